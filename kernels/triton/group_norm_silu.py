"""group_norm_silu: one program per (sample, group), which reads it three times, from the cache after the first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource

WARPS = 8
_TILE = 4096


@triton.jit
def statistics(x, x_channel, x_pixel, c, p, channels, pixels, eps, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """Of a group from x on: its mean, as float32 has it, what that lacks, and the standard deviation."""
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
    return mean, left, deviation


@triton.jit
def scale_and_shift(weight, weight_sample, weight_channel, bias, bias_sample, bias_channel, sample, channel, inside):
    """Of a sample's channels: weight and bias, 1 and 0 where there is none."""
    scale, shift = tl.where(inside, 1.0, 0.0), tl.where(inside, 0.0, 0.0)
    if weight is not None:
        scale = tl.load(weight + sample * weight_sample + channel * weight_channel, inside, 0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + sample * bias_sample + channel * bias_channel, inside, 0.0).to(tl.float32)
    return scale, shift


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
    out += sample * out_sample + first * out_channel
    c = tl.arange(0, CHANNELS).to(tl.int64)[:, None]
    p = tl.arange(0, PIXELS).to(tl.int64)[None, :]

    mean, left, deviation = statistics(x, x_channel, x_pixel, c, p, channels, pixels, eps, CHANNELS, PIXELS)
    for c0 in range(0, channels, CHANNELS):
        scale, offset = scale_and_shift(
            weight, weight_sample, weight_channel, bias, bias_sample, bias_channel, sample, first + c0 + c,
            c0 + c < channels,
        )  # fmt: skip
        factor = scale / deviation
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
    _group_norm_silu[(samples * groups,)](
        x, weight, bias, out, *x.stride(), *out.stride(), *strides_of(weight), *strides_of(bias), groups,
        channels // groups, pixels, eps,
        **tile(channels // groups, pixels, by_pixel=x.stride(1) < x.stride(2)), num_warps=WARPS,
    )  # fmt: skip


def strides_of(parameter: Any) -> tuple[int, int]:
    """Of samples and channels."""
    if parameter is None:
        return 0, 0
    return (0 if parameter.dim() == 1 else parameter.stride(0)), parameter.stride(-1)


def tile(channels: int, pixels: int, by_pixel: bool, most: int = _TILE) -> dict[str, int]:
    """As much as there is of what is contiguous in memory, then of the other."""
    sizes = {"CHANNELS": triton.next_power_of_2(channels), "PIXELS": triton.next_power_of_2(pixels)}
    inner, outer = ("CHANNELS", "PIXELS") if by_pixel else ("PIXELS", "CHANNELS")
    first = min(sizes[inner], most)
    return {inner: first, outer: min(sizes[outer], most // first)}


def sources(dtype: str) -> Iterator[tuple[ASTSource, dict[str, Any]]]:
    """The kernel for a U-Net's activations in "fp32", "bf16" or "fp16", in both memory formats, and for groups of one
    channel; with options."""
    yield from sources_of(_group_norm_silu, ("x", "out"), dict.fromkeys(("x", "weight", "bias", "out"), f"*{dtype}"))


def sources_of(
    kernel: Any, images: Sequence[str], pointers: dict[str, str], most: int = _TILE
) -> Iterator[tuple[ASTSource, dict[str, Any]]]:
    """A kernel that walks images by groups; pointers: all tensors, with their types."""
    names = kernel.arg_names
    strides = [f"{image}_{unit}" for image in images for unit in ("sample", "channel", "pixel")]
    ints = dict.fromkeys((*strides, "weight_sample", "bias_sample", "groups", "channels", "pixels"), "i32")
    for channels, by_pixel in ((10, False), (10, True), (1, False)):
        unit = "channel" if by_pixel else "pixel"
        constants = {f"{image}_{unit}": 1 for image in images} | {"weight_channel": 1, "bias_channel": 1}
        constants |= tile(channels, 4096, by_pixel, most)
        if channels == 1:
            constants["channels"] = 1  # as Triton has it for every 1
        types = pointers | ints | {"eps": "fp32"} | dict.fromkeys(constants, "constexpr")
        aligned = [n for n in (*pointers, *strides, "pixels") if n not in constants]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        signature = {name: types[name] for name in names}
        yield ASTSource(kernel, signature, constants, attributes), {"num_warps": WARPS}
