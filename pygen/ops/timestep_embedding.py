"""timestep_embedding: a time as cosines and sines (Vaswani et al. 2017; of diffusion's steps, Ho et al. 2020).

f_i = max_period^(-i / (half - shift)),    i < half = width // 2
row = cos(t f_0), ..., cos(t f_half-1), sin(t f_0), ..., sin(t f_half-1), and a 0 where width is odd
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pygen.ops.backend import triton_kernels, use_reference, use_triton
from pygen.ops.spec import Example, OpSpec, tensor_bytes

_BACKENDS = ("reference", "cpu", "triton")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def timestep_embedding(
    t: Tensor,
    width: int,
    *,
    max_period: float = 10000.0,
    cosines_first: bool = True,
    shift: float = 0.0,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Cosines and sines of times at wavelengths from 2 pi to 2 pi ``max_period``, spaced geometrically.

    As exact at a time of 1000 as at 1, where products in float32 are off by 1e-4. Differentiable once with respect to
    ``t``.

    Args:
        t: (batch,), of any real dtype; taken as float32.
        width: of a row, 2 or more.
        max_period: the wavelengths' ratio to 2 pi.
        cosines_first: diffusers' ``flip_sin_to_cos``; else the sines are.
        shift: diffusers' ``downscale_freq_shift``: with 1, the last wavelength is 2 pi ``max_period`` itself.
        dtype: of the result: float32, bfloat16 or float16.
        out: (batch, width), rows contiguous, receives the result; new where left out.

    Returns:
        (batch, width), ``out``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if t.dim() != 1:
        raise ValueError(f"timestep_embedding: t must have shape (batch,), got {list(t.shape)}")
    if t.is_complex():
        raise TypeError(f"timestep_embedding: t must be real, got {t.dtype}")
    settings = (max_period, cosines_first, shift)
    if out is None:
        if width < 2 or width // 2 <= shift:
            raise ValueError(
                f"timestep_embedding: width must be at least 2, and shift below half of it; got {width} and {shift}"
            )
        if torch.is_grad_enabled() and t.requires_grad:
            recorded: Tensor = _TimestepEmbedding.apply(t, width, *settings, dtype)
            return recorded
        out = t.new_empty((t.shape[0], width), dtype=dtype)
    elif out.dim() == 2 and out.shape[1] != width:
        raise ValueError(f"timestep_embedding: out must have width {width}, got {list(out.shape)}")
    if use_reference("timestep_embedding", _BACKENDS, t.device):
        return out.copy_(timestep_embedding_reference(t, width, *settings, dtype=out.dtype))
    (_triton if use_triton("timestep_embedding", t.device) else _kernel)(t.to(torch.float32), *settings, out)
    return out


class _TimestepEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, width: int, *settings: Any) -> Tensor:
        max_period, cosines_first, shift, dtype = settings
        kind: dict[str, Any] = {"max_period": max_period, "cosines_first": cosines_first, "shift": shift}
        y = timestep_embedding(t, width, **kind, dtype=dtype)
        ctx.save_for_backward(y)
        ctx.t, ctx.half, ctx.settings = t.dtype, width // 2, settings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """cos' = -sin and sin' = cos, which are there."""
        (y,) = ctx.saved_tensors
        max_period, cosines_first, shift, _ = ctx.settings
        compute = torch.promote_types(y.dtype, torch.float32)
        first, second = y[:, : 2 * ctx.half].to(compute).chunk(2, dim=1)
        of_first, of_second = grad[:, : 2 * ctx.half].to(compute).chunk(2, dim=1)
        slope = of_second * first - of_first * second
        frequencies = _frequencies(ctx.half, max_period, shift, y.device).to(compute)
        grad_t = (slope if cosines_first else -slope) @ frequencies
        return grad_t.to(ctx.t), *(None,) * 5


def _frequencies(half: int, max_period: float, shift: float, device: torch.device) -> Tensor:
    powers = -math.log(max_period) * torch.arange(half, dtype=torch.float64, device=device) / (half - shift)
    return powers.exp()


def timestep_embedding_reference(
    t: Tensor, width: int, max_period: float, cosines_first: bool, shift: float, *, dtype: torch.dtype
) -> Tensor:
    compute = torch.promote_types(t.dtype if t.is_floating_point() else torch.float32, torch.float32)
    angles = t.to(compute)[:, None] * _frequencies(width // 2, max_period, shift, t.device).to(compute)
    parts = (angles.cos(), angles.sin()) if cosines_first else (angles.sin(), angles.cos())
    return torch.nn.functional.pad(torch.cat(parts, dim=1), (0, width % 2)).to(dtype)


_kernel = torch.ops.pygen.timestep_embedding.default


@torch.library.register_fake("pygen::timestep_embedding")
def _fake(*arguments: object) -> None:
    return None


def _triton(t: Tensor, max_period: float, cosines_first: bool, shift: float, out: Tensor) -> None:
    if t.device != out.device:
        raise ValueError(f"timestep_embedding: t lies on {t.device}, out on {out.device}")
    if out.shape[:1] != t.shape or out.dim() != 2 or out.stride(1) != 1:
        raise ValueError(
            f"timestep_embedding: out must have shape ({len(t)}, width) and contiguous rows, got {list(out.shape)} "
            f"with strides {out.stride()}"
        )
    if out.dtype not in _DTYPES:
        raise TypeError(f"timestep_embedding: out must be float32, bfloat16 or float16, got {out.dtype}")
    if not 0 < max_period < math.inf:
        raise ValueError(f"timestep_embedding: max_period must be above 0, got {max_period}")
    with torch.cuda.device_of(t):
        if len(t):
            triton_kernels("timestep_embedding").launch(t, max_period, cosines_first, shift, out)


torch.library.impl("pygen::timestep_embedding", "CUDA", _triton)


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    def example(name: str, t: Any, width: int, **more: Any) -> Example:
        t = torch.as_tensor(t, dtype=torch.float32)
        out = torch.full((len(t), width), math.nan, dtype=dtype)
        settings = {"max_period": 10000.0, "cosines_first": True, "shift": 0.0}
        return Example(name, {"t": t, **settings, "out": out} | more)

    times = [0.0, 1.0, 0.37, -12.5, 981.0, 999.0]
    for cosines_first in (False, True):
        for width in (2, 3, 4, 7, 16, 31, 32, 34, 66, 256, 320, 1025, 2500):
            yield example("every width", times, width, cosines_first=cosines_first)
    yield example("shift", times, 256, shift=1.0)
    yield example("another period", times, 64, max_period=1e6)
    yield example("a short period", times, 64, max_period=0.5)
    yield example("large times", [1e4, 65536.0, 99999.0, 1e5, 100001.0, -3e6, 1e9], 256)
    yield example("NaN and Inf", [math.nan, math.inf, -math.inf, 1.0], 40)
    yield example("no times", [], 40)
    yield example("rows differ", torch.arange(12.0)[::3], 40, out=torch.full((4, 60), math.nan, dtype=dtype)[:, 7:47])


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    for batch in (2, 128):
        t = torch.rand(batch) * 1000
        settings = {"max_period": 10000.0, "cosines_first": True, "shift": 0.0}
        yield Example(f"{batch} x 320", {"t": t, **settings, "out": torch.empty(batch, 320, dtype=dtype)})


def _function(t: Tensor, out: Tensor, **settings: Any) -> Tensor:
    return timestep_embedding(t, out.shape[1], out=out, **settings)


TIMESTEP_EMBEDDING = OpSpec(
    name="timestep_embedding",
    function=_function,
    reference=lambda t, out, **settings: (timestep_embedding_reference(t, out.shape[1], **settings, dtype=out.dtype),),
    operator=_kernel,
    outputs=("out",),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(example.arguments["t"], example.arguments["out"]),
    flops=lambda example: 40 * example.arguments["out"].numel(),
    benchmarks=_benchmarks,
)
