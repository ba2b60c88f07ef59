"""The suite `decode`: the ops of autoregressive decoding, beside torch's, over weights and caches met in memory.

In life a weight or a cache is met once per token, behind all the others: calls take turns over copies that no cache
holds, and their floor is a sum over as many bytes, taking turns likewise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

import pygen
from bench.cases import Case, Work
from bench.measure import Call
from pygen.ops.packed_linear import in_large_pages
from tests.error_rule import Triple

if TYPE_CHECKING:
    from bench.run import Result

ROTATED, ROTATED_QUICK = 512 << 20, 64 << 20  # bytes
VOCABULARY = 128256
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "top-k 50, top-p 0.9, min-p 0.05": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
}
# batch, heads, heads of keys, keys; and whether the cache is in pages of 64.
ATTENTION = {
    (1, 8, 8, 4096): ("float32", "bfloat16", "bfloat16 paged", "int8"),
    (1, 32, 8, 16000): ("float32", "bfloat16", "bfloat16 paged", "int8"),
    (8, 32, 8, 4096): ("bfloat16", "bfloat16 paged"),
    (64, 32, 8, 1024): ("bfloat16", "bfloat16 paged"),
}
HEAD_DIM, PAGE = 128, 64
LAYERS = ((4096, 4096), (11008, 4096))  # outputs, inputs
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"format": "float32"},
    "bfloat16": {"format": "bfloat16"},
    "int8": {"format": "int8"},
    "int8 by 32": {"format": "int8", "group": 32},
    "int4 by 32": {"format": "int4", "group": 32},
    "int4 by 128": {"format": "int4", "group": 128, "symmetric": False},
}
ROWS = (1, 4, 16, 64)
# What part of its floor a call is to reach, and how many times its peer's speed.
SHARES = {
    "attention": {"float32": 0.8, "bfloat16": 0.8, "bfloat16 paged": 0.8},
    "linear, 1 row": {"bfloat16": 0.9, "int8": 0.85, "int8 by 32": 0.85, "int4 by 32": 0.75, "int4 by 128": 0.75},
}
SPEEDUPS = {"top-p 0.9": 50.0, "top-k 50": 5.0}


def cases(quick: bool) -> list[Case]:
    rotated = ROTATED_QUICK if quick else ROTATED
    sampling = [(name, dtype, 1) for name in SAMPLING for dtype in (torch.float32, torch.bfloat16)]
    sampling += [("top-p 0.9", torch.float32, 16)]
    attention = [(shape, cache) for shape, caches in ATTENTION.items() for cache in caches]
    linear = [(layer, 1, name) for layer in LAYERS for name in FORMATS]
    linear += [(LAYERS[0], rows, name) for rows in ROWS[1:] for name in FORMATS]
    if quick:
        sampling, attention = sampling[2:6:2], attention[1:2]
        linear = [(LAYERS[0], 1, name) for name in ("bfloat16", "int4 by 32")]

    def case(part: str, name: str, make: Callable[[], Work]) -> Case:
        return Case("decode", name, make, part)

    return [
        *(
            case("sampling", f"{name}, {batch} x {VOCABULARY} {str(dtype)[6:]}", partial(sample, name, dtype, batch))
            for name, dtype, batch in sampling
        ),
        *(
            case("attention", f"attention, {sizes(shape)}, {cache}", partial(attend, *shape, cache, rotated))
            for shape, cache in attention
        ),
        *(
            case("linear", f"linear, {counted(rows)} x {layer}, {name}", partial(project, *layer, rows, name, rotated))
            for layer, rows, name in linear
        ),
    ]


def counted(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


def sizes(shape: tuple[int, int, int, int]) -> str:
    batch, heads, kv_heads, keys = shape
    return f"batch {batch}, {heads} heads{f' over {kv_heads}' if kv_heads < heads else ''}, {keys} keys"


def in_turn(calls: Iterable[Call]) -> Call:
    """Each of the calls after the other, again and again."""
    turns = cycle(list(calls))
    return lambda: next(turns)()


def reads(total_bytes: int, rotated: int) -> Call:
    """Sums over so many bytes each, that take turns over all."""
    numbers = max(1, total_bytes // 4)
    everything = large_pages(torch.ones(copies(total_bytes, rotated) * numbers))
    return in_turn([part.sum for part in everything.split(numbers)])


def large_pages(tensor: Tensor) -> Tensor:
    """As weights and caches lie that are streamed, so that the floor is that of pages of 2 MB too."""
    return in_large_pages(tensor.view(torch.uint8)).view(tensor.dtype)


def copies(total_bytes: int, rotated: int) -> int:
    return max(1, math.ceil(rotated / total_bytes))


def by_sorting(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """As most libraries do: transformers' TopPLogitsWarper, softmax and multinomial."""
    ascending, order = (logits / temperature).sort(dim=-1)
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    removed[..., -1:] = False
    kept = torch.full_like(logits, -math.inf).scatter(-1, order, ascending.masked_fill(removed, -math.inf))
    return kept.softmax(dim=-1).multinomial(1)


