"""Small whole files that fuzzing starts from: python -m tests.fuzz.seeds FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from pygen.files.stored_tensor import DTYPES
from pygen.testing.gguf_writer import write_gguf

FIELDS = {
    "llama.block_count": 1,
    "llama.rope.freq_base": 10000.0,
    "llama.signed": [-1, -2],
    "tokenizer.ggml.tokens": ["a", "b", "\u2581"],
    "tokenizer.ggml.add_bos_token": True,
    "general.flags": [True, False],
    "general.many": [False] * 1100,
}


def write_seeds(folder: Path) -> list[Path]:
    """Every dtype and type, text beyond ASCII, no tensors at all, tensors without elements."""
    folder.mkdir(parents=True, exist_ok=True)
    dtypes = {name: torch.zeros(2, 3, dtype=dtype) for name, dtype in DTYPES.items()}
    save_file(dtypes | {"\u00e9": torch.ones(0, 4), "scalar": torch.tensor(1.0)}, folder / "dtypes.safetensors")
    save_file({"a.weight": torch.ones(3)}, folder / "one.safetensors", {"format": "pt", "quoted": '"\\\n\u2581'})
    save_file({}, folder / "none.safetensors")
    spaced = json.dumps({"x": {"shape": [], "dtype": "U8", "data_offsets": [0, 1]}}, indent=1).encode()
    (folder / "spaced.safetensors").write_bytes(len(spaced).to_bytes(8, "little") + spaced + b"\1")
    tensors = {"token_embd.weight": torch.ones(2, 64), "blk.0.attn_norm.weight": torch.ones(3)}
    for type in ("F32", "F16", "BF16", "Q8_0", "Q4_0"):
        write_gguf(folder / f"{type}.gguf", "llama", FIELDS, tensors, type)
    write_gguf(folder / "none.gguf", "llama", {}, {})
    return sorted(folder.iterdir())


if __name__ == "__main__":
    write_seeds(Path(sys.argv[1]))
