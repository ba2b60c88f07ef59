"""A language model's checkpoint on disk, opened without reading its weights.

Two layouts are known: a directory of Hugging Face's (``config.json`` and ``model.safetensors``, or shards and
``model.safetensors.index.json``), and a GGUF file of llama.cpp's, whose fields and names are translated into Hugging
Face's. Nothing is unpickled. A header is checked whole before any of it is used, by the parsers of
``csrc/checkpoint_header.h``; what is malformed is a :class:`~pygen.files.CheckpointError`. A file that is truncated
while it is open is not survived: that is the price of mapping it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pygen import _C
from pygen.autoregressive.gguf import translate
from pygen.files import CheckpointError as CheckpointError
from pygen.files import refuse
from pygen.files.safetensors import read_json, stored_tensors
from pygen.files.stored_tensor import StoredTensor, parsed

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


def _open_gguf(file: Path, tokenizer: Path | None) -> CheckpointFiles:
    stored, metadata, lengths = parsed(file, _C.parse_gguf)
    config, generation_config, tensors = translate(file, metadata, lengths, stored)
    return CheckpointFiles(file, config, generation_config, tensors, tokenizer)


def _open_safetensors(directory: Path, tokenizer: Path | None) -> CheckpointFiles:
    config = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    generation_config = read_json(generation) if generation.exists() else {}
    tensors = stored_tensors(directory / WEIGHTS, directory / INDEX)
    return CheckpointFiles(directory, config, generation_config, tensors, tokenizer)
