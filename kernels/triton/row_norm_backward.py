"""row_norm_backward: one program per chunk of a sample's rows, which leaves its sums for the gradients of parameters;
then one program per few elements of a row, which adds those of the chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource

from .row_norm import (
    WARPS,
    load_scale,
    parameter_offset,
    row_offset,
    row_strides,
    sample_strides,
    source,
    tile,
)

_TILE = 4096
_PROGRAMS = 512  # about as many as keep a GPU busy, if there are so many rows
_ADD_COLUMNS, _ADD_CHUNKS = 32, 64


@triton.jit
def _row_norm_backward(
    x,
    grad,
    weight,
    residual_grad,
    grad_x,
    weight_sums,
    bias_sums,
    rows,  # of a sample
    middle,  # rows along the last two of three dimensions
    inner,
    elements,  # of a row
    chunk,  # rows of a program
    chunks,  # of a sample
    x_0,
    x_1,
    x_2,
    grad_0,
    grad_1,
    grad_2,
    residual_grad_0,
    residual_grad_1,
    residual_grad_2,
    grad_x_0,
    grad_x_1,
    grad_x_2,
    weight_0,  # of samples
    eps,
    offset,
    CENTRED: tl.constexpr,
    BY_SAMPLE: tl.constexpr,
    WHOLE: tl.constexpr,  # whether a row fits the tile
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks if BY_SAMPLE else program * 0
    begin = (program - sample * chunks) * chunk
    weight_at = parameter_offset(sample, weight_0, BY_SAMPLE)
    column = tl.arange(0, COLUMNS)
    sums_at = program * elements + column
    weight_sum = tl.zeros([COLUMNS], tl.float32)
    bias_sum = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, chunk, ROWS):
        row = (begin + first + tl.arange(0, ROWS))[:, None]
        here = row < rows
        row += sample * rows
        x_row = row_offset(row, middle, inner, x_0, x_1, x_2)
        grad_row = row_offset(row, middle, inner, grad_0, grad_1, grad_2)
        residual_grad_row = row_offset(row, middle, inner, residual_grad_0, residual_grad_1, residual_grad_2)
        grad_x_row = row_offset(row, middle, inner, grad_x_0, grad_x_1, grad_x_2)

        mean = tl.zeros([ROWS, 1], tl.float32)
        if CENTRED:
            sums = tl.zeros([ROWS, COLUMNS], tl.float32)
            for c0 in range(0, elements, COLUMNS):
                c = c0 + column[None, :]
                sums += tl.load(x + x_row + c, here & (c < elements), 0.0).to(tl.float32)
            mean = tl.sum(sums, 1)[:, None] / elements

        # With n the normalised row and g = grad * weight, the sums of g and of g n.
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        squares = tl.zeros([ROWS, COLUMNS], tl.float32)
        g_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        for c0 in range(0, elements, COLUMNS):
            c = c0 + column[None, :]
            inside = here & (c < elements)
            away = tl.where(inside, tl.load(x + x_row + c, inside, 0.0).to(tl.float32) - mean, 0.0)
            g = tl.load(grad + grad_row + c, inside, 0.0).to(tl.float32) * load_scale(
                weight, weight_at, c, elements, offset
            )
            sums += away
            squares += away * away
            g_sums += g
            products += g * away
        left = tl.zeros([ROWS, 1], tl.float32)
        mean_g = tl.zeros([ROWS, 1], tl.float32)
        if CENTRED:
            left = tl.sum(sums, 1)[:, None] / elements
            mean_g = tl.sum(g_sums, 1)[:, None] / elements
        reciprocal = 1.0 / tl.sqrt_rn(tl.sum(squares, 1)[:, None] / elements - left * left + eps)
        mean_gn = (tl.sum(products, 1)[:, None] / elements - left * mean_g) * reciprocal

        for c0 in range(0, elements, COLUMNS):
            c = c0 + column[None, :]
            inside = here & (c < elements)
            n = tl.where(inside, (tl.load(x + x_row + c, inside, 0.0).to(tl.float32) - mean - left) * reciprocal, 0.0)
            dy = tl.load(grad + grad_row + c, inside, 0.0).to(tl.float32)
            if grad_x is not None:
                g = (dy * load_scale(weight, weight_at, c, elements, offset) - mean_g - n * mean_gn) * reciprocal
                if residual_grad is not None:
                    g += tl.load(residual_grad + residual_grad_row + c, inside, 0.0).to(tl.float32)
                tl.store(grad_x + grad_x_row + c, g.to(grad_x.dtype.element_ty), inside)
            if WHOLE:
                weight_sum += tl.sum(dy * n, 0)
                bias_sum += tl.sum(dy, 0)
            else:
                # The sums wait in memory; a barrier, since other threads may load them than stored them.
                at, there = c0 + sums_at, c0 + column < elements
                later = there & (first > 0)
                if weight_sums is not None:
                    sum = tl.load(weight_sums + at, later, 0.0) + tl.sum(dy * n, 0)
                    tl.debug_barrier()
                    tl.store(weight_sums + at, sum, there)
                if bias_sums is not None:
                    sum = tl.load(bias_sums + at, later, 0.0) + tl.sum(dy, 0)
                    tl.debug_barrier()
                    tl.store(bias_sums + at, sum, there)
        if not WHOLE:
            tl.debug_barrier()
    if WHOLE:
        if weight_sums is not None:
            tl.store(weight_sums + sums_at, weight_sum, column < elements)
        if bias_sums is not None:
            tl.store(bias_sums + sums_at, bias_sum, column < elements)


@triton.jit
def _add_chunks(sums, grad, chunks, elements, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    sample = tl.program_id(1).to(tl.int64)
    sums += sample * chunks * elements
    total = tl.zeros([CHUNKS, COLUMNS], tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = (first + tl.arange(0, CHUNKS).to(tl.int64))[:, None]
        inside = (chunk < chunks) & (column < elements)[None, :]
        total += tl.load(sums + chunk * elements + column[None, :], inside, 0.0)
    tl.store(grad + sample * elements + column, tl.sum(total, 0).to(grad.dtype.element_ty), column < elements)


def chunk_rows(rows: int, elements: int) -> int:
    """How many rows a program takes: a matter of the shape alone, so that the order of the sums is."""
    step = tile(elements, _TILE)["ROWS"]
    return step * max(1, min(64, rows // (_PROGRAMS * step)))


def launch(
    x: Any,
    grad: Any,
    weight: Any,
    eps: float,
    offset: float,
    centred: bool,
    by_sample: bool,
    residual_grad: Any,
    grad_x: Any,
    grad_weight: Any,
    grad_bias: Any,
    weight_sums: Any,
    bias_sums: Any,
) -> None:
    """x, grad, residual_grad and grad_x have three dimensions of rows, and one of neighbouring elements; by sample, the
    first is theirs. The sums are (samples * chunks, elements) in float32, where the gradients are wanted."""
    outer, middle, inner, elements = x.shape
    samples = outer if by_sample else 1
    rows = x.numel() // elements // max(samples, 1)
    chunk = chunk_rows(rows, elements)
    chunks = triton.cdiv(rows, chunk)
    strides = row_strides(x, grad, residual_grad, grad_x)
    options = tile(elements, _TILE)
    if samples * chunks:
        _row_norm_backward[(samples * chunks,)](
            x, grad, weight, residual_grad, grad_x, weight_sums, bias_sums, rows, middle, inner, elements, chunk,
            chunks, *strides, *sample_strides(weight), eps, offset, CENTRED=centred, BY_SAMPLE=by_sample,
            WHOLE=elements <= options["COLUMNS"], **options, num_warps=WARPS,
            enable_fp_fusion=False,  # gradients of short rows cancel: what is subtracted must be rounded alike
        )  # fmt: skip
    for sums, gradient in ((weight_sums, grad_weight), (bias_sums, grad_bias)):
        if gradient is not None and samples:
            _add_chunks[(triton.cdiv(elements, _ADD_COLUMNS), samples)](
                sums, gradient, chunks, elements, COLUMNS=_ADD_COLUMNS, CHUNKS=_ADD_CHUNKS, num_warps=WARPS
            )


def sources(dtype: str) -> Iterator[tuple[ASTSource, dict[str, Any]]]:
    """Rows of a transformer, of a head, and longer than a tile, in "fp32", "bf16" or "fp16"; with options."""
    pointers = dict.fromkeys(("x", "grad", "weight", "residual_grad", "grad_x"), f"*{dtype}")
    pointers |= dict.fromkeys(("weight_sums", "bias_sums"), "*fp32")
    strides = [name for name in _row_norm_backward.arg_names if name[-2:] in ("_0", "_1", "_2") and name != "weight_0"]
    types = pointers | dict.fromkeys(
        ("rows", "middle", "inner", "elements", "chunk", "chunks", "weight_0", *strides), "i32"
    )
    types |= {"eps": "fp32", "offset": "fp32"}
    for elements in (4096, 64, 16384):
        for centred in (False, True):
            options = tile(elements, _TILE)
            constants = {"CENTRED": centred, "WHOLE": elements <= options["COLUMNS"], "BY_SAMPLE": False} | options
            if not centred:
                constants |= {"bias_sums": None}
            yield source(_row_norm_backward, types, constants, [*pointers, "elements", *strides])
    constants = {"CENTRED": True, "WHOLE": True, "BY_SAMPLE": True} | tile(1152, _TILE)
    yield source(_row_norm_backward, types, constants, [*pointers, "elements", *strides])
    types = {"sums": "*fp32", "grad": f"*{dtype}", "chunks": "i32", "elements": "i32"}
    constants = {"COLUMNS": _ADD_COLUMNS, "CHUNKS": _ADD_CHUNKS}
    yield source(_add_chunks, types, constants, ["sums", "grad", "elements"])
