"""Tensors where they lie: in a file mapped into memory, plain or in ggml's blocks of 32."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pygen.files import open_regular, refuse

# The formats of safetensors and of GGUF that are a dtype of torch.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
BLOCK = 32  # elements; a block is a float16 scale and the codes of 8 or 4 bits
BLOCK_BYTES = {"Q8_0": 2 + BLOCK, "Q4_0": 2 + BLOCK // 2}
_BLOCKS_AT_ONCE = 1 << 15  # 1M elements: what is unpacked in between stays small
_MAP_NORESERVE = 0x4000  # Linux; a mapping larger than memory is not refused. Python has no name for it


class MappedFile:
    """A file mapped privately: nothing that is written to a tensor of it reaches the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size == 0:
                refuse(path, "truncated: the file is empty")
            flags, access = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            try:
                self.map = mmap.mmap(stream.fileno(), size, flags=flags, prot=access)
            except OSError as error:
                refuse(path, error.strerror)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)

    def release(self, begin: int, end: int) -> None:
        """Let the pages go that hold these bytes; who reads them again reads them from the disk."""
        begin -= begin % mmap.PAGESIZE
        if begin < end:
            self.map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _as_stored(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    format: a key of ``DTYPES`` or ``BLOCK_BYTES``; stored_shape: as the file has it, slowest dimension first; begin and
    end: its bytes; arrange: from what is stored to the tensor of that name in Hugging Face's layout.
    """

    file: MappedFile
    format: str
    stored_shape: tuple[int, ...]
    begin: int
    end: int
    arrange: Callable[[Tensor], Tensor] = _as_stored

    @property
    def dtype(self) -> torch.dtype | str:
        """The stored dtype, or the name of the quantised format."""
        return DTYPES.get(self.format, self.format)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.arrange(torch.empty(self.stored_shape, device="meta")).shape)

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the CPU; without ``dtype``, in its own (float32 for a quantised one).

        Where nothing must be converted, reordered or aligned, it is a view of the file.
        """
        data = self.file.bytes[self.begin : self.end]
        if self.format in BLOCK_BYTES:
            tensor = _dequantise(data.view(-1, BLOCK_BYTES[self.format]), self.format, dtype or torch.float32)
        else:
            stored = DTYPES[self.format]
            tensor = (data if self.begin % stored.itemsize == 0 else data.clone()).view(stored)
        tensor = self.arrange(tensor.view(self.stored_shape)).to(dtype or tensor.dtype)
        if tensor.untyped_storage().data_ptr() != self.file.bytes.untyped_storage().data_ptr():
            self.release()
        return tensor

    def release(self) -> None:
        """Let the file's pages go: for who has copied what ``read`` gave, and counts memory."""
        self.file.release(self.begin, self.end)


def _dequantise(blocks: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """uint8 (blocks, bytes of a block) to ``dtype`` (blocks, 32): each code times its block's scale, in float32."""
    out = torch.empty(len(blocks), BLOCK, dtype=dtype)
    for part, into in zip(blocks.split(_BLOCKS_AT_ONCE), out.split(_BLOCKS_AT_ONCE), strict=True):
        scale, codes = part[:, :2].contiguous().view(torch.float16).float(), part[:, 2:]
        if format == "Q8_0":
            values = codes.view(torch.int8)
        else:  # element i is the low half of byte i, element 16 + i the high half
            values = torch.cat([codes & 15, codes >> 4], dim=1).to(torch.int8) - 8
        into.copy_(values * scale)
    return out


def parsed(
    file: Path, parse: Callable[[mmap.mmap], Any]
) -> tuple[dict[str, StoredTensor], dict[str, Any], dict[str, int]]:
    """The tensors by the names they have in the file, the metadata, and the lengths of arrays that are not in it."""
    mapped = MappedFile(file)
    try:
        entries, metadata, lengths = parse(mapped.map)
    except ValueError as error:
        refuse(file, error)
    return {name: StoredTensor(mapped, *entry) for name, *entry in entries}, metadata, lengths
