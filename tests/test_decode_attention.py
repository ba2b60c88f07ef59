"""decode_attention beyond its spec: torch's attention, layouts and batches to the bit, far memory, wrong input."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import pygen
from pygen.ops.decode_attention import decode_attention_reference, paged
from tests.error_rule import assert_error_rule, in_double
from tests.test_cuda_kernels import emulation  # noqa: F401

BY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])


def case(
    lengths: list[int],
    dtype: torch.dtype = torch.bfloat16,
    heads: int = 8,
    kv_heads: int = 2,
    q_len: int = 1,
    head_dim: int = 64,
    capacity: int | None = None,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    batch, capacity = len(lengths), max(lengths) if capacity is None else capacity
    size = (batch, kv_heads, capacity, head_dim)
    arguments: dict[str, Any] = {"q": torch.randn(batch, heads, q_len, head_dim, generator=generator)}
    if dtype == torch.int8:
        arguments |= {n: torch.randint(-127, 128, size, generator=generator).to(dtype) for n in ("k_cache", "v_cache")}
        arguments |= {n: torch.rand(size[:3], generator=generator) / 100 for n in ("k_scale", "v_scale")}
    else:
        arguments["q"] = arguments["q"].to(dtype)
        arguments |= {n: torch.randn(size, generator=generator).to(dtype) for n in ("k_cache", "v_cache")}
    return arguments | {"lengths": torch.tensor(lengths)}


def rows(arguments: dict[str, Any], *chosen: int) -> dict[str, Any]:
    """The same call for some of the sequences."""
    return {n: value[list(chosen)] if isinstance(value, Tensor) else value for n, value in arguments.items()}


def test_the_reference_is_torchs_attention() -> None:
    arguments = case([50, 50], torch.float64, q_len=5)
    q, k, v = (arguments[name] for name in ("q", "k_cache", "v_cache"))
    ahead = torch.arange(50) - torch.arange(45, 50)[:, None]
    for window in (None, 7):
        mask = (ahead <= 0) & (ahead > -(window or 50))
        expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        result, lse = decode_attention_reference(**arguments, window=window)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
        scores = (q @ k.repeat_interleave(4, 1).mT / 8).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


@BY_DTYPE
@pytest.mark.parametrize("page_size", [1, 16, 100, 256])
def test_pages_give_the_bits_of_a_contiguous_cache(dtype: torch.dtype, page_size: int, isa: str) -> None:
    lengths = [0, 1, page_size - 1, page_size, page_size + 1, 1100 if isa == "baseline" else 4097]
    for q_len in (1, 4):
        arguments = case(lengths, dtype, q_len=q_len)
        expected = pygen.decode_attention(**arguments)
        assert torch.equal(pygen.decode_attention(**arguments | paged(arguments, page_size)), expected)


@BY_DTYPE
@pytest.mark.parametrize("page_size", [None, 64])
def test_a_ragged_batch_up_to_many_splits(dtype: torch.dtype, page_size: int | None) -> None:
    """Beside the truth, as the spec's examples are, which end at three splits."""
    arguments = case([0, 1, 63, 64, 65, 4097], dtype, heads=4, head_dim=128)
    if page_size is not None:
        arguments |= paged(arguments, page_size)
    truth, _ = decode_attention_reference(**in_double(arguments))
    same, _ = decode_attention_reference(**arguments)
    assert_error_rule([(pygen.decode_attention(**arguments), same, truth)])


