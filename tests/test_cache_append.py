"""cache_append beyond its spec: transformers' norms and rotations, int8 and its error, pages, rings, wrong input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3TextConfig, Qwen3Config
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.qwen3 import modeling_qwen3

import pygen
from pygen import _C
from pygen.ops.cache_append import cache_append_reference
from tests.error_rule import assert_error_rule

BY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
TABLE = pygen.rope_table(pygen.rope_frequencies(64)[0], 64)


def new_tokens(dtype: torch.dtype = torch.float32, batch: int = 3, length: int = 4) -> dict[str, Tensor]:
    """Heads of a fused projection, and the weights of their norms."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(batch, length, 8, 64, generator=generator).to(dtype).transpose(1, 2)
    norms = torch.rand(2, 64, generator=generator).to(dtype)
    return {"q": heads[:, :4], "k": heads[:, 4:6], "v": heads[:, 6:], "q_norm": norms[0], "k_norm": norms[1]}


def int8_cache(*size: int) -> dict[str, Tensor]:
    return {name: torch.full((*size, 64), 99, dtype=torch.int8) for name in ("k_cache", "v_cache")} | {
        name: torch.full(size, 99.0) for name in ("k_scale", "v_scale")
    }


def float_cache(*size: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.full((*size, 64), 99.0, dtype=dtype) for name in ("k_cache", "v_cache")}


