"""group_norm_silu: one program per (sample, group), which reads it three times, from the cache after the first; where
these are too few for a GPU and large, several to each: some take the moments of a part, then some normalise one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource

WARPS = 8
_TILE = 4096
_PROGRAMS = 512  # about as many as keep a GPU busy


@triton.jit
def _moments(x, x_channel, x_pixel, c, p, channels, begin, end, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """Of the pixels from one to another of a group from x on: their mean, as float32 has it, and the sums of what lies
    off it and of that squared."""
    sums = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for c0 in range(0, channels, CHANNELS):
        for p0 in range(begin, end, PIXELS):
            inside = (c0 + c < channels) & (p0 + p < end)
            sums += tl.load(x + (c0 + c) * x_channel + (p0 + p) * x_pixel, inside, 0.0).to(tl.float32)
    mean = tl.sum(sums) / (1.0 * channels * (end - begin))

    sums = tl.zeros([CHANNELS, PIXELS], tl.float32)
    squares = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for c0 in range(0, channels, CHANNELS):
        for p0 in range(begin, end, PIXELS):
            inside = (c0 + c < channels) & (p0 + p < end)
            value = tl.load(x + (c0 + c) * x_channel + (p0 + p) * x_pixel, inside, 0.0).to(tl.float32)
            away = tl.where(inside, value - mean, 0.0)
            sums += away
            squares += away * away
    return mean, tl.sum(sums), tl.sum(squares)


@triton.jit
def statistics(x, x_channel, x_pixel, c, p, channels, pixels, eps, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """Of a group from x on: its mean, as float32 has it, what that lacks, and the standard deviation."""
    mean, sum, square = _moments(x, x_channel, x_pixel, c, p, channels, 0, pixels, CHANNELS, PIXELS)
    count = 1.0 * channels * pixels
    left = sum / count
    return mean, left, tl.sqrt_rn(square / count - left * left + eps)


@triton.jit
def _statistics_of_parts(parts, channels, pixels, chunk, splits, eps, SPLITS: tl.constexpr):
    """Likewise, of the moments of a group's parts of `chunk` pixels each, about the mean of the first."""
    part = tl.arange(0, SPLITS)
    there = part < splits
    mean = tl.load(parts)
    away = tl.where(there, tl.load(parts + 3 * part, there, 0.0) - mean, 0.0)
    sum = tl.load(parts + 3 * part + 1, there, 0.0)
    square = tl.load(parts + 3 * part + 2, there, 0.0)
    count = tl.where(there, 1.0 * channels * tl.minimum(chunk, pixels - part * chunk), 0.0)
    left = tl.sum(count * away + sum) / (1.0 * channels * pixels)
    off = left - away  # each part's mean from that of all
    squares = tl.sum(tl.where(there, square - 2.0 * off * sum + count * off * off, 0.0))
    return mean, left, tl.sqrt_rn(squares / (1.0 * channels * pixels) + eps)


@triton.jit
def _part_moments(
    x,
    parts,
    x_sample,
    x_channel,
    x_pixel,
    groups,
    channels,
    pixels,
    chunk,
    splits,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    unit, begin = program // splits, (program % splits).to(tl.int32) * chunk
    x += unit // groups * x_sample + unit % groups * channels * x_channel
    c = tl.arange(0, CHANNELS).to(tl.int64)[:, None]
    p = tl.arange(0, PIXELS).to(tl.int64)[None, :]
    end = tl.minimum(begin + chunk, pixels)
    mean, sum, square = _moments(x, x_channel, x_pixel, c, p, channels, begin, end, CHANNELS, PIXELS)
    tl.store(parts + 3 * program, mean)
    tl.store(parts + 3 * program + 1, sum)
    tl.store(parts + 3 * program + 2, square)


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
    parts,  # None: a program takes a whole group
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
    chunk,  # pixels of a part
    splits,
    eps,
    CHANNELS: tl.constexpr,  # of a tile
    PIXELS: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two, at least splits
):
    program = tl.program_id(0).to(tl.int64)
    unit, begin = program // splits, (program % splits).to(tl.int32) * chunk
    sample, first = unit // groups, unit % groups * channels
    x += sample * x_sample + first * x_channel
    out += sample * out_sample + first * out_channel
    c = tl.arange(0, CHANNELS).to(tl.int64)[:, None]
    p = tl.arange(0, PIXELS).to(tl.int64)[None, :]

    if parts is None:
        mean, left, deviation = statistics(x, x_channel, x_pixel, c, p, channels, pixels, eps, CHANNELS, PIXELS)
    else:
        mean, left, deviation = _statistics_of_parts(
            parts + 3 * unit * splits, channels, pixels, chunk, splits, eps, SPLITS
        )
    end = tl.minimum(begin + chunk, pixels)
    for c0 in range(0, channels, CHANNELS):
        scale, offset = scale_and_shift(
            weight, weight_sample, weight_channel, bias, bias_sample, bias_channel, sample, first + c0 + c,
            c0 + c < channels,
        )  # fmt: skip
        factor = scale / deviation
        for p0 in range(begin, end, PIXELS):
            inside = (c0 + c < channels) & (p0 + p < end)
            value = tl.load(x + (c0 + c) * x_channel + (p0 + p) * x_pixel, inside, 0.0).to(tl.float32)
            y = (value - mean - left) * factor + offset
            y = y / (1.0 + tl.exp(-y))
            tl.store(out + (c0 + c) * out_channel + (p0 + p) * out_pixel, y.to(out.dtype.element_ty), inside)


