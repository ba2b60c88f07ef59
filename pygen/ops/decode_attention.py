"""decode_attention: one or a few query tokens of every sequence against its cache of keys and values.

The attention of autoregressive decoding, split over the keys and merged by log-sum-exp (Flash-Decoding, Dao et al.
2023), with grouped queries (Ainslie et al. 2023), paged caches (Kwon et al. 2023), sliding windows in a ring, ALiBi
(Press et al. 2022), soft caps (Gemma 2, 2024) and attention sinks (Xiao et al. 2024, as a learned score per head).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pygen.ops.backend import use_reference
from pygen.ops.spec import Example, OpSpec, tensor_bytes

_BACKENDS = ("reference", "cpu", "cuda")


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    ring: bool = False,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Softmax attention of the newest tokens of sequences whose keys and values lie in a cache.

    Query i of a sequence sits at position lengths - q_len + i and sees the positions up to its own. Slots that no query
    sees are not read. A row's result depends on nothing but what it sees: to the bit, it is the same in every batch,
    among any other queries, in pages, in a ring or contiguous, on any number of threads and on every backend but the
    reference.

    Args:
        q: (batch, heads, q_len, head_dim), float32, bfloat16 or float16, of any strides; q_len up to 16, head_dim up to
            512, heads a multiple of kv_heads: query head h reads kv head h // (heads // kv_heads).
        k_cache, v_cache: (batch, kv_heads, capacity, head_dim), or with ``block_table`` (pages, kv_heads, page_size,
            head_dim); float32, bfloat16, float16, or int8 with scales; contiguous in head_dim.
        lengths: int64 (batch,): how many tokens each sequence holds, the q_len of this call included. A query that
            sees nothing gives zeros.
        block_table: int32 (batch, max_pages): the pages of each sequence in order. A page that does not exist raises
            on a CPU, and where the environment has PYGEN_DEBUG=1, which waits for the device; else a GPU's kernel takes
            what would lie in it for unseen.
        ring: position p lies in slot p % capacity, and only the last ``capacity`` positions are there to see.
        window: a query sees no more than so many positions, its own included.
        scale: of the scores; 1 / sqrt(head_dim) where left out.
        soft_cap: scores become soft_cap * tanh(score / soft_cap).
        alibi_slopes: float32 (heads,): slope * (position of the key - position of the query) is added to the scores.
        sinks: float32 (heads,): a score that takes its share of the weights, and has no value.
        k_scale, v_scale: float32, an int8 cache's shape less head_dim: value = scale * int8.
        out: q's shape, receives the result; new where left out.
        lse: float32 (batch, heads, q_len), receives the log-sum-exp of the scores, the sink's included, where given.

    Returns:
        (batch, heads, q_len, head_dim) in q's dtype, or ``out``.

    Raises:
        ValueError, TypeError, IndexError: naming the argument.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    settings: dict[str, Any] = {
        "block_table": block_table,
        "ring": ring,
        "window": window,
        "scale": scale,
        "soft_cap": soft_cap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    if use_reference("decode_attention", _BACKENDS, q.device):
        result, logarithm = decode_attention_reference(q, k_cache, v_cache, lengths, **settings)
        out.copy_(result)
        if lse is not None:
            lse.copy_(logarithm)
        return out
    _kernel(q, k_cache, v_cache, lengths, *settings.values(), out, lse)
    return out


def decode_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    ring: bool = False,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(q.dtype, torch.float32)
    (batch, heads, q_len, head_dim), (pages, kv_heads, page_size, _) = q.shape, k_cache.shape
    if block_table is None:
        block_table = torch.arange(batch, device=q.device)[:, None]
    capacity = block_table.shape[1] * page_size

    # Positions (batch, capacity), from the oldest that the cache may hold, and where they lie.
    position = torch.arange(capacity, device=q.device).expand(batch, capacity)
    if ring:
        position = position + (lengths[:, None] - capacity).clamp(min=0)
    slot = position % capacity
    page, offset = block_table.gather(1, slot // page_size).long(), slot % page_size
    exists = (page >= 0) & (page < pages)
    page = page.clamp(0, pages - 1)
    k, v = k_cache[page, :, offset].to(compute), v_cache[page, :, offset].to(compute)
    if k_scale is not None and v_scale is not None:
        k, v = k * k_scale[page, :, offset, None].to(compute), v * v_scale[page, :, offset, None].to(compute)

    own = lengths[:, None] - q_len + torch.arange(q_len, device=q.device)
    ahead = position[:, None] - own[:, :, None]  # (batch, q_len, capacity)
    seen = (ahead <= 0) & exists[:, None]
    if window is not None:
        seen = seen & (ahead > -window)

    grouped = q.to(compute).view(batch, kv_heads, heads // kv_heads, q_len, head_dim)
    scores = torch.einsum("bhgqd,bkhd->bhgqk", grouped, k) * (head_dim**-0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.to(compute).view(kv_heads, -1, 1, 1) * ahead[:, None, None]
    scores = torch.where(seen[:, None, None], scores, -math.inf)
    largest = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.to(compute).view(kv_heads, -1, 1, 1)
        largest = torch.maximum(largest, sink)
    base = torch.where(largest == -math.inf, 0, largest)
    weights = (scores - base).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sink - base).exp()
    values = torch.where(seen[..., None, None], v[:, None], 0)  # what is unseen may be NaN
    out = torch.einsum("bhgqk,bqkhd->bhgqd", weights, values) / total
    out = torch.where(total == 0, 0, out)
    lse = (base + total.log())[..., 0]
    return out.reshape(q.shape).to(q.dtype), lse.reshape(batch, heads, q_len)


_kernel = torch.ops.pygen.decode_attention.default


@torch.library.register_fake("pygen::decode_attention")
def _fake(*arguments: object) -> None:
    return None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(to)

    def example(
        name: str,
        *lengths: int,
        heads: int = 2,
        kv_heads: int = 1,
        q_len: int = 1,
        head_dim: int = 16,
        capacity: int | None = None,
        page_size: int | None = None,
        cache: torch.dtype = dtype,
        **more: Any,
    ) -> Example:
        """Slots that hold no token hold NaN."""
        batch = len(lengths)
        capacity = max(*lengths, 1) if capacity is None else capacity
        size = (batch, kv_heads, capacity, head_dim)
        unused = torch.arange(capacity)[:, None] >= torch.tensor(lengths).view(-1, 1, 1, 1)
        if cache == torch.int8:
            k, v = ((30 * draw(*size, to=torch.float32)).round().clamp(-127, 127).to(cache) for _ in range(2))
            scales = torch.rand((2, *size[:3]), generator=generator) / 30
            more["k_scale"], more["v_scale"] = (torch.where(unused[..., 0], math.nan, scale) for scale in scales)
        else:
            k, v = (torch.where(unused, math.nan, draw(*size, to=cache)) for _ in range(2))
        arguments = {"q": draw(batch, heads, q_len, head_dim), "k_cache": k, "v_cache": v} | more
        if page_size is not None:
            arguments |= paged(arguments, page_size, generator)
        outputs = {
            "out": torch.full((batch, heads, q_len, head_dim), math.nan, dtype=dtype),
            "lse": torch.full((batch, heads, q_len), math.nan),
        }
        return Example(name, {"lengths": torch.tensor(lengths), "ring": False} | arguments | outputs)

    for length in (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 255, 256, 257, 511, 513):
        yield example("every length", length, capacity=600)
        yield example("every length, paged", length, capacity=600, page_size=16)
    for head_dim in (*range(1, 18, 2), 31, 32, 33, 40, 64, 65, 72, 80, 96, 112, 127, 128, 200, 256, 512):
        yield example("every head_dim", 35, 3, head_dim=head_dim)
    for heads in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16):
        yield example("every group", 40, heads=heads)
        yield example("several kv heads", 40, heads=3 * heads, kv_heads=3)
    for q_len in (1, 2, 3, 5, 8, 16):
        yield example("every q_len", 300, 2, 17, q_len=q_len)
        yield example("every q_len, window", 300, 2, 17, q_len=q_len, window=13)
    for cache in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        for head_dim in (16, 33, 80):
            for page_size in (None, 16):
                cached: dict[str, Any] = {"cache": cache, "head_dim": head_dim, "page_size": page_size}
                yield example(f"cache in {cache}", 37, 16, 130, heads=6, kv_heads=2, **cached)
                yield example(f"cache in {cache}, q_len", 37, 16, 130, q_len=3, soft_cap=5.0, **cached)
    yield example("rows differ", 5, 0, 300, 64, 257, heads=4, kv_heads=2)
    for page_size in (1, 5, 16, 256, 300):
        yield example("every page size", 290, 40, 7, 0, page_size=page_size)
    for window in (1, 2, 16, 100, 256, 257, 1000):
        yield example("every window", 600, 300, 40, 0, window=window)
    for length in (100, 149, 150, 151, 300, 1000, 1237):
        yield example("ring", length, capacity=150, ring=True)
        yield example("ring, paged", length, capacity=150, ring=True, page_size=15)
        yield example("ring, window", length, capacity=150, ring=True, window=140, q_len=11)
    slopes, sinks = 2.0 ** -torch.arange(1, 5), torch.tensor([0.5, -3.0, 9.0, -math.inf])
    four: dict[str, Any] = {"heads": 4, "kv_heads": 2}
    for q_len in (1, 3):
        yield example("ALiBi", 300, 20, **four, q_len=q_len, alibi_slopes=slopes)
        yield example("soft cap", 300, 20, **four, q_len=q_len, soft_cap=2.0)
        yield example("sinks", 300, 20, 0, **four, q_len=q_len, sinks=sinks)
        rules: dict[str, Any] = {"alibi_slopes": slopes, "soft_cap": 50.0, "sinks": sinks, "window": 70, "scale": 0.3}
        yield example("all of it", 300, 20, 0, **four, q_len=q_len, **rules)
    strided = example("strided", 40, 33, heads=6, kv_heads=3, q_len=2)
    for name in ("q", "k_cache", "v_cache", "out"):
        tensor = strided.arguments[name]
        strided.arguments[name] = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    strided.arguments["lse"] = strided.arguments["lse"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    yield strided
    odd = example("misaligned", 40, 33, head_dim=17)
    for name in ("q", "k_cache", "v_cache"):
        odd.arguments[name] = odd.arguments[name][..., 1:]
    odd.arguments["out"] = odd.arguments["out"][..., :16]
    yield odd
    columns = example("head_dim strided", 40, head_dim=24)
    columns.arguments["q"] = draw(1, 2, 24, 2)[..., :1].transpose(2, 3)
    columns.arguments["out"] = torch.full((1, 2, 24, 3), math.nan, dtype=dtype)[..., 1:2].transpose(2, 3)
    yield columns
    special = example("NaN and Inf", *[60] * 7)
    q, k, v = (special.arguments[name] for name in ("q", "k_cache", "v_cache"))
    k[0, 0, 5, 3], v[1, 0, 5, 3], q[2, 0, 0, 1], v[3, 0, 50, 2] = math.nan, math.nan, math.nan, math.inf
    q[4:, :, :, 0] = 1.0
    k[4, 0, 7, 0], k[5, 0, 7, 0], k[6, :, :60, 0] = math.inf, -math.inf, -math.inf
    yield special
    later = example("NaN in a later token", 40, q_len=4)
    later.arguments["k_cache"][..., 38, :] = later.arguments["v_cache"][..., 39, :] = math.nan
    yield later
    large = example("large scores", 300, 40)
    large.arguments["q"] = 100 * large.arguments["q"]
    yield large
    yield Example("empty batch", {name: value[:0] if isinstance(value, Tensor) else value
                                  for name, value in example("", 40).arguments.items()})  # fmt: skip


def paged(arguments: dict[str, Any], page_size: int, generator: torch.Generator | None = None) -> dict[str, Any]:
    """A contiguous cache in pages of any order: k_cache, v_cache, their scales, and the block table."""
    batch, _, capacity, _ = arguments["k_cache"].shape
    per_sequence = -(-capacity // page_size)
    order = torch.randperm(batch * per_sequence + 2, generator=generator)
    table = order[: batch * per_sequence].view(batch, per_sequence).int()
    result: dict[str, Any] = {"block_table": table}
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if arguments.get(name) is None:
            continue
        cache = arguments[name]
        missing = math.nan if cache.is_floating_point() else 0
        pages = torch.full((len(order), cache.shape[1], page_size, *cache.shape[3:]), missing, dtype=cache.dtype)
        for b in range(batch):
            for i in range(per_sequence):
                piece = cache[b, :, i * page_size : (i + 1) * page_size]
                pages[table[b, i], :, : piece.shape[1]] = piece
        result[name] = pages
    return result


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    """Language models' heads: without and with groups of queries, from a short context to a long one, and in pages."""
    for name, batch, heads, kv_heads, length in (
        ("8 heads, 512 keys", 1, 8, 8, 512),
        ("8 heads, 4096 keys", 1, 8, 8, 4096),
        ("32 heads over 8, 16,000 keys", 1, 32, 8, 16000),
        ("32 heads over 8, 1024 keys, batch 16", 16, 32, 8, 1024),
    ):
        q = torch.randn(batch, heads, 1, 128).to(dtype)
        k, v = (torch.randn(batch, kv_heads, length, 128).to(dtype) for _ in range(2))
        arguments = {"q": q, "k_cache": k, "v_cache": v, "lengths": torch.full((batch,), length), "ring": False}
        yield Example(name, arguments | {"out": torch.empty_like(q)})
        if batch > 1:
            yield Example(f"{name}, in pages", arguments | paged(arguments, 16) | {"out": torch.empty_like(q)})


def _bytes_moved(example: Example) -> int:
    """Those of the keys and values that are seen, at most: a window is narrower."""
    arguments = example.arguments
    k, table = arguments["k_cache"], arguments.get("block_table")
    capacity = k.shape[2] * (1 if table is None else table.shape[1])
    tokens = int(arguments["lengths"].clamp(0, min(capacity, arguments.get("window") or capacity)).sum())
    return 2 * tokens * k.shape[1] * k.shape[3] * k.element_size() + tensor_bytes(arguments["q"], arguments["out"])


DECODE_ATTENTION = OpSpec(
    name="decode_attention",
    function=decode_attention,
    reference=lambda out=None, lse=None, **arguments: decode_attention_reference(**arguments),
    operator=_kernel,
    outputs=("out", "lse"),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=_bytes_moved,
    flops=lambda example: 4 * int(example.arguments["lengths"].sum()) * example.arguments["q"][0, :, :, :].numel(),
    benchmarks=_benchmarks,
)
