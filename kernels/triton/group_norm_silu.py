"""group_norm_silu: one program per (sample, group), which reads it three times, from the cache after the first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource

_TILE = 4096
_WARPS = 8


@triton.jit
def _group_norm_silu(
    x,
    weight,
    bias,
    out,
    x_sample,
    x_channel,
    x_pixel,
    out_sample,
    out_channel,
    out_pixel,
    weight_stride,
    bias_stride,
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
    out += sample * out_sample + first * out_channel
    c = tl.arange(0, CHANNELS).to(tl.int64)[:, None]
    p = tl.arange(0, PIXELS).to(tl.int64)[None, :]
    count = 1.0 * channels * pixels

    sums = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for c0 in range(0, channels, CHANNELS):
        for p0 in range(0, pixels, PIXELS):
            inside = (c0 + c < channels) & (p0 + p < pixels)
            sums += tl.load(x + (c0 + c) * x_channel + (p0 + p) * x_pixel, inside, 0.0).to(tl.float32)
    mean = tl.sum(sums) / count

    # Deviations from the rounded mean tell what the rounding left.
    sums = tl.zeros([CHANNELS, PIXELS], tl.float32)
    squares = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for c0 in range(0, channels, CHANNELS):
        for p0 in range(0, pixels, PIXELS):
            inside = (c0 + c < channels) & (p0 + p < pixels)
            value = tl.load(x + (c0 + c) * x_channel + (p0 + p) * x_pixel, inside, 0.0).to(tl.float32)
            away = tl.where(inside, value - mean, 0.0)
            sums += away
            squares += away * away
    left = tl.sum(sums) / count
    deviation = tl.sqrt_rn(tl.sum(squares) / count - left * left + eps)

    for c0 in range(0, channels, CHANNELS):
        factor = tl.full([CHANNELS, 1], 1.0, tl.float32) / deviation
        offset = tl.zeros([CHANNELS, 1], tl.float32)
        if weight is not None:
            factor *= tl.load(weight + (first + c0 + c) * weight_stride, c0 + c < channels, 0.0).to(tl.float32)
        if bias is not None:
            offset += tl.load(bias + (first + c0 + c) * bias_stride, c0 + c < channels, 0.0).to(tl.float32)
        for p0 in range(0, pixels, PIXELS):
            inside = (c0 + c < channels) & (p0 + p < pixels)
            value = tl.load(x + (c0 + c) * x_channel + (p0 + p) * x_pixel, inside, 0.0).to(tl.float32)
            y = (value - mean - left) * factor + offset
            y = y / (1.0 + tl.exp(-y))
            tl.store(out + (c0 + c) * out_channel + (p0 + p) * out_pixel, y.to(out.dtype.element_ty), inside)


def launch(
    x: Any, weight: Any, bias: Any, samples: int, channels: int, pixels: int, groups: int, eps: float, out: Any
) -> None:
    """x and out are (samples, channels, pixels), of any strides."""
    strides = [0 if parameter is None else parameter.stride(0) for parameter in (weight, bias)]
    _group_norm_silu[(samples * groups,)](
        x, weight, bias, out, *x.stride(), *out.stride(), *strides, groups, channels // groups, pixels, eps,
        **_tile(channels // groups, pixels, by_pixel=x.stride(1) < x.stride(2)), num_warps=_WARPS,
    )  # fmt: skip


def _tile(channels: int, pixels: int, by_pixel: bool) -> dict[str, int]:
    """As much as there is of what is contiguous in memory, then of the other."""
    sizes = {"CHANNELS": triton.next_power_of_2(channels), "PIXELS": triton.next_power_of_2(pixels)}
    inner, outer = ("CHANNELS", "PIXELS") if by_pixel else ("PIXELS", "CHANNELS")
    tile = {inner: min(sizes[inner], _TILE)}
    return tile | {outer: min(sizes[outer], _TILE // tile[inner])}


def sources(dtype: str) -> Iterator[tuple[ASTSource, dict[str, Any]]]:
    """The kernel for a U-Net's activations in "fp32", "bf16" or "fp16", in both memory formats, and for groups of one
    channel; with options."""
    pointers = dict.fromkeys(("x", "weight", "bias", "out"), f"*{dtype}")
    strides = ("x_sample", "x_channel", "x_pixel", "out_sample", "out_channel", "out_pixel")
    ints = dict.fromkeys((*strides, "groups", "channels", "pixels"), "i32")
    for channels, by_pixel in ((10, False), (10, True), (1, False)):
        tile = _tile(channels, 4096, by_pixel)
        unit = "channel" if by_pixel else "pixel"
        constants = {f"x_{unit}": 1, f"out_{unit}": 1, "weight_stride": 1, "bias_stride": 1} | tile
        if channels == 1:
            constants["channels"] = 1  # as Triton has it for every 1
        types = pointers | ints | {"eps": "fp32"} | dict.fromkeys(constants, "constexpr")
        names = _group_norm_silu.arg_names
        aligned = [n for n in (*pointers, *strides, "pixels") if n not in constants]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        signature = {name: types[name] for name in names}
        yield ASTSource(_group_norm_silu, signature, constants, attributes), {"num_warps": _WARPS}
