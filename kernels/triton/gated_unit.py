"""gated_unit: a tile of elements to each program; what is not wanted is neither read nor written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource

_TILE = 2048
_WARPS = 4
_DIMS = 3
_OPERANDS = ("gate", "up", "grad", "out", "grad_gate", "grad_up")


@triton.jit
def _exp(x):
    """e^x of x below 0; tl.exp rounds x log2(e) as a whole, and so loses digits where it is large."""
    x = tl.where(x < -200.0, -200.0, x)  # where it is 0, infinity too
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = tl.fma(whole, -1.4286068203094172e-06, tl.fma(whole, -0.693145751953125, x))  # log(2) in two parts
    return tl.exp2(whole) * tl.exp2(rest * 1.4426950408889634)


@triton.jit
def _sigmoids(x):
    """1 / (1 + e^-x) and 1 / (1 + e^x), neither of which loses digits to the other."""
    small = _exp(-tl.abs(x))
    most = 1.0 / (1.0 + small)
    least = small * most
    return tl.where(x < 0, least, most), tl.where(x < 0, most, least)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    if ACTIVATION == "silu":
        below, above = _sigmoids(x)
        value = x * below
        slope = below + value * above
    elif ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * below
        slope = below + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    else:
        square = x * x
        square = tl.where(square > 1e12, 1e12, square)  # where it is too large to matter
        below, above = _sigmoids(x * (1.5957691216057308 + 0.07135481627260025 * square))
        value = x * below
        slope = below + value * above * (1.5957691216057308 + 0.21406444881780076 * square)
    return value, slope


@triton.jit
def _gated_unit(
    gate, up, grad, out, grad_gate, grad_up,
    gate_plane, gate_row, gate_column, up_plane, up_row, up_column, grad_plane, grad_row, grad_column,
    out_plane, out_row, out_column, grad_gate_plane, grad_gate_row, grad_gate_column,
    grad_up_plane, grad_up_row, grad_up_column,
    all_rows, rows, columns,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile
    COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    row = (program // across * ROWS + tl.arange(0, ROWS))[:, None]
    c = (program % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < all_rows) & (c < columns)
    p, r = row // rows, row % rows
    x = tl.load(gate + p * gate_plane + r * gate_row + c * gate_column, inside, 0.0).to(tl.float32)
    u = tl.load(up + p * up_plane + r * up_row + c * up_column, inside, 0.0).to(tl.float32)
    g = u
    if grad is not None:  # before anything is written, maybe in its place
        g = tl.load(grad + p * grad_plane + r * grad_row + c * grad_column, inside, 0.0).to(tl.float32)
    value, slope = _activate(x, ACTIVATION)
    if out is not None:
        y = (value * u).to(out.dtype.element_ty)
        tl.store(out + p * out_plane + r * out_row + c * out_column, y, inside)
    if grad_gate is not None:
        y = (g * u * slope).to(grad_gate.dtype.element_ty)
        tl.store(grad_gate + p * grad_gate_plane + r * grad_gate_row + c * grad_gate_column, y, inside)
    if grad_up is not None:
        y = (g * value).to(grad_up.dtype.element_ty)
        tl.store(grad_up + p * grad_up_plane + r * grad_up_row + c * grad_up_column, y, inside)


def launch(activation: str, size: Sequence[int], operands: Sequence[Any], strides: Sequence[Sequence[int]]) -> None:
    """Tensors in the order of _OPERANDS, or None, and their strides over `size`, of at most three dimensions."""
    size = (1,) * (_DIMS - len(size)) + tuple(size)
    padded = [(0,) * (_DIMS - len(stride)) + tuple(stride) for stride in strides]
    tile = _tile(size[0] * size[1], size[2])
    programs = triton.cdiv(size[0] * size[1], tile["ROWS"]) * triton.cdiv(size[2], tile["COLUMNS"])
    _gated_unit[(programs,)](
        *operands, *(stride for operand in padded for stride in operand), size[0] * size[1], *size[1:],
        ACTIVATION=activation, **tile, num_warps=_WARPS,
    )  # fmt: skip


def _tile(rows: int, columns: int) -> dict[str, int]:
    width = min(triton.next_power_of_2(columns), _TILE)
    return {"ROWS": min(triton.next_power_of_2(rows), _TILE // width), "COLUMNS": width}


def sources(dtype: str) -> Iterator[tuple[ASTSource, dict[str, Any]]]:
    """The kernel for both halves of a projection in "fp32", "bf16" or "fp16": every activation, forwards and
    backwards."""
    names = _gated_unit.arg_names
    strides = [f"{operand}_{dim}" for operand in _OPERANDS for dim in ("plane", "row", "column")]
    for activation in ("silu", "gelu", "gelu_tanh"):
        for absent in (("grad", "grad_gate", "grad_up"), ("out",)):
            constants: dict[str, Any] = dict.fromkeys(absent) | {"ACTIVATION": activation} | _tile(4096, 11008)
            constants |= {stride: 1 for stride in strides if stride.endswith("column")}
            types = dict.fromkeys(_OPERANDS, f"*{dtype}") | dict.fromkeys(
                (*strides, "all_rows", "rows", "columns"), "i32"
            )
            types |= dict.fromkeys(constants, "constexpr")
            aligned = [n for n in (*_OPERANDS, *strides, "columns") if n not in constants]
            attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
            signature = {name: types[name] for name in names}
            yield ASTSource(_gated_unit, signature, constants, attributes), {"num_warps": _WARPS}
