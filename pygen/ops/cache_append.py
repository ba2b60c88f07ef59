"""cache_append: the keys and values of new tokens on their way into the cache, and their queries, in one pass.

Keys and queries are normalised over the head (QK-norm, Henry et al. 2020, as an RMSNorm: Qwen3, Gemma 3) and turned by
their position (``rope``); keys and values are cast to the cache's dtype, or quantised to int8 with a scale per token
and head, and written where ``decode_attention`` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pygen.ops.backend import use_reference
from pygen.ops.rope import rope_frequencies, rope_reference, rope_table, token_positions
from pygen.ops.spec import Example, OpSpec, tensor_bytes

_BACKENDS = ("reference", "cpu", "cuda")
_OUTPUTS = ("out", "k_cache", "v_cache", "k_scale", "v_scale")
_LEAST = 2.0**-120  # heads of smaller numbers are quantised to zeros


def cache_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    q: Tensor | None = None,
    rope: Tensor | None = None,
    positions: Tensor | None = None,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    block_table: Tensor | None = None,
    ring: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    """Writes k and v into a cache, and gives back q as attention takes it.

    New token i of a sequence lies at position lengths - length + i; one before position 0 is padding: it is not
    written, and its queries become zeros. In a ring, of tokens with one slot the last is written. Slots of no new token
    are not touched. Arithmetic is float32, with one rounding at the end.

    Args:
        k, v: (batch, kv_heads, length, head_dim), float32, bfloat16 or float16, contiguous in head_dim, of up to 1024:
            parts of a fused projection need no copy.
        k_cache, v_cache: (batch, kv_heads, capacity, head_dim), or with ``block_table`` (pages, kv_heads, page_size,
            head_dim); float32, bfloat16, float16, or int8 with scales; contiguous in head_dim.
        lengths: int64 (batch,): how many tokens each sequence holds, these included.
        q: (batch, heads, length, head_dim), of k's dtype.
        rope: the table that turns q and k, as ``rope_table`` makes it; neither is turned where it is left out.
        positions: int64, as ``rope`` takes them, where heads are not turned by the positions above.
        interleaved: pairs to turn are neighbours, as in GPT-J; else elements i and pairs + i.
        q_norm, k_norm: (head_dim,), the weights of an RMSNorm before that. Gemma's, which count from 1, are passed as
            1 + weight.
        eps: of the norms.
        block_table: int32 (batch, max_pages): the pages of each sequence in order. A page that does not exist raises
            on a CPU, and where the environment has PYGEN_DEBUG=1, which waits for the device; else a GPU's kernel
            writes nothing for it.
        ring: position p lies in slot p % capacity.
        k_scale, v_scale: float32, an int8 cache's shape less head_dim: value = scale * int8, scale = max |value| / 127.
        out: receives q normalised and turned; may be q itself; new where left out.

    Returns:
        ``out``; None where there is no q.

    Raises:
        ValueError, TypeError, IndexError: naming the argument.
    """
    if q is not None and out is None:
        out = torch.empty_like(q)
    if not use_reference("cache_append", _BACKENDS, k.device):
        _kernel(
            k, v, k_cache, v_cache, lengths, q, rope, positions, interleaved, q_norm, k_norm, eps, block_table, ring,
            k_scale, v_scale, out,
        )  # fmt: skip
        return out
    results = cache_append_reference(
        k, v, k_cache, v_cache, lengths, q=q, rope=rope, positions=positions, interleaved=interleaved, q_norm=q_norm,
        k_norm=k_norm, eps=eps, block_table=block_table, ring=ring, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    for tensor, result in zip((out, k_cache, v_cache, k_scale, v_scale), results, strict=True):
        if tensor is not None and result is not None:
            tensor.copy_(result)
    return out


def cache_append_reference(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    q: Tensor | None = None,
    rope: Tensor | None = None,
    positions: Tensor | None = None,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    block_table: Tensor | None = None,
    ring: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """q as it goes into attention, the caches and their scales, all new."""
    compute = torch.promote_types(k.dtype, torch.float32)
    (batch, _, length, _), page_size = k.shape, k_cache.shape[2]
    at = lengths[:, None] - length + torch.arange(length, device=k.device)  # (batch, length), negative for padding
    turns = at.clamp(min=0) if positions is None else token_positions(positions, batch, length)

    def prepared(x: Tensor, norm: Tensor | None) -> Tensor:
        x = x.to(compute)
        if norm is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.to(compute)
        return x if rope is None else rope_reference(x, turns, rope, interleaved=interleaved)

    written = at >= 0
    if ring:
        capacity = page_size * (1 if block_table is None else block_table.shape[1])
        written = written & (at >= lengths[:, None] - capacity)
        at = at % capacity
    sequence, token = written.nonzero(as_tuple=True)
    page, slot = sequence, at[written]
    if block_table is not None:
        page, slot = block_table[sequence, slot // page_size].long(), slot % page_size

    def appended(x: Tensor, cache: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        cache, rows = cache.clone(), x[sequence, :, token]  # (tokens, kv_heads, head_dim)
        if scale is not None:
            most = rows.abs().amax(-1)
            step = torch.where(most < _LEAST, 0, most) / 127
            scale = scale.clone()
            scale[page, :, slot] = step.to(scale.dtype)
            step = step[..., None]
            rows = torch.where((step > 0) & step.isfinite(), rows / step, 0).round()
        cache[page, :, slot] = rows.to(cache.dtype)
        return cache, scale

    out = None
    if q is not None:
        padding = (lengths[:, None] - length + torch.arange(length, device=k.device) < 0)[:, None, :, None]
        out = torch.where(padding, 0, prepared(q, q_norm)).to(q.dtype)
    (k_cache, k_scale), (v_cache, v_scale) = (
        appended(prepared(k, k_norm), k_cache, k_scale),
        appended(v.to(compute), v_cache, v_scale),
    )
    return out, k_cache, v_cache, k_scale, v_scale


_kernel = torch.ops.pygen.cache_append.default


@torch.library.register_fake("pygen::cache_append")
def _fake(*arguments: object) -> None:
    return None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def tensor(*size: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(like)

    def whole(*size: int) -> Tensor:
        """Numbers that int8 holds exactly at a scale of 1/4, of which each head has a largest one."""
        values = torch.randint(-126, 127, size, generator=generator)
        values[..., -1:] = torch.where(values[..., -1:] < 0, -127, 127)
        return (values / 4).to(dtype)

    def example(
        name: str, lengths: list[int], length: int, head_dim: int = 32, *, q_heads: int = 4, kv_heads: int = 2,
        capacity: int = 24, cache: torch.dtype | None = None, pages: list[list[int]] | None = None, **more: Any,
    ) -> Example:  # fmt: skip
        batch, quantised = len(lengths), cache == torch.int8
        new = whole if quantised else tensor
        shape = (batch if pages is None else 9, kv_heads, capacity, head_dim)
        caches = [
            torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator) if quantised
            else tensor(*shape, like=cache or dtype)
            for _ in range(2)
        ]  # fmt: skip
        q = new(batch, q_heads, length, head_dim) if q_heads > 0 else None
        arguments = {
            "k": new(batch, kv_heads, length, head_dim), "v": new(batch, kv_heads, length, head_dim),
            "k_cache": caches[0], "v_cache": caches[1], "lengths": torch.tensor(lengths, dtype=torch.int64), "q": q,
            "interleaved": False, "eps": 1e-6, "ring": False,
            "block_table": None if pages is None else torch.tensor(pages, dtype=torch.int32),
            "k_scale": tensor(*shape[:3], like=torch.float32) if quantised else None,
            "v_scale": tensor(*shape[:3], like=torch.float32) if quantised else None,
            "out": None if q is None else torch.full_like(q, math.nan),
        }  # fmt: skip
        return Example(name, arguments | more)

    def table(pairs: int) -> Tensor:
        return rope_table(rope_frequencies(2 * pairs)[0], 60)

    def norms(head_dim: int) -> dict[str, Any]:
        return {"q_norm": tensor(head_dim), "k_norm": tensor(head_dim)}

    quarters = rope_table(torch.full((16,), math.pi / 2), 60).round()  # exact turns, of numbers that stay whole
    several = [[0, 8, 3], [5, 1, 2]]
    for interleaved in (False, True):
        kind: dict[str, Any] = {"interleaved": interleaved}
        for head_dim in (2, 3, 6, 15, 16, 30, 33, 48, 64, 80, 96, 128, 130, 256):
            full = kind | {"rope": table(head_dim // 2)}
            yield example("every head_dim", [3], 2, head_dim, capacity=3, **full)
            yield example("every head_dim, norm", [3], 2, head_dim, capacity=3, **full, **norms(head_dim))
            partial = kind | {"rope": table(max(head_dim // 8, 1))}
            yield example("partial", [3], 2, head_dim, capacity=3, **partial, **norms(head_dim))
        int8 = kind | {"cache": torch.int8, "rope": quarters}
        for head_dim in (32, 33, 40, 64, 90):
            yield example("int8", [3, 10], 2, head_dim, **int8)
        yield example("int8, pages", [3, 22], 4, 48, pages=several, capacity=8, **int8)
        yield example("int8, ring", [30, 5], 4, 48, ring=True, **int8)
        yield example("rows differ", [1, 24, 5], 1, 64, rope=table(32), **norms(64), **kind)
    for length in (1, 2, 15, 16, 17, 24):
        yield example("every length", [24, 24], length, rope=table(16), **norms(32))
    for cache in (torch.float32, torch.bfloat16, torch.float16):
        yield example(f"cache in {cache}", [7, 24], 3, 40, cache=cache, rope=table(20), **norms(40))
    yield example("as it is", [7, 24], 3)
    yield example("int8 as it is", [7, 24], 3, cache=torch.int8)
    yield example("no queries", [7, 24], 3, q_heads=0, rope=table(16), k_norm=tensor(32))
    yield example("norm alone", [7, 24], 3, **norms(32), eps=1e-2)
    for like in (torch.float32, torch.bfloat16, torch.float16):
        weights: dict[str, Any] = {name: tensor(32, like=like) for name in ("q_norm", "k_norm")}
        yield example(f"weights in {like}", [7, 24], 3, rope=table(16), **weights)
    yield example("padding", [0, 2, 24], 5, rope=table(16), **norms(32))
    yield example("padding in pages", [0, 2], 5, rope=table(16), pages=several, capacity=8)
    yield example("positions given", [5, 24], 2, rope=table(16), positions=torch.tensor([[50, 3], [0, 0]]))
    yield example("positions count on", [5, 24], 2, rope=table(16), positions=torch.tensor([[50], [3]]))
    for length in (1, 7, 8, 9, 20):
        yield example("pages", [20, 24], length, rope=table(16), pages=several, capacity=8)
        yield example("ring", [50, 24], length, rope=table(16), ring=True, capacity=8)
        yield example("ring in pages", [30, 21], length, rope=table(16), pages=several, ring=True, capacity=4)
    yield example("shared pages", [20, 20], 1, rope=table(16), pages=[[4, 5, 3], [4, 5, 2]], capacity=8)
    q = tensor(2, 4, 3, 32)
    yield example("in place", [7, 24], 3, rope=table(16), **norms(32), q=q, out=q)
    fused = tensor(2, 3, 8 * 64 + 1)[..., 1:].unflatten(-1, (8, 64)).transpose(1, 2)
    parts: dict[str, Any] = {
        "q": fused[:, :4],
        "k": fused[:, 4:6],
        "v": fused[:, 6:],
        "out": torch.zeros_like(fused[:, :4]),
    }
    yield example("a fused projection", [7, 24], 3, 64, rope=table(32), **norms(64), **parts)
    pair = tensor(2, 24, 2, 2, 64)
    strided: dict[str, Any] = {"k_cache": pair[:, :, 0].transpose(1, 2), "v_cache": pair[:, :, 1].transpose(1, 2)}
    yield example("caches of tokens before heads", [7, 24], 3, 64, rope=table(32), **strided)
    special = example("NaN and Inf", [7, 24], 3, rope=table(16), **norms(32))
    for name in ("q", "k", "v"):
        special.arguments[name][0, :, 1, 3], special.arguments[name][1, 1, 2, 9] = math.nan, math.inf
    yield special
    special = example("NaN, Inf and zeros as int8", [7, 24], 3, cache=torch.int8)
    for name in ("k", "v"):
        values = special.arguments[name]
        values[0, :, 1, 3], values[1, 1, 2, 9], values[1, 0, 2] = math.nan, -math.inf, 0
    yield special
    yield example(
        "huge and tiny norms", [7, 24], 3, k=1e4 * tensor(2, 2, 3, 32), q=1e-3 * tensor(2, 4, 3, 32), **norms(32)
    )
    yield example("empty batch", [], 3, rope=table(16))


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    """A token of one and of many sequences, and a prompt, of Qwen3's heads; and a token into int8."""
    sizes = (("a token", 1, 1, dtype), ("a token, int8", 1, 1, torch.int8), ("a token, batch 64", 64, 1, dtype),
             ("a prompt", 1, 4096, dtype), ("a prompt, int8", 1, 4096, torch.int8))  # fmt: skip
    for name, batch, length, cache in sizes:
        capacity = 4096
        heads = torch.randn(batch, length, 48, 128).to(dtype).transpose(1, 2)
        shape = (batch, 8, capacity, 128)
        arguments = {
            "k": heads[:, 32:40], "v": heads[:, 40:], "q": heads[:, :32], "out": torch.empty_like(heads[:, :32]),
            "lengths": torch.full((batch,), capacity), "rope": rope_table(rope_frequencies(128)[0], capacity),
            "q_norm": torch.rand(128).to(dtype), "k_norm": torch.rand(128).to(dtype),
            "k_cache": torch.zeros(shape, dtype=cache), "v_cache": torch.zeros(shape, dtype=cache),
        }  # fmt: skip
        if cache == torch.int8:
            arguments |= {"k_scale": torch.zeros(shape[:3]), "v_scale": torch.zeros(shape[:3])}
        yield Example(name, arguments)


def _bytes_moved(example: Example) -> int:
    """q, k and v are read, q and the new slots are written, and every token's row of the table is read."""
    given = example.arguments
    k = given["k"]
    slot = given["k_cache"].element_size() * k.shape[-1] + (0 if given.get("k_scale") is None else 4)
    written = 2 * k.shape[:-1].numel() * slot
    rows = 0 if given.get("rope") is None else k.shape[0] * k.shape[2] * tensor_bytes(given["rope"][0])
    return tensor_bytes(k, given["v"], given.get("q"), given.get("out")) + written + rows


CACHE_APPEND = OpSpec(
    name="cache_append",
    function=cache_append,
    reference=lambda out=None, **arguments: cache_append_reference(**arguments),
    operator=_kernel,
    outputs=_OUTPUTS,
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=_bytes_moved,
    flops=lambda example: 8 * (example.arguments["k"].numel() + tensor_bytes(example.arguments.get("q"))),
    benchmarks=_benchmarks,
)