@BY_DTYPE
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_is_transformers_norm_rotation_and_cache(family: str, dtype: torch.dtype, isa: str) -> None:
    """What the attention of Qwen3 and Gemma 3 does to queries and keys; Gemma's weights count from 1."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64}
    if family == "qwen3":
        modeling, norm = modeling_qwen3, modeling_qwen3.Qwen3RMSNorm
        inv_freq, _ = pygen.rope_frequencies(64, Qwen3Config(**sizes).rope_parameters)
    else:
        modeling, norm = modeling_gemma3, modeling_gemma3.Gemma3RMSNorm
        inv_freq, _ = pygen.rope_frequencies(64, Gemma3TextConfig(**sizes).rope_parameters["full_attention"])
    given, first = new_tokens(dtype), 7
    angles = (torch.arange(first, first + 4).double()[:, None] * inv_freq).repeat(1, 2)

    def theirs(to: torch.dtype) -> tuple[Tensor, Tensor]:
        results = []
        for name in ("q", "k"):
            module = norm(64, eps=1e-6)
            module.weight.data = given[f"{name}_norm"].to(to)
            normed = module(given[name].to(to))
            results.append(normed.to(to) if to != torch.float64 else exact(given[name].double(), module.weight.data))
        cosine, sine = (turned[None].expand(3, -1, -1).to(to) for turned in (angles.cos(), angles.sin()))
        q, k = modeling.apply_rotary_pos_emb(*results, cosine, sine)
        return q, k

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        """The modules compute in float32 whatever they are given."""
        weight = weight if family == "qwen3" else 1 + weight
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    cache = float_cache(3, 2, 20, dtype=dtype)
    weights = {name: given[name] if family == "qwen3" else 1 + given[name].float() for name in ("q_norm", "k_norm")}
    table = pygen.rope_table(inv_freq, 20)
    q = pygen.cache_append(**given | weights, **cache, lengths=torch.full((3,), first + 4), rope=table)
    same, truth = theirs(dtype), theirs(torch.float64)
    assert_error_rule([(q, same[0], truth[0])])
    written = slice(first, first + 4)
    assert_error_rule([(cache["k_cache"][:, :, written], same[1], truth[1])])
    assert torch.equal(cache["v_cache"][:, :, written], given["v"])
    for tensor in cache.values():
        untouched = torch.cat((tensor[:, :, :first], tensor[:, :, first + 4 :]), dim=2)
        assert bool((untouched == 99).all())


@BY_DTYPE
@pytest.mark.parametrize("interleaved", [False, True])
def test_int8_is_within_half_a_step(interleaved: bool, dtype: torch.dtype, isa: str) -> None:
    given, cache = new_tokens(dtype, length=20), int8_cache(3, 2, 20)
    lengths = torch.full((3,), 20)
    pygen.cache_append(**given, **cache, lengths=lengths, rope=TABLE, interleaved=interleaved)
    given = {name: tensor.double() for name, tensor in given.items()}
    exact = {name: torch.zeros(3, 2, 20, 64, dtype=torch.float64) for name in ("k_cache", "v_cache")}
    truth = cache_append_reference(**given, **exact, lengths=lengths, rope=TABLE.double(), interleaved=interleaved)
    for name, values in zip(("k", "v"), truth[1:3], strict=True):
        scale, stored = cache[f"{name}_scale"].double(), cache[f"{name}_cache"].double()
        assert_error_rule([(cache[f"{name}_scale"], cache[f"{name}_scale"], values.abs().amax(-1) / 127)])
        assert bool((stored.abs().amax(-1) == 127).all())
        rounding = 2.0**-20 * values.abs().amax(-1, keepdim=True)  # of float32, before it is quantised
        assert bool(((stored * scale[..., None] - values).abs() <= scale[..., None] / 2 + rounding).all())


@pytest.mark.parametrize("quantised", [False, True])
def test_instruction_sets_and_threads_agree_to_the_bit(quantised: bool) -> None:
    """On numbers that are no multiples of a scale too."""
    before, threads = _C.isa(), torch.get_num_threads()
    results = []
    try:
        for isa in _C.supported_isas():
            for count in (1, 2):
                _C.set_isa(isa)
                torch.set_num_threads(count)
                cache = int8_cache(3, 2, 40) if quantised else float_cache(3, 2, 40)
                q = pygen.cache_append(**new_tokens(length=40), **cache, lengths=torch.tensor([40, 3, 38]), rope=TABLE)
                results.append([q, *cache.values()])
    finally:
        _C.set_isa(before)
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("quantised", [False, True])
def test_pages_hold_what_a_contiguous_cache_does(quantised: bool) -> None:
    make = int8_cache if quantised else float_cache
    given, lengths = new_tokens(length=11), torch.tensor([11, 20, 24])
    block_table = torch.tensor([[4, 0, 7], [1, 8, 3], [2, 6, 5]], dtype=torch.int32)
    whole, paged = make(3, 2, 24), make(9, 2, 8)
    expected = pygen.cache_append(**given, **whole, lengths=lengths, rope=TABLE)
    q = pygen.cache_append(**given, **paged, lengths=lengths, rope=TABLE, block_table=block_table)
    assert expected is not None
    assert q is not None
    assert torch.equal(q, expected)
    for name, pages in paged.items():
        gathered = pages[block_table.long()].transpose(1, 2).flatten(2, 3)  # (batch, kv_heads, pages * page_size, ...)
        assert torch.equal(gathered, whole[name])


def test_a_ring_keeps_the_last_tokens() -> None:
    """Appended one by one, or at once."""
    given = new_tokens(length=20)
    one_by_one, at_once = float_cache(3, 2, 8), float_cache(3, 2, 8)
    for i in range(20):
        token = {name: given[name][:, :, i : i + 1] for name in ("q", "k", "v")}
        pygen.cache_append(**given | token, **one_by_one, lengths=torch.full((3,), 30 + i + 1), rope=TABLE, ring=True)
    pygen.cache_append(**given, **at_once, lengths=torch.full((3,), 50), rope=TABLE, ring=True)
    assert all(torch.equal(one_by_one[name], at_once[name]) for name in at_once)
    assert torch.equal(at_once["v_cache"][:, :, 49 % 8], given["v"][:, :, 19])


def test_norm_and_rotation_are_those_of_rope_to_the_bit() -> None:
    given, cache = new_tokens(), float_cache(3, 2, 20)
    plain = {name: given[name] for name in ("q", "k", "v")}
    q = pygen.cache_append(**plain, **cache, lengths=torch.tensor([4, 9, 20]), rope=TABLE)
    first = torch.tensor([[0], [5], [16]])
    assert q is not None
    assert torch.equal(q, pygen.rope(given["q"], first, TABLE))
    k = pygen.rope(given["k"], first, TABLE)
    for b, at in enumerate(first[:, 0].tolist()):
        assert torch.equal(cache["k_cache"][b, :, at : at + 4], k[b])


RIGHT: dict[str, Any] = {
    "k": torch.zeros(2, 2, 3, 64), "v": torch.zeros(2, 2, 3, 64), "k_cache": torch.zeros(2, 2, 20, 64),
    "v_cache": torch.zeros(2, 2, 20, 64), "lengths": torch.tensor([3, 20]), "q": torch.zeros(2, 4, 3, 64),
}  # fmt: skip
INT8 = {name: RIGHT[name].to(torch.int8) for name in ("k_cache", "v_cache")}
PAGED = {name: torch.zeros(5, 2, 8, 64) for name in ("k_cache", "v_cache")}
BEYOND, BEFORE = torch.tensor([[[0, 1, 2], [3, 4, 5]], [[0, 1, 2], [3, 4, -1]]]).int()


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "k must have shape", {"k": torch.zeros(2, 3, 64)}),
        (ValueError, "v must have k's shape", {"v": torch.zeros(2, 2, 4, 64)}),
        (TypeError, "v must have k's dtype", {"v": torch.zeros(2, 2, 3, 64).half()}),
        (TypeError, "q must have k's dtype", {"q": torch.zeros(2, 4, 3, 64).half()}),
        (ValueError, "q must have k's shape .* but for its heads", {"q": torch.zeros(2, 4, 2, 64)}),
        (ValueError, "out must have q's shape", {"out": torch.zeros(2, 4, 3, 32)}),
        (ValueError, "does not fit k_cache", dict.fromkeys(("k_cache", "v_cache"), torch.zeros(2, 4, 20, 64))),
        (ValueError, "v_cache must have k_cache's shape", {"v_cache": torch.zeros(2, 2, 21, 64)}),
        (ValueError, "lengths holds 21 for sequence 1, and the cache at most 20", {"lengths": torch.tensor([3, 21])}),
        (ValueError, "lengths holds -1", {"lengths": torch.tensor([3, -1])}),
        (TypeError, "lengths must be Long", {"lengths": torch.tensor([3.0, 4.0])}),
        (ValueError, "k_scale is missing for k_cache of", INT8),
        (ValueError, "k_scale is given for k_cache of", {"k_scale": torch.zeros(2, 2, 20)}),
        (IndexError, "block_table names a page outside", PAGED | {"block_table": BEYOND}),
        (IndexError, "block_table names a page outside", PAGED | {"block_table": BEFORE}),
        (ValueError, "q_norm must have shape", {"q_norm": torch.zeros(32)}),
        (ValueError, "eps must be finite and not negative, got -1", {"eps": -1.0}),
        (ValueError, "q_norm needs q", {"q": None, "q_norm": torch.zeros(64)}),
        (ValueError, "give q and out together", {"q": None, "out": torch.zeros(2, 4, 3, 64)}),
        (ValueError, "positions needs rope", {"positions": torch.arange(3)}),
        (ValueError, "rope must have shape", {"rope": torch.zeros(20, 2, 33)}),
        (IndexError, "position 19 lies outside the table, which holds 10", {"rope": TABLE[:10]}),
        (IndexError, "position 64 lies outside", {"rope": TABLE, "positions": torch.tensor(62)}),
        (RuntimeError, "memory", {"k_cache": torch.zeros(1, 2, 20, 64).expand(2, 2, 20, 64)}),
        (RuntimeError, "not differentiable, and k requires grad", {"k": torch.zeros(2, 2, 3, 64).requires_grad_()}),
    ],
)  # fmt: skip
def test_wrong_arguments(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        pygen.cache_append(**RIGHT | change)
    pygen.cache_append(**RIGHT)
