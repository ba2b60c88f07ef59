"""GGUF files for tests and benches: ggml's blocks and rounding, and a Llama that llama.cpp loads."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pygen.autoregressive.gguf import ARCHITECTURES
from pygen.files import replacing

TensorType = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0"]
ALIGNMENT = 32
BLOCK = 32
_TYPE_NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "BF16": 30}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # general.file_type
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK_BYTES = {"Q8_0": 2 + BLOCK, "Q4_0": 2 + BLOCK // 2}
_ELEMENTS_AT_ONCE = 1 << 22


def quantise(tensor: Tensor, type: Literal["Q8_0", "Q4_0"]) -> Tensor:
    """uint8 (elements / 32, bytes of a block): a float16 scale and the codes, as ggml's reference rounds them.

    Q8_0: scale = max |x| / 127, codes round(x / scale), halves away from zero. Q4_0: scale = m / -8 with m the first x
    of the largest magnitude, codes trunc(x / scale + 8.5) up to 15; byte i holds code i and, above it, code 16 + i.
    Raises ValueError where a scale is not finite in float16.
    """
    x = tensor.reshape(-1, BLOCK).float()
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))
    scale = largest.abs() / 127 if type == "Q8_0" else largest / -8
    half = scale.half()
    if not half.isfinite().all():
        raise ValueError(f"a block of the tensor has no finite scale in {type}")
    x = x * torch.where(scale.reciprocal().isfinite(), scale.reciprocal(), 0.0)
    if type == "Q8_0":
        whole = x.trunc()
        codes = (whole + (2 * (x - whole)).trunc()).to(torch.int8).view(torch.uint8)
    else:
        nibbles = (x + 8.5).trunc().clamp(max=15).to(torch.uint8)
        codes = nibbles[:, : BLOCK // 2] | nibbles[:, BLOCK // 2 :] << 4
    return torch.cat([half.view(torch.uint8), codes], dim=1)


def write_gguf(
    path: str | os.PathLike[str],
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    type: TensorType = "F32",
) -> None:
    """Write a GGUF file of version 3.

    metadata: full names ("llama.block_count") to bool, int (uint32; int32 if negative or in a list, as llama.cpp reads
    them), float (float32), str, or a list of one of these; tensors: GGUF's names to tensors. Those of two and more
    dimensions are stored as ``type``, in rows that must be a multiple of 32 elements for Q8_0 and Q4_0; the others as
    F32, as llama.cpp needs them.
    """
    stored: dict[str, TensorType] = {name: type if tensor.dim() >= 2 else "F32" for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if stored[name] in _BLOCK_BYTES and tensor.shape[-1] % BLOCK != 0:
            raise ValueError(
                f"tensor {name!r} has rows of {tensor.shape[-1]} elements, and {type} has blocks of {BLOCK}"
            )
    fields = {"general.architecture": architecture, "general.alignment": ALIGNMENT} | dict(metadata)
    fields["general.file_type"] = _FILE_TYPES[type]
    header = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)))
    for key, value in fields.items():
        header += _string(key) + _value(key, value)
    offset = 0
    for name, tensor in tensors.items():
        header += _string(name) + struct.pack("<I", tensor.dim())
        header += struct.pack(f"<{tensor.dim()}Q", *reversed(tensor.shape))
        header += struct.pack("<IQ", _TYPE_NUMBERS[stored[name]], offset)
        offset += _padded(_size(tensor, stored[name]))
    with replacing(Path(path)) as stream:
        stream.write(header.ljust(_padded(len(header)), b"\0"))
        for name, tensor in tensors.items():
            for part in _parts(tensor, stored[name]):
                stream.write(part)
            size = _size(tensor, stored[name])
            stream.write(b"\0" * (_padded(size) - size))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _size(tensor: Tensor, type: TensorType) -> int:
    if type in _BLOCK_BYTES:
        return tensor.numel() // BLOCK * _BLOCK_BYTES[type]
    return tensor.numel() * _DTYPES[type].itemsize


def _parts(tensor: Tensor, type: TensorType) -> Iterator[bytes]:
    """The bytes of a tensor, so many at a time that a copy of it is never whole."""
    for part in tensor.detach().reshape(-1).split(_ELEMENTS_AT_ONCE):
        if type == "Q8_0" or type == "Q4_0":
            data = quantise(part, type)
        else:
            data = part.to(_DTYPES[type]).contiguous().view(torch.uint8)
        yield data.numpy().tobytes()


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any, signed: bool = False) -> bytes:
    """A value behind the number of its type."""
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{key} is an empty list, which has no type")
        items = [_value(key, item, signed=True) for item in value]
        if len({item[:4] for item in items}) != 1:
            raise ValueError(f"{key} has items of several types")
        return (
            struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)
        )
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<Ii", 5, value) if signed or value < 0 else struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    raise TypeError(f"{key} must be a bool, int, float, str or a list of one of them, got {value.__class__.__name__}")


def write_llama_gguf(
    path: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor], type: TensorType = "F32"
) -> None:
    """Write a Llama for llama.cpp from what Hugging Face's has: the fields of its config.json, and its tensors.

    The rows of q and k are put into llama.cpp's order. The vocabulary is a placeholder of SentencePiece's kind: <unk>,
    <s>, </s>, the bytes, then words without meaning.
    """
    if config.get("rope_scaling") or (config.get("rope_parameters") or {}).get("rope_type", "default") != "default":
        raise ValueError("rope_scaling cannot be written")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    metadata = {
        "general.name": "pygen",
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": float(theta),
        "llama.vocab_size": config["vocab_size"],
        **_vocabulary(config["vocab_size"]),
    }
    architecture = ARCHITECTURES["llama"]
    parts = {of: part for part, of in architecture.parts.items()}
    whole = {of: part for part, of in architecture.whole.items()}
    renamed = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(rf"{re.escape(architecture.block)}\.(\d+)\.(.+)", stem)
        if stem in whole:
            renamed[f"{whole[stem]}.{kind}"] = tensor
        elif block and block[2] in parts:
            part = parts[block[2]]
            if part in ("attn_q", "attn_k"):
                halves = tensor.reshape(heads if part == "attn_q" else kv_heads, 2, -1, *tensor.shape[1:])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            renamed[f"blk.{block[1]}.{part}.{kind}"] = tensor
        else:
            raise ValueError(f"tensor {name!r} is none of a Llama")
    write_gguf(path, "llama", metadata, renamed, type)


def _vocabulary(size: int) -> dict[str, Any]:
    normal, unknown, control, byte = 1, 2, 3, 6
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    kinds = [unknown, control, control, *[byte] * 256]
    words = max(0, size - len(tokens))
    tokens = (tokens + [f"\u2581{number}" for number in range(words)])[:size]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(-number) for number in range(size)],
        "tokenizer.ggml.token_type": (kinds + [normal] * words)[:size],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }
