"""group_norm_silu: silu(group_norm(x)), as every U-Net's residual block has it, reading x from memory once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
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

    On a CPU the (sample, group) pairs are shared among the threads, neighbouring groups together where x is
    channels-last: where there are fewer pairs than threads, some threads rest.

    Args:
        x: (samples, channels, ...), float32, bfloat16 or float16; each sample contiguous or channels-last.
        weight, bias: (channels,), in x's dtype or float32; 1 and 0 where None.
        groups: how many groups of neighbouring channels to normalise; divides the channels.
        eps: added to the variance.
        out: of x's shape, dtype and memory format; may be x. New where left out.

    Returns:
        ``out``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if out is None:
        out = torch.empty_like(x)
    if use_reference("group_norm_silu", _BACKENDS, x.device):
        return out.copy_(group_norm_silu_reference(x, weight, bias, groups, eps)[0])
    if use_triton("group_norm_silu", x.device):
        _triton(x, weight, bias, groups, eps, out)
    else:
        _kernel(x, weight, bias, groups, eps, out)
    return out


def group_norm_silu_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float = 1e-5
) -> tuple[Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if parameter is None else parameter.to(compute) for parameter in (weight, bias))
    # torch.nn.functional's refuses groups of one element.
    return (functional.silu(torch.group_norm(x.to(compute), groups, weight, bias, eps)).to(x.dtype),)


_kernel = torch.ops.pygen.group_norm_silu.default


@torch.library.register_fake("pygen::group_norm_silu")
def _fake(*arguments: object) -> None:
    return None


def _triton(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, out: Tensor) -> None:
    samples, channels = _check(x, weight, bias, groups, out)
    if x.numel() == 0:
        return
    # (samples, channels, pixels); a view, or the spatial dimensions do not merge.
    x, out = (_merge_pixels(name, tensor) for name, tensor in (("x", x), ("out", out)))
    with torch.cuda.device_of(x):
        triton_kernels("group_norm_silu").launch(x, weight, bias, samples, channels, x.shape[2], groups, eps, out)


torch.library.impl("pygen::group_norm_silu", "CUDA", _triton)


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, out: Tensor) -> tuple[int, int]:
    """What csrc checks for the CPU."""
    if x.dim() < 2:
        raise ValueError(f"group_norm_silu: x must have shape (samples, channels, ...), got {list(x.shape)}")
    samples, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise ValueError(f"group_norm_silu: groups must divide x's {channels} channels, got {groups}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"group_norm_silu: x must be float32, bfloat16 or float16, got {x.dtype}")
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"group_norm_silu: out must have x's shape {list(x.shape)} and dtype {x.dtype}, "
            f"got {list(out.shape)} and {out.dtype}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.shape != (channels,):
            raise ValueError(f"group_norm_silu: {name} must have shape ({channels},), got {list(parameter.shape)}")
        if parameter.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"group_norm_silu: {name} must have x's dtype {x.dtype} or be float32, got {parameter.dtype}"
            )
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("out", out)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"group_norm_silu: {name} must lie on x's device {x.device}, got {tensor.device}")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(
                f"group_norm_silu is not differentiable, and {name} requires grad: call it under torch.no_grad()"
            )
    return samples, channels


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
        return Example(name, arguments | more)

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
