"""The weight of a linear layer, packed once into the layout that linear_decode streams (see packed_linear.h)."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

PANEL = 32
GROUPS = (32, 64, 128)
WeightFormat = Literal["float32", "bfloat16", "int8", "int4"]
_AT_ONCE = 1 << 18  # elements that are packed at once: what lies in between stays small, and in the caches
FORMATS: tuple[WeightFormat, ...] = ("float32", "bfloat16", "int8", "int4")


class PackedLinear(NamedTuple):
    """A weight as ``pack_linear`` makes it. ``data`` may be moved to another device by ``_replace``; the rest says what
    its bytes mean.

    data: uint8 (panels, bytes of a panel); of a stack of layers (experts, panels, bytes of a panel).
    outputs, inputs: of the layer; of a gated one, ``outputs`` is that of the gate and of the up projection each.
    group: inputs that share a scale, the padding of K included; 0 unless quantised.
    zeros: whether the codes' zeros are stored; the middle of their range where not.
    """

    data: Tensor
    outputs: int
    inputs: int
    format: WeightFormat
    group: int
    zeros: bool
    gated: bool

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    def clone(self) -> PackedLinear:
        """A copy that, like ``pack_linear``'s, lies in large pages: ``data.clone()`` would not."""
        return self._replace(data=in_large_pages(self.data))

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The (dequantised) weight in ``dtype``: (outputs, inputs), or (2 outputs, inputs), the gate's rows first.

        Of a stack of layers, one behind the other: (experts, ...).
        """
        if self.data.dim() == 3:
            return torch.stack([self._replace(data=layer).unpack(dtype) for layer in self.data])
        panels = self.data.shape[0]
        if self.group == 0:
            stored = getattr(torch, self.format)
            pair = 1 if stored == torch.float32 else 2
            lines = self.data.view(stored).view(panels, -1, PANEL, pair)
            return self._rows(lines.transpose(1, 2).reshape(panels, PANEL, -1)).to(dtype)
        header = (1 + self.zeros) * 2 * PANEL
        groups = self.data.view(panels, -1, header + self.group * PANEL // (1 if self.format == "int8" else 2))
        codes = groups[..., header:].reshape(panels, -1, PANEL, 4)  # words of four bytes
        if self.format == "int4":
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).unflatten(3, (2, 2)).permute(0, 1, 2, 4, 5, 3)
        codes = codes.transpose(1, 2).reshape(panels, PANEL, -1, self.group)
        scales, *zeros = (
            numbers.contiguous().view(torch.bfloat16).unflatten(-1, (-1, 2)).transpose(2, 3).flatten(2).transpose(1, 2)
            for numbers in groups[..., :header].split(2 * PANEL, dim=-1)
        )
        zero = zeros[0].to(dtype) if zeros else torch.full_like(scales, 128 if self.format == "int8" else 8).to(dtype)
        weight = scales.to(dtype)[..., None] * (codes.to(dtype) - zero[..., None])
        return self._rows(weight.flatten(2))

    def _rows(self, panels: Tensor) -> Tensor:
        """(panels, 32, padded K) -> the layer's rows."""
        parts = panels.split(PANEL // 2, dim=1) if self.gated else (panels,)
        return torch.cat([part.flatten(0, 1)[: self.outputs, : self.inputs] for part in parts])


def pack_linear(
    weight: Tensor,
    up: Tensor | None = None,
    *,
    format: WeightFormat = "bfloat16",
    group: int | None = None,
    symmetric: bool = True,
) -> PackedLinear:
    """Packs a linear layer's weight for ``linear_decode``, quantising it where the format asks for that.

    Codes are rounded to nearest. Symmetric: the scale is the number of largest magnitude in the group over -2^(bits-1),
    which makes use of all codes (as ggml's Q4_0 does). Asymmetric: the codes span the group and 0, which is met.

    Args:
        weight: (outputs, inputs), floating point: a gated layer's gate where ``up`` is given.
        up: the up projection of a gated layer, of weight's shape.
        format: "float32", "bfloat16", "int8" or "int4".
        group: int8 and int4: neighbouring inputs that share a scale, 32, 64 or 128; 0 for all (one scale per output
            channel). The default is 0 for int8 and 32 for int4.
        symmetric: int8 and int4: without zeros.

    Returns:
        A ``PackedLinear``; its ``unpack()`` gives back the weight that ``linear_decode`` multiplies by.

    Raises:
        ValueError, TypeError: naming the argument; of a weight to be quantised, where it is not finite.
    """
    parts = _check(weight, up, format, group, symmetric)
    outputs, inputs = weight.shape
    quantised = format in ("int8", "int4")
    if quantised:
        group = (0 if format == "int8" else 32) if group is None else group
        group = group or max(8, -(-inputs // 8) * 8)
    width = PANEL // len(parts)
    count = -(-outputs // width)
    at_once = max(1, _AT_ONCE // (PANEL * inputs))
    data: Tensor | None = None
    for first in range(0, max(count, 1), at_once):
        rows = [part[first * width : (first + at_once) * width] for part in parts]
        panels = torch.cat([_pad(part, 0, width).unflatten(0, (-1, width)) for part in rows], dim=1)
        packed = _codes(panels, format, group, symmetric) if group else _numbers(panels, format)
        if data is None:
            data = _empty_in_large_pages((count, packed.shape[1]), weight.device)
        data[first : first + at_once] = packed
    assert data is not None
    return PackedLinear(data, outputs, inputs, format, group or 0, quantised and not symmetric, up is not None)


def _numbers(panels: Tensor, format: str) -> Tensor:
    """(panels, 32, K) -> uint8 (panels, bytes)."""
    stored = getattr(torch, format)
    pair = 1 if stored == torch.float32 else 2
    lines = _pad(panels.to(stored), 2, pair).unflatten(2, (-1, pair)).transpose(1, 2)
    return lines.contiguous().view(torch.uint8).flatten(1)


def _codes(panels: Tensor, format: str, group: int, symmetric: bool) -> Tensor:
    """(panels, 32, K) -> uint8 (panels, bytes)."""
    bits = 8 if format == "int8" else 4
    values = _pad(panels.float(), 2, group).unflatten(2, (-1, group))
    if not values.isfinite().all():
        raise ValueError(f"pack_linear: weight must be finite to be packed as {format}")
    codes, *numbers = _quantise(values, bits, symmetric)
    words = codes.flatten(2).unflatten(2, (-1, 32 // bits))  # (panels, 32, words, codes of a word)
    if bits == 4:
        pairs = words.unflatten(3, (2, 2, 2))
        words = (pairs[..., 0, :] | pairs[..., 1, :] << 4).transpose(3, 4).flatten(3)
    lines = words.transpose(1, 2).reshape(len(panels), values.shape[2], -1)  # of a group
    headers = [
        number.to(torch.bfloat16).transpose(1, 2).unflatten(2, (2, -1)).transpose(2, 3).flatten(2).view(torch.uint8)
        for number in numbers
    ]
    return torch.cat([*headers, lines], dim=2).flatten(1)


def pack_experts(
    weights: Sequence[Tensor] | Tensor,
    ups: Sequence[Tensor] | Tensor | None = None,
    *,
    format: WeightFormat = "bfloat16",
    group: int | None = None,
    symmetric: bool = True,
) -> PackedLinear:
    """Packs layers of one shape, as a mixture of experts has them, for ``linear_decode``'s ``experts``.

    They are packed one after the other: a sequence that reads its tensors when they are asked for is never held whole.

    Args:
        weights: of each expert, as ``pack_linear`` takes it; or one tensor (experts, outputs, inputs).
        ups: likewise, of gated layers.
        format, group, symmetric: as ``pack_linear`` takes them.

    Returns:
        A ``PackedLinear`` whose data is (experts, panels, bytes of a panel).

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if len(weights) == 0 or (ups is not None and len(ups) != len(weights)):
        count = "none" if ups is None else len(ups)
        raise ValueError(f"pack_experts: weights must be one or more, and ups as many, got {len(weights)} and {count}")
    stack: PackedLinear | None = None
    for i in range(len(weights)):
        layer = pack_linear(
            weights[i], None if ups is None else ups[i], format=format, group=group, symmetric=symmetric
        )
        if stack is None:
            shape = (len(weights), *layer.data.shape)
            stack = layer._replace(data=_empty_in_large_pages(shape, layer.data.device))
        if layer._replace(data=stack.data) != stack or layer.data.shape != stack.data.shape[1:]:
            raise ValueError(f"pack_experts: weights must have one shape, got {list(weights[i].shape)} as number {i}")
        stack.data[i] = layer.data
    assert stack is not None
    return stack


def _quantise(values: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, ...]:
    """Codes, scales (as they are in bfloat16) and, unless symmetric, zeros, of (..., group)."""
    most = (1 << bits) - 1
    if symmetric:
        extreme = values.gather(-1, values.abs().argmax(-1, keepdim=True))
        scale, zero = extreme / -(1 << (bits - 1)), torch.full_like(extreme, 1 << (bits - 1))
        scale = scale.bfloat16().float()
    else:
        low = values.amin(-1, keepdim=True).clamp(max=0.0)
        scale = (values.amax(-1, keepdim=True).clamp(min=0.0) - low) / most
        scale = (scale.view(torch.int32) + 0xFFFF & ~0xFFFF).view(torch.float32)  # up, so that the codes suffice
    scale[scale.abs() < torch.finfo(torch.float32).tiny] = 0.0
    inverse = torch.where(scale == 0.0, 0.0, 1.0 / scale)
    if not symmetric:
        zero = (-low * inverse).round().clamp(0, most)
    codes = ((values * inverse).round() + zero).clamp(0, most).to(torch.uint8)
    return (codes, scale[..., 0]) if symmetric else (codes, scale[..., 0], zero[..., 0])


def in_large_pages(data: Tensor) -> Tensor:
    """A copy in pages of 2 MB, where the kernel grants them: a core streams those a tenth faster."""
    return _empty_in_large_pages(data.shape, data.device).copy_(data)


def _empty_in_large_pages(shape: Sequence[int], device: torch.device) -> Tensor:
    data = torch.empty(shape, dtype=torch.uint8, device=device)
    if device.type == "cpu" and data.numel() >= 4 << 20 and hasattr(mmap, "MADV_HUGEPAGE"):
        first = -(-data.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (data.data_ptr() + data.numel() - first) // mmap.PAGESIZE * mmap.PAGESIZE
        advise = ctypes.CDLL(None).madvise  # which may refuse: it is advice
        advise(ctypes.c_void_p(first), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return data


def _pad(tensor: Tensor, dim: int, multiple: int) -> Tensor:
    return pad(tensor, (0, 0) * (tensor.dim() - 1 - dim) + (0, -tensor.shape[dim] % multiple))


def _check(weight: Tensor, up: Tensor | None, format: str, group: int | None, symmetric: bool) -> list[Tensor]:
    parts = [weight] if up is None else [weight, up]
    for name, part in zip(("weight", "up"), parts, strict=False):
        if part.dim() != 2 or part.shape[1] == 0:
            raise ValueError(f"pack_linear: {name} must have shape (outputs, inputs), got {list(part.shape)}")
        if not part.is_floating_point():
            raise TypeError(f"pack_linear: {name} must be floating point, got {part.dtype}")
    if up is not None and (up.shape != weight.shape or up.device != weight.device):
        raise ValueError(
            f"pack_linear: up must have weight's shape {list(weight.shape)} and device {weight.device}, got "
            f"{list(up.shape)} on {up.device}"
        )
    if format not in FORMATS:
        raise ValueError(f"pack_linear: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if group is not None and format in ("float32", "bfloat16"):
        raise ValueError(f"pack_linear: group is for int8 and int4, got {group} for {format}")
    if not symmetric and format in ("float32", "bfloat16"):
        raise ValueError(f"pack_linear: symmetric is for int8 and int4, got {symmetric} for {format}")
    if group not in (None, 0, *GROUPS):
        raise ValueError(f"pack_linear: group must be 0 (all inputs), 32, 64 or 128, got {group}")
    return [part.detach() for part in parts]