def launch(x: Any, weight: Any, bias: Any, groups: int, eps: float, out: Any, floats: Callable[[int], Any]) -> None:
    """x and out are (samples, channels, pixels), of any strides; floats: makes a tensor of so many, on x's device."""
    samples, channels, pixels = x.shape
    of_group, units = channels // groups, samples * groups
    sizes = tile(of_group, pixels, by_pixel=x.stride(1) < x.stride(2))
    chunk, splits = _split(units, of_group, pixels, sizes)
    parts = None
    if splits > 1:
        parts = floats(units * splits * 3)
        _part_moments[(units * splits,)](
            x, parts, *x.stride(), groups, of_group, pixels, chunk, splits, **sizes, num_warps=WARPS
        )
    _group_norm_silu[(units * splits,)](
        x, weight, bias, out, parts, *x.stride(), *out.stride(), *strides_of(weight), *strides_of(bias), groups,
        of_group, pixels, chunk, splits, eps, **sizes, SPLITS=triton.next_power_of_2(splits), num_warps=WARPS,
    )  # fmt: skip


def _split(units: int, channels: int, pixels: int, sizes: dict[str, int]) -> tuple[int, int]:
    """The pixels of a part of a group, of which no one is less than a tile, and how many parts there are."""
    tiles = -(-pixels // sizes["PIXELS"])
    splits = min(tiles, -(-_PROGRAMS // units)) if channels * pixels > _TILE else 1
    chunk = -(-tiles // splits) * sizes["PIXELS"]
    return chunk, -(-pixels // chunk)


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
    """The kernels for a U-Net's activations in "fp32", "bf16" or "fp16", in both memory formats, and for groups of one
    channel, in one part and in several; with options."""
    pointers = dict.fromkeys(("x", "weight", "bias", "out"), f"*{dtype}")
    yield from sources_of(_group_norm_silu, ("x", "out"), pointers, parts=None, splits=1, SPLITS=1)
    of_parts = {"parts": "*fp32"}
    yield from sources_of(_group_norm_silu, ("x", "out"), pointers | of_parts, SPLITS=8)
    yield from sources_of(_part_moments, ("x",), {"x": f"*{dtype}"} | of_parts)


def sources_of(
    kernel: Any, images: Sequence[str], pointers: dict[str, str], most: int = _TILE, **settings: Any
) -> Iterator[tuple[ASTSource, dict[str, Any]]]:
    """A kernel that walks images by groups; pointers: all tensors, with their types; settings: its other constants."""
    names = kernel.arg_names
    strides = [f"{image}_{unit}" for image in images for unit in ("sample", "channel", "pixel")]
    ints = dict.fromkeys(
        (*strides, "weight_sample", "bias_sample", "groups", "channels", "pixels", "chunk", "splits"), "i32"
    )
    for channels, by_pixel in ((10, False), (10, True), (1, False)):
        unit = "channel" if by_pixel else "pixel"
        constants = {f"{image}_{unit}": 1 for image in images} | {"weight_channel": 1, "bias_channel": 1}
        constants |= tile(channels, 4096, by_pixel, most) | settings
        if channels == 1:
            constants["channels"] = 1  # as Triton has it for every 1
        constants = {name: value for name, value in constants.items() if name in names}
        types = pointers | ints | {"eps": "fp32"} | dict.fromkeys(constants, "constexpr")
        aligned = [n for n in (*pointers, *strides, "pixels", "chunk") if n in names and n not in constants]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        signature = {name: types[name] for name in names}
        yield ASTSource(kernel, signature, constants, attributes), {"num_warps": WARPS}
