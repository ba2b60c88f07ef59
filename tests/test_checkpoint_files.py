"""Checkpoints of language models: what the libraries write is read back whole, and what is malformed is refused in one
line, whatever its bytes say, in little memory."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pygen.autoregressive import gguf
from pygen.autoregressive.checkpoint_files import CheckpointError, CheckpointFiles, open_checkpoint
from pygen.files.safetensors import MAX_JSON
from pygen.files.stored_tensor import DTYPES
from pygen.models import checkpoint
from pygen.testing.gguf_writer import quantise, write_gguf, write_llama_gguf
from tests.emulation_build import run
from tests.fuzz.seeds import write_seeds

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
}


def tensors_of_a_llama() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: tensor.detach() for name, tensor in LlamaForCausalLM(LlamaConfig(**CONFIG)).state_dict().items()}


def write_directory(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / "model.safetensors")
    return folder


def same(files: CheckpointFiles, tensors: dict[str, torch.Tensor]) -> None:
    assert sorted(files.names) == sorted(tensors)
    for name, tensor in tensors.items():
        read = files.read(name)
        assert read.dtype == files.dtype(name) == tensor.dtype
        assert tuple(read.shape) == files.shape(name) == tuple(tensor.shape)
        assert torch.equal(read.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


# --- What is well formed ---------------------------------------------------------------------------------------------


def test_every_dtype_of_safetensors_is_read_as_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, (3, 5 * dtype.itemsize)).to(torch.uint8).view(dtype) for name, dtype in DTYPES.items()
    }
    tensors |= {"empty": torch.ones(0, 4), '\u00e9 "quoted"\n': torch.ones(2, 1, 3)}
    files = open_checkpoint(write_directory(tmp_path / "model", tensors))
    assert files.config == CONFIG
    assert (files.generation_config, files.tokenizer) == ({}, None)
    flat = {name: tensor for name, tensor in tensors.items() if tensor.dim() > 0 and tensor.numel()}
    for name, tensor in flat.items():
        assert torch.equal(files.read(name).view(torch.uint8), tensor.view(torch.uint8))
    assert files.shape("empty") == tuple(files.read("empty").shape) == (0, 4)
    assert files.read("F64", torch.bfloat16).dtype == torch.bfloat16


def test_scalars_and_dtypes_that_are_asked_for(tmp_path: Path) -> None:
    value = torch.tensor(1.0 + 2**-12)
    files = open_checkpoint(write_directory(tmp_path, {"scalar": value}))
    assert files.shape("scalar") == ()
    assert torch.equal(files.read("scalar"), value)
    assert files.read("scalar", torch.float16).item() == 1.0


@pytest.mark.parametrize("shard", ["40KB", "5GB"])
def test_what_transformers_saves_is_read(tmp_path: Path, shard: str) -> None:
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "40KB")
    files = open_checkpoint(tmp_path)
    same(files, model.state_dict())
    assert files.tokenizer == tmp_path / "tokenizer.json"
    assert files.generation_config["eos_token_id"] == 2
    assert files.config["num_key_value_heads"] == 2


def test_reading_is_a_view_of_the_file_and_never_writes_it(tmp_path: Path) -> None:
    folder = write_directory(tmp_path, {"a": torch.arange(4096.0), "b": torch.ones(3, dtype=torch.float16)})
    before = (folder / "model.safetensors").read_bytes()
    files = open_checkpoint(folder)
    first, second = files.read("a"), files.read("a")
    assert first.data_ptr() == second.data_ptr()
    first[0] = 7.0
    assert second[0] == 7.0
    files.release("a")
    del files
    assert torch.equal(second, torch.arange(4096.0))  # from the disk again
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_tensor_off_its_alignment_is_copied(tmp_path: Path) -> None:
    folder = write_directory(tmp_path, {"a": torch.ones(1)})
    entries = {"a": ("U8", 1, 0, 1), "b": ("F32", 2, 1, 9)}
    data = bytes([9]) + struct.pack("<2f", 1.5, -2.5)
    (folder / "model.safetensors").write_bytes(safetensors_file(json_of(entries), data))
    assert open_checkpoint(folder).read("b").tolist() == [1.5, -2.5]


def test_a_link_leads_where_the_download_cache_has_the_file(tmp_path: Path) -> None:
    folder = write_directory(tmp_path / "model", {"a": torch.ones(2)})
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    same(open_checkpoint(folder), {"a": torch.ones(2)})


def test_a_large_checkpoint_is_read_in_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """Conversion lets the file's pages go: the peak grows by what is built and one tensor, not by the file."""
    write_gguf(tmp_path / "m.gguf", "llama", minimal_metadata(), big_tensors(), "F32")
    script = f"""
import resource, torch
from pygen.autoregressive.checkpoint_files import open_checkpoint
files = open_checkpoint({str(tmp_path / "m.gguf")!r})
files.read("model.norm.weight", torch.bfloat16)
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in files.names:
    files.read(name, torch.bfloat16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""
    grown = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert grown < 30 * 1024  # KiB; the file has 64 MiB, a tensor 8 MiB, its bfloat16 4 MiB


def big_tensors() -> dict[str, torch.Tensor]:
    names = ["token_embd.weight", *(f"blk.0.{part}.weight" for part in ("attn_v", "ffn_gate", "ffn_up", "ffn_down"))]
    names += ["output.weight", "blk.0.attn_output.weight", "blk.0.attn_v.bias"]
    return {name: torch.ones(8, 1 << 18) for name in names} | {"output_norm.weight": torch.ones(64)}


# --- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_a_llama_through_gguf(tmp_path: Path, type: Any) -> None:
    tensors = tensors_of_a_llama()
    write_llama_gguf(tmp_path / "m.gguf", CONFIG, tensors, type)
    files = open_checkpoint(tmp_path)
    assert files.path == tmp_path / "m.gguf"
    assert {key: files.config[key] for key in CONFIG} == CONFIG
    assert files.config["tie_word_embeddings"] is False
    assert files.generation_config == {"bos_token_id": 1, "eos_token_id": 2}
    assert sorted(files.names) == sorted(tensors)
    for name, tensor in tensors.items():
        matrix = tensor.dim() == 2
        assert files.dtype(name) == (
            {"Q8_0": "Q8_0", "Q4_0": "Q4_0"}.get(type, DTYPES.get(type)) if matrix else torch.float32
        )
        assert files.shape(name) == tuple(tensor.shape)
        if type in DTYPES:
            assert torch.equal(
                files.read(name, torch.float32), tensor.to(DTYPES[type] if matrix else tensor.dtype).float()
            )
        elif matrix:
            blocks = tensor.view(-1, 32)
            steps = blocks.abs().amax(1, keepdim=True) / (127 if type == "Q8_0" else 8)
            error = (files.read(name).view(-1, 32) - blocks).abs()
            # Half a step, and the largest of Q4_0's other sign a whole one; the scale is a float16.
            assert (error <= steps * (0.5 if type == "Q8_0" else 1.0) + blocks.abs() * 2**-10).all()
            assert torch.equal(files.read(name, torch.bfloat16), files.read(name).bfloat16())


def test_quantised_blocks_are_ggmls() -> None:
    """Worked by hand from the formulas of ggml-quants.c: halves go away from zero, the sign of Q4_0's scale is that of
    its first largest element turned, codes of opposite halves share a byte."""
    x = torch.zeros(2, 32)
    x[0, :5] = torch.tensor([127.0, 0.5, -0.5, 1.5, -126.5])
    eight = quantise(x, "Q8_0")
    assert eight.shape == (2, 34)
    assert eight[0, :2].view(torch.float16).item() == 1.0
    assert eight[0, 2:7].view(torch.int8).tolist() == [127, 1, -1, 2, -127]
    assert not eight[1].any()  # zeros have the scale 0
    x[0, :3], x[0, 16:19] = torch.tensor([8.0, -8.0, 1.0]), torch.tensor([-1.0, 0.4, 0.6])
    x[0, 3:5] = 0.0
    four = quantise(x, "Q4_0")
    assert four[0, :2].view(torch.float16).item() == -1.0
    codes = [0, 15, 7] + [8] * 13
    upper = [9, 8, 7] + [8] * 13
    assert four[0, 2:].tolist() == [low | high << 4 for low, high in zip(codes, upper, strict=True)]
    with pytest.raises(ValueError, match="no finite scale in Q4_0"):
        quantise(torch.full((32,), 1e9), "Q4_0")


def minimal_metadata(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    fields = {
        "context_length": 128,
        "block_count": 1,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    return {f"{architecture}.{key}": value for key, value in (fields | changes).items() if value is not None}


def open_gguf(folder: Path, architecture: str, tensors: dict[str, torch.Tensor], **changes: Any) -> CheckpointFiles:
    metadata = minimal_metadata(architecture, **{key.replace("__", "."): value for key, value in changes.items()})
    write_gguf(folder / "m.gguf", architecture, metadata, {"token_embd.weight": torch.ones(10, 64)} | tensors)
    return open_checkpoint(folder / "m.gguf")


def test_mixtral_and_qwen3_moe_get_their_experts_one_by_one(tmp_path: Path) -> None:
    experts = {f"blk.0.ffn_{part}_exps.weight": torch.randn(3, 4, 8) for part in ("gate", "up", "down")}
    counts = {"expert_count": 3, "expert_used_count": 2}
    files = open_gguf(tmp_path, "llama", experts | {"blk.0.ffn_gate_inp.weight": torch.ones(3, 64)}, **counts)
    assert (files.config["model_type"], files.config["num_local_experts"]) == ("mixtral", 3)
    for part, name in {"gate": "w1", "up": "w3", "down": "w2"}.items():
        for expert in range(3):
            read = files.read(f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight")
            assert torch.equal(read, experts[f"blk.0.ffn_{part}_exps.weight"][expert])
    assert files.shape("model.layers.0.block_sparse_moe.gate.weight") == (3, 64)
    files = open_gguf(tmp_path, "qwen3moe", experts, expert_feed_forward_length=4, **counts)
    assert (files.config["model_type"], files.config["num_experts_per_tok"]) == ("qwen3_moe", 2)
    read = files.read("model.layers.0.mlp.experts.2.up_proj.weight")
    assert torch.equal(read, experts["blk.0.ffn_up_exps.weight"][2])


def test_what_conversion_changes_is_undone(tmp_path: Path) -> None:
    """The orders are those of llama.cpp's conversion scripts, written out here element by element."""
    w = torch.randn(64, 5)
    halves = torch.stack([w[h * 16 + half * 8 + i] for h in range(4) for i in range(8) for half in range(2)])
    files = open_gguf(tmp_path, "llama", {"blk.0.attn_q.weight": halves, "blk.0.attn_q.bias": halves[:, 0].clone()})
    assert torch.equal(files.read("model.layers.0.self_attn.q_proj.weight"), w)
    assert torch.equal(files.read("model.layers.0.self_attn.q_proj.bias"), w[:, 0])
    assert files.config["attention_bias"] is True

    qkv = torch.randn(192, 5)
    stacked = torch.stack([qkv[(h * 3 + part) * 16 + i] for part in range(3) for h in range(4) for i in range(16)])
    neox = {"attention.layer_norm_rms_epsilon": None, "attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 4}
    files = open_gguf(tmp_path, "gptneox", {"blk.0.attn_qkv.weight": stacked}, **neox)
    assert torch.equal(files.read("gpt_neox.layers.0.attention.query_key_value.weight"), qkv)
    assert (files.config["rotary_pct"], files.config["layer_norm_eps"]) == (0.25, 1e-5)

    del neox["rope.dimension_count"]
    files = open_gguf(tmp_path, "gpt2", {"blk.0.ffn_up.weight": w, "blk.0.ffn_up.bias": w[:, 0].clone()}, **neox)
    assert torch.equal(files.read("transformer.h.0.mlp.c_fc.weight"), w.t())
    assert files.shape("transformer.h.0.mlp.c_fc.weight") == (5, 64)
    assert (files.config["n_embd"], files.config["tie_word_embeddings"]) == (64, True)

    files = open_gguf(tmp_path, "gemma2", {"blk.0.attn_norm.weight": torch.tensor([1.5, 0.5])})
    assert files.read("model.layers.0.input_layernorm.weight").tolist() == [0.5, -0.5]


def test_gemmas_layers_and_scale(tmp_path: Path) -> None:
    window = {"attention.sliding_window": 16}
    files = open_gguf(tmp_path, "gemma2", {}, block_count=3, final_logit_softcapping=30.0, **window)
    local, full = "sliding_attention", "full_attention"
    assert files.config["layer_types"] == [local, full, local]
    assert (files.config["final_logit_softcapping"], files.config["query_pre_attn_scalar"]) == (30.0, 16)
    files = open_gguf(tmp_path, "gemma3", {}, block_count=7, **window)
    assert files.config["layer_types"] == [local] * 5 + [full, local]
    assert (files.config["rope_theta"], files.config["rope_local_base_freq"]) == (1e6, 1e4)
    files = open_gguf(tmp_path, "gemma3", {}, block_count=62, **{"attention.key_length": 32} | window)
    assert (files.config["query_pre_attn_scalar"], files.config["head_dim"]) == (16, 32)


def test_scaled_frequencies(tmp_path: Path) -> None:
    factors = torch.linspace(1, 8, 8)
    files = open_gguf(tmp_path, "llama", {"rope_freqs.weight": factors})
    scaling = files.config["rope_scaling"]
    assert (scaling["rope_type"], scaling["attention_factor"]) == ("longrope", 1.0)
    assert torch.equal(torch.tensor(scaling["short_factor"]), factors)
    assert "rope_freqs.weight" not in files.names
    both = {"rope_factors_long.weight": factors, "rope_factors_short.weight": factors / 2}
    files = open_gguf(tmp_path, "phi3", both, **{"rope.scaling.original_context_length": 32})
    assert files.config["rope_scaling"]["short_factor"][0] == 0.5
    assert files.config["original_max_position_embeddings"] == 32
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 32.0}
    files = open_gguf(tmp_path, "qwen2", {}, **{f"rope.scaling.{key}": value for key, value in yarn.items()})
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0}
    assert files.config["rope_scaling"] == expected
    with pytest.raises(CheckpointError, match=r"rope_freqs.*8 elements"):
        open_gguf(tmp_path, "llama", {"rope_freqs.weight": torch.ones(7)})


