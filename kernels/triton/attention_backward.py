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
    INTERPRETED,
    LOG2E,
    check_reach,
    chosen,
    kind_of,
    load_rows,
    product,
    scores_of,
    source,
    store_rows,
)

QUERY_STRIDES = tuple(
    f"{name}_{d}" for name in ("grad", "q", "k", "v", "out", "mask", "grad_q") for d in ("b", "h", "l", "d")
)
KEY_STRIDES = tuple(
    f"{name}_{d}" for name in ("grad", "q", "k", "v", "mask", "grad_k", "grad_v") for d in ("b", "h", "l", "d")
)


@triton.jit
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
    grad_b,
    grad_h,
    grad_l,
    grad_d,
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
    out_b,
    out_h,
    out_l,
    out_d,
    mask_b,
    mask_h,
    mask_l,
    mask_d,
    grad_q_b,
    grad_q_h,
    grad_q_l,
    grad_q_d,
    heads,
    group,
    queries,
    keys,
    width,
    before,
    after,
    scale,
    MASK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    WIDEN: tl.constexpr,
):
    sample, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    grad += sample * grad_b + head * grad_h
    q += sample * q_b + head * q_h
    k += sample * k_b + head // group * k_h
    v += sample * v_b + head // group * v_h
    out += sample * out_b + head * out_h
    grad_q += sample * grad_q_b + head * grad_q_h
    if MASK != 0:
        mask += sample * mask_b + head * mask_h
    length = keys
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + sample), 0), keys).to(tl.int32)
    first = tl.program_id(0) * QUERIES
    rows = first + tl.arange(0, QUERIES)
    numbers = (sample * heads + head) * queries + rows

    q0 = load_rows(q, rows, q_l, q_d, queries, 0, width, FIRST)
    g0 = load_rows(grad, rows, grad_l, grad_d, queries, 0, width, FIRST)
    o0 = load_rows(out, rows, out_l, out_d, queries, 0, width, FIRST)
    away = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
    sums0 = tl.zeros([QUERIES, FIRST], tl.float32)
    if REST > 0:
        q1 = load_rows(q, rows, q_l, q_d, queries, FIRST, width, REST)
        g1 = load_rows(grad, rows, grad_l, grad_d, queries, FIRST, width, REST)
        o1 = load_rows(out, rows, out_l, out_d, queries, FIRST, width, REST)
        away += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
        sums1 = tl.zeros([QUERIES, REST], tl.float32)
    tl.store(delta + numbers, away, rows < queries)
    base = tl.load(logsumexp + numbers, rows < queries, 0.0)
    base = tl.where(base == float("-inf"), 0.0, base) * LOG2E

    begin = tl.maximum(first - before, 0) // KEYS * KEYS
    end = tl.minimum(length, tl.minimum(first + QUERIES, queries) + after)
    for at in range(begin, end, KEYS):
        columns = at + tl.arange(0, KEYS)
        k0 = load_rows(k, columns, k_l, k_d, length, 0, width, FIRST)
        v0 = load_rows(v, columns, v_l, v_d, length, 0, width, FIRST)
        s = product(q0, k0.T, None, WIDEN)
        slope = product(g0, v0.T, None, WIDEN)
        if REST > 0:
            k1 = load_rows(k, columns, k_l, k_d, length, FIRST, width, REST)
            v1 = load_rows(v, columns, v_l, v_d, length, FIRST, width, REST)
            s = product(q1, k1.T, s, WIDEN)
            slope = product(g1, v1.T, slope, WIDEN)
        s = scores_of(s, scale * LOG2E, mask, rows, columns, queries, length, before, after, mask_l, mask_d, MASK)
        p = tl.exp2(s - base[:, None])
        ds = tl.where(s == float("-inf"), 0.0, p * (slope - away[:, None])).to(k0.dtype)
        sums0 = product(ds, k0, sums0, WIDEN)
        if REST > 0:
            sums1 = product(ds, k1, sums1, WIDEN)
    store_rows(grad_q, rows, grad_q_l, grad_q_d, queries, 0, width, sums0 * scale, FIRST)
    if REST > 0:
        store_rows(grad_q, rows, grad_q_l, grad_q_d, queries, FIRST, width, sums1 * scale, REST)