def by_topk(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    values, tokens = logits.topk(top_k)
    return tokens.gather(-1, (values / temperature).softmax(dim=-1).multinomial(1))


def sample(name: str, dtype: torch.dtype, batch: int) -> Work:
    logits = (3 * torch.randn(batch, VOCABULARY)).to(dtype)
    settings, seed, out = SAMPLING[name], torch.tensor([0]), torch.empty(batch, dtype=torch.int64)

    def results() -> Iterator[Triple]:
        for step in range(16):
            ours = pygen.sample_token(logits, **settings, seed=seed, step=step)
            with pygen.backend("reference"):
                theirs = pygen.sample_token(logits.double(), **settings, seed=seed, step=step)
            yield ours, theirs, theirs

    calls: dict[str, Call] = {"pygen": lambda: pygen.sample_token(logits, **settings, seed=seed, out=out)}
    if name == "greedy":
        calls["eager"] = lambda: logits.argmax(dim=-1)
    elif name == "top-k 50":
        calls["eager"] = lambda: by_topk(logits, settings["temperature"], settings["top_k"])
    elif name == "top-p 0.9":
        calls["eager"] = lambda: by_sorting(logits, settings["temperature"], settings["top_p"])
    return Work(calls, logits.nbytes, 0, dtype, results)


def attend(batch: int, heads: int, kv_heads: int, keys: int, cache: str, rotated: int) -> Work:
    dtype = torch.float32 if cache == "float32" else torch.bfloat16
    stored = torch.int8 if cache == "int8" else dtype
    moved = 2 * batch * kv_heads * keys * HEAD_DIM * stored.itemsize
    count = copies(moved, rotated)
    q, lengths = torch.randn(batch, heads, 1, HEAD_DIM).to(dtype), torch.full((batch,), keys)
    out = torch.empty_like(q)
    how: dict[str, Any] = {"lengths": lengths}
    pages = math.ceil(keys / PAGE)
    shape = (batch, kv_heads, keys, HEAD_DIM)
    if cache.endswith("paged"):
        shape = (batch * pages, kv_heads, PAGE, HEAD_DIM)
        how["block_table"] = torch.randperm(batch * pages).int().view(batch, pages)
    if stored is torch.int8:
        caches = [large_pages(torch.randint(-127, 128, (2, *shape), dtype=stored)) for _ in range(count)]
        how["k_scale"] = how["v_scale"] = torch.rand(shape[:-1]) / 127
        moved += 2 * how["k_scale"].nbytes
    else:
        caches = [large_pages(torch.randn(2, *shape, dtype=dtype)) for _ in range(count)]

    def attention(cached: Tensor) -> Tensor:
        k, v = cached
        return pygen.decode_attention(q, k, v, **how, out=out)

    def torch_own(k: Tensor, v: Tensor, q: Tensor = q) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=heads > kv_heads)

    def results() -> Iterator[Triple]:
        k, v = caches[0]
        if "k_scale" in how:
            k, v = k * how["k_scale"][..., None], v * how["v_scale"][..., None]
        elif "block_table" in how:
            table = how["block_table"].long()
            k, v = (t[table].transpose(1, 2).flatten(2, 3)[:, :, :keys] for t in (k, v))
        yield attention(caches[0]), torch_own(k.to(dtype), v.to(dtype)), torch_own(*(t.double() for t in (k, v, q)))

    calls: dict[str, Call] = {"pygen, out=": in_turn([partial(attention, cached) for cached in caches])}
    if "paged" not in cache and stored is dtype:  # torch knows no pages, and no int8
        calls["eager"] = in_turn([partial(torch_own, *cached) for cached in caches])
    flops = 4 * batch * heads * keys * HEAD_DIM
    return Work(calls, moved, flops, dtype, results, reads(moved, rotated), "DRAM, in turn")