def test_version_2_is_read(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "m.gguf", CONFIG, tensors_of_a_llama())
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    data[4] = 2
    (tmp_path / "m.gguf").write_bytes(data)
    assert torch.equal(open_checkpoint(tmp_path).read("lm_head.weight"), tensors_of_a_llama()["lm_head.weight"])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"tensors": {"token_embd.weight": torch.ones(4, 33)}, "type": "Q8_0"}, "33"),
        ({"metadata": {"a": []}}, "empty"),
        ({"metadata": {"a": [1, "x"]}}, "several types"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    arguments: dict[str, Any] = {"metadata": {}, "tensors": {}} | change
    with pytest.raises(ValueError, match=word):
        write_gguf(tmp_path / "m.gguf", "llama", **arguments)
    assert not list(tmp_path.iterdir())


# --- What is malformed -----------------------------------------------------------------------------------------------


def refuses(path: Path, *words: str) -> str:
    """open_checkpoint fails with one line that begins with a path, and has the words; in little memory."""
    tracemalloc.start()
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before < 64 << 10  # KiB
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 1000
    assert line.startswith(str(path))
    for word in words:
        assert word in line
    return line


def safetensors_file(header: str | bytes, data: bytes = b"") -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header)) + header + data


def json_of(entries: dict[str, tuple[str, Any, int, int]]) -> str:
    """Names to dtype, size, begin and end."""
    return json.dumps(
        {
            name: {"dtype": dtype, "shape": size if isinstance(size, list) else [size], "data_offsets": [begin, end]}
            for name, (dtype, size, begin, end) in entries.items()
        }
    )


