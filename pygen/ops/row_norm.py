"""row_norm: RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016) over the last dimension, with autograd and
the addition to a residual stream before it, gated where each sample has parameters of its own.

    h = gate x + residual
    y = (h - mean) / sqrt(variance + eps) * weight + bias                layer_norm
    y = (h - mean) / sqrt(variance + eps) * (1 + scale) + shift          ada_layer_norm
    y = h / sqrt(mean(h^2) + eps) * (offset + weight)                    rms_norm
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pygen import _C  # noqa: F401  (registers the operators)
from pygen.ops.backend import triton_kernels, use_reference, use_triton
from pygen.ops.spec import Example, OpSpec, tensor_bytes

_BACKENDS = ("reference", "cpu", "triton")


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: None = None,
    offset: float = 0.0,
    out: Tensor | None = None,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor,
    offset: float = 0.0,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """h / sqrt(mean(h^2) + eps) * (offset + weight) over the last dimension, where h = x + residual.

    Differentiable once with respect to ``x``, ``residual`` and ``weight``; the backward pass keeps no more than h and
    computes the statistics again. Arithmetic is float32 or better with one rounding to x's dtype at the end, under
    autocast too, which leaves dtypes alone. A row's result does not depend on the other rows.

    Args:
        x: (..., elements), float32, bfloat16 or float16; the last dimension contiguous.
        weight: (elements,), contiguous, in x's dtype or float32; nothing is multiplied where None.
        eps: added to the mean square.
        residual: of x's shape and dtype. h is rounded to that dtype before it is normalised.
        offset: added to the weight: 1 in Gemma.
        out: of x's shape and dtype; may be x or residual. New where left out.
        residual_out: likewise, receives h; may be x or residual.

    Returns:
        ``out``; with a residual, ``(out, residual_out)``.

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: where out or residual_out is given and a gradient is wanted.
    """
    return _norm(x, residual, weight, None, eps, offset, False, out, residual_out)


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: None = None,
    out: Tensor | None = None,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(h - mean) / sqrt(variance + eps) * weight + bias over the last dimension, where h = x + residual.

    As ``rms_norm``, and differentiable with respect to ``bias`` too. Statistics are not spoilt by a large mean.

    Args:
        bias: (elements,), contiguous, in x's dtype or float32; nothing is added where None.
        eps: added to the variance.
        x, weight, residual, out, residual_out: as in ``rms_norm``.

    Returns:
        ``out``; with a residual, ``(out, residual_out)``.

    Raises:
        as ``rms_norm``.
    """
    return _norm(x, residual, weight, bias, eps, 0.0, True, out, residual_out)


@overload
def ada_layer_norm(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, *, out: Tensor | None = None
) -> Tensor: ...
@overload
def ada_layer_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
def ada_layer_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """layer_norm(h) (1 + scale) + shift, where h = gate x + residual, with a scale, a shift and a gate of each sample
    (adaLN-zero of DiT, Peebles and Xie 2023: x is what a block's branch gave, and y what the next begins with).

    As ``layer_norm``, in one pass, and differentiable with respect to all.

    Args:
        x: (batch, ..., elements), float32, bfloat16 or float16; the last dimension contiguous.
        scale, shift, gate: (batch, elements), rows contiguous, in x's dtype or float32; a gate of 1 where left out.
        eps: added to the variance.
        residual: of x's shape and dtype. h is rounded to that dtype before it is normalised.
        out, residual_out: as in ``layer_norm``.

    Returns:
        ``out``; with a residual, ``(out, residual_out)``.

    Raises:
        as ``layer_norm``.
    """
    if x.dim() < 2:
        raise ValueError(f"ada_layer_norm: x must have shape (batch, ..., elements), got {list(x.shape)}")
    size = [x.shape[0], x.shape[-1]]
    for name, tensor in (("scale", scale), ("shift", shift), ("gate", gate)):
        if tensor is None:
            continue
        if list(tensor.shape) != size:
            raise ValueError(f"ada_layer_norm: {name} must have shape {size}, got {list(tensor.shape)}")
        if tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"ada_layer_norm: {name} must have x's dtype {x.dtype} or be float32, got {tensor.dtype}")
        if tensor.stride(1) != 1 and tensor.numel() > 1:
            raise ValueError(f"ada_layer_norm: {name} must have contiguous rows, got strides {tensor.stride()}")
    return _norm(x, residual, scale, shift, eps, 1.0, True, out, residual_out, gate=gate)


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    out: Tensor | None,
    residual_out: Tensor | None,
    *,
    gate: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    if out is None and residual_out is None and torch.is_grad_enabled():
        inputs = (x, residual, gate, weight, bias)
        if any(tensor is not None and tensor.requires_grad for tensor in inputs):
            recorded: Tensor | tuple[Tensor, Tensor] = _RowNorm.apply(*inputs, eps, offset, centred)
            return recorded
    if out is None:
        out = torch.empty_like(x)
    if residual is not None and residual_out is None:
        residual_out = torch.empty_like(x)
    row_norm(x, residual, gate, weight, bias, eps, offset, centred, out, residual_out)
    return out if residual_out is None else (out, residual_out)


