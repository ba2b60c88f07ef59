"""row_norm: one program per few rows, which it reads two or three times, from the cache after the first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource

_TILE = 8192
WARPS = 8


@triton.jit
def load_row(x, residual, gate, at, residual_at, gate_at, c, inside):
    """gate x + residual as it is handed on: rounded to x's dtype."""
    h = tl.load(x + (at + c), inside, 0.0).to(tl.float32)
    if gate is not None:
        h *= tl.load(gate + (gate_at + c), inside, 0.0).to(tl.float32)
    if residual is not None:
        h = (
            (h + tl.load(residual + (residual_at + c), inside, 0.0).to(tl.float32))
            .to(x.dtype.element_ty)
            .to(tl.float32)
        )
    return h


@triton.jit
def row_offset(row, middle, inner, stride_0, stride_1, stride_2):
    """Where a row lies that is counted along three dimensions."""
    return row // inner // middle * stride_0 + row // inner % middle * stride_1 + row % inner * stride_2


@triton.jit
def parameter_offset(sample, stride, BY_SAMPLE: tl.constexpr):
    """Where a parameter of a row lies; all rows share it but by sample."""
    return sample * stride if BY_SAMPLE else 0


@triton.jit
def load_scale(weight, at, c, elements, offset):
    if weight is None:
        return tl.full(c.shape, 1.0, tl.float32)
    else:  # a return above does not end what Triton compiles
        return tl.load(weight + at + c, c < elements, 0.0).to(tl.float32) + offset


@triton.jit
def _row_norm(
    x,
    residual,
    gate,
    weight,
    bias,
    out,
    residual_out,
    rows,
    middle,  # rows along the last two of three dimensions
    inner,
    elements,  # of a row
    x_0,
    x_1,
    x_2,
    residual_0,
    residual_1,
    residual_2,
    out_0,
    out_1,
    out_2,
    residual_out_0,
    residual_out_1,
    residual_out_2,
    gate_0,  # of samples
    weight_0,
    bias_0,
    eps,
    offset,
    CENTRED: tl.constexpr,
    BY_SAMPLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    x_row = row_offset(row, middle, inner, x_0, x_1, x_2)
    residual_row = row_offset(row, middle, inner, residual_0, residual_1, residual_2)
    out_row = row_offset(row, middle, inner, out_0, out_1, out_2)
    residual_out_row = row_offset(row, middle, inner, residual_out_0, residual_out_1, residual_out_2)
    column = tl.arange(0, COLUMNS)[None, :]
    sample = tl.minimum(row, rows - 1) // inner // middle
    gate_row = parameter_offset(sample, gate_0, BY_SAMPLE)
    weight_row = parameter_offset(sample, weight_0, BY_SAMPLE)
    bias_row = parameter_offset(sample, bias_0, BY_SAMPLE)

    mean = tl.zeros([ROWS, 1], tl.float32)
    if CENTRED:
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for c0 in range(0, elements, COLUMNS):
            c = c0 + column
            sums += load_row(x, residual, gate, x_row, residual_row, gate_row, c, (row < rows) & (c < elements))
        mean = tl.sum(sums, 1)[:, None] / elements

    # Deviations from the rounded mean tell what the rounding left.
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for c0 in range(0, elements, COLUMNS):
        c = c0 + column
        inside = (row < rows) & (c < elements)
        away = tl.where(inside, load_row(x, residual, gate, x_row, residual_row, gate_row, c, inside) - mean, 0.0)
        sums += away
        squares += away * away
    left = tl.zeros([ROWS, 1], tl.float32)
    if CENTRED:
        left = tl.sum(sums, 1)[:, None] / elements
    reciprocal = 1.0 / tl.sqrt_rn(tl.sum(squares, 1)[:, None] / elements - left * left + eps)

    for c0 in range(0, elements, COLUMNS):
        c = c0 + column
        inside = (row < rows) & (c < elements)
        h = load_row(x, residual, gate, x_row, residual_row, gate_row, c, inside)
        y = (h - mean - left) * reciprocal * load_scale(weight, weight_row, c, elements, offset)
        if bias is not None:
            y += tl.load(bias + bias_row + c, c < elements, 0.0).to(tl.float32)
        if residual is not None:
            tl.store(residual_out + residual_out_row + c, h.to(residual_out.dtype.element_ty), inside)
        tl.store(out + out_row + c, y.to(out.dtype.element_ty), inside)


def launch(
    x: Any,
    residual: Any,
    gate: Any,
    weight: Any,
    bias: Any,
    eps: float,
    offset: float,
    centred: bool,
    by_sample: bool,
    out: Any,
    residual_out: Any,
) -> None:
    """x, residual, out and residual_out have three dimensions of rows, and one of neighbouring elements; by sample, the
    first is theirs."""
    *_, middle, inner, elements = x.shape
    rows = x.numel() // elements
    strides = row_strides(x, residual, out, residual_out)
    options = tile(elements, _TILE)
    _row_norm[(triton.cdiv(rows, options["ROWS"]),)](
        x, residual, gate, weight, bias, out, residual_out, rows, middle, inner, elements, *strides,
        *sample_strides(gate, weight, bias), eps, offset, CENTRED=centred, BY_SAMPLE=by_sample, **options,
        num_warps=WARPS,
    )  # fmt: skip


def row_strides(*tensors: Any) -> list[int]:
    return [stride for tensor in tensors for stride in ((0, 0, 0) if tensor is None else tensor.stride()[:3])]


def sample_strides(*parameters: Any) -> list[int]:
    return [0 if parameter is None or parameter.dim() == 1 else parameter.stride(0) for parameter in parameters]


def tile(elements: int, most: int) -> dict[str, int]:
    """A row where it fits, with others where it is short; else a quarter of what fits."""
    columns = triton.next_power_of_2(elements)
    return {"ROWS": max(1, min(most // 4 // columns, 64)), "COLUMNS": columns if columns <= most else most // 4}


def source(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: list[str]
) -> tuple[ASTSource, dict[str, Any]]:
    """A kernel as it is launched on aligned memory."""
    names = kernel.arg_names
    types = types | dict.fromkeys(constants, "constexpr")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constants}
    return ASTSource(kernel, {name: types[name] for name in names}, constants, attributes), {"num_warps": WARPS}


def sources(dtype: str) -> Iterator[tuple[ASTSource, dict[str, Any]]]:
    """Rows of a transformer, of a head, and longer than a tile, in "fp32", "bf16" or "fp16"; with options."""
    pointers = dict.fromkeys(("x", "residual", "gate", "weight", "bias", "out", "residual_out"), f"*{dtype}")
    strides = [name for name in _row_norm.arg_names if name[-2:] in ("_0", "_1", "_2")]
    types = pointers | dict.fromkeys(("rows", "middle", "inner", "elements", *strides), "i32")
    types |= {"eps": "fp32", "offset": "fp32"}
    for elements in (4096, 64, 16384):
        for centred in (False, True):
            constants = {"CENTRED": centred, "BY_SAMPLE": False, "gate": None} | tile(elements, _TILE)
            if not centred:
                constants |= {"bias": None}
            yield source(_row_norm, types, constants, [*pointers, "elements", *strides])
    constants = {"CENTRED": True, "BY_SAMPLE": True} | tile(1152, _TILE)
    yield source(_row_norm, types, constants, [*pointers, "elements", *strides])
