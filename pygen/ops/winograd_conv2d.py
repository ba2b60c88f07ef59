"""winograd_conv2d: 3x3 convolutions of images with many channels, by 16 products in the place of 36, or 36 of 144.

Tiles of m x m outputs see (m + 2) x (m + 2) pixels. With the transforms of F(m x m, 3x3) (Lavin & Gray 2015)

    Y = A^T ((G g G^T) * (B^T d B)) A

of weight g and pixels d, summed over channels, they are as many products, which for all tiles of an image are that many
matrix products. Transforms and sums are float32. Tiles are 4 x 4, at the points 0, 2/3, -2/3, 3/2, -3/2 and
infinity (with the usual 1 and 2 the errors are twice as large), which err no more than a direct convolution of as many
channels; of float32 and less than 256 channels they are 2 x 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pygen.ops.backend import use_reference
from pygen.ops.spec import Example, OpSpec, tensor_bytes

_BACKENDS = ("reference", "cpu")
_PANEL = 64  # outputs that are computed at once


def winograd_weight(weight: Tensor) -> Tensor:
    """What ``winograd_conv2d`` multiplies with, of the weight of a convolution.

    Args:
        weight: (out_channels, channels, 3, 3), float32, bfloat16 or float16.

    Returns:
        (panels, channels, 9, 64), in the same dtype: 64 outputs to a panel.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"winograd_weight: weight must have shape (out_channels, channels, 3, 3), got {weight.shape}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"winograd_weight: weight must be float32, bfloat16 or float16, got {weight.dtype}")
    taps = functional.pad(weight.detach().flatten(2), (0, 0, 0, 0, 0, -len(weight) % _PANEL))
    return taps.unflatten(0, (-1, _PANEL)).permute(0, 2, 3, 1).contiguous()


def winograd_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_channels: int, out: Tensor | None = None
) -> Tensor:
    """conv2d(x, w, bias, padding=1) of the 3x3 weight w that ``weight`` was made of. Not differentiable.

    What is not finite stays where a direct convolution has it. The result does not depend on the number of threads.

    Args:
        x: (batch, channels, height, width), float32, bfloat16 or float16, channels-last.
        weight: (panels, channels, 9, 64), in x's dtype, as ``winograd_weight`` makes it.
        bias: (out_channels,), in x's dtype.
        out_channels: how many there are.
        out: (batch, out_channels, height, width), channels-last, in x's dtype: receives the result; new where left out.

    Returns:
        the result, in ``out``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if x.dim() != 4:
        raise ValueError(f"winograd_conv2d: x must have shape (batch, channels, height, width), got {x.shape}")
    if out_channels < 1:
        raise ValueError(f"winograd_conv2d: out_channels must be positive, got {out_channels}")
    if out is None:
        size = (x.shape[0], out_channels, *x.shape[2:])
        out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if use_reference("winograd_conv2d", _BACKENDS, x.device):
        return out.copy_(winograd_conv2d_reference(x, weight, bias, out_channels=out_channels))
    _kernel(x, weight, bias, out_channels, out)
    return out


def learning_winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv2d(x, weight, bias, padding=1), once differentiable: by these products, x's gradient too.

    Args:
        x: (batch, channels, height, width), float32.
        weight: (out_channels, channels, 3, 3), and bias: (out_channels,) or None; likewise.

    Returns:
        (batch, out_channels, height, width), channels-last.
    """
    y: Tensor = _Learning.apply(x, weight, bias)
    return y


