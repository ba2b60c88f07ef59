"""sample_gram: the inner products of the tensors of each sample with each other, and with the constant 1.

    gram[b, i, j] = sum over sample b of t_i * t_j,     t_n = 1

So gram[b, i, n] is a sum, gram[b, n, n] the number of elements, and means, variances, norms and angles follow: what
guidance rescale, projected and perpendicular guidance need, in one pass over memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pygen.ops.backend import use_reference
from pygen.ops.spec import Example, OpSpec, tensor_bytes

_BACKENDS = ("reference", "cpu", "cuda")


def sample_gram(tensors: Sequence[Tensor], *, out: Tensor | None = None) -> Tensor:
    """The Gram matrix of each sample of one to four tensors, over all its elements, with the constant 1 as the last.

    Summed in double in one order: the same bits in any batch, at any number of threads and on any device.

    Args:
        tensors: 1 to 4, of one shape (batch, ...), any strides, each in float32, bfloat16 or float16.
        out: float64 (batch, n + 1, n + 1), receives the result; new where left out.

    Returns:
        float64 (batch, n + 1, n + 1), ``out`` where given.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if not tensors:
        raise ValueError("sample_gram: tensors must hold 1 to 4 of them, got 0")
    first, size = tensors[0], len(tensors) + 1
    if out is None:
        out = first.new_empty((first.shape[0] if first.dim() else 0, size, size), dtype=torch.float64)
    if use_reference("sample_gram", _BACKENDS, first.device):
        return out.copy_(sample_gram_reference(tensors)[0])
    _kernel(tensors, out)
    return out


def sample_gram_reference(tensors: Sequence[Tensor]) -> tuple[Tensor]:
    compute = torch.promote_types(tensors[0].dtype, torch.float32)
    shape = tensors[0].shape
    vectors = torch.stack([tensor.to(compute) for tensor in (*tensors, torch.ones_like(tensors[0]))], dim=1)
    vectors = vectors.reshape(shape[0], len(tensors) + 1, math.prod(shape[1:]))
    return ((vectors @ vectors.mT).double(),)


_kernel = torch.ops.pygen.sample_gram.default


@torch.library.register_fake("pygen::sample_gram")
def _fake(tensors: Sequence[Tensor], out: Tensor) -> None:
    return None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def tensor(*size: int, like: torch.dtype = dtype) -> Tensor:
        return (torch.randn(size, generator=generator) + 0.5).to(like)

    def example(name: str, *tensors: Tensor, out: Tensor | None = None) -> Example:
        size = len(tensors) + 1
        out = torch.full((tensors[0].shape[0], size, size), math.nan, dtype=torch.float64) if out is None else out
        return Example(name, {"tensors": list(tensors), "out": out})

    for count in range(0, 36):
        yield example("every count", tensor(1, count), tensor(1, count))
    for count in (255, 256, 257, 263, 1023, 1025, 8191, 8192, 8193, 9000):
        yield example("ends of runs and blocks", tensor(2, count))
    for n in (1, 2, 3, 4):
        yield example(f"{n} tensors", *(tensor(5, 3, 7, 9) for _ in range(n)))
    yield example("latents", *(tensor(2, 4, 64, 64) for _ in range(2)))
    yield example("several blocks", *(tensor(3, 3, 75, 79) for _ in range(4)))
    yield example("without further dimensions", tensor(5), tensor(5))
    yield example("empty batch", tensor(0, 4))
    shape = (5, 3, 7, 9)
    yield example("dtypes differ", *(tensor(*shape, like=like) for like in (dtype, torch.float32, torch.float16)))
    last = tensor(*shape).to(memory_format=torch.channels_last)
    yield example("channels-last", last, tensor(*shape).to(memory_format=torch.channels_last))
    yield example("memory formats differ", last, tensor(*shape))
    wide = tensor(5, 6, 7, 18)
    yield example("sliced", wide[:, 1:4, :, ::2], wide[:, 3:, :, 1::2])
    yield example("halves of the channels", tensor(2, 8, 48, 48)[:, :4], tensor(2, 8, 48, 48)[:, 4:])
    yield example("misaligned", tensor(388)[1:].view(3, 129), tensor(390)[3:].view(3, 129))
    yield example("broadcast", tensor(5, 1, 1, 9).expand(shape), tensor(*shape))
    yield example(
        "strided out", tensor(*shape), out=torch.full((2, 2, 10), math.nan, dtype=torch.float64).permute(2, 1, 0)[::2]
    )
    yield example("a large mean", tensor(2, 3000) + 1000)
    special = tensor(4, 64)
    special[0, 5], special[1, 3], special[2, 1] = math.nan, math.inf, -math.inf
    special[3, 2], special[3, 7] = math.inf, -math.inf
    yield example("NaN and Inf", special, tensor(4, 64).abs() + 0.1)


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    for name, size in {"latents": (2, 4, 64, 64), "large latents": (8, 4, 128, 128)}.items():
        tensors = [torch.randn(size).to(dtype) for _ in range(2)]
        yield Example(name, {"tensors": tensors, "out": torch.empty(size[0], 3, 3, dtype=torch.float64)})


def _flops(example: Example) -> int:
    n = len(example.arguments["tensors"])
    return n * (n + 2) * example.arguments["tensors"][0].numel()


SAMPLE_GRAM = OpSpec(
    name="sample_gram",
    function=sample_gram,
    reference=lambda tensors, out: sample_gram_reference(tensors),
    operator=_kernel,
    outputs=("out",),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(*example.arguments["tensors"]),
    flops=_flops,
    benchmarks=_benchmarks,
)