def project(outputs: int, inputs: int, rows: int, name: str, rotated: int) -> Work:
    how = FORMATS[name]
    dtype = torch.float32 if how["format"] == "float32" else torch.bfloat16
    weight = torch.randn(outputs, inputs) / inputs**0.5
    first = pygen.pack_linear(weight, **how)
    moved = first.nbytes
    count = copies(moved, rotated)
    packed = [first, *(first.clone() for _ in range(count - 1))]
    x = torch.randn(rows, inputs).to(dtype)
    out = torch.empty(rows, outputs, dtype=dtype)

    def results() -> Iterator[Triple]:
        unpacked = first.unpack(torch.float64)
        same = functional.linear(x, unpacked.to(dtype)) if how["format"] not in ("int8", "int4") else None
        truth = functional.linear(x.double(), unpacked)
        # Beside a quantised weight, what torch's bfloat16 makes of the same numbers.
        yield pygen.linear_decode(x, first), truth.to(dtype) if same is None else same, truth

    calls: dict[str, Call] = {
        "pygen, out=": in_turn([partial(pygen.linear_decode, x, one, out=out) for one in packed]),
    }
    peers = torch_linear(weight, how, x, math.ceil(rotated / (outputs * inputs * dtype.itemsize)))
    if peers:
        calls["eager"] = in_turn(peers)
    work_flops = 2 * rows * outputs * inputs
    return Work(calls, moved, work_flops, dtype, results, reads(moved, rotated), "DRAM, in turn")


def torch_linear(weight: Tensor, how: dict[str, Any], x: Tensor, count: int) -> list[Call]:
    """torch's own product with a weight of the same format, where it has one: calls that take turns."""
    aten = torch.ops.aten
    if how["format"] in ("float32", "bfloat16"):
        return [partial(functional.linear, x, weight.to(x.dtype).clone()) for _ in range(count)]
    if how["format"] == "int8" and "group" not in how:
        scales = (weight.abs().amax(dim=1) / 127).to(x.dtype)
        whole = (weight / scales[:, None].float()).round().clamp(-127, 127).to(torch.int8)
        return [partial(aten._weight_int8pack_mm, x, whole.clone(), scales) for _ in range(2 * count)]
    if how["format"] == "int4":
        group = how["group"]
        digits = torch.randint(0, 16, weight.shape, dtype=torch.int32)
        scales_and_zeros = torch.rand(weight.shape[1] // group, weight.shape[0], 2).to(x.dtype)
        four = aten._convert_weight_to_int4pack_for_cpu(digits, 1)
        return [
            partial(aten._weight_int4pack_mm_for_cpu, x, four.clone(), group, scales_and_zeros)
            for _ in range(4 * count)
        ]
    return []


def verdicts(results: Iterable[Result]) -> Iterator[str]:
    """Which goals are reached, and which not."""
    timed = [result for result in results if result.suite == "decode" and result.times]
    for work, goals in SHARES.items():
        for name, goal in goals.items():
            these = [r for r in timed if r.name.startswith(work) and r.name.endswith(f", {name}")]
            if these:
                shares = ", ".join(f"{result.floor / result.best:.2f}" for result in these)
                yield f"{work}, {name}: {shares} of the read bandwidth, the goal being {goal:g}"
    for name, goal in SPEEDUPS.items():
        these = [r for r in timed if r.name.startswith(f"{name}, ") and r.best_peer]
        if these:
            speedups = ", ".join(f"{(result.best_peer or 0.0) / result.best:.1f}" for result in these)
            yield f"{name}: {speedups} times the peer's speed, the goal being {goal:g}"
