"""attention: one program per tile of queries of a head, which walks the keys it sees with a running maximum
(FlashAttention-2, Dao 2023). Where all queries of a tile see all keys of another, nothing is masked.

A head's dimensions are one tile, or two side by side where one power of two would be mostly padding. Scores are scaled
within the exponent, which is in powers of 2; the sign of a negative scale goes to q.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction

BAND = 1 << 30  # further than any position
LOG2E = tl.constexpr(1.4426950408889634)
# A new number of these is no reason to compile again; of strides only a 1 is.
SIZES = ("heads", "group", "queries", "keys", "before", "after", "scale")


@triton.jit
def product(a, b, sums, WIDEN: tl.constexpr):
    """a b + sums; widened for the interpreter, which takes bfloat16 for integers."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def head_of(start, strides, sample, head, STEP: tl.constexpr):
    """Where a head of a sample begins; strides but the last are in units of STEP elements."""
    return start + (tl.cast(sample, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]) * STEP


@triton.jit
def load_rows(
    start, strides, rows, count, BEGIN: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """(rows, SIZE): dimensions BEGIN on of rows, 0 where there is none; WHOLE where all rows are below ``count``."""
    column = BEGIN + tl.arange(0, SIZE)
    at = start + rows[:, None] * (strides[2] * STEP) + column[None, :] * strides[3]
    if WHOLE and BEGIN + SIZE <= WIDTH:
        return tl.load(at)
    elif WHOLE:
        return tl.load(at, (column < WIDTH)[None, :], 0.0)
    elif BEGIN + SIZE <= WIDTH:
        return tl.load(at, (rows < count)[:, None], 0.0)
    else:
        return tl.load(at, (rows < count)[:, None] & (column < WIDTH)[None, :], 0.0)


@triton.jit
def store_rows(
    start, strides, rows, count, value, BEGIN: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    column = BEGIN + tl.arange(0, SIZE)
    at = start + rows[:, None] * (strides[2] * STEP) + column[None, :] * strides[3]
    tl.store(at, value.to(start.dtype.element_ty), (rows < count)[:, None] & (column < WIDTH)[None, :])


@triton.jit
def masked(
    s, scale, mask, strides, q, k, queries, length, before, after, MASK: tl.constexpr, BANDED: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Products of queries q and keys k, -inf where nothing is seen; what a mask is added to is scaled before."""
    if MASK != 0:
        at, inside = mask + q * strides[2] + k * strides[3], (q < queries) & (k < length)
        if MASK == 1:
            s = tl.where(tl.load(at, inside, 0) != 0, s, float("-inf"))
        else:
            s = s * scale + tl.load(at, inside, 0.0).to(tl.float32)
    if not WHOLE:
        s = tl.where(k < length, s, float("-inf"))
        if BANDED:
            s = tl.where((k - q <= after) & (q - k <= before), s, float("-inf"))
    return s


class Dropout(NamedTuple):
    """What weights are dropped by: the numbers of a sample, and how far from one to the next."""

    seed: Any
    step: Any  # or None
    sample_ids: Any  # or None
    strides: Any
    draw: Any  # of head 0
    dropped: Any  # of 65536
    scale: Any  # of weights that are kept


@triton.jit
def pair_kept(dropout, word):
    return ((word & 0xFFFF) >= dropout.dropped).to(tl.uint32) | ((word >> 16) >= dropout.dropped).to(tl.uint32) << 1


@triton.jit
def kept(dropout, sample, head, rows, first_key, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Which weights of a tile are kept, (keys, queries).

    A block of Philox is made once for its eight keys, and its bits handed to the threads that want them. That takes the
    sum: behind one Triton does not look, and would else have each thread make every block that it wants a bit of.
    """
    step, number = tl.cast(0, tl.uint32), sample.to(tl.uint32)
    if dropout.step is not None:
        step = tl.load(dropout.step + sample * dropout.strides[1]).to(tl.uint32)
    if dropout.sample_ids is not None:
        number = tl.load(dropout.sample_ids + sample * dropout.strides[2]).to(tl.uint32)
    seed = tl.load(dropout.seed + sample * dropout.strides[0])
    q, eight = rows[None, :], first_key // 8 + tl.arange(0, KEYS // 8)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, q << 24 | eight, q >> 8 | (dropout.draw | head) << 16, step, number)
    low = pair_kept(dropout, w0) | pair_kept(dropout, w1) << 2
    high = pair_kept(dropout, w2) << 4 | pair_kept(dropout, w3) << 6
    bits = tl.sum(tl.join(low, high), 2)
    return ((bits[:, None, :] >> tl.arange(0, 8)[None, :, None] & 1) != 0).reshape(KEYS, QUERIES)


@triton.jit
def keys_seen(first, length, queries, before, after, BANDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Of a tile of queries: where the keys begin that some see, those that all see, where these end and where all
    do."""
    if BANDED:
        begin = tl.maximum(first - before, 0) // KEYS * KEYS
        end = tl.minimum(length, tl.minimum(first + QUERIES, queries) + after)
        whole = tl.minimum(tl.cdiv(tl.maximum(first + QUERIES - 1 - before, 0), KEYS) * KEYS, end)
        return begin, whole, tl.maximum(tl.minimum(length, first + after + 1) // KEYS * KEYS, whole), end
    else:
        return 0, 0, length // KEYS * KEYS, length


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=("q_at", "k_at", "v_at", "mask_at", "out_at"))
def _attention(
    q,
    k,
    v,
    mask,
    lengths,
    out,
    logsumexp,
    q_at,  # strides: batch, heads, length, head_dim
    k_at,
    v_at,
    mask_at,
    out_at,
    heads,
    group,  # query heads to a head of keys
    queries,
    keys,
    before,  # query i sees keys i - before to i + after
    after,
    scale,  # above 0
    dropout,
    MASK: tl.constexpr,  # none, bool, or added
    NEGATIVE: tl.constexpr,  # whether the scale is
    BANDED: tl.constexpr,
    WIDTH: tl.constexpr,  # of a head
    STEP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST: tl.constexpr,  # of a head's dimensions, and the rest
    REST: tl.constexpr,
    WIDEN: tl.constexpr,
):
    sample, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    q = head_of(q, q_at, sample, head, STEP)
    k = head_of(k, k_at, sample, head // group, STEP)
    v = head_of(v, v_at, sample, head // group, STEP)
    out = head_of(out, out_at, sample, head, STEP)
    if MASK != 0:
        mask = head_of(mask, mask_at, sample, head, 1)
    length = keys
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + sample), 0), keys).to(tl.int32)
    first = tl.program_id(0) * QUERIES
    rows = first + tl.arange(0, QUERIES)
    FLOATS: tl.constexpr = q.dtype.element_ty == tl.float32  # whose tiles are better on their way at the edges too

    q0 = load_rows(q, q_at, rows, queries, 0, WIDTH, FIRST, STEP, False)
    q0 = -q0 if NEGATIVE else q0
    sums0 = tl.zeros([QUERIES, FIRST], tl.float32)
    if REST > 0:
        q1 = load_rows(q, q_at, rows, queries, FIRST, WIDTH, REST, STEP, False)
        q1 = -q1 if NEGATIVE else q1
        sums1 = tl.zeros([QUERIES, REST], tl.float32)
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    unit = LOG2E if MASK == 2 else scale * LOG2E  # what scores are in powers of 2
    ends = keys_seen(first, length, queries, before, after, BANDED, QUERIES, KEYS)
    for part in tl.static_range(0 if BANDED else 1, 3):
        for at in tl.range(ends[part], ends[part + 1], KEYS, num_stages=None if part == 1 or FLOATS else 1):
            columns = at + tl.arange(0, KEYS)
            k0 = load_rows(k, k_at, columns, length, 0, WIDTH, FIRST, STEP, part == 1)
            s = product(q0, k0.T, None, WIDEN)
            if REST > 0:
                k1 = load_rows(k, k_at, columns, length, FIRST, WIDTH, REST, STEP, part == 1)
                s = product(q1, k1.T, s, WIDEN)
            s = masked(
                s, scale, mask, mask_at, rows[:, None], columns[None, :], queries, length, before, after, MASK, BANDED,
                part == 1,
            )  # fmt: skip
            higher = tl.maximum(most, tl.max(s, 1) * unit)
            base = higher
            if MASK != 0 or part != 1:
                base = tl.where(higher == float("-inf"), 0.0, higher)
            held = tl.exp2(most - base)
            p = tl.exp2(s * unit - base[:, None])
            total = total * held + tl.sum(p, 1)
            if dropout is not None:
                keep = kept(dropout, sample, head, rows, at, QUERIES, KEYS).T
                p = tl.where(keep, p, 0.0)
            v0 = load_rows(v, v_at, columns, length, 0, WIDTH, FIRST, STEP, part == 1)
            sums0 = product(p.to(v0.dtype), v0, sums0 * held[:, None], WIDEN)
            if REST > 0:
                v1 = load_rows(v, v_at, columns, length, FIRST, WIDTH, REST, STEP, part == 1)
                sums1 = product(p.to(v1.dtype), v1, sums1 * held[:, None], WIDEN)
            most = higher

    nothing = total == 0.0
    share = tl.where(nothing, 0.0, 1.0 / tl.where(nothing, 1.0, total))[:, None]
    if dropout is not None:
        share *= dropout.scale
    store_rows(out, out_at, rows, queries, sums0 * share, 0, WIDTH, FIRST, STEP)
    if REST > 0:
        store_rows(out, out_at, rows, queries, sums1 * share, FIRST, WIDTH, REST, STEP)
    if logsumexp is not None:
        y = tl.where(nothing, float("-inf"), (most + tl.log2(tl.where(nothing, 1.0, total))) / LOG2E)
        tl.store(logsumexp + tl.cast(sample * heads + head, tl.int64) * queries + rows, y, rows < queries)


def launch(
    q: Any, k: Any, v: Any, mask: Any, lengths: Any, band: Any, scale: float, architecture: str,
    dropout: Dropout | None, out: Any, logsumexp: Any,
) -> None:  # fmt: skip
    """band: how far before and behind it a query sees; mask: None, or of the scores' shape, expanded;
    architecture: a key of TABLES."""
    batch, heads, queries, width = q.shape
    step, at = laid_out(q=q, k=k, v=v, mask=mask, out=out)
    how = chosen(TABLES[architecture], width, q.element_size(), mask is not None)
    how |= constants_of(mask, band, scale, width, step)
    _attention[triton.cdiv(queries, how["QUERIES"]), batch * heads](
        q, k, v, mask, lengths, out, logsumexp, *at.values(), heads, heads // k.shape[1], queries, k.shape[2], *band,
        size_of(scale), dropout, **how,
    )  # fmt: skip


def dropout_of(draw: int, dropped: int, batch: int, seed: Any, step: Any, sample_ids: Any) -> Dropout:
    strides = tuple(0 if one is None else one.expand(batch).stride(0) for one in (seed, step, sample_ids))
    scale = 65536 / (65536 - dropped) if dropped < 65536 else 0.0
    return Dropout(seed, step, sample_ids, strides, draw, dropped, scale)


INTERPRETED = isinstance(_attention, InterpretedFunction)


def laid_out(**tensors: Any) -> tuple[int, dict[str, tuple[int, int, int, int]]]:
    """The elements of 16 bytes, where all rows of all tensors begin at a multiple of as many, else 1; and the strides,
    all but the last divided by it. A mask's are as they are."""
    at, step = {}, 16 // tensors["q"].element_size()
    for name, tensor in tensors.items():
        if tensor is None:
            at[name] = (0, 0, 0, 0)
            continue
        batch, head, row, column = at[name] = tensor.stride()
        if (tensor.shape[2] - 1) * row + (tensor.shape[3] - 1) * column >= 2**31:  # offsets within a head have 32 bits
            raise ValueError(f"attention: a head of {name} spans 2^31 elements or more")
        if name != "mask" and (column != 1 or (batch | head | row) % step or tensor.data_ptr() % 16):
            step = 1
    return step, {
        name: found if name == "mask" else (*(stride // step for stride in found[:3]), found[3])
        for name, found in at.items()
    }


def constants_of(mask: Any, band: tuple[int, int], scale: float, width: int, step: int) -> dict[str, Any]:
    """Of a kernel, but for its tile's."""
    return {
        "MASK": kind_of(mask), "NEGATIVE": scale < 0, "BANDED": band != (BAND, BAND), "WIDTH": width, "STEP": step,
        "WIDEN": INTERPRETED,
    }  # fmt: skip


def size_of(scale: float) -> float:
    """Its magnitude; not 0, of which -inf would make NaN."""
    return max(abs(scale), 1e-30)


def kind_of(mask: Any) -> int:
    return 0 if mask is None else 1 if mask.element_size() == 1 else 2


class Table(NamedTuple):
    """How programs are shaped, by the bytes of an element.

    tiles: of queries and of keys, warps and stages, up to a width of a head.
    narrowest: the least tile of a head's dimensions.
    """

    tiles: dict[int, dict[int, tuple[int, int, int, int]]]
    narrowest: dict[int, int]


# The fastest of what neither spills nor asks for more shared memory than there is. float32 has no tensor cores here.
# Hopper and Blackwell multiply by groups of warps: there, Triton's products of narrow bfloat16 tiles read outside their
# memory (seen on sm_90), and the tiles of other GPUs are too small.
WITHOUT_TENSOR_CORES = {80: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2)}
TABLES = {
    "warpgroup": Table(
        {
            2: {48: (128, 64, 4, 3), 64: (64, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 64, 4, 2)},
            4: WITHOUT_TENSOR_CORES,
        },
        {2: 64, 4: 16},
    ),
    "warp": Table(
        {2: {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)}, 4: WITHOUT_TENSOR_CORES}, {2: 16, 4: 16}
    ),
}


def chosen(table: Table, width: int, element_size: int, crowded: bool) -> dict[str, int]:
    """The constants of a kernel, and its options; crowded where a mask takes memory and registers too."""
    tiles, narrowest = table.tiles[element_size], table.narrowest[element_size]
    queries, keys, warps, stages = next(tile for most, tile in tiles.items() if width <= most)
    if crowded:
        queries, keys, stages = max(queries // 2, 16), max(keys // 2, 16), min(stages, 2)
    first = max(narrowest, 1 << (width.bit_length() - 1))
    rest = 0 if width <= first else max(narrowest, triton.next_power_of_2(width - first))
    if rest == first:
        first, rest = 2 * first, 0
    return {
        "QUERIES": queries, "KEYS": keys, "FIRST": first, "REST": rest, "num_warps": warps, "num_stages": stages
    }  # fmt: skip


def sources(dtype: str, architecture: str = "warp") -> Iterator[tuple[ASTSource, dict[str, Any]]]:
    """The kernel in "fp32", "bf16" or "fp16", for heads of U-Nets and transformers, with and without masks."""
    types = dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}") | {"logsumexp": "*fp32"}
    for width, kind, drops in ((64, 0, False), (40, 2, False), (128, 1, False), (160, 0, False), (64, 0, True)):
        tile = chosen(TABLES[architecture], width, 4 if dtype == "fp32" else 2, kind != 0)
        yield source(_attention, types, tile, width, kind, drops)


def source(
    kernel: Any, types: dict[str, str], tile: dict[str, int], width: int, kind: int, drops: bool
) -> tuple[ASTSource, dict[str, Any]]:
    """As a call on contiguous tensors would compile it, with lengths, a kind of mask and maybe dropout; and its
    options."""
    options = {name: tile[name] for name in ("num_warps", "num_stages")}
    step = 4 if types["q"] == "*fp32" else 8
    constants: dict[str, Any] = {name: value for name, value in tile.items() if name not in options}
    constants |= {"MASK": kind, "NEGATIVE": False, "BANDED": False, "WIDTH": width, "STEP": step, "WIDEN": False}
    types = types | {"lengths": "*i64", "scale": "fp32", "mask": "*i1" if kind == 1 else "*fp32"}
    if kind == 0:
        constants["mask"] = None
    if not drops:
        constants["dropout"] = None
    names = kernel.arg_names
    signature: dict[str, Any] = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [n for n in names if n not in constants and types.get(n, "i32")[0] == "*"]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    by_path = {(names.index(name),): value for name, value in constants.items()}
    for name in names:
        if name.endswith("_at"):
            signature[name] = ("i32", "i32", "i32", "constexpr")
            by_path[names.index(name), 3] = 1
    if drops:
        signature["dropout"] = Dropout("*i64", "*i64", "*i64", ("i32", "i32", "i32"), "i32", "i32", "fp32")
    return ASTSource(kernel, signature, by_path, attributes), options
