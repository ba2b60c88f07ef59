"""group_norm_silu: silu(group_norm(x)), as every U-Net's residual block has it, reading x from memory once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pygen import _C  # noqa: F401  (registers the operator)
from pygen.ops.backend import triton_kernels, use_reference, use_triton
from pygen.ops.spec import Example, OpSpec, tensor_bytes

_BACKENDS = ("reference", "cpu", "triton")


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """silu(group_norm(x)): statistics in float32 or better, whatever x's mean; one rounding to x's dtype at the end.

    Differentiable, once; the backward pass makes the statistics again.

    On a CPU the (sample, group) pairs are shared among the threads, neighbouring groups together where x is
    channels-last: where there are fewer pairs than threads, some threads rest.

    Args:
        x: (samples, channels, ...), float32, bfloat16 or float16; each sample contiguous or channels-last.
        weight, bias: (channels,), or (samples, channels) of each sample, in x's dtype or float32; 1 and 0 where None.
        groups: how many groups of neighbouring channels to normalise; divides the channels.
        eps: added to the variance.
        out: of x's shape, dtype and memory format; may be x. New where left out; where it is given, nothing is recorded
            for autograd.

    Returns:
        ``out``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if out is None:
        learns = (tensor is not None and tensor.requires_grad for tensor in (x, weight, bias))
        if torch.is_grad_enabled() and any(learns):
            recorded: Tensor = _GroupNormSilu.apply(x, weight, bias, groups, eps)
            return recorded
        out = torch.empty_like(x)
    if use_reference("group_norm_silu", _BACKENDS, x.device):
        return out.copy_(group_norm_silu_reference(x, weight, bias, groups, eps)[0])
    if use_triton("group_norm_silu", x.device):
        _triton(x, weight, bias, groups, eps, out)
    else:
        _kernel(x, weight, bias, groups, eps, out)
    return out


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.groups, ctx.eps = groups, eps
        return group_norm_silu(x, weight, bias, groups, eps, out=torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if grad.stride() != x.stride():
            grad = torch.empty_like(x).copy_(grad)
        grad_x = torch.empty_like(x)
        sums = x.new_empty((*x.shape[:2], 2), dtype=torch.promote_types(x.dtype, torch.float32))
        group_norm_silu_backward(x, grad, weight, bias, ctx.groups, ctx.eps, grad_x, sums)
        of_parameters = (
            None if parameter is None else (part if parameter.dim() == 2 else part.sum(0)).to(parameter.dtype)
            for part, parameter in zip(sums.unbind(2), (weight, bias), strict=True)
        )
        return grad_x, *of_parameters, None, None


def group_norm_silu_backward(
    x: Tensor,
    grad: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    grad_x: Tensor,
    channel_sums: Tensor,
) -> Tensor:
    """Writes the gradient of x, and each sample's part in those of weight and bias.

    Args:
        grad: of the result; as x, and of its memory format.
        grad_x: receives x's gradient; likewise.
        channel_sums: float32 (samples, channels, 2), contiguous: receives the parts of weight's and of bias's gradient.

    Returns:
        ``grad_x``.
    """
    if use_reference("group_norm_silu_backward", _BACKENDS, x.device):
        results = group_norm_silu_backward_reference(x, grad, weight, bias, groups, eps)
        for tensor, result in zip((grad_x, channel_sums), results, strict=True):
            tensor.copy_(result)
    elif use_triton("group_norm_silu_backward", x.device):
        _triton_backward(x, grad, weight, bias, groups, eps, grad_x, channel_sums)
    else:
        _backward_kernel(x, grad, weight, bias, groups, eps, grad_x, channel_sums)
    return grad_x


def group_norm_silu_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float = 1e-5
) -> tuple[Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if parameter is None else parameter.to(compute) for parameter in (weight, bias))
    # torch.nn.functional's refuses groups of one element.
    if all(parameter is None or parameter.dim() == 1 for parameter in (weight, bias)):
        y = torch.group_norm(x.to(compute), groups, weight, bias, eps)
    else:
        y, shape = torch.group_norm(x.to(compute), groups, None, None, eps), (-1, x.shape[1], *[1] * (x.dim() - 2))
        y = y if weight is None else y * weight.reshape(shape)
        y = y if bias is None else y + bias.reshape(shape)
    return (functional.silu(y).to(x.dtype),)