@triton.jit
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
    grad_b,
    grad_h,
    grad_l,
    grad_d,
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
    grad_k_b,
    grad_k_h,
    grad_k_l,
    grad_k_d,
    grad_v_b,
    grad_v_h,
    grad_v_l,
    grad_v_d,
    heads,
    group,
    queries,
    keys,
    width,
    before,
    after,
    scale,
    MASK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    WIDEN: tl.constexpr,
):
    kv_heads = heads // group
    sample, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    k += sample * k_b + kv_head * k_h
    v += sample * v_b + kv_head * v_h
    length = keys
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + sample), 0), keys).to(tl.int32)
    first = tl.program_id(0) * KEYS
    columns = first + tl.arange(0, KEYS)

    k0 = load_rows(k, columns, k_l, k_d, length, 0, width, FIRST)
    v0 = load_rows(v, columns, v_l, v_d, length, 0, width, FIRST)
    of_k0 = tl.zeros([KEYS, FIRST], tl.float32)
    of_v0 = tl.zeros([KEYS, FIRST], tl.float32)
    if REST > 0:
        k1 = load_rows(k, columns, k_l, k_d, length, FIRST, width, REST)
        v1 = load_rows(v, columns, v_l, v_d, length, FIRST, width, REST)
        of_k1 = tl.zeros([KEYS, REST], tl.float32)
        of_v1 = tl.zeros([KEYS, REST], tl.float32)
    begin = tl.maximum(first - after, 0) // QUERIES * QUERIES
    end = tl.minimum(queries, tl.minimum(first + KEYS, length) + before)
    if first >= length:
        end = 0
    for head in range(kv_head * group, (kv_head + 1) * group):
        of_q = q + sample * q_b + head * q_h
        of_grad = grad + sample * grad_b + head * grad_h
        of_mask = mask
        if MASK != 0:
            of_mask = mask + sample * mask_b + head * mask_h
        for at in range(begin, end, QUERIES):
            rows = at + tl.arange(0, QUERIES)
            numbers = (sample * heads + head) * queries + rows
            q0 = load_rows(of_q, rows, q_l, q_d, queries, 0, width, FIRST)
            g0 = load_rows(of_grad, rows, grad_l, grad_d, queries, 0, width, FIRST)
            s = product(q0, k0.T, None, WIDEN)
            slope = product(g0, v0.T, None, WIDEN)
            if REST > 0:
                q1 = load_rows(of_q, rows, q_l, q_d, queries, FIRST, width, REST)
                g1 = load_rows(of_grad, rows, grad_l, grad_d, queries, FIRST, width, REST)
                s = product(q1, k1.T, s, WIDEN)
                slope = product(g1, v1.T, slope, WIDEN)
            s = scores_of(
                s, scale * LOG2E, of_mask, rows, columns, queries, length, before, after, mask_l, mask_d, MASK
            )
            base = tl.load(logsumexp + numbers, rows < queries, 0.0)
            base = tl.where(base == float("-inf"), 0.0, base) * LOG2E
            away = tl.load(delta + numbers, rows < queries, 0.0)
            p = tl.exp2(s - base[:, None])
            ds = tl.where(s == float("-inf"), 0.0, p * (slope - away[:, None])).to(q0.dtype)
            p = p.to(q0.dtype)
            of_v0 = product(p.T, g0, of_v0, WIDEN)
            of_k0 = product(ds.T, q0, of_k0, WIDEN)
            if REST > 0:
                of_v1 = product(p.T, g1, of_v1, WIDEN)
                of_k1 = product(ds.T, q1, of_k1, WIDEN)
    grad_k += sample * grad_k_b + kv_head * grad_k_h
    grad_v += sample * grad_v_b + kv_head * grad_v_h
    store_rows(grad_k, columns, grad_k_l, grad_k_d, keys, 0, width, of_k0 * scale, FIRST)
    store_rows(grad_v, columns, grad_v_l, grad_v_d, keys, 0, width, of_v0, FIRST)
    if REST > 0:
        store_rows(grad_k, columns, grad_k_l, grad_k_d, keys, FIRST, width, of_k1 * scale, REST)
        store_rows(grad_v, columns, grad_v_l, grad_v_d, keys, FIRST, width, of_v1, REST)


def launch(
    grad: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, delta: Any, mask: Any, lengths: Any, band: Any,
    scale: float, grad_q: Any, grad_k: Any, grad_v: Any,
) -> None:  # fmt: skip
    """delta: float32, of logsumexp's shape, for the kernels' own use."""
    check_reach(grad=grad, q=q, k=k, v=v, out=out, mask=mask, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v)
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    tile = chosen(TILES, width, q.element_size())
    rest = (heads, heads // kv_heads, queries, keys, width, *band, scale)
    how = {"MASK": kind_of(mask), "WIDEN": INTERPRETED, **tile}

    def strides(*tensors: Any) -> list[int]:
        return [s for tensor in tensors for s in ((0,) * 4 if tensor is None else tensor.stride())]

    _queries[triton.cdiv(queries, tile["QUERIES"]), batch * heads](
        grad, q, k, v, out, logsumexp, delta, mask, lengths, grad_q, *strides(grad, q, k, v, out, mask, grad_q), *rest,
        **how,
    )  # fmt: skip
    if keys:
        _keys[triton.cdiv(keys, tile["KEYS"]), batch * kv_heads](
            grad, q, k, v, logsumexp, delta, mask, lengths, grad_k, grad_v,
            *strides(grad, q, k, v, mask, grad_k, grad_v), *rest, **how,
        )  # fmt: skip


TILES = {
    2: {64: (64, 32, 4), 128: (64, 32, 8), 256: (32, 16, 8)},
    4: {80: (32, 32, 4), 128: (16, 16, 4), 256: (16, 16, 8)},
}


def sources(dtype: str) -> Iterator[tuple[ASTSource, dict[str, Any]]]:
    """Both kernels in "fp32", "bf16" or "fp16", for heads of one part; those of two spill some tens of bytes."""
    tensors = ("grad", "q", "k", "v", "out", "grad_q", "grad_k", "grad_v")
    types = dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys(("logsumexp", "delta"), "*fp32")
    for width, kind in ((64, 0), (128, 1)):
        tile = chosen(TILES, width, 4 if dtype == "fp32" else 2)
        for kernel, strides in ((_queries, QUERY_STRIDES), (_keys, KEY_STRIDES)):
            yield source(kernel, types, strides, tile, kind)
