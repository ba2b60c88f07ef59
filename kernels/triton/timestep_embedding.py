"""timestep_embedding: a row to each program, in double: there are few, and float's angles of large times are rough."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource

_WARPS = 4


@triton.jit
def _timestep_embedding(
    t,
    out,
    t_0,  # strides of rows
    out_0,
    half,
    DECAY: tl.constexpr,  # of frequencies, from one to the next; an argument would be rounded to float
    ODD: tl.constexpr,
    COSINES_FIRST: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PAIRS)
    time = tl.load(t + row * t_0).to(tl.float64)
    angle = time * tl.exp(i.to(tl.float64) * DECAY)
    cosine, sine = tl.cos(angle).to(tl.float32), tl.sin(angle).to(tl.float32)
    cosine, sine = cosine.to(out.dtype.element_ty), sine.to(out.dtype.element_ty)
    to = out + row * out_0 + i
    if COSINES_FIRST:
        tl.store(to, cosine, i < half)
        tl.store(to + half, sine, i < half)
    else:
        tl.store(to, sine, i < half)
        tl.store(to + half, cosine, i < half)
    if ODD:
        tl.store(out + row * out_0 + 2 * half, tl.zeros([], out.dtype.element_ty))


def launch(t: Any, max_period: float, cosines_first: bool, shift: float, out: Any) -> None:
    """t is (rows,), out (rows, width), a row's elements neighbours."""
    width = out.shape[1]
    half = width // 2
    _timestep_embedding[(out.shape[0],)](
        t, out, t.stride(0), out.stride(0), half, DECAY=-math.log(max_period) / (half - shift), ODD=width % 2 == 1,
        COSINES_FIRST=cosines_first, PAIRS=triton.next_power_of_2(half), num_warps=_WARPS,
    )  # fmt: skip


def sources(dtype: str) -> Iterator[tuple[ASTSource, dict[str, Any]]]:
    """The rows of a U-Net's embedding, in "fp32", "bf16" or "fp16"."""
    names = _timestep_embedding.arg_names
    types = {"t": "*fp32", "out": f"*{dtype}", "t_0": "i32", "out_0": "i32", "half": "i32"}
    constants = {"DECAY": -math.log(10000.0) / 160, "ODD": False, "COSINES_FIRST": True, "PAIRS": 256}
    types |= dict.fromkeys(constants, "constexpr")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in ("t", "out", "out_0", "half")}
    yield (
        ASTSource(_timestep_embedding, {name: types[name] for name in names}, constants, attributes),
        {"num_warps": _WARPS},
    )
