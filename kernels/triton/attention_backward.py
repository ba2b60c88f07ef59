"""attention_backward: one program per tile of queries makes their gradient, and then one per tile of keys makes theirs,
each by the weights made again (FlashAttention-2, Dao 2023). Nothing is added by atomics: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource

from .attention import (
    LOG2E,
    SIZES,
    Dropout,
    Table,
    chosen,
    constants_of,
    head_of,
    kept,
    keys_seen,
    laid_out,
    load_rows,
    masked,
    product,
    size_of,
    source,
    store_rows,
)

STRIDES = ("grad_at", "q_at", "k_at", "v_at", "out_at", "mask_at", "grad_q_at", "grad_k_at", "grad_v_at")


@triton.jit
def load_base(logsumexp, at, inside):
    """What weights are made again with; infinite for queries that see nothing and where there is none."""
    y = tl.load(logsumexp + at, inside, float("-inf"))
    return tl.where(y == float("-inf"), float("inf"), y)


@triton.jit
def weights_and_slopes(s, slope, unit, base, away, ALL: tl.constexpr):
    """The weights, and the gradients of the scores, of masked products and the products of grad and v; ALL where all is
    seen."""
    p = tl.exp2((s * unit - base) * LOG2E)  # in this order: what is rounded first is small
    ds = p * (slope - away)
    if not ALL:
        ds = tl.where(s == float("-inf"), 0.0, ds)
    return p, ds


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STRIDES)
def _queries(
    grad,
    q,
    k,
    v,
    out,
    logsumexp,
    delta,
    mask,
    lengths,
    grad_q,
    grad_at,  # strides: batch, heads, length, head_dim
    q_at,
    k_at,
    v_at,
    out_at,
    mask_at,
    grad_q_at,
    heads,
    group,
    queries,
    keys,
    before,
    after,
    scale,
    dropout,
    MASK: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BANDED: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    WIDEN: tl.constexpr,
):
    sample, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    grad = head_of(grad, grad_at, sample, head, STEP)
    q = head_of(q, q_at, sample, head, STEP)
    k = head_of(k, k_at, sample, head // group, STEP)
    v = head_of(v, v_at, sample, head // group, STEP)
    out = head_of(out, out_at, sample, head, STEP)
    grad_q = head_of(grad_q, grad_q_at, sample, head, STEP)
    if MASK != 0:
        mask = head_of(mask, mask_at, sample, head, 1)
    length = keys
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + sample), 0), keys).to(tl.int32)
    first = tl.program_id(0) * QUERIES
    rows = first + tl.arange(0, QUERIES)
    FLOATS: tl.constexpr = q.dtype.element_ty == tl.float32  # whose tiles are better on their way at the edges too
    numbers = tl.cast(sample * heads + head, tl.int64) * queries + rows

    q0 = load_rows(q, q_at, rows, queries, 0, WIDTH, FIRST, STEP, False)
    q0 = -q0 if NEGATIVE else q0
    g0 = load_rows(grad, grad_at, rows, queries, 0, WIDTH, FIRST, STEP, False)
    o0 = load_rows(out, out_at, rows, queries, 0, WIDTH, FIRST, STEP, False)
    away = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
    sums0 = tl.zeros([QUERIES, FIRST], tl.float32)
    if REST > 0:
        q1 = load_rows(q, q_at, rows, queries, FIRST, WIDTH, REST, STEP, False)
        q1 = -q1 if NEGATIVE else q1
        g1 = load_rows(grad, grad_at, rows, queries, FIRST, WIDTH, REST, STEP, False)
        o1 = load_rows(out, out_at, rows, queries, FIRST, WIDTH, REST, STEP, False)
        away += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
        sums1 = tl.zeros([QUERIES, REST], tl.float32)
    tl.store(delta + numbers, away, rows < queries)
    base = load_base(logsumexp, numbers, rows < queries)
    unit = 1.0 if MASK == 2 else scale

    ends = keys_seen(first, length, queries, before, after, BANDED, QUERIES, KEYS)
    for part in tl.static_range(0 if BANDED else 1, 3):
        for at in tl.range(ends[part], ends[part + 1], KEYS, num_stages=None if part == 1 or FLOATS else 1):
            columns = at + tl.arange(0, KEYS)
            k0 = load_rows(k, k_at, columns, length, 0, WIDTH, FIRST, STEP, part == 1)
            v0 = load_rows(v, v_at, columns, length, 0, WIDTH, FIRST, STEP, part == 1)
            s = product(q0, k0.T, None, WIDEN)
            slope = product(g0, v0.T, None, WIDEN)
            if REST > 0:
                k1 = load_rows(k, k_at, columns, length, FIRST, WIDTH, REST, STEP, part == 1)
                v1 = load_rows(v, v_at, columns, length, FIRST, WIDTH, REST, STEP, part == 1)
                s = product(q1, k1.T, s, WIDEN)
                slope = product(g1, v1.T, slope, WIDEN)
            s = masked(
                s, scale, mask, mask_at, rows[:, None], columns[None, :], queries, length, before, after, MASK, BANDED,
                part == 1,
            )  # fmt: skip
            if dropout is not None:
                keep = kept(dropout, sample, head, rows, at, QUERIES, KEYS).T
                slope = tl.where(keep, slope * dropout.scale, 0.0)
            _, ds = weights_and_slopes(s, slope, unit, base[:, None], away[:, None], MASK == 0 and part == 1)
            ds = ds.to(k0.dtype)
            sums0 = product(ds, k0, sums0, WIDEN)
            if REST > 0:
                sums1 = product(ds, k1, sums1, WIDEN)
    signed = -scale if NEGATIVE else scale
    store_rows(grad_q, grad_q_at, rows, queries, sums0 * signed, 0, WIDTH, FIRST, STEP)
    if REST > 0:
        store_rows(grad_q, grad_q_at, rows, queries, sums1 * signed, FIRST, WIDTH, REST, STEP)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STRIDES)
def _keys(
    grad,
    q,
    k,
    v,
    logsumexp,
    delta,
    mask,
    lengths,
    grad_k,
    grad_v,
    grad_at,
    q_at,
    k_at,
    v_at,
    mask_at,
    grad_k_at,
    grad_v_at,
    heads,
    group,
    queries,
    keys,
    before,
    after,
    scale,
    dropout,
    MASK: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BANDED: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    WIDEN: tl.constexpr,
):
    kv_heads = heads // group
    sample, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    k = head_of(k, k_at, sample, kv_head, STEP)
    v = head_of(v, v_at, sample, kv_head, STEP)
    grad_k = head_of(grad_k, grad_k_at, sample, kv_head, STEP)
    grad_v = head_of(grad_v, grad_v_at, sample, kv_head, STEP)
    length = keys
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + sample), 0), keys).to(tl.int32)
    first = tl.program_id(0) * KEYS
    columns = first + tl.arange(0, KEYS)
    FLOATS: tl.constexpr = q.dtype.element_ty == tl.float32
    unit = 1.0 if MASK == 2 else scale

    k0 = load_rows(k, k_at, columns, length, 0, WIDTH, FIRST, STEP, False)
    k0 = -k0 if NEGATIVE else k0
    v0 = load_rows(v, v_at, columns, length, 0, WIDTH, FIRST, STEP, False)
    of_k0 = tl.zeros([KEYS, FIRST], tl.float32)
    of_v0 = tl.zeros([KEYS, FIRST], tl.float32)
    if REST > 0:
        k1 = load_rows(k, k_at, columns, length, FIRST, WIDTH, REST, STEP, False)
        k1 = -k1 if NEGATIVE else k1
        v1 = load_rows(v, v_at, columns, length, FIRST, WIDTH, REST, STEP, False)
        of_k1 = tl.zeros([KEYS, REST], tl.float32)
        of_v1 = tl.zeros([KEYS, REST], tl.float32)
    # A query sees keys as far behind it as keys are seen by queries ahead. What lies behind the lengths is left out
    # below, and a query that is none has no weights: only a band is masked.
    ends = keys_seen(first, queries, length, after, before, BANDED, KEYS, QUERIES)
    if first >= length:
        ends = 0, 0, 0, 0
    for head in range(kv_head * group, (kv_head + 1) * group):
        of_q = head_of(q, q_at, sample, head, STEP)
        of_grad = head_of(grad, grad_at, sample, head, STEP)
        of_mask = mask
        if MASK != 0:
            of_mask = head_of(mask, mask_at, sample, head, 1)
        for part in tl.static_range(0 if BANDED else 1, 3):
            for at in tl.range(ends[part], ends[part + 1], QUERIES, num_stages=None if part == 1 or FLOATS else 1):
                rows = at + tl.arange(0, QUERIES)
                numbers = tl.cast(sample * heads + head, tl.int64) * queries + rows
                q0 = load_rows(of_q, q_at, rows, queries, 0, WIDTH, FIRST, STEP, part == 1)
                g0 = load_rows(of_grad, grad_at, rows, queries, 0, WIDTH, FIRST, STEP, part == 1)
                s = product(k0, q0.T, None, WIDEN)  # of keys by queries: weights are then where their products read
                slope = product(v0, g0.T, None, WIDEN)
                if REST > 0:
                    q1 = load_rows(of_q, q_at, rows, queries, FIRST, WIDTH, REST, STEP, part == 1)
                    g1 = load_rows(of_grad, grad_at, rows, queries, FIRST, WIDTH, REST, STEP, part == 1)
                    s = product(k1, q1.T, s, WIDEN)
                    slope = product(v1, g1.T, slope, WIDEN)
                s = masked(
                    s, scale, of_mask, mask_at, rows[None, :], columns[:, None], queries, length, before, after, MASK,
                    BANDED, part == 1 or not BANDED,
                )  # fmt: skip
                base = load_base(logsumexp, numbers, rows < queries)[None, :]
                away = tl.load(delta + numbers, rows < queries, 0.0)[None, :]
                if dropout is not None:
                    keep = kept(dropout, sample, head, rows, first, QUERIES, KEYS)
                    slope = tl.where(keep, slope * dropout.scale, 0.0)
                p, ds = weights_and_slopes(s, slope, unit, base, away, MASK == 0 and (part == 1 or not BANDED))
                if dropout is not None:
                    p = tl.where(keep, p * dropout.scale, 0.0)
                p, ds = p.to(q0.dtype), ds.to(q0.dtype)
                of_v0 = product(p, g0, of_v0, WIDEN)
                of_k0 = product(ds, q0, of_k0, WIDEN)
                if REST > 0:
                    of_v1 = product(p, g1, of_v1, WIDEN)
                    of_k1 = product(ds, q1, of_k1, WIDEN)
    seen = (columns < length)[:, None]
    signed = -scale if NEGATIVE else scale
    store_rows(grad_k, grad_k_at, columns, keys, tl.where(seen, of_k0 * signed, 0.0), 0, WIDTH, FIRST, STEP)
    store_rows(grad_v, grad_v_at, columns, keys, tl.where(seen, of_v0, 0.0), 0, WIDTH, FIRST, STEP)
    if REST > 0:
        store_rows(grad_k, grad_k_at, columns, keys, tl.where(seen, of_k1 * signed, 0.0), FIRST, WIDTH, REST, STEP)
        store_rows(grad_v, grad_v_at, columns, keys, tl.where(seen, of_v1, 0.0), FIRST, WIDTH, REST, STEP)


def launch(
    grad: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, delta: Any, mask: Any, lengths: Any, band: Any,
    scale: float, architecture: str, dropout: Dropout | None, grad_q: Any, grad_k: Any, grad_v: Any,
) -> None:  # fmt: skip
    """delta: float32, of logsumexp's shape, for the kernels' own use."""
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    step, at = laid_out(
        grad=grad, q=q, k=k, v=v, out=out, mask=mask, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v
    )  # fmt: skip
    constants = constants_of(mask, band, scale, width, step)
    rest = (heads, heads // kv_heads, queries, keys, *band, size_of(scale), dropout)

    def how(tables: dict[str, Table]) -> dict[str, Any]:
        size = q.element_size()
        return constants | chosen(
            tables[architecture], width, size, crowded(mask is not None, dropout is not None, size)
        )

    def strides(*names: str) -> list[tuple[int, int, int, int]]:
        return [at[name] for name in names]

    tile = how(QUERY_TABLES)
    _queries[triton.cdiv(queries, tile["QUERIES"]), batch * heads](
        grad, q, k, v, out, logsumexp, delta, mask, lengths, grad_q,
        *strides("grad", "q", "k", "v", "out", "mask", "grad_q"), *rest, **tile,
    )  # fmt: skip
    if keys:
        tile = how(KEY_TABLES)
        _keys[triton.cdiv(keys, tile["KEYS"]), batch * kv_heads](
            grad, q, k, v, logsumexp, delta, mask, lengths, grad_k, grad_v,
            *strides("grad", "q", "k", "v", "mask", "grad_k", "grad_v"), *rest, **tile,
        )  # fmt: skip


WITHOUT_TENSOR_CORES = {80: (16, 32, 4, 2), 128: (32, 16, 4, 2), 256: (16, 16, 8, 2)}
QUERY_TABLES = {
    "warpgroup": Table(
        {2: {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)}, 4: WITHOUT_TENSOR_CORES}, {2: 64, 4: 16}
    ),
    "warp": Table(
        {2: {64: (64, 32, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)}, 4: WITHOUT_TENSOR_CORES}, {2: 16, 4: 16}
    ),
}
KEY_TABLES = {
    "warpgroup": Table(
        {2: {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 32, 8, 1)}, 4: WITHOUT_TENSOR_CORES}, {2: 64, 4: 16}
    ),
    "warp": Table(
        {2: {64: (32, 64, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)}, 4: WITHOUT_TENSOR_CORES}, {2: 16, 4: 16}
    ),
}


def crowded(masks: bool, drops: bool, element_size: int) -> bool:
    """Whether a tile leaves too few registers for the rest; those of float32 have some for dropout."""
    return masks or (drops and element_size == 2)


def sources(dtype: str, architecture: str = "warp") -> Iterator[tuple[ASTSource, dict[str, Any]]]:
    """Both kernels in "fp32", "bf16" or "fp16", for heads of U-Nets and transformers."""
    tensors = ("grad", "q", "k", "v", "out", "grad_q", "grad_k", "grad_v")
    types = dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys(("logsumexp", "delta"), "*fp32")
    for width, kind, drops in ((64, 0, False), (128, 1, False), (64, 0, True)):
        for kernel, tables in ((_queries, QUERY_TABLES), (_keys, KEY_TABLES)):
            size = 4 if dtype == "fp32" else 2
            tile = chosen(tables[architecture], width, size, crowded(kind != 0, drops, size))
            yield source(kernel, types, tile, width, kind, drops)