class _RowNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        gate: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        offset: float,
        centred: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        out = torch.empty_like(x)
        h = None if residual is None else torch.empty_like(x)
        row_norm(x, residual, gate, weight, bias, eps, offset, centred, out, h)
        ctx.save_for_backward(x if h is None else h, weight, bias, gate, x if ctx.needs_input_grad[2] else None)
        ctx.settings = eps, offset, centred
        ctx.set_materialize_grads(False)  # most often nobody asks for the gradient of one of the two
        return out if h is None else (out, h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, residual_grad: Tensor | None = None) -> tuple[Tensor | None, ...]:
        h, weight, bias, gate, x = ctx.saved_tensors
        for_x, for_residual, for_gate, for_weight, for_bias = ctx.needs_input_grad[:5]
        grad = torch.zeros_like(h) if grad is None else with_rows(grad)
        residual_grad = None if residual_grad is None else with_rows(residual_grad)
        grad_h = torch.empty_like(h) if for_x or for_residual or for_gate else None
        grad_weight, grad_bias = (
            torch.empty(like.shape, dtype=like.dtype, device=like.device) if wanted else None
            for like, wanted in ((weight, for_weight), (bias, for_bias))
        )
        eps, offset, centred = ctx.settings
        row_norm_backward(h, grad, weight, eps, offset, centred, residual_grad, grad_h, grad_weight, grad_bias)
        grad_x, grad_gate = grad_h, None
        if gate is not None and grad_h is not None:
            if for_x:
                grad_x = (grad_h * rows_of(gate, h)).to(h.dtype)
            if for_gate:
                compute = torch.promote_types(h.dtype, torch.float32)
                grad_gate = (grad_h.to(compute) * x)[:, None].flatten(1, -2).sum(1).to(gate.dtype)
        return (
            grad_x if for_x else None, grad_h if for_residual else None, grad_gate, grad_weight, grad_bias,
            None, None, None,
        )  # fmt: skip


def with_rows(x: Tensor) -> Tensor:
    """With a contiguous last dimension. Autograd hands on whatever strides a later op's derivative has: those of an
    expanded number, even."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rows_of(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter of all rows, (elements,), or of each sample's, (batch, elements), as it broadcasts to x."""
    return parameter if parameter.dim() == 1 else parameter.unflatten(0, (-1, *(1,) * (x.dim() - 2)))


def row_norm(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    out: Tensor,
    residual_out: Tensor | None,
) -> Tensor:
    """What ``rms_norm`` and, where centred, ``layer_norm`` run; parameters are (elements,) or (batch, elements)."""
    if use_reference("row_norm", _BACKENDS, x.device):
        y, h = row_norm_reference(x, residual, gate, weight, bias, eps, offset, centred)
        if residual_out is not None:
            residual_out.copy_(h)
        return out.copy_(y)
    if use_triton("row_norm", x.device):
        _triton(x, residual, gate, weight, bias, eps, offset, centred, out, residual_out)
    else:
        _kernel(x, residual, gate, weight, bias, eps, offset, centred, out, residual_out)
    return out