def group_norm_silu_backward_reference(
    x: Tensor, grad: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)

    def by_channel(parameter: Tensor | None, otherwise: float) -> Tensor:
        values = x.new_full((x.shape[1],), otherwise, dtype=compute) if parameter is None else parameter.to(compute)
        return values.reshape(-1, groups, x.shape[1] // groups, 1)

    size = (len(x), groups, x.shape[1] // groups, math.prod(x.shape[2:]))
    wide, wide_grad = (tensor.to(compute).reshape(size) for tensor in (x, grad))
    variance, mean = torch.var_mean(wide, dim=(2, 3), correction=0, keepdim=True)
    reciprocal = (variance + eps).rsqrt()
    normal = (wide - mean) * reciprocal
    weights = by_channel(weight, 1.0)
    z = normal * weights + by_channel(bias, 0.0)
    slope = z.sigmoid() * (1 + z * (1 - z.sigmoid()))
    of_z = wide_grad * slope
    weighed = of_z * weights
    means = weighed.mean((2, 3), keepdim=True), (weighed * normal).mean((2, 3), keepdim=True)
    of_x = reciprocal * (weighed - means[0] - normal * means[1])
    sums = torch.stack(((of_z * normal).sum(3), of_z.sum(3)), dim=-1).reshape(len(x), x.shape[1], 2)
    return of_x.reshape(x.shape).to(x.dtype), sums


_kernel = torch.ops.pygen.group_norm_silu.default
_backward_kernel = torch.ops.pygen.group_norm_silu_backward.default


@torch.library.register_fake("pygen::group_norm_silu_backward")
def _fake_backward(*arguments: object) -> None:
    return None


@torch.library.register_fake("pygen::group_norm_silu")
def _fake(*arguments: object) -> None:
    return None


def _triton(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, out: Tensor) -> None:
    _check("group_norm_silu", x, weight, bias, groups, out=out)
    if x.numel() == 0:
        return
    # (samples, channels, pixels); a view, or the spatial dimensions do not merge.
    x, out = (_merge_pixels(name, tensor) for name, tensor in (("x", x), ("out", out)))
    floats = partial(x.new_empty, dtype=torch.float32)
    with torch.cuda.device_of(x):
        triton_kernels("group_norm_silu").launch(x, weight, bias, groups, eps, out, floats)


torch.library.impl("pygen::group_norm_silu", "CUDA", _triton)


def _triton_backward(
    x: Tensor,
    grad: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    grad_x: Tensor,
    channel_sums: Tensor,
) -> None:
    op = "group_norm_silu's backward pass"
    _check(op, x, weight, bias, groups, grad=grad, grad_x=grad_x)
    size = (*x.shape[:2], 2)
    if channel_sums.shape != size or channel_sums.dtype != torch.float32 or not channel_sums.is_contiguous():
        raise ValueError(f"{op}: channel_sums must be float32, contiguous, of shape {list(size)}")
    if x.numel() == 0:
        channel_sums.zero_()
        return
    x, grad, grad_x = (_merge_pixels(name, t) for name, t in (("x", x), ("grad", grad), ("grad_x", grad_x)))
    with torch.cuda.device_of(x):
        triton_kernels("group_norm_silu_backward").launch(x, grad, weight, bias, groups, eps, grad_x, channel_sums)


torch.library.impl("pygen::group_norm_silu_backward", "CUDA", _triton_backward)


def _check(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, **like: Tensor) -> None:
    """What csrc checks for the CPU; like: tensors of x's shape and dtype."""
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have shape (samples, channels, ...), got {list(x.shape)}")
    samples, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise ValueError(f"{op}: groups must divide x's {channels} channels, got {groups}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: x must be float32, bfloat16 or float16, got {x.dtype}")
    for name, tensor in like.items():
        if tensor.shape != x.shape or tensor.dtype != x.dtype:
            raise ValueError(
                f"{op}: {name} must have x's shape {list(x.shape)} and dtype {x.dtype}, "
                f"got {list(tensor.shape)} and {tensor.dtype}"
            )
    parameters = {name: tensor for name, tensor in (("weight", weight), ("bias", bias)) if tensor is not None}
    for name, parameter in parameters.items():
        if parameter.shape not in ((channels,), (samples, channels)):
            shapes = f"({channels},) or ({samples}, {channels})"
            raise ValueError(f"{op}: {name} must have shape {shapes}, got {list(parameter.shape)}")
        if parameter.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{op}: {name} must have x's dtype {x.dtype} or be float32, got {parameter.dtype}")
    for name, tensor in {"x": x, **parameters, **like}.items():
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must lie on x's device {x.device}, got {tensor.device}")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(f"{op} is not differentiable, and {name} requires grad: call it under torch.no_grad()")


def _merge_pixels(name: str, tensor: Tensor) -> Tensor:
    try:
        return tensor.view(*tensor.shape[:2], -1)
    except RuntimeError:
        raise ValueError(
            f"group_norm_silu: {name}'s samples must be contiguous or channels-last, call contiguous() on it; got "
            f"shape {list(tensor.shape)} and strides {tensor.stride()}"
        ) from None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def tensor(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def example(name: str, x: Tensor, groups: int, like: torch.dtype = dtype, **more: Any) -> Example:
        x = x if x.dtype == dtype else x.to(dtype)
        weight, bias = (tensor(x.shape[1]).to(like) for _ in range(2))
        out = torch.full_like(x, math.nan)
        arguments = {"x": x, "weight": weight, "bias": bias, "groups": groups, "eps": 1e-5, "out": out}
        return Example(name, arguments | more, own_bits=dtype == torch.bfloat16)

    def channels_last(x: Tensor) -> Tensor:
        return x.to(dtype).to(memory_format=torch.channels_last)

    for pixels in range(1, 70):
        yield example("every count of pixels", tensor(1, 6, pixels), 2)
    for width in range(1, 70):
        yield example("every count of channels", channels_last(tensor(1, 2 * width, 3, 3)), 2)
    yield example("latents", tensor(2, 64, 16, 16), 32)
    yield example("channels-last", channels_last(tensor(2, 96, 9, 15)), 32)
    yield example("channels-last, wide groups", channels_last(tensor(2, 320, 5, 5)), 2)
    yield example("channels-last, many pixels", channels_last(tensor(1, 40, 20, 31)), 4)
    yield example("many blocks", tensor(1, 4, 5, 1001), 2)
    yield example("many blocks, channels-last", channels_last(tensor(1, 4, 35, 40)), 1)
    yield example("blocks of unlike means", tensor(1, 2, 5500) + 3e2 * (torch.arange(5500) > 4000), 1)
    for groups in (1, 5, 35):
        yield example(f"{groups} groups", tensor(3, 35, 7, 5), groups)
        yield example(f"{groups} groups, channels-last", channels_last(tensor(3, 35, 7, 5)), groups)
    yield example("no pixels to speak of", tensor(5, 48), 6)
    yield example("groups of one element", tensor(2, 6), 6)
    yield example("one channel", tensor(2, 1, 8, 9), 1)
    yield example("sequence", tensor(2, 24, 50), 8)
    yield example("volume", tensor(2, 12, 3, 5, 4), 3)
    x = tensor(2, 12, 3, 5, 4).to(dtype).to(memory_format=torch.channels_last_3d)
    yield example("volume, channels-last", x, 3)
    yield example("empty batch", tensor(0, 8, 4, 4), 2)
    yield example("no pixels", tensor(2, 8, 0, 4), 2)
    for name, mean in (("mean 1e3", 1e3), ("mean -3e4", -3e4)):
        yield example(name, tensor(2, 16, 12, 12) + mean, 4)
        yield example(f"{name}, channels-last", channels_last(tensor(2, 16, 12, 12) + mean), 4)
    yield example("means differ", tensor(2, 16, 40, 12) + 100 * tensor(2, 16, 40, 1), 4)
    yield example("an outlier first", torch.cat([1e4 * tensor(8, 8, 1), tensor(8, 8, 5000)], dim=2), 8)
    yield example("constant", torch.full((2, 8, 5, 5), 0.7), 2)
    yield example("constant, channels-last", channels_last(torch.full((2, 8, 5, 5), 0.7)), 2)
    yield example("large values", 30 * tensor(2, 8, 9, 9), 2, weight=torch.full((8,), 30.0).to(dtype))
    special = tensor(6, 8, 4, 5)
    special[1, 0, 2, 3], special[2, 5, 0, 0], special[3, 7, 3, 4], special[4, :, 0, 1] = (
        math.nan,
        math.inf,
        -math.inf,
        1,
    )
    special[4, :, 0, 2:4] = math.inf
    yield example("NaN and Inf", special, 4)
    yield example("NaN and Inf, channels-last", channels_last(special), 4)
    infinite = torch.tensor([math.inf, -math.inf, math.nan, 1.0, 0.0, -1.0])
    yield example("NaN and Inf in bias", tensor(2, 6, 5), 2, bias=infinite.to(dtype))
    yield example("no weight", tensor(2, 8, 5, 5), 2, weight=None)
    yield example("no bias", tensor(2, 8, 5, 5), 2, bias=None)
    yield example("neither", tensor(2, 8, 5, 5), 2, weight=None, bias=None)
    yield example("float32 parameters", tensor(2, 8, 5, 5), 2, like=torch.float32)
    yield example("strided parameters", tensor(2, 8, 5, 5), 2, weight=tensor(16)[::2].to(dtype))
    for name, size in (("", (3, 24, 5, 5)), (", of pixels", (3, 24))):
        yield example(
            f"parameters of a sample{name}", tensor(*size), 6, weight=tensor(3, 24).to(dtype), bias=tensor(3, 24)
        )
    yield example("a weight of a sample, channels-last", channels_last(tensor(3, 24, 5, 5)), 6, weight=tensor(3, 24))
    yield example("a sliced bias of a sample", tensor(3, 24, 7), 6, bias=tensor(6, 48)[::2, 24:].to(dtype))
    yield example("another eps", 0.01 * tensor(2, 8, 5, 5), 2, eps=0.3)
    wide = tensor(3, 48, 6, 7).to(dtype)
    yield example("sliced", wide[::2, 8:40], 4)
    yield example("sliced, channels-last", channels_last(wide)[::2, 8:40], 4)
    yield example("misaligned", tensor(1 + 2 * 16 * 33).to(dtype)[1:].view(2, 16, 33), 4)
    x = tensor(2, 24, 7, 9).to(dtype)
    yield example("in place", x, 4, out=x)
    x = channels_last(tensor(2, 72, 7, 9))
    yield example("in place, channels-last", x, 4, out=x)


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    sizes = {"the middle of a U-Net": (2, 1280, 8, 8), "its first blocks": (2, 320, 64, 64)}
    for name, size in sizes.items():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(size).to(dtype).to(memory_format=memory_format)
            weight, bias = torch.randn(2, size[1]).to(dtype)
            suffix = ", channels-last" if memory_format is torch.channels_last else ""
            arguments = {"x": x, "weight": weight, "bias": bias, "groups": 32, "eps": 1e-5, "out": torch.empty_like(x)}
            yield Example(name + suffix, arguments)


GROUP_NORM_SILU = OpSpec(
    name="group_norm_silu",
    function=group_norm_silu,
    reference=lambda out, **arguments: group_norm_silu_reference(**arguments),
    operator=_kernel,
    outputs=("out",),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(example.arguments["x"], example.arguments["out"]),
    flops=lambda example: 30 * example.arguments["x"].numel(),
    benchmarks=_benchmarks,
)


def _backward_of(examples: Iterator[Example]) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(1)
    for example in examples:
        x = example.arguments["x"]
        if any(word in example.name for word in ("NaN", "in place", "constant", "one element")):
            continue  # the gradients of the last two are rounding errors alone
        grad, sums = torch.empty_like(x), torch.full((*x.shape[:2], 2), math.nan)
        grad.copy_(torch.randn(x.shape, generator=generator))
        given = {name: value for name, value in example.arguments.items() if name not in ("x", "out")}
        yield Example(example.name, {"x": x, "grad": grad} | given | {"grad_x": grad.clone(), "channel_sums": sums})


GROUP_NORM_SILU_BACKWARD = OpSpec(
    name="group_norm_silu_backward",
    function=group_norm_silu_backward,
    reference=lambda grad_x, channel_sums, **arguments: group_norm_silu_backward_reference(**arguments),
    operator=_backward_kernel,
    outputs=("grad_x", "channel_sums"),
    backends=_BACKENDS,
    examples=lambda dtype: _backward_of(_examples(dtype)),
    bytes_moved=lambda example: 3 * tensor_bytes(example.arguments["x"]),
    flops=lambda example: 60 * example.arguments["x"].numel(),
    benchmarks=lambda dtype: _backward_of(_benchmarks(dtype)),
)
