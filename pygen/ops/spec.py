"""One declaration per op. Tests, benchmarks and the op table are driven by these and by nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SPECS: dict[str, OpSpec] = {}


@dataclass(frozen=True)
class Example:
    """Keyword arguments for an op's public function, the tensors it writes included.

    own_bits: whether each instruction set has bits of its own: where a library's matrix product has a part in it, or
        where what becomes bfloat16 is computed to no more than that.
    """

    name: str
    arguments: dict[str, Any]
    own_bits: bool = False


@dataclass(frozen=True)
class OpSpec:
    """What there is to know about an op.

    function: the public function; writes the tensors named by ``outputs``, of which an example may leave some out, and
        returns the first. Where it writes only a part of one, as of a cache, the rest stays as it is.
    reference: plain PyTorch, the same arguments less the outputs (but for those that are written in part); returns a
        tuple in the order of ``outputs``. Runs in the dtype of its inputs (halves compute in float32), float64
        included.
    operator: the entry under torch.ops; its arguments have the names of the function's.
    examples: for a dtype, the cases that every test of correctness runs.
    bytes_moved, flops: of an example, for the floors that benchmarks print.
    benchmarks: for a dtype, the sizes worth timing, by name; the first is small.
    bits_on_gpu: whether the CUDA kernel gives the CPU's bits; where its sums have another order, the error rule holds.
    """

    name: str
    function: Callable[..., Tensor | None]
    reference: Callable[..., tuple[Tensor | None, ...]]
    operator: Any
    outputs: tuple[str, ...]
    backends: tuple[str, ...]
    examples: Callable[[torch.dtype], Iterator[Example]]
    bytes_moved: Callable[[Example], int]
    flops: Callable[[Example], int]
    benchmarks: Callable[[torch.dtype], Iterator[Example]]
    bits_on_gpu: bool = True

    def __post_init__(self) -> None:
        SPECS[self.name] = self


def tensor_bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def index_tensor(value: int | Tensor, device: torch.device) -> Tensor:
    """A number that kernels read through a pointer: an int64 tensor as it is, an int (modulo 2^64) as a constant."""
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, int | torch.SymInt):
        raise TypeError(f"seed, step and key must be integers or tensors of torch.int64, got {value!r}")
    value &= 0xFFFFFFFFFFFFFFFF
    return constant(value - (1 << 64) if value >> 63 else value, torch.int64, device)


_constants: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}


def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor that is only ever read. On a CPU it is made once, elsewhere filled in without waiting."""
    if device.type != "cpu" or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return torch.full((1,), value, dtype=dtype, device=device)
    key = (value, dtype, device)
    tensor = _constants.get(key)
    if tensor is None:
        if len(_constants) >= 1024:
            _constants.clear()
        with torch.inference_mode(False):  # who asks first does not decide what may be recorded
            tensor = _constants[key] = torch.full((1,), value, dtype=dtype, device=device)
    return tensor
