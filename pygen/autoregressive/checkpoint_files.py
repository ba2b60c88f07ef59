"""A language model's checkpoint on disk, opened without reading its weights.

Two layouts are known: a directory of Hugging Face's (``config.json`` and ``model.safetensors``, or shards and
``model.safetensors.index.json``), and a GGUF file of llama.cpp's, whose fields and names are translated into Hugging
Face's. Nothing is unpickled. A header is checked whole before any of it is used, by the parsers of
``csrc/checkpoint_header.h``; what is malformed is a :class:`~pygen.files.CheckpointError`. A file that is truncated
while it is open is not survived: that is the price of mapping it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from mmap import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pygen import _C
from pygen.autoregressive.gguf import translate
from pygen.autoregressive.stored_tensor import MappedFile, StoredTensor
from pygen.files import CheckpointError as CheckpointError
from pygen.files import open_regular, refuse

MAX_JSON = 1 << 24  # bytes of config.json, and of an index: what is parsed from it takes many times more
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class CheckpointFiles:
    """An open checkpoint.

    path: what was opened; config: the fields of ``config.json``; generation_config: those of
    ``generation_config.json``, or {}; names: of the tensors, in Hugging Face's terms; tokenizer: the path of
    ``tokenizer.json``, or None.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        tensors: Mapping[str, StoredTensor],
        tokenizer: Path | None = None,
    ) -> None:
        self.path = path
        self.config = config
        self.generation_config = generation_config
        self.tokenizer = tokenizer
        self.names = list(tensors)
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype | str:
        """The stored dtype, or the name of the quantised format: "Q8_0" or "Q4_0"."""
        return self._stored(name).dtype

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the CPU; without ``dtype``, in its own (float32 for a quantised one).

        It is a view of the mapped file where nothing must be converted, reordered or aligned: treat it as read-only.
        """
        return self._stored(name).read(dtype)

    def release(self, name: str) -> None:
        """Let the pages of a tensor go that ``read`` gave as a view: memory peaks lower. The view stays valid."""
        self._stored(name).release()

    def file(self, name: str) -> Path:
        """The file that holds the tensor, for messages."""
        return self._stored(name).file.path

    def _stored(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            refuse(self.path, f"missing tensor {name!r}")
        return self._tensors[name]


def open_checkpoint(path: str | os.PathLike[str]) -> CheckpointFiles:
    """Open a directory in Hugging Face's layout, a GGUF file, or a directory that holds one GGUF file."""
    path = Path(path)
    if path.suffix in _PICKLES and path.is_file():
        _refuse_pickle(path)
    if not path.is_dir():
        if path.exists() and path.suffix != ".gguf":
            refuse(path, "neither a directory nor a .gguf file")
        return _open_gguf(path, tokenizer=None)
    tokenizer = path / "tokenizer.json"
    found = tokenizer if tokenizer.is_file() else None
    if (path / WEIGHTS).exists() or (path / INDEX).exists():
        return _open_safetensors(path, found)
    gguf = sorted(path.glob("*.gguf"))
    if len(gguf) == 1:
        return _open_gguf(gguf[0], found)
    if gguf:
        refuse(path, f"{len(gguf)} GGUF files: open one of them, {gguf[0].name} say")
    for file in sorted(path.iterdir()):
        if file.suffix in _PICKLES:
            _refuse_pickle(file)
    refuse(path, f"holds neither {WEIGHTS}, nor {INDEX}, nor a .gguf file")


def _refuse_pickle(file: Path) -> None:
    refuse(file, "a pickle, which may run any code and is never read: load it with transformers and save_pretrained it")


def _parse(file: Path, parse: Callable[[mmap], Any]) -> tuple[dict[str, StoredTensor], dict[str, Any], dict[str, int]]:
    """The tensors by the names they have in the file, the metadata, and the lengths of arrays that are not in it."""
    mapped = MappedFile(file)
    try:
        entries, metadata, lengths = parse(mapped.map)
    except ValueError as error:
        refuse(file, error)
    return {name: StoredTensor(mapped, *entry) for name, *entry in entries}, metadata, lengths


def _open_gguf(file: Path, tokenizer: Path | None) -> CheckpointFiles:
    stored, metadata, lengths = _parse(file, _C.parse_gguf)
    config, generation_config, tensors = translate(file, metadata, lengths, stored)
    return CheckpointFiles(file, config, generation_config, tensors, tokenizer)


def _open_safetensors(directory: Path, tokenizer: Path | None) -> CheckpointFiles:
    config = _read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    generation_config = _read_json(generation) if generation.exists() else {}
    if (directory / WEIGHTS).exists():
        tensors, _, _ = _parse(directory / WEIGHTS, _C.parse_safetensors)
    else:
        tensors = _parse_shards(directory / INDEX)
    return CheckpointFiles(directory, config, generation_config, tensors, tokenizer)


def _parse_shards(index: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards: those of the index, each in its own file, and no others."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        refuse(index, "weight_map must be an object of tensors and the files that hold them")
    for name, shard in weight_map.items():
        # A plain name: a path would lead out of the directory. (A link may: caches of downloads are made of them.)
        plain = isinstance(shard, str) and Path(shard).name == shard and len(shard) < 256
        if not plain or not shard.endswith(".safetensors"):
            refuse(index, f"weight_map: the file of {name!r:.100} must be a name in this directory, got {shard!r:.100}")
    tensors: dict[str, StoredTensor] = {}
    for shard in dict.fromkeys(weight_map.values()):
        file = index.with_name(shard)
        found, _, _ = _parse(file, _C.parse_safetensors)
        for name, tensor in found.items():
            if weight_map.get(name) != shard:
                refuse(file, f"unknown tensor {name!r}: it is not in {index.name}, or there in another file")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            refuse(index.with_name(shard), f"missing tensor {name!r:.100}, which {index.name} promises")
    return {name: tensors[name] for name in weight_map}


def _read_json(file: Path) -> dict[str, Any]:
    with open_regular(file) as stream:
        if os.fstat(stream.fileno()).st_size > MAX_JSON:
            refuse(file, f"more than {MAX_JSON} bytes")
        text = stream.read()

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
            refuse(file, f"field {name!r:.100} is there twice")
        return fields

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        refuse(file, f"not JSON: {error}")
    if not isinstance(value, dict):
        refuse(file, "must hold a JSON object")
    return value