ONE = '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
FOUR = b"1234"
MANY_FIELDS = dict.fromkeys(map(str, range(20_000)), "")
BAD_SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "empty"),
    "seven bytes": (b"1234567", "truncated"),
    "no header": (struct.pack("<Q", 0), "expected '{'"),
    "header size beyond the file": (struct.pack("<Q", 100) + b"{}", "truncated"),
    "huge header size": (struct.pack("<Q", 2**63) + b"{}", "header of 9223372036854775808"),
    "negative header size": (struct.pack("<q", -1) + b"{}", "header"),
    "header size above the limit": (struct.pack("<Q", 100_000_001) + b"{}", "100000001"),
    "header is a list": (safetensors_file("[]"), "expected '{'"),
    "header is a number": (safetensors_file("12"), "expected '{'"),
    "header does not end": (safetensors_file(ONE[:-1], FOUR), "expected '}'"),
    "string does not end": (safetensors_file('{"a'), "does not end"),
    "text after the header": (safetensors_file(ONE + "x", FOUR), "after its end"),
    "second object": (safetensors_file(ONE + ONE, FOUR), "after its end"),
    "comma too many": (safetensors_file(ONE[:-1] + ",}", FOUR), "expected"),
    "nested lists": (safetensors_file('{"a":' + "[" * 100_000), "expected '{'"),
    "nested objects": (safetensors_file('{"a":' * 100_000), "unknown field 'a'"),
    "nested shape": (safetensors_file('{"a":{"shape":' + "[" * 100_000), "must be a count"),
    "name not UTF-8": (safetensors_file(b'{"\xff\xfe":1}'), "not UTF-8"),
    "name overlong UTF-8": (safetensors_file(b'{"\xc0\xaf":1}'), "not UTF-8"),
    "name half a surrogate": (safetensors_file('{"\\ud800":1}'), "not UTF-8"),
    "surrogates swapped": (safetensors_file('{"\\ud800\\u0041":1}'), "surrogate"),
    "bad escape": (safetensors_file('{"\\x":1}'), "bad escape"),
    "bad unicode escape": (safetensors_file('{"\\u12g4":1}'), "u escape"),
    "control character": (safetensors_file('{"a\nb":1}'), "control character"),
    "empty name": (safetensors_file('{"":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "name of 0 bytes"),
    "long name": (safetensors_file(json_of({"n" * 2000: ("U8", 0, 0, 0)})), "name of 2000 bytes"),
    "entry is a list": (safetensors_file('{"a":[]}'), "expected '{'"),
    "no dtype": (safetensors_file('{"a":{"shape":[4],"data_offsets":[0,4]}}', FOUR), "lacks dtype"),
    "no shape": (safetensors_file('{"a":{"dtype":"U8","data_offsets":[0,4]}}', FOUR), "lacks shape"),
    "no offsets": (safetensors_file('{"a":{"dtype":"U8","shape":[4]}}', FOUR), "lacks data_offsets"),
    "unknown field": (safetensors_file(ONE.replace('"dtype"', '"stride":[1],"dtype"'), FOUR), "'stride'"),
    "field twice": (safetensors_file(ONE.replace('"dtype"', '"shape":[4],"dtype"'), FOUR), "'shape' twice"),
    "dtype unknown": (safetensors_file(json_of({"a": ("Q99", 4, 0, 4)}), FOUR), "'Q99'"),
    "dtype of four bits": (safetensors_file(json_of({"a": ("F4", 8, 0, 4)}), FOUR), "'F4'"),
    "dtype a number": (safetensors_file(ONE.replace('"U8"', "8"), FOUR), "expected '\"'"),
    "dtype of another size": (safetensors_file(ONE.replace("U8", "F32"), FOUR), "takes 16 bytes"),
    "negative dimension": (safetensors_file(json_of({"a": ("U8", -4, 0, 4)}), FOUR), "must be a count"),
    "fractional dimension": (safetensors_file(ONE.replace("[4]", "[4.0]"), FOUR), "must be a count"),
    "exponent": (safetensors_file(ONE.replace("[4]", "[4e0]"), FOUR), "must be a count"),
    "leading zero": (safetensors_file(ONE.replace("[4]", "[04]"), FOUR), "must be a count"),
    "dimension of many digits": (safetensors_file(ONE.replace("[4]", "[" + "9" * 5000 + "]"), FOUR), "too large"),
    "dimension above 63 bits": (safetensors_file(json_of({"a": ("U8", 2**63, 0, 4)}), FOUR), "too large"),
    "product overflows": (safetensors_file(json_of({"a": ("U8", [2**32, 2**32], 0, 4)}), FOUR), "overflows"),
    "product overflows to the size": (safetensors_file(json_of({"a": ("U8", [2**62, 4, 4], 0, 0)})), "overflows"),
    "bytes overflow": (safetensors_file(json_of({"a": ("F64", 2**62, 0, 4)}), FOUR), "overflows"),
    "many dimensions": (safetensors_file(json_of({"a": ("U8", [1] * 100_000, 0, 1)}), b"1"), "more than 8"),
    "one offset": (safetensors_file(ONE.replace("[0,4]", "[4]"), FOUR), "two data_offsets"),
    "three offsets": (safetensors_file(ONE.replace("[0,4]", "[0,4,8]"), FOUR), "two data_offsets"),
    "negative offset": (safetensors_file(json_of({"a": ("U8", 4, -4, 0)}), FOUR), "must be a count"),
    "offsets swapped": (safetensors_file(json_of({"a": ("U8", 4, 4, 0)}), FOUR), "4 to 0"),
    "size is not the shape's": (safetensors_file(json_of({"a": ("U8", 3, 0, 4)}), FOUR), "takes 3 bytes"),
    "data missing": (safetensors_file(ONE), "truncated"),
    "data truncated": (safetensors_file(ONE, FOUR[:3]), "truncated"),
    "data left over": (safetensors_file(ONE, FOUR + b"5"), "1 bytes after"),
    "data without tensors": (safetensors_file("{}", FOUR), "4 bytes after"),
    "overlap": (safetensors_file(json_of({"a": ("U8", 4, 0, 4), "b": ("U8", 2, 2, 4)}), FOUR), "overlaps"),
    "the same bytes": (safetensors_file(json_of({"a": ("U8", 4, 0, 4), "b": ("U8", 4, 0, 4)}), FOUR), "overlaps"),
    "gap": (safetensors_file(json_of({"a": ("U8", 1, 0, 1), "b": ("U8", 2, 2, 4)}), FOUR), "gap"),
    "gap at the start": (safetensors_file(json_of({"a": ("U8", 3, 1, 4)}), FOUR), "gap"),
    "name twice": (safetensors_file("{" + ONE[1:-1] + "," + ONE[1:-1] + "}", FOUR), "'a' is there twice"),
    "metadata twice": (safetensors_file('{"__metadata__":{},"__metadata__":{}}'), "twice"),
    "metadata not text": (safetensors_file('{"__metadata__":{"a":1}}'), "expected"),
    "metadata key twice": (safetensors_file('{"__metadata__":{"a":"","a":""}}'), "'a' is there twice"),
    "metadata without end": (safetensors_file(json.dumps({"__metadata__": MANY_FIELDS})), "more than 16384"),
    "a pickle": (b"\x80\x02}q\x00." * 4, "header"),
}


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_malformed_safetensors(tmp_path: Path, case: str) -> None:
    data, word = BAD_SAFETENSORS[case]
    write_directory(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(data)
    refuses(tmp_path, "model.safetensors", word)


def test_truncated_safetensors_everywhere(tmp_path: Path) -> None:
    data = (write_directory(tmp_path, tensors_of_a_llama()) / "model.safetensors").read_bytes()
    cuts = {*range(0, 64), *range(64, len(data), 4001), len(data) - 1}
    for cut in sorted(cuts):
        os.truncate(tmp_path / "model.safetensors", 0)
        (tmp_path / "model.safetensors").write_bytes(data[:cut])
        refuses(tmp_path, "model.safetensors")


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def gguf_file(
    fields: list[bytes],
    tensors: list[bytes] = [],  # noqa: B006
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    field_count: int | None = None,
) -> bytes:
    counts = len(tensors) if tensor_count is None else tensor_count, len(fields) if field_count is None else field_count
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(fields) + b"".join(tensors)
    return header.ljust(-(-len(header) // 32) * 32, b"\0") + data


def gguf_tensor(
    name: str | bytes = "t", shape: Any = (8,), type: int = 0, offset: int = 0, dims: int | None = None
) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape) if dims is None else dims, *shape)
    return string(name) + sizes + struct.pack("<IQ", type, offset)


def u32(key: str, value: int) -> bytes:
    return string(key) + struct.pack("<II", 4, value)


def array(key: str, type: int, count: int, items: bytes = b"") -> bytes:
    return string(key) + struct.pack("<IIQ", 9, type, count) + items


BAD_GGUF: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "empty"),
    "magic": (gguf_file([], magic=b"GGML"), "must begin with 'GGUF'"),
    "only magic": (b"GGUF", "truncated"),
    "version 1": (gguf_file([], version=1), "version 1"),
    "version 4": (gguf_file([], version=4), "version 4"),
    "big-endian": (gguf_file([], version=3 << 24), "big-endian"),
    "tensor count": (gguf_file([], tensor_count=2**62), "tensors"),
    "negative tensor count": (gguf_file([], tensor_count=2**64 - 1), "tensors"),
    "tensor count one too large": (gguf_file([], [gguf_tensor()], b"\0" * 32, tensor_count=2), "name is empty"),
    "field count": (gguf_file([], field_count=2**63), "fields"),
    "field count too large": (gguf_file([u32("a", 1)], field_count=2), "a key is empty"),
    "field count too small": (gguf_file([u32("a", 1), u32("b" * 99, 1)], field_count=1), "after the last tensor"),
    "many fields": (gguf_file([], data=b"\1" * 400_000, field_count=20_000), "20000 fields"),
    "empty key": (gguf_file([u32("", 1)]), "key is empty"),
    "key too long": (gguf_file([u32("k" * 2000, 1)]), "2000 bytes"),
    "key length negative": (gguf_file([struct.pack("<q", -1) + b"x" * 20]), "18446744073709551615"),
    "key not UTF-8": (gguf_file([string(b"\xff\xff") + struct.pack("<II", 4, 1)]), "not UTF-8"),
    "key twice": (gguf_file([u32("a", 1), u32("a", 2)]), "'a' is there twice"),
    "key twice, once an array": (gguf_file([u32("a", 1), array("a", 8, 1, string("x"))]), "'a' is there twice"),
    "value type": (gguf_file([string("a") + struct.pack("<II", 13, 1)]), "unknown type 13"),
    "value type huge": (gguf_file([string("a") + struct.pack("<II", 2**32 - 1, 1)]), "unknown type"),
    "boolean of 2": (gguf_file([string("a") + struct.pack("<IB", 7, 2)]), "neither true nor false"),
    "string longer than the file": (gguf_file([string("a") + struct.pack("<IQ", 8, 1000)]), "truncated"),
    "string above the limit": (gguf_file([string("a") + struct.pack("<IQ", 8, 2**40)]), "at most"),
    "string not UTF-8": (gguf_file([string("a") + struct.pack("<I", 8) + string(b"\x80")]), "not UTF-8"),
    "array count": (gguf_file([array("a", 4, 2**61)]), "2305843009213693952 elements"),
    "array count of bytes": (gguf_file([array("a", 0, 2**63)]), "elements"),
    "array of strings count": (gguf_file([array("a", 8, 2**60)]), "elements"),
    "array of strings truncated": (gguf_file([array("a", 8, 2, string("x") + struct.pack("<Q", 99))]), "truncated"),
    "array of arrays": (gguf_file([array("a", 9, 1, struct.pack("<IQ", 9, 1) * 1000)]), "array of arrays"),
    "array element type": (gguf_file([array("a", 77, 1, b"1234")]), "unknown type 77"),
    "array of booleans": (gguf_file([array("a", 7, 2, b"\0\5")]), "neither true nor false"),
    "alignment 0": (gguf_file([u32("general.alignment", 0)]), "power of two"),
    "alignment 24": (gguf_file([u32("general.alignment", 24)]), "got 24"),
    "alignment huge": (gguf_file([u32("general.alignment", 2**31)]), "got 2147483648"),
    "alignment text": (gguf_file([string("general.alignment") + struct.pack("<I", 8) + string("32")]), "power of two"),
    "alignment signed": (gguf_file([string("general.alignment") + struct.pack("<Ii", 5, -32)]), "power of two"),
    "name empty": (gguf_file([], [gguf_tensor("")]), "name is empty"),
    "name too long": (gguf_file([], [gguf_tensor("n" * 2000)]), "2000 bytes"),
    "name not UTF-8": (gguf_file([], [gguf_tensor(b"\xed\xa0\x80")]), "not UTF-8"),
    "name twice": (gguf_file([], [gguf_tensor(), gguf_tensor(offset=32)], b"1" * 64), "'t' is there twice"),
    "five dimensions": (gguf_file([], [gguf_tensor(shape=(1,) * 5)]), "5 dimensions"),
    "dimensions huge": (gguf_file([], [gguf_tensor(dims=2**32 - 1)]), "4294967295 dimensions"),
    "negative dimension": (gguf_file([], [gguf_tensor(shape=(2**64 - 1,))]), "negative or 0"),
    "dimension 0": (gguf_file([], [gguf_tensor(shape=(0, 4))]), "negative or 0"),
    "product overflows": (gguf_file([], [gguf_tensor(shape=(2**40, 2**40))]), "overflows"),
    "product overflows to little": (gguf_file([], [gguf_tensor(shape=(2**62, 2, 2, 2))], b"1" * 32), "overflows"),
    "bytes overflow": (gguf_file([], [gguf_tensor(shape=(2**62,))]), "overflows"),
    "type unknown": (gguf_file([], [gguf_tensor(type=999)]), "unknown type 999"),
    "type Q4_K": (gguf_file([], [gguf_tensor(shape=(256,), type=12)], b"1" * 160), "Q4_K"),
    "type F64": (gguf_file([], [gguf_tensor(type=28)], b"1" * 64), "F64"),
    "rows that are no blocks": (gguf_file([], [gguf_tensor(shape=(48,), type=8)], b"1" * 64), "blocks of 32"),
    "offset huge": (gguf_file([], [gguf_tensor(offset=2**64 - 16)], b"1" * 32), "overflows"),
    "offset not aligned": (gguf_file([], [gguf_tensor(offset=4)], b"1" * 64), "begins at 4"),
    "offset behind the file": (gguf_file([], [gguf_tensor(offset=2**40)], b"1" * 32), "begins at"),
    "overlap": (gguf_file([], [gguf_tensor("a", (16,)), gguf_tensor("b", offset=32)], b"1" * 96), "overlaps"),
    "gap": (gguf_file([], [gguf_tensor("a"), gguf_tensor("b", offset=64)], b"1" * 96), "begins at 64"),
    "data missing": (gguf_file([], [gguf_tensor()]), "truncated"),
    "data truncated": (gguf_file([], [gguf_tensor()], b"1" * 31), "truncated"),
    "data left over": (gguf_file([], [gguf_tensor()], b"1" * 96), "64 bytes after"),
    "no architecture": (gguf_file([]), "missing field 'general.architecture'"),
    "architecture a number": (gguf_file([u32("general.architecture", 1)]), "must be a string"),
}