class _Learning(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        return winograd_conv2d(x, winograd_weight(weight), bias, out_channels=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        of_x, *of_parameters = ctx.needs_input_grad
        grad_x = None
        if of_x:  # by the kernel turned round
            turned = winograd_weight(weight.flip(2, 3).transpose(0, 1))
            grad_x = winograd_conv2d(grad, turned, out_channels=x.shape[1])
        how = ([len(weight)], (1, 1), (1, 1), (1, 1), False, (0, 0), 1)  # sizes of the bias, stride, padding, dilation
        _, *rest = torch.ops.aten.convolution_backward(grad, x, weight, *how, (False, *of_parameters))
        return grad_x, *rest


def winograd_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None, *, out_channels: int) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    taps = weight.to(compute).permute(0, 3, 1, 2).flatten(0, 1)[:out_channels].unflatten(2, (3, 3))
    bias = None if bias is None else bias.to(compute)
    return functional.conv2d(x.to(compute), taps, bias, padding=1).to(x.dtype)


_kernel = torch.ops.pygen.winograd_conv2d.default


@torch.library.register_fake("pygen::winograd_conv2d")
def _fake(*arguments: object) -> None:
    return None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    def example(name: str, batch: int, channels: int, height: int, width: int, outputs: int, seed: int = 0) -> Example:
        generator = torch.Generator().manual_seed(seed)

        def tensor(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        x = tensor(batch, channels, height, width).to(dtype).to(memory_format=torch.channels_last)
        weight = winograd_weight((tensor(outputs, channels, 3, 3) / (9 * channels) ** 0.5).to(dtype))
        out = torch.empty(batch, outputs, height, width, dtype=dtype, memory_format=torch.channels_last)
        arguments = {"x": x, "weight": weight, "bias": tensor(outputs).to(dtype), "out_channels": outputs}
        return Example(name, arguments | {"out": out.fill_(math.nan)}, own_bits=True)

    for channels in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48):
        yield example("every count of channels", 2, channels, 6, 5, 20)
    for outputs in (1, 2, 3, 15, 16, 17, 63, 64, 65, 100, 128, 130):
        yield example("every count of outputs", 1, 12, 5, 8, outputs)
    for height, width in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (1, 9), (9, 1), (7, 4), (16, 16)):
        yield example("every size", 2, 24, height, width, 24)
        yield example("every size of many channels", 2, 260, height, width, 24)
    yield example("many blocks", 3, 16, 33, 21, 80)
    yield example("many blocks of many channels", 3, 300, 33, 21, 80)
    yield example("latents", 2, 320, 8, 8, 320)
    yield example("empty batch", 0, 8, 4, 4, 8)
    plain = example("no bias", 2, 10, 7, 7, 70)
    yield Example("no bias", plain.arguments | {"bias": None}, own_bits=True)
    part = example("a part of an image", 2, 20, 5, 6, 12)
    image = torch.randn(2, 9, 8, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    yield Example(part.name, part.arguments | {"x": image.permute(0, 3, 1, 2)[:, 7:27, 1:6, 2:]}, own_bits=True)
    for value, channels in itertools.product((math.nan, math.inf, -math.inf), (20, 270)):
        odd = example(f"{value} in places", 2, channels, 9, 10, 70)
        odd.arguments["x"][0, 3, 4, 5], odd.arguments["x"][1, 19, 0, 9], odd.arguments["x"][1, 0, 8, 0] = (value,) * 3
        yield odd
    large = example("large values", 1, 20, 8, 8, 20)
    large.arguments["x"].mul_(1000)
    yield large


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    sizes = {"the middle of a U-Net": (2, 1280, 8, 1280), "its second blocks": (2, 640, 32, 640),
             "its first blocks": (2, 320, 64, 320)}  # fmt: skip
    for name, (batch, channels, side, outputs) in sizes.items():
        x = torch.randn(batch, channels, side, side).to(dtype).to(memory_format=torch.channels_last)
        weight = winograd_weight((torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5).to(dtype))
        arguments = {"x": x, "weight": weight, "bias": torch.randn(outputs).to(dtype), "out_channels": outputs}
        yield Example(name, arguments | {"out": torch.empty_like(x)})


def _flops(example: Example) -> int:
    """Of the products, of whole tiles; a direct convolution has 2.25 times as many, or 4 times."""
    x, out = example.arguments["x"], example.arguments["out"]
    taps = 16 / 4 if x.dtype == torch.float32 and x.shape[1] < 256 else 36 / 16
    return int(2 * taps * x.shape[1] * out.numel())


WINOGRAD_CONV2D = OpSpec(
    name="winograd_conv2d",
    function=winograd_conv2d,
    reference=lambda out, **arguments: (winograd_conv2d_reference(**arguments),),
    operator=_kernel,
    outputs=("out",),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(*(example.arguments[name] for name in ("x", "weight", "out"))),
    flops=_flops,
    benchmarks=_benchmarks,
)
