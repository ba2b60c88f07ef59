"""attention: one program per tile of queries of a head, which walks the keys it sees with a running maximum
(FlashAttention-2, Dao 2023).

A head's dimensions are two tiles, powers of two side by side, so that 40, 72, 80, 96 and 160 are not padded to the next
power. Scores are in powers of 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction

BAND = 1 << 30  # further than any position
LOG2E = tl.constexpr(1.4426950408889634)
STRIDES = tuple(f"{name}_{d}" for name in ("q", "k", "v", "mask", "out") for d in ("b", "h", "l", "d"))


@triton.jit
def product(a, b, sums, WIDEN: tl.constexpr):
    """a b + sums; widened for the interpreter, which takes bfloat16 for integers."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def load_rows(start, rows, row_stride, column_stride, count, begin, width, SIZE: tl.constexpr):
    """(rows, SIZE): dimensions ``begin`` on of rows below ``count``, 0 where there is none."""
    column = begin + tl.arange(0, SIZE)
    at = start + rows[:, None] * row_stride + column[None, :] * column_stride
    return tl.load(at, (rows[:, None] < count) & (column[None, :] < width), 0.0)


@triton.jit
def store_rows(start, rows, row_stride, column_stride, count, begin, width, value, SIZE: tl.constexpr):
    column = begin + tl.arange(0, SIZE)
    at = start + rows[:, None] * row_stride + column[None, :] * column_stride
    tl.store(at, value.to(start.dtype.element_ty), (rows[:, None] < count) & (column[None, :] < width))