def row_norm_reference(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """y and h."""
    compute = torch.promote_types(x.dtype, torch.float32)
    h = x
    if residual is not None:
        h = x + residual if gate is None else torch.addcmul(residual, rows_of(gate, x).to(x.dtype), x)
    scale, shift = (None if parameter is None else parameter.to(compute) for parameter in (weight, bias))
    y = _formula(h.to(compute), scale, shift, eps, offset, centred)
    return y.to(x.dtype), h


def _formula(h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, centred: bool) -> Tensor:
    norm = functional.layer_norm if centred else functional.rms_norm
    y = norm(h, h.shape[-1:], eps=eps)
    if weight is not None:
        y = y * rows_of(offset + weight, h)
    return y if bias is None else y + rows_of(bias, h)


def row_norm_backward(
    x: Tensor,
    grad: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    residual_grad: Tensor | None,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> Any:
    """The gradients that are wanted, where ``grad`` is y's and x was h; ``residual_grad`` is added to x's."""
    if use_reference("row_norm_backward", _BACKENDS, x.device):
        results = row_norm_backward_reference(x, grad, weight, eps, offset, centred, residual_grad)
        for wanted, result in zip((grad_x, grad_weight, grad_bias), results, strict=True):
            if wanted is not None:
                wanted.copy_(result)
        return grad_x
    run = _triton_backward if use_triton("row_norm_backward", x.device) else _kernel_backward
    run(x, grad, weight, eps, offset, centred, residual_grad, grad_x, grad_weight, grad_bias)
    return grad_x


def row_norm_backward_reference(
    x: Tensor,
    grad: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    residual_grad: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients of x, weight and bias, as autograd derives them."""
    compute = torch.promote_types(x.dtype, torch.float32)
    if weight is None:
        weight, offset = x.new_ones(x.shape[-1]), 0.0

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _formula(x, weight, bias, eps, offset, centred)

    scale = weight.to(compute)
    derive: Any = torch.func.vjp(norm, x.to(compute), scale, torch.zeros_like(scale))[1]
    grad_x, grad_weight, grad_bias = derive(grad.to(compute))
    if residual_grad is not None:
        grad_x = grad_x + residual_grad.to(compute)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


_kernel = torch.ops.pygen.row_norm.default
_kernel_backward = torch.ops.pygen.row_norm_backward.default


@torch.library.register_fake("pygen::row_norm")
@torch.library.register_fake("pygen::row_norm_backward")
def _fake(*arguments: object) -> None:
    return None


def _triton(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    out: Tensor,
    residual_out: Tensor | None,
) -> None:
    op = "layer_norm" if centred else "rms_norm"
    if (residual is None) != (residual_out is None):
        raise ValueError(f"{op}: residual_out receives x + residual: give both or neither")
    if gate is not None and residual is None:
        raise ValueError(f"{op}: gate needs a residual that gate * x is added to")
    of_rows = {"x": x, "residual": residual, "out": out, "residual_out": residual_out}
    by_sample = _check(op, of_rows, {"gate": gate, "weight": weight, "bias": bias})
    if x.numel() == 0:
        return
    x, residual, out, residual_out = _merge_rows(op, of_rows, by_sample)
    with torch.cuda.device_of(x):
        triton_kernels("row_norm").launch(
            x, residual, gate, weight, bias, eps, offset, centred, by_sample, out, residual_out
        )  # fmt: skip


def _triton_backward(
    x: Tensor,
    grad: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    residual_grad: Tensor | None,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    op = "layer_norm's backward pass" if centred else "rms_norm's backward pass"
    of_rows = {"x": x, "grad": grad, "residual_grad": residual_grad, "grad_x": grad_x}
    by_sample = _check(op, of_rows, {"weight": weight, "grad_weight": grad_weight, "grad_bias": grad_bias})
    if x.shape[-1] == 0:
        return
    x, grad, residual_grad, grad_x = _merge_rows(op, of_rows, by_sample)
    kernels = triton_kernels("row_norm_backward")
    elements = x.shape[-1]
    samples = x.shape[0] if by_sample else 1
    rows = x.numel() // elements // max(samples, 1)
    chunks = samples * -(-rows // kernels.chunk_rows(rows, elements))
    sums = [
        None if wanted is None else x.new_empty((chunks, elements), dtype=torch.float32)
        for wanted in (grad_weight, grad_bias)
    ]
    with torch.cuda.device_of(x):
        kernels.launch(
            x, grad, weight, eps, offset, centred, by_sample, residual_grad, grad_x, grad_weight, grad_bias, *sums
        )  # fmt: skip


torch.library.impl("pygen::row_norm", "CUDA", _triton)
torch.library.impl("pygen::row_norm_backward", "CUDA", _triton_backward)


def _check(op: str, of_rows: dict[str, Any], parameters: dict[str, Tensor | None]) -> bool:
    """What csrc checks for the CPU; returns whether a parameter differs by sample."""
    x: Tensor = of_rows["x"]
    by_sample = any(tensor is not None and tensor.dim() == 2 for tensor in parameters.values())
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have shape (..., elements), got {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: x must be float32, bfloat16 or float16, got {x.dtype}")
    if by_sample and x.dim() < 2:
        raise ValueError(
            f"{op}: x must have shape (batch, ..., elements), as a parameter is (batch, elements), got {list(x.shape)}"
        )
    for name, tensor in (of_rows | parameters).items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must lie on x's device {x.device}, got {tensor.device}")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(
                f"{op}: {name} requires grad, and what is written to given tensors is not recorded: leave out and "
                "residual_out out, or call it under torch.no_grad()"
            )
        shape, dtypes = (x.shape, {x.dtype}) if name in of_rows else (x.shape[-1:], {x.dtype, torch.float32})
        if name in parameters and tensor.dim() == 2:
            shape = torch.Size((x.shape[0], x.shape[-1]))
        weight = parameters["weight"]
        if name not in (*of_rows, "gate") and tensor.dim() != (1 if weight is None else weight.dim()):
            raise ValueError(f"{op}: {name} must have as many dimensions as weight, or one, got {list(tensor.shape)}")
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype not in dtypes:
            raise TypeError(f"{op}: {name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel():
            raise ValueError(
                f"{op}: {name}'s last dimension must be contiguous, call contiguous() on it; got strides "
                f"{tensor.stride()}"
            )
    return by_sample


def _merge_rows(op: str, of_rows: dict[str, Any], by_sample: bool) -> list[Any]:
    """Views of four dimensions: the leading ones in x's memory order, merged where all tensors allow it to three; by
    sample, the first is theirs."""
    x: Tensor = of_rows["x"]
    present = [tensor for tensor in of_rows.values() if tensor is not None]
    merged: list[tuple[int, list[int]]] = []  # sizes, and every tensor's strides
    for d in sorted(range(by_sample, x.dim() - 1), key=x.stride, reverse=True):
        size, strides = x.shape[d], [tensor.stride(d) for tensor in present]
        if size == 1:
            continue
        if merged and merged[-1][1] == [stride * size for stride in strides]:
            size *= merged.pop()[0]
        merged.append((size, strides))
    most = 2 if by_sample else 3
    if len(merged) > most:
        raise ValueError(
            f"{op}: on a GPU rows may lie along three strided dimensions, call contiguous(); got shape {list(x.shape)} "
            f"and strides {x.stride()}"
        )
    merged = [(1, [0] * len(present))] * (most - len(merged)) + merged
    if by_sample:
        merged.insert(0, (x.shape[0], [tensor.stride(0) for tensor in present]))
    sizes = [size for size, _ in merged]
    views = (
        tensor.as_strided((*sizes, x.shape[-1]), (*strides, 1))
        for tensor, *strides in zip(present, *(strides for _, strides in merged), strict=True)
    )
    return [None if tensor is None else next(views) for tensor in of_rows.values()]


def _row_examples(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, dict[str, Tensor | float | None]]]:
    """Names, rows, and what is told of them beside: for both passes."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    for elements in range(1, 132):
        yield "every count", tensor(2, elements), {}
    for elements in (511, 512, 513, 577, 1023, 1025, 4095, 4096, 4097, 9001):
        yield "around a short sum", tensor(1, elements), {}
    for shape in ((40,), (7, 1), (65, 33), (2, 3, 5, 24), (1, 4096), (300, 64), (0, 8), (2, 0)):
        yield f"shape {shape}", tensor(*shape), {}
    yield "sliced", tensor(3, 9, 120)[:, 1:7:2, 40:80], {}
    yield "heads", tensor(2, 7, 3, 32).transpose(1, 2), {}
    yield "broadcast rows", tensor(3, 1, 40).expand(3, 4, 40), {}
    yield "misaligned", tensor(1 + 5 * 67)[1:].view(5, 67), {}
    for mean in (1e3, -3e4):
        yield f"mean {mean}", tensor(8, 700) + mean, {}
    yield "means differ", tensor(8, 96) + 100 * tensor(8, 1), {}
    yield "an outlier first", torch.cat([1e4 * tensor(4, 1), tensor(4, 999)], 1), {}
    yield "constant", torch.full((3, 77), 0.7).to(dtype), {}
    yield "zeros", torch.zeros(3, 77).to(dtype), {}
    yield "small values", 1e-4 * tensor(5, 130), {}
    yield "large values", 300 * tensor(5, 130), {}
    yield "no weight", tensor(5, 70), {"weight": None}
    yield "float32 parameters", tensor(5, 70), {"weight": torch.randn(70, generator=generator)}
    yield "another eps", 0.01 * tensor(5, 70), {"eps": 0.3}


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(1)

    def random(like: Tensor, *size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(like.dtype)

    def example(name: str, x: Tensor, centred: bool, **more: Any) -> Example:
        weight = more.pop("weight", random(x, x.shape[-1]))
        bias = random(x if weight is None else weight, x.shape[-1]) if centred else None
        arguments = {
            "x": x, "residual": None, "gate": None, "weight": weight, "bias": bias, "eps": 1e-5,
            "offset": 0.0, "centred": centred, "out": torch.full_like(x, math.nan), "residual_out": None,
        } | more  # fmt: skip
        if arguments["residual"] is not None and arguments["residual_out"] is None:
            arguments["residual_out"] = torch.full_like(x, math.nan)
        return Example(f"{name}, {'layer_norm' if centred else 'rms_norm'}", arguments)

    for centred in (False, True):
        for name, x, more in _row_examples(dtype):
            yield example(name, x, centred, **more)
        for elements in (1, 7, 16, 40, 64, 129, 1000):
            x = random(torch.empty(0, dtype=dtype), 5, elements)
            yield example("residual", x, centred, residual=random(x, 5, elements))
        x, residual = random(x, 2, 3, 40), random(x, 2, 5, 90)[:, ::2, 33:73]
        yield example("strided residual", x, centred, residual=residual)
        yield example("broadcast residual", x, centred, residual=random(x, 3, 40).expand(2, 3, 40))
        yield example("strided outputs", x, centred, residual=residual, out=torch.zeros(2, 7, 41).to(dtype)[:, 1:4, 1:])
        yield example("out is residual", x, centred, residual=(residual := random(x, 2, 3, 40)), out=residual)
        yield example("no bias", x, centred, bias=None)
        for size in ((3, 5, 40), (1, 70), (4, 2, 3, 33), (2, 9, 64, 16)):
            x = random(x, *size).transpose(-3, -2) if len(size) == 4 else random(x, *size)
            samples, elements = x.shape[0], x.shape[-1]
            weight, bias = random(x, samples, elements + 3)[:, :elements], random(x, samples, elements)
            of_samples = {"weight": weight, "bias": bias if centred else None, "offset": 1.0}
            yield example("of each sample", x, centred, **of_samples)
            gated = {"residual": random(x, *x.shape), "gate": torch.randn(bias.shape, generator=generator)}
            yield example("gate", x, centred, **gated)
            yield example("gate of each sample's norm", x, centred, **gated, **of_samples)
        yield example(
            "samples of a broadcast", random(x, 3, 1, 40).expand(3, 4, 40), centred, weight=random(x, 3, 40), bias=None
        )
        special = random(x, 8, 40)
        special[1, 3], special[2, 39], special[3, 0], special[4, 5:7] = math.nan, math.inf, -math.inf, math.inf
        yield example("NaN and Inf", special, centred)
        yield example("one gate, NaN and Inf", special, centred, residual=random(x, 8, 40), gate=random(x, 40))
        infinite = torch.tensor([math.inf, -math.inf, math.nan, 1.0, 0.0]).to(dtype)
        yield example("NaN and Inf in weight", random(x, 3, 5), centred, weight=infinite)
        # What is compiled is told these by name.
        x, residual = random(x, 6, 100), random(x, 6, 100)
        in_place = example("", x, centred, residual=residual, out=x, residual_out=residual)
        yield Example("in place", in_place.arguments)
        yield Example("in place", example("", x, centred, out=x).arguments)
    yield example("Gemma's offset", random(x, 5, 70), False, offset=1.0)
    yield example("offset without weight", random(x, 5, 70), False, offset=1.0, weight=None)


def _benchmark_rows(dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    for shape, centred in product(((1, 4096), (4096, 4096), (8192, 1152)), (False, True)):
        x, weight = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
        name = f"{'layer_norm' if centred else 'rms_norm'} of {shape[0]} x {shape[1]}"
        yield name, {"x": x, "weight": weight, "eps": 1e-5, "offset": 0.0, "centred": centred}


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    for name, rows in _benchmark_rows(dtype):
        x, residual = rows["x"], torch.randn_like(rows["x"])
        bias = torch.randn_like(rows["weight"]) if rows["centred"] else None
        given = rows | {"bias": bias, "out": torch.empty_like(x)}
        given |= {"gate": None, "residual": None, "residual_out": None}
        yield Example(name, given)
        added = {"residual": residual, "residual_out": torch.empty_like(x)}
        yield Example(f"{name}, residual", given | added)
        if rows["centred"]:
            yield Example(f"{name}, residual, gate", given | added | {"gate": torch.randn_like(rows["weight"])})


def _backward_examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(2)

    def random(like: Tensor, *size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(like.dtype)

    def example(name: str, x: Tensor, centred: bool, **more: Any) -> Example:
        weight = more.get("weight", random(x, x.shape[-1]))
        parameter = torch.full((x.shape[-1],), math.nan, dtype=x.dtype if weight is None else weight.dtype)
        arguments = {
            "x": x, "grad": random(x, *x.shape), "weight": weight, "eps": 1e-5, "offset": 0.0, "centred": centred,
            "residual_grad": None, "grad_x": torch.full_like(x, math.nan),
            "grad_weight": parameter, "grad_bias": parameter.clone() if centred else None,
        }  # fmt: skip
        return Example(f"{name}, {'layer_norm' if centred else 'rms_norm'}", arguments | more)

    for centred in (False, True):
        for name, x, more in _row_examples(dtype):
            yield example(name, x, centred, **more)
        for rows in (1, 31, 32, 33, 64, 65, 200):
            yield example("around a chunk", random(torch.empty(0, dtype=dtype), rows, 50), centred)
        x = random(x, 2, 3, 40)
        yield example("residual's gradient", x, centred, residual_grad=random(x, 2, 3, 40))
        yield example("strided gradients", x, centred, grad=random(x, 2, 5, 90)[:, ::2, 33:73])
        yield example("x's gradient alone", x, centred, grad_weight=None, grad_bias=None)
        yield example("no gradient of x", x, centred, grad_x=None)
        for size in ((3, 5, 40), (1, 70), (4, 2, 3, 33), (2, 40, 16), (5, 2200)):
            x = random(x, *size)
            nothing = torch.full((size[0], size[-1]), math.nan, dtype=x.dtype)
            of_samples = {"weight": random(x, *nothing.shape), "grad_weight": nothing, "offset": 1.0}
            yield example("of each sample", x, centred, **of_samples, grad_bias=nothing.clone() if centred else None)
            yield example("weight's alone", x, centred, **of_samples, grad_bias=None)
        special = random(x, 8, 40)
        special[1, 3], special[2, 39], special[3, 0] = math.nan, math.inf, -math.inf
        yield example("NaN and Inf", special, centred)
        x, grad = random(x, 6, 100), random(x, 6, 100)
        yield Example("in place", example("", x, centred, grad=grad, grad_x=grad).arguments)
    yield example("Gemma's offset", random(x, 5, 70), False, offset=1.0)


def _backward_benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    for name, rows in _benchmark_rows(dtype):
        x, weight = rows["x"], rows["weight"]
        gradients: dict[str, Any] = {"grad_x": torch.empty_like(x), "grad_weight": torch.empty_like(weight)}
        gradients |= {"grad_bias": torch.empty_like(weight) if rows["centred"] else None}
        yield Example(name, rows | {"grad": torch.randn_like(x), "residual_grad": None} | gradients)


ROW_NORM = OpSpec(
    name="row_norm",
    function=row_norm,
    reference=lambda out, residual_out, **arguments: row_norm_reference(**arguments),
    operator=_kernel,
    outputs=("out", "residual_out"),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(
        *(example.arguments[name] for name in ("x", "residual", "gate", "weight", "bias", "out", "residual_out"))
    ),
    flops=lambda example: 8 * example.arguments["x"].numel(),
    benchmarks=_benchmarks,
)

ROW_NORM_BACKWARD = OpSpec(
    name="row_norm_backward",
    function=row_norm_backward,
    reference=lambda grad_x, grad_weight, grad_bias, **arguments: row_norm_backward_reference(**arguments),
    operator=_kernel_backward,
    outputs=("grad_x", "grad_weight", "grad_bias"),
    backends=_BACKENDS,
    examples=_backward_examples,
    bytes_moved=lambda example: tensor_bytes(
        *(example.arguments[name] for name in ("x", "grad", "residual_grad", "grad_x", "weight"))
    ),
    flops=lambda example: 20 * example.arguments["x"].numel(),
    benchmarks=_backward_benchmarks,
)
