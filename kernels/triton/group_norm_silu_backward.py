"""group_norm_silu_backward: one program per (sample, group), which leaves its channels' sums for the gradients of
weight and bias."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource

from .group_norm_silu import WARPS, scale_and_shift, sources_of, statistics, strides_of, tile

_TILE = 2048  # of which more is held than in the forward pass


@triton.jit
def _load_dz(x, grad, scale, shift, mean, left, deviation, inside):
    """Of some elements: n, the normalised ones, and the gradient of z = n scale + shift."""
    n = tl.where(inside, (tl.load(x, inside, 0.0).to(tl.float32) - mean - left) / deviation, 0.0)
    z = n * scale + shift
    sigmoid = 1.0 / (1.0 + tl.exp(-z))
    return n, tl.load(grad, inside, 0.0).to(tl.float32) * sigmoid * (1.0 + z * (1.0 - sigmoid))


@triton.jit
def _group_norm_silu_backward(
    x,
    grad,
    weight,
    bias,
    grad_x,
    channel_sums,
    x_sample,
    x_channel,
    x_pixel,
    grad_sample,
    grad_channel,
    grad_pixel,
    grad_x_sample,
    grad_x_channel,
    grad_x_pixel,
    weight_sample,
    weight_channel,
    bias_sample,
    bias_channel,
    groups,
    channels,  # of a group
    pixels,
    eps,
    CHANNELS: tl.constexpr,  # of a tile
    PIXELS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample, first = program // groups, program % groups * channels
    x += sample * x_sample + first * x_channel
    grad += sample * grad_sample + first * grad_channel
    grad_x += sample * grad_x_sample + first * grad_x_channel
    channel_sums += program * channels * 2
    c = tl.arange(0, CHANNELS).to(tl.int64)[:, None]
    p = tl.arange(0, PIXELS).to(tl.int64)[None, :]
    count = 1.0 * channels * pixels

    mean, left, deviation = statistics(x, x_channel, x_pixel, c, p, channels, pixels, eps, CHANNELS, PIXELS)
    g_sums = tl.zeros([CHANNELS, 1], tl.float32)  # of g = dz scale
    products = tl.zeros([CHANNELS, 1], tl.float32)  # of g n
    for c0 in range(0, channels, CHANNELS):
        here = c0 + c < channels
        scale, shift = scale_and_shift(
            weight, weight_sample, weight_channel, bias, bias_sample, bias_channel, sample, first + c0 + c, here
        )
        weight_sums = tl.zeros([CHANNELS, PIXELS], tl.float32)
        bias_sums = tl.zeros([CHANNELS, PIXELS], tl.float32)
        for p0 in range(0, pixels, PIXELS):
            inside = here & (p0 + p < pixels)
            x_at, grad_at = (c0 + c) * x_channel + (p0 + p) * x_pixel, (c0 + c) * grad_channel + (p0 + p) * grad_pixel
            n, dz = _load_dz(x + x_at, grad + grad_at, scale, shift, mean, left, deviation, inside)
            weight_sums += dz * n
            bias_sums += dz
        of_weight, of_bias = tl.sum(weight_sums, 1)[:, None], tl.sum(bias_sums, 1)[:, None]
        tl.store(channel_sums + 2 * (c0 + c), of_weight, here)
        tl.store(channel_sums + 2 * (c0 + c) + 1, of_bias, here)
        g_sums += of_bias * scale
        products += of_weight * scale
    mean_g, mean_gn = tl.sum(g_sums) / count, tl.sum(products) / count

    for c0 in range(0, channels, CHANNELS):
        here = c0 + c < channels
        scale, shift = scale_and_shift(
            weight, weight_sample, weight_channel, bias, bias_sample, bias_channel, sample, first + c0 + c, here
        )
        for p0 in range(0, pixels, PIXELS):
            inside = here & (p0 + p < pixels)
            x_at, grad_at = (c0 + c) * x_channel + (p0 + p) * x_pixel, (c0 + c) * grad_channel + (p0 + p) * grad_pixel
            n, dz = _load_dz(x + x_at, grad + grad_at, scale, shift, mean, left, deviation, inside)
            of_x = (dz * scale - mean_g - n * mean_gn) / deviation
            to = grad_x + (c0 + c) * grad_x_channel + (p0 + p) * grad_x_pixel
            tl.store(to, of_x.to(grad_x.dtype.element_ty), inside)


def launch(x: Any, grad: Any, weight: Any, bias: Any, groups: int, eps: float, grad_x: Any, channel_sums: Any) -> None:
    """x, grad and grad_x are (samples, channels, pixels), of any strides."""
    samples, channels, pixels = x.shape
    _group_norm_silu_backward[(samples * groups,)](
        x, grad, weight, bias, grad_x, channel_sums, *x.stride(), *grad.stride(), *grad_x.stride(),
        *strides_of(weight), *strides_of(bias), groups, channels // groups, pixels, eps,
        **tile(channels // groups, pixels, by_pixel=x.stride(1) < x.stride(2), most=_TILE), num_warps=WARPS,
    )  # fmt: skip


def sources(dtype: str) -> Iterator[tuple[ASTSource, dict[str, Any]]]:
    """As the forward pass's."""
    pointers = dict.fromkeys(("x", "grad", "weight", "bias", "grad_x"), f"*{dtype}") | {"channel_sums": "*fp32"}
    yield from sources_of(_group_norm_silu_backward, ("x", "grad", "grad_x"), pointers, _TILE)
