"""combine_experts: what a row's experts made of it, by their weights, and the residual."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pygen.ops.backend import use_reference
from pygen.ops.spec import Example, OpSpec, tensor_bytes

_BACKENDS = ("reference", "cpu", "cuda")


def combine_experts(x: Tensor, weights: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """sum_k weights[k] x[k] + residual, in float32, in the order of the choices, and rounded once.

    Args:
        x: (..., choices, width), float32, bfloat16 or float16, contiguous in width: float32 is what the experts' last
            layer makes without a rounding of its own.
        weights: float32 (..., choices), as ``route_experts`` makes them.
        residual: (..., width), of out's dtype, contiguous in width.
        out: (..., width), float32, bfloat16 or float16, contiguous in width; may be ``residual``. New, in the
            residual's dtype or else x's, where left out.

    Returns:
        ``out``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if out is None:
        dtype = x.dtype if residual is None else residual.dtype
        out = x.new_empty(*x.shape[:-2], x.shape[-1], dtype=dtype)
    if use_reference("combine_experts", _BACKENDS, x.device):
        return out.copy_(combine_experts_reference(x, weights, residual))
    if x.dim() == 3:
        _kernel(x, weights, residual, out)
    else:
        rows, width = x.shape[:-2].numel(), x.shape[-1]
        flat = None if residual is None else residual.view(rows, width)
        _kernel(x.view(rows, *x.shape[-2:]), weights.view(rows, weights.shape[-1]), flat, out.view(rows, width))
    return out


def combine_experts_reference(x: Tensor, weights: Tensor, residual: Tensor | None = None) -> Tensor:
    """In the dtype of its arithmetic."""
    compute = torch.promote_types(x.dtype, torch.float32)
    y = (x.to(compute) * weights[..., None].to(compute)).sum(-2)
    return y if residual is None else y + residual.to(compute)


_kernel = torch.ops.pygen.combine_experts.default


@torch.library.register_fake("pygen::combine_experts")
def _fake(*arguments: object) -> None:
    return None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    def example(name: str, x: Tensor, to: torch.dtype = dtype, **more: Any) -> Example:
        rows, choices, width = x.shape
        weights = torch.rand(rows, choices, generator=generator)
        out = torch.full((rows, width), math.nan, dtype=to)
        return Example(name, {"x": x, "weights": weights, "residual": None, "out": out} | more)

    for width in (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 100, 333):
        for choices in (1, 2, 8):
            yield example("every width", draw(3, choices, width))
            yield example("with a residual", draw(3, choices, width), residual=draw(3, width))
    for name, other in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        yield example(f"into {name}", draw(2, 2, 40), other, residual=draw(2, 40).to(other))
        yield example(f"from {name}", draw(2, 2, 40).to(other), residual=draw(2, 40))
    yield example("latents", draw(1, 8, 256), residual=draw(1, 256))
    out = draw(3, 40)
    yield example("in place", draw(3, 2, 40), residual=out, out=out)
    weights = torch.rand(2, 4, generator=generator)[:, ::2]
    wide: dict[str, Any] = {
        "residual": draw(2, 50)[:, 5:45],
        "out": torch.full((2, 50), math.nan, dtype=dtype)[:, 3:43],
    }
    yield example("strided", draw(2, 2, 64).transpose(0, 1)[..., 7:47], weights=weights, **wide)
    special = draw(3, 2, 40)
    special[0, 0, 3], special[1, 1, 39], special[2, :, 7] = math.nan, math.inf, torch.tensor([math.inf, -math.inf])
    yield example("NaN and Inf", special, residual=draw(3, 40))
    yield example("many rows", draw(700, 2, 9))
    yield example("no rows", draw(0, 2, 40))


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    for rows in (1, 64):
        arguments = {"x": torch.randn(rows, 8, 2048), "weights": torch.rand(rows, 8)}
        out = torch.empty(rows, 2048, dtype=dtype)
        yield Example(f"8 choices, {rows} rows", arguments | {"residual": torch.ones_like(out), "out": out})


COMBINE_EXPERTS = OpSpec(
    name="combine_experts",
    function=combine_experts,
    reference=lambda out, **arguments: (combine_experts_reference(**arguments).to(out.dtype),),
    operator=_kernel,
    outputs=("out",),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(*example.arguments.values()),
    flops=lambda example: 2 * example.arguments["x"].numel(),
    benchmarks=_benchmarks,
)