@BY_DTYPE
@pytest.mark.parametrize("q_len", [1, 6])
def test_a_ring_gives_the_bits_of_a_window(dtype: torch.dtype, q_len: int, isa: str) -> None:
    """A ring of window + q_len - 1 slots holds all that a window sees, wherever in the ring it begins."""
    window, lengths = 300, [1, 299, 300, 305, 306, 700, 1237]
    arguments = case(lengths, dtype, q_len=q_len)
    expected = pygen.decode_attention(**arguments, window=window)
    capacity = window + q_len - 1
    ring = dict(arguments)
    for name in {"k_cache", "v_cache", "k_scale", "v_scale"} & set(arguments):
        cache = arguments[name]
        ring[name] = cache[:, :, :capacity].clone()
        for b, length in enumerate(lengths):
            for position in range(max(0, length - capacity), length):
                ring[name][b, :, position % capacity] = cache[b, :, position]
    assert torch.equal(pygen.decode_attention(**ring, window=window, ring=True), expected)
    in_pages = ring | paged(ring, capacity // 5)
    if capacity % 5 == 0:  # else the pages hold more than the ring
        assert torch.equal(pygen.decode_attention(**in_pages, window=window, ring=True), expected)


@BY_DTYPE
def test_a_row_is_the_same_in_every_batch(dtype: torch.dtype, threads: int) -> None:
    """Over 8192 keys, in 32 splits: alone, in a ragged batch, and among other heads of its group."""
    arguments = case([8192, 3, 0, 8000, 4097], dtype)
    expected = pygen.decode_attention(**arguments)
    for b in range(5):
        assert torch.equal(pygen.decode_attention(**rows(arguments, b))[0], expected[b])
    assert torch.equal(pygen.decode_attention(**rows(arguments, 3, 0)), expected[[3, 0]])
    for heads in ([0, 4], [1, 2, 5, 7]):
        fewer = arguments | {"q": arguments["q"][:, heads]}
        assert torch.equal(pygen.decode_attention(**fewer), expected[:, heads])


@BY_DTYPE
def test_tokens_of_a_draft_get_the_bits_of_single_ones(dtype: torch.dtype, isa: str) -> None:
    """What speculative decoding needs: verifying q_len tokens is decoding them one by one."""
    arguments = case([1000, 258, 7], dtype, q_len=7, heads=6)
    for window in (None, 250):
        together = pygen.decode_attention(**arguments, window=window)
        for i in range(7):
            one = {"q": arguments["q"][:, :, i : i + 1], "lengths": arguments["lengths"] - 6 + i}
            assert torch.equal(pygen.decode_attention(**arguments | one, window=window), together[:, :, i : i + 1])


def test_halves_merge_by_their_log_sum_exp() -> None:
    """In float32, to the digits that it has: what `lse` is for."""
    arguments = case([700], torch.float32)
    parts = []
    for half in (slice(0, 300), slice(300, 700)):
        cache = {name: arguments[name][:, :, half].contiguous() for name in ("k_cache", "v_cache")}
        lse = torch.empty(1, 8, 1)
        length = torch.tensor([half.stop - half.start])
        parts.append((pygen.decode_attention(arguments["q"], **cache, lengths=length, lse=lse), lse))
    (a, lse_a), (b, lse_b) = parts
    share = torch.sigmoid(lse_a - lse_b)[..., None]
    torch.testing.assert_close(share * a + (1 - share) * b, pygen.decode_attention(**arguments))


@pytest.mark.slow
@pytest.mark.parametrize("in_pages", [False, True])
def test_a_cache_beyond_4_gib(in_pages: bool) -> None:
    """2^32 elements, 8 GiB of addresses, of which a window touches a few pages."""
    capacity, window = 2**26, 300
    cache = torch.empty(1, 1, capacity, 64, dtype=torch.bfloat16)
    near = torch.randn(1, 1, window, 64).bfloat16()
    cache[:, :, -window:] = near
    q = torch.randn(1, 4, 1, 64).bfloat16()
    given: dict[str, Any] = {"lengths": torch.tensor([capacity])}
    if in_pages:
        cache = cache.view(capacity // 64, 1, 64, 64)
        given["block_table"] = torch.arange(capacity // 64, dtype=torch.int32)[None]
    result = pygen.decode_attention(q, cache, cache, window=window, **given)
    lengths = torch.tensor([window])
    expected, _ = decode_attention_reference(q.double(), near.double(), near.double(), lengths)
    same, _ = decode_attention_reference(q, near, near, lengths)
    error = (result - expected).abs().max()
    assert error <= 2 * (same - expected).abs().max() + torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_pages_that_do_not_exist(emulation: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Raise on the CPU, where they are used, and for debugging on a GPU; else neither read nor seen."""
    arguments = case([40, 33], q_len=2)
    arguments |= paged(arguments, 16)
    arguments["block_table"][0, 1], arguments["block_table"][1, 2] = -1, 1000
    with pytest.raises(IndexError, match=r"block_table names a page outside \[0, 8\) for position 16 of sequence 0"):
        pygen.decode_attention(**arguments)
    with pytest.raises(IndexError, match="for position 32 of sequence 0"):
        pygen.decode_attention(**rows_of_pages(arguments, 1))
    pygen.decode_attention(**rows_of_pages(arguments, 1) | {"lengths": torch.tensor([32])})  # its last page is unused
    pygen.decode_attention(**rows_of_pages(arguments, 0), window=7)  # and here the second is out of sight

    schema = emulation.decode_attention.default._schema.arguments
    given = copy.copy(arguments) | {"ring": False, "out": torch.empty_like(arguments["q"])}
    emulation.decode_attention.default(*(given.get(argument.name) for argument in schema))
    expected, _ = decode_attention_reference(**arguments)
    torch.testing.assert_close(given["out"], expected)
    monkeypatch.setenv("PYGEN_DEBUG", "1")
    with pytest.raises(IndexError, match=r"block_table names a page outside \[0, 8\) for position 16 of sequence 0"):
        emulation.decode_attention.default(*(given.get(argument.name) for argument in schema))


def rows_of_pages(arguments: dict[str, Any], b: int) -> dict[str, Any]:
    return arguments | {name: arguments[name][b : b + 1] for name in ("q", "lengths", "block_table")}


def test_wrong_input() -> None:
    good = case([40, 33])
    pages = good | paged(good, 16)
    quantised = case([40, 33], torch.int8)
    q, k = good["q"], good["k_cache"]
    for error, message, given in (
        (ValueError, r"q must have shape \(batch, heads, q_len, head_dim\)", good | {"q": q[0]}),
        (ValueError, "q_len must be 1 to 16, got 17", good | {"q": q.repeat(1, 1, 17, 1)}),
        (ValueError, "q has a head_dim of 32, and k_cache one of 64", good | {"q": q[..., :32]}),
        (ValueError, "q has 7 heads, not a multiple of k_cache's 2", good | {"q": q[:, :7]}),
        (ValueError, "k_cache must have shape", good | {"k_cache": k[0]}),
        (ValueError, "k_cache must be contiguous in head_dim", good | {"k_cache": k.mT.contiguous().mT}),
        (ValueError, "k_cache holds 2 sequences for a batch of 1", good | {"q": q[:1], "lengths": good["lengths"][:1]}),
        (ValueError, "v_cache must have k_cache's shape", good | {"v_cache": k[:, :, 1:]}),
        (TypeError, "v_cache must have k_cache's dtype", good | {"v_cache": k.float()}),
        (TypeError, "k_cache must be float32, bfloat16 or float16 or int8", good | {"k_cache": k.double()}),
        (TypeError, "lengths must be", good | {"lengths": good["lengths"].int()}),
        (ValueError, "lengths must have shape", good | {"lengths": good["lengths"][:1]}),
        (ValueError, "lengths holds 41 for sequence 0", good | {"lengths": torch.tensor([41, 1])}),
        (ValueError, "lengths holds -1 for sequence 1", good | {"lengths": torch.tensor([40, -1])}),
        (TypeError, "block_table must be", pages | {"block_table": pages["block_table"].long()}),
        (ValueError, "block_table must have shape", pages | {"block_table": pages["block_table"][:1]}),
        (ValueError, "k_scale is missing for k_cache", quantised | {"k_scale": None}),
        (ValueError, "v_scale must have shape", quantised | {"v_scale": quantised["v_scale"][..., 1:]}),
        (ValueError, "k_scale is given for k_cache", good | {"k_scale": quantised["k_scale"]}),
        (ValueError, "window must be positive, got 0", good | {"window": 0}),
        (ValueError, "scale must be finite, got nan", good | {"scale": math.nan}),
        (ValueError, "soft_cap must be positive", good | {"soft_cap": -1.0}),
        (ValueError, r"sinks must have shape \(heads,\)", good | {"sinks": torch.zeros(2)}),
        (TypeError, "alibi_slopes must be", good | {"alibi_slopes": torch.zeros(8, dtype=torch.float64)}),
        (ValueError, "out must have q's shape", good | {"out": q[:, :4].clone()}),
        (RuntimeError, "single memory location", good | {"out": q}),
        (ValueError, "lse must have shape", good | {"lse": torch.zeros(2, 8)}),
        (RuntimeError, "not differentiable, and q requires grad", good | {"q": q.clone().requires_grad_()}),
    ):
        with pytest.raises(error, match=message):
            pygen.decode_attention(**given)