@pytest.mark.parametrize("case", BAD_GGUF)
def test_malformed_gguf(tmp_path: Path, case: str) -> None:
    data, word = BAD_GGUF[case]
    (tmp_path / "m.gguf").write_bytes(data)
    refuses(tmp_path / "m.gguf", word)


def test_truncated_gguf_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_llama_gguf(file, CONFIG, tensors_of_a_llama(), "Q8_0")
    data = file.read_bytes()
    for cut in sorted({*range(0, 64), *range(64, len(data) - 32, 2003)}):
        file.write_bytes(data[:cut])
        refuses(file)


def test_a_sparse_file_of_many_gigabytes_costs_no_memory(tmp_path: Path) -> None:
    """The size of a file bounds what its header may claim, not what is allocated for it."""
    file = tmp_path / "m.gguf"
    for fields in ([array("a", 8, 2**31)], [array("a", 0, 2**33)], [string("a") + struct.pack("<IQ", 8, 2**33)]):
        file.write_bytes(gguf_file(fields, field_count=1))
        os.truncate(file, 1 << 36)
        refuses(file)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"architecture": "mamba"}, "'mamba'"),
        ({"block_count": None}, "missing field 'llama.block_count'"),
        ({"block_count": 0}, "llama.block_count"),
        ({"block_count": -1}, "llama.block_count"),
        ({"block_count": 10**9}, "llama.block_count"),
        ({"block_count": "2"}, "llama.block_count"),
        ({"block_count": True}, "llama.block_count"),
        ({"attention.head_count": [4, 2]}, "llama.attention.head_count"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "rms_epsilon"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, "rms_epsilon"),
        ({"rope.dimension_count": 8}, "rope.dimension_count"),
        ({"rope.scaling.type": "dynamic"}, "'dynamic'"),
        ({"attention.clamp_kqv": 8.0}, "unknown field 'llama.attention.clamp_kqv'"),
        ({"attention.value_length": 8}, "value_length"),
        ({"attention.causal": False}, "causal"),
        ({"vocab_size": 11}, "vocab_size"),
        ({"expert_count": 10**6}, "expert_count"),
        ({"tensors": {"blk.1.attn_v.weight": torch.ones(2, 2)}}, "unknown tensor 'blk.1.attn_v.weight'"),
        ({"tensors": {"blk.0.ssm_a.weight": torch.ones(2, 2)}}, "unknown tensor"),
        ({"tensors": {"blk.00.attn_v.weight": torch.ones(2, 2)}}, "unknown tensor"),
        ({"tensors": {"blk.0.attn_q.weight": torch.ones(12, 2)}}, "rows for 4 heads"),
        ({"tensors": {"blk.0.ffn_up_exps.weight": torch.ones(2, 2, 2)}}, "0 experts"),
        ({"tensors": {"token_embd.weight": torch.ones(64)}}, "token_embd.weight"),
        ({"split.count": 3}, "split.count"),
        ({"general.type": "adapter"}, "general.type"),
    ],
)
def test_gguf_whose_meaning_is_not_known(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    architecture = changes.pop("architecture", "llama")
    tensors = {"token_embd.weight": torch.ones(10, 64)} | changes.pop("tensors", {})
    whole = {key: changes.pop(key) for key in ("split.count", "general.type") if key in changes}
    write_gguf(tmp_path / "m.gguf", architecture, minimal_metadata(architecture, **changes) | whole, tensors)
    refuses(tmp_path / "m.gguf", word)


def test_every_architecture_opens(tmp_path: Path) -> None:
    norm = {"attention.layer_norm_epsilon": 1e-5, "expert_count": 4, "expert_used_count": 2}
    norm["expert_feed_forward_length"] = 8
    for architecture in gguf.ARCHITECTURES:
        wanted = {"gpt2": ("attention.layer_norm_epsilon",), "gptneox": ("attention.layer_norm_epsilon",)}
        wanted["qwen3moe"] = ("expert_count", "expert_used_count", "expert_feed_forward_length")
        changes = {key: norm[key] for key in wanted.get(architecture, ())}
        if "attention.layer_norm_epsilon" in changes:
            changes["attention.layer_norm_rms_epsilon"] = None
        files = open_gguf(tmp_path, architecture, {}, **changes)
        assert files.config["vocab_size"] == 10
        assert files.config["model_type"]


# --- Directories -----------------------------------------------------------------------------------------------------


def sharded(folder: Path) -> Path:
    """Two shards and their index."""
    write_directory(folder, {})
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(3)}, folder / "two.safetensors")
    index(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    return folder


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(tmp_path: Path) -> None:
    same(open_checkpoint(sharded(tmp_path)), {"a": torch.ones(2), "b": torch.ones(3)})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: index(d, {"a": "../one.safetensors"}), ["'a'", "name in this directory"]),
        (lambda d: index(d, {"a": str(d / "one.safetensors")}), ["name in this directory"]),
        (lambda d: index(d, {"a": "/etc/passwd"}), ["name in this directory"]),
        (lambda d: index(d, {"a": ".."}), ["name in this directory"]),
        (lambda d: index(d, {"a": "one.bin"}), ["name in this directory"]),
        (lambda d: index(d, {"a": 3}), ["name in this directory"]),
        (lambda d: index(d, {"a": "x" * 5000 + ".safetensors"}), ["'a'", "name in this directory"]),
        (lambda d: index(d, []), ["weight_map"]),
        (lambda d: index(d, None), ["weight_map"]),
        (lambda d: index(d, {"a": "one.safetensors"} | {"c": "two.safetensors"}), ["unknown tensor 'b'"]),
        (lambda d: index(d, dict.fromkeys("ab", "one.safetensors")), ["missing tensor 'b'"]),
        (lambda d: index(d, {"a": "two.safetensors", "b": "one.safetensors"}), ["unknown tensor"]),
        (lambda d: (d / "two.safetensors").unlink(), ["two.safetensors", "No such file"]),
        (
            lambda d: os.truncate(d / "two.safetensors", (d / "two.safetensors").stat().st_size - 1),
            ["two.safetensors", "truncated"],
        ),
        (lambda d: (d / "model.safetensors.index.json").write_text("{"), ["index.json", "not JSON"]),
        (lambda d: (d / "model.safetensors.index.json").write_text("[" * 10**6), ["index.json", "not JSON"]),
        (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map":{"a":"x","a":"y"}}'), ["twice"]),
        (lambda d: os.truncate(d / "config.json", MAX_JSON + 1), ["config.json", "more than"]),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), ["config.json", "not JSON"]),
        (lambda d: (d / "config.json").write_text("3"), ["config.json", "JSON object"]),
        (lambda d: (d / "config.json").write_text("1" * 5000), ["config.json", "not JSON"]),
        (lambda d: (d / "config.json").unlink(), ["config.json", "No such file"]),
        (lambda d: (d / "generation_config.json").write_text("[]"), ["generation_config.json", "JSON object"]),
    ],
)
def test_damaged_directories(tmp_path: Path, damage: Callable[[Path], Any], words: list[str]) -> None:
    damage(sharded(tmp_path))
    refuses(tmp_path, *words)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", "No such file")
    refuses(tmp_path, "neither model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    refuses(tmp_path, "pytorch_model.bin", "pickle", "save_pretrained")
    refuses(tmp_path / "pytorch_model.bin", "pickle")
    (tmp_path / "text.txt").touch()
    refuses(tmp_path / "text.txt", "neither a directory nor a .gguf file")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    refuses(tmp_path, "2 GGUF files")
    (tmp_path / "c.gguf").mkdir()
    refuses(tmp_path / "c.gguf", "neither model.safetensors")
    os.mkfifo(tmp_path / "pipe.gguf")
    refuses(tmp_path / "pipe.gguf", "not a regular file")  # and does not wait for a writer


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    files = open_checkpoint(write_directory(tmp_path, {"a": torch.ones(1)}))
    assert "a" in files
    assert "b" not in files
    for ask in (files.read, files.shape, files.dtype, files.release):
        with pytest.raises(CheckpointError, match="missing tensor 'b'"):
            ask("b")
    assert checkpoint.CheckpointError is CheckpointError


# --- Fuzzing ---------------------------------------------------------------------------------------------------------


def test_damaged_files_under_the_sanitizers(tmp_path: Path) -> None:
    """A fixed sequence of mutations through the fuzz target; `make fuzz` looks further, guided by coverage."""
    sources = [ROOT / "tests" / "fuzz" / "mutate.cpp", ROOT / "tests" / "fuzz" / "checkpoint_header.cpp"]
    program = tmp_path / "mutate"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-g", "-fsanitize=address,undefined"]
    command += ["-fno-sanitize-recover=all", *map(str, sources), str(ROOT / "csrc" / "checkpoint_header.cpp")]
    subprocess.run([*command, "-o", str(program)], check=True)
    seeds = write_seeds(tmp_path / "seeds")
    result = run(program, "20000", "1", *map(str, seeds))
    assert (result.returncode, result.stdout, result.stderr) == (0, "20000\n", "")


def test_the_seeds_are_well_formed(tmp_path: Path) -> None:
    for seed in write_seeds(tmp_path):
        if seed.suffix == ".safetensors":
            folder = tmp_path / "model"
            write_directory(folder, {})
            seed.rename(folder / "model.safetensors")
            assert sorted(open_checkpoint(folder).names) == sorted(load_file(folder / "model.safetensors"))
