"""Linear layers and convolutions in int8, an approximation, by oneDNN's products of bytes on a CPU.

Weights are symmetric, -127 to 127 by a scale of each output channel, made once and held. Activations are 0 to 255 by a
scale and a zero point of the whole input, found at every call (dynamic quantisation; Jacob et al. 2018, Quantization
and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference): so a sample's result depends on those
that share its batch. Sums are exact, in int32; scales and bias come after, in float32. With s the scale of x and t that
of w, an output is off by s/2 sum |w'| + t/2 sum |x| at most, w' the rounded weights, and by rounding in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pygen.held import Held
from pygen.models.layers import Convolution, convolve, packs, project

SCALES = 254  # from the least activation to the greatest: zero is rounded too, and 255 of them could end at 256
FEWEST_ROWS = 64  # of a product: in those of embeddings of times there is no time to win
AT_ONCE = 1 << 17  # elements, so that what is between their float and their byte stays in a core's cache

_onednn: Any = torch.ops.onednn


@dataclass(frozen=True)
class Bytes:
    """x = scale * (values - zero), in x's order in memory."""

    values: Tensor
    scale: float
    zero: int


def quantised(x: Tensor) -> Bytes | None:
    """Of a flat tensor, not empty; none of what is not finite, or so near to 0 or so large that scales would not be."""
    low, high = (bound.item() for bound in torch.aminmax(x))
    low, high = min(low, 0.0), max(high, 0.0)
    if not 2.0**-100 < high - low < 2.0**100:
        return None
    scale = (high - low) / SCALES
    zero = round(-low / scale)
    values, half_above = torch.empty_like(x, dtype=torch.uint8), torch.tensor([zero + 0.5])
    for part, out in zip(x.split(AT_ONCE), values.split(AT_ONCE), strict=True):
        out.copy_(torch.add(half_above, part, alpha=1 / scale))  # truncated
    return Bytes(values, scale, zero)


@dataclass(frozen=True)
class Weight:
    """In oneDNN's own order, with a scale and a zero point, which is 0, of each output channel."""

    values: Tensor
    scales: Tensor
    zeros: Tensor


def packed(weight: Tensor, pack: Callable[[Tensor, Tensor], Tensor]) -> Weight:
    """Of (out, ...); ``pack`` puts int8, with its scales, into oneDNN's order."""
    weight = weight.detach().float()
    scales = weight.flatten(1).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    values = (weight / scales.view(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8)
    return Weight(pack(values, scales), scales, torch.zeros(len(scales), dtype=torch.int32))


def _product(x: Bytes, weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    bias = None if bias is None else bias.float()
    operands = (x.values, x.scale, x.zero, weight.values, weight.scales, weight.zeros, bias)
    return _onednn.qlinear_pointwise(*operands, 1.0, 0, dtype, "none", [], "")


@functools.cache
def bytes_are_exact() -> bool:
    """Whether products of bytes are: without VNNI's instructions, or the like, sums of two saturate in 16 bits."""
    if not torch.backends.mkldnn.is_available():
        return False
    rows, width = 64, 256
    x = Bytes(torch.full((rows, width), 255, dtype=torch.uint8), 1.0, 0)
    weight = packed(torch.full((rows, width), 127.0), lambda values, _: _onednn.qlinear_prepack(values, [rows, width]))
    return bool((_product(x, weight, None, torch.float32) == 255 * 127 * width).all())


def project_int8(module: nn.Linear, held: Held[Weight], exact: Held[Tensor], x: Tensor) -> Tensor:
    """``module``'s product of (..., in_features), in x's dtype, float32 or bfloat16; exact in fewer rows than
    ``FEWEST_ROWS``, where something learns, and of what is not finite."""
    rows = x.numel() // module.in_features
    x_bytes = quantised(x.reshape(-1)) if rows >= FEWEST_ROWS and packs(module, x) else None
    if x_bytes is None:
        return project(module, exact, x)
    shape = [rows, module.in_features]
    weight = held.get(
        (module.weight,), lambda: packed(module.weight, lambda values, _: _onednn.qlinear_prepack(values, shape))
    )
    matrix = Bytes(x_bytes.values.view(shape), x_bytes.scale, x_bytes.zero)
    return _product(matrix, weight, module.bias, x.dtype).view(*x.shape[:-1], module.out_features)


def convolve_int8(module: nn.Conv2d, held: Held[Weight], exact: Held[Convolution], x: Tensor) -> Tensor:
    """Likewise ``module``'s convolution, of one group and padded with zeros, channels-last."""
    rows = x.numel() // module.in_channels
    if rows < FEWEST_ROWS or x.dim() != 4 or not packs(module, x):
        return convolve(module, exact, x)
    x = x.contiguous(memory_format=torch.channels_last)
    last = x.permute(0, 2, 3, 1)
    x_bytes = quantised(last.reshape(-1))
    if x_bytes is None:
        return convolve(module, exact, x)
    how = (module.stride, module.padding, module.dilation, module.groups)

    def pack(values: Tensor, scales: Tensor) -> Tensor:  # for any scale of x, and any zero point but 0
        return _onednn.qconv_prepack(values, scales, 1.0, 1, *how, list(x.shape))

    weight = held.get((module.weight,), lambda: packed(module.weight, pack))
    values = x_bytes.values.view(last.shape).permute(0, 3, 1, 2)
    bias = None if module.bias is None else module.bias.float()
    operands = (values, x_bytes.scale, x_bytes.zero, weight.values, weight.scales, weight.zeros, bias)
    return _onednn.qconv2d_pointwise(*operands, *how, 1.0, 0, x.dtype, "none", [], "")