@triton.jit
def scores_of(s, scale, mask, queries_at, keys_at, queries, length, before, after, mask_l, mask_d, MASK: tl.constexpr):
    """Scaled and masked, in powers of 2; -inf where nothing is seen. (queries, keys)."""
    q, k = queries_at[:, None], keys_at[None, :]
    seen = (q < queries) & (k < length) & (k - q <= after) & (q - k <= before)
    s = s * scale
    if MASK == 1:
        seen = seen & (tl.load(mask + q * mask_l + k * mask_d, seen, 0) != 0)
    if MASK == 2:
        s += tl.load(mask + q * mask_l + k * mask_d, seen, 0.0).to(tl.float32) * LOG2E
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _attention(
    q,
    k,
    v,
    mask,
    lengths,
    out,
    logsumexp,
    q_b,
    q_h,
    q_l,
    q_d,
    k_b,
    k_h,
    k_l,
    k_d,
    v_b,
    v_h,
    v_l,
    v_d,
    mask_b,
    mask_h,
    mask_l,
    mask_d,
    out_b,
    out_h,
    out_l,
    out_d,
    heads,
    group,  # query heads to a head of keys
    queries,
    keys,
    width,  # of a head
    before,  # query i sees keys i - before to i + after
    after,
    scale,
    MASK: tl.constexpr,  # none, bool, or added
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST: tl.constexpr,  # of a head's dimensions, and the rest
    REST: tl.constexpr,
    WIDEN: tl.constexpr,
):
    sample, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    q += sample * q_b + head * q_h
    k += sample * k_b + head // group * k_h
    v += sample * v_b + head // group * v_h
    out += sample * out_b + head * out_h
    if MASK != 0:
        mask += sample * mask_b + head * mask_h
    length = keys
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + sample), 0), keys).to(tl.int32)
    first = tl.program_id(0) * QUERIES
    rows = first + tl.arange(0, QUERIES)

    q0 = load_rows(q, rows, q_l, q_d, queries, 0, width, FIRST)
    sums0 = tl.zeros([QUERIES, FIRST], tl.float32)
    if REST > 0:
        q1 = load_rows(q, rows, q_l, q_d, queries, FIRST, width, REST)
        sums1 = tl.zeros([QUERIES, REST], tl.float32)
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    begin = tl.maximum(first - before, 0) // KEYS * KEYS
    end = tl.minimum(length, tl.minimum(first + QUERIES, queries) + after)
    for at in range(begin, end, KEYS):
        columns = at + tl.arange(0, KEYS)
        k0 = load_rows(k, columns, k_l, k_d, length, 0, width, FIRST)
        s = product(q0, k0.T, None, WIDEN)
        if REST > 0:
            k1 = load_rows(k, columns, k_l, k_d, length, FIRST, width, REST)
            s = product(q1, k1.T, s, WIDEN)
        s = scores_of(s, scale * LOG2E, mask, rows, columns, queries, length, before, after, mask_l, mask_d, MASK)
        higher = tl.maximum(most, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        kept = tl.exp2(most - base)
        p = tl.exp2(s - base[:, None])
        total = total * kept + tl.sum(p, 1)
        v0 = load_rows(v, columns, v_l, v_d, length, 0, width, FIRST)
        sums0 = product(p.to(v0.dtype), v0, sums0 * kept[:, None], WIDEN)
        if REST > 0:
            v1 = load_rows(v, columns, v_l, v_d, length, FIRST, width, REST)
            sums1 = product(p.to(v1.dtype), v1, sums1 * kept[:, None], WIDEN)
        most = higher

    nothing = total == 0.0
    share = tl.where(nothing, 0.0, 1.0 / tl.where(nothing, 1.0, total))[:, None]
    store_rows(out, rows, out_l, out_d, queries, 0, width, sums0 * share, FIRST)
    if REST > 0:
        store_rows(out, rows, out_l, out_d, queries, FIRST, width, sums1 * share, REST)
    if logsumexp is not None:
        y = tl.where(nothing, float("-inf"), (most + tl.log2(tl.where(nothing, 1.0, total))) / LOG2E)
        tl.store(logsumexp + (sample * heads + head) * queries + rows, y, rows < queries)


def launch(q: Any, k: Any, v: Any, mask: Any, lengths: Any, band: Any, scale: float, out: Any, logsumexp: Any) -> None:
    """band: how far before and behind it a query sees; mask: None, or of the scores' shape, expanded."""
    check_reach(q=q, k=k, v=v, mask=mask, out=out)
    batch, heads, queries, width = q.shape
    tile = chosen(TILES, width, q.element_size())
    grid = (triton.cdiv(queries, tile["QUERIES"]), batch * heads)
    strides = [s for tensor in (q, k, v, mask, out) for s in ((0,) * 4 if tensor is None else tensor.stride())]
    _attention[grid](
        q, k, v, mask, lengths, out, logsumexp, *strides, heads, heads // k.shape[1], queries, k.shape[2], width, *band,
        scale, MASK=kind_of(mask), WIDEN=INTERPRETED, **tile,
    )  # fmt: skip


INTERPRETED = isinstance(_attention, InterpretedFunction)


def check_reach(**tensors: Any) -> None:
    """Offsets within a head are of 32 bits."""
    for name, tensor in tensors.items():
        if (
            tensor is not None
            and sum((n - 1) * s for n, s in zip(tensor.shape[2:], tensor.stride()[2:], strict=True)) >= 2**31
        ):
            raise ValueError(f"attention: a head of {name} spans 2^31 elements or more")


def kind_of(mask: Any) -> int:
    return 0 if mask is None else 1 if mask.element_size() == 1 else 2


# The tiles of queries and of keys and the warps of a program, up to a width of a head, by the bytes of an element: what
# neither spills nor asks for more shared memory than there is, on GPUs from sm_80 on. float32 has no tensor cores.
TILES = {
    2: {96: (128, 64, 8), 128: (128, 32, 8), 256: (64, 32, 8)},
    4: {80: (64, 32, 8), 128: (32, 32, 8), 256: (32, 16, 8)},
}


def chosen(tiles: dict[int, dict[int, tuple[int, int, int]]], width: int, element_size: int) -> dict[str, int]:
    """Of a table of tiles: the constants of a kernel, and its options."""
    queries, keys, warps = next(tile for most, tile in tiles[element_size].items() if width <= most)
    first = max(16, 1 << (width.bit_length() - 1))  # a head's dimensions as one or two powers of two
    rest = 0 if width <= first else max(16, triton.next_power_of_2(width - first))
    return {"QUERIES": queries, "KEYS": keys, "FIRST": first, "REST": rest, "num_warps": warps, "num_stages": 2}


def sources(dtype: str) -> Iterator[tuple[ASTSource, dict[str, Any]]]:
    """The kernel in "fp32", "bf16" or "fp16", for heads of U-Nets and transformers, with and without masks."""
    for width, kind in ((64, 0), (40, 2), (128, 1), (160, 0)):
        types = dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}") | {"logsumexp": "*fp32"}
        yield source(_attention, types, STRIDES, chosen(TILES, width, 4 if dtype == "fp32" else 2), kind)


def source(
    kernel: Any, types: dict[str, str], strides: tuple[str, ...], tile: dict[str, int], kind: int
) -> tuple[ASTSource, dict[str, Any]]:
    """As a call on contiguous tensors would compile it, with lengths and a kind of mask; and its options."""
    options = {name: tile[name] for name in ("num_warps", "num_stages")}
    constants: dict[str, Any] = {name: value for name, value in tile.items() if name not in options}
    constants |= {"MASK": kind, "WIDEN": False} | {name: 1 for name in strides if name.endswith("_d")}
    types = types | {"lengths": "*i64", "scale": "fp32", "mask": "*i1" if kind == 1 else "*fp32"}
    if kind == 0:
        constants["mask"] = None
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [n for n in names if n not in constants and ((n in types and types[n][0] == "*") or n in strides)]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(kernel, signature, constants, attributes), options
