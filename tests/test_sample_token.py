"""sample_token: what it draws, what its filters keep beside transformers' own, and what no batch or thread changes."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

import pygen
from pygen.ops.sample_token import sample_token_reference
from tests.error_rule import unit_in_the_last_place

VOCABULARIES = (1, 2, 111, 32000, 128256, 262144)
FILTERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.8},
    "top-k": {"top_k": 50},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "min-p": {"min_p": 0.02},
    "typical-p": {"typical_p": 0.9},
    "all": {"temperature": 1.3, "top_k": 400, "top_p": 0.97, "min_p": 0.002, "typical_p": 0.9},
}
BY_FILTER = pytest.mark.parametrize("settings", FILTERS.values(), ids=FILTERS)


def random_logits(*size: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def exact_probabilities(logits: Tensor, **settings: float) -> Tensor:
    scores = transformers_scores(logits.double(), torch.zeros(len(logits), 0, dtype=torch.int64), **settings)
    return scores.softmax(-1)


def transformers_scores(scores: Tensor, previous: Tensor, **settings: float) -> Tensor:
    """What generate() would sample from, by its own processors in its own order."""
    processors = LogitsProcessorList()
    for name, make in {
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
        "typical_p": hf.TypicalLogitsWarper,
    }.items():
        if name in settings:
            processors.append(make(settings[name]))
    return processors(previous, scores)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 30, "min_p": 0.02}, {"typical_p": 0.8, "temperature": 1.5}],
    ids=["drawn", "top-p", "top-k and min-p", "typical-p"],
)
def test_draws_have_the_exact_distribution(settings: dict[str, float]) -> None:
    """Five million draws by each of three seeds."""
    rows, rounds, logits = 500_000, 10, random_logits(1, 111, spread=1.5)
    p = exact_probabilities(logits, **settings)[0]
    for seed in (1, 2**40 + 7, -5):
        counts = torch.zeros(111, dtype=torch.int64)
        for step in range(rounds):
            tokens = pygen.sample_token(logits.expand(rows, -1), seed=seed, step=step, **settings)
            counts += tokens.bincount(minlength=111)
        assert int(counts[p == 0].sum()) == 0
        expected = p * rows * rounds
        likely = expected > 10
        chi_square = ((counts - expected) ** 2 / expected)[likely].sum()
        degrees = likely.sum() - 1
        assert torch.special.gammaincc(degrees / 2, chi_square / 2) > 1e-6, (seed, chi_square, degrees)


def test_filters_keep_what_those_of_transformers_keep() -> None:
    """By the probability of the tokens drawn, in which every token that is kept has its share.

    Which of equal logits stay is up to torch's unstable sort there.
    """
    choose = random.Random(0)
    for case in range(400):
        vocabulary = choose.choice([1, 2, 7, 50, 111, 300, 1500])
        rows = 8
        logits = random_logits(rows, vocabulary, seed=case, spread=choose.choice([0.5, 2.0, 6.0]))
        if choose.random() < 0.3:
            logits = logits.round()
        previous = torch.randint(vocabulary, (rows, 12), generator=torch.Generator().manual_seed(case))
        offers: dict[str, Any] = {
            "temperature": choose.choice([0.3, 0.8, 1.7]),
            "top_k": choose.choice([1, 5, 40, 200]),
            "top_p": choose.choice([0.05, 0.5, 0.9, 0.99]),
            "min_p": choose.choice([0.001, 0.03, 0.3]),
            "typical_p": choose.choice([0.1, 0.5, 0.9, 0.99]),
            "repetition_penalty": choose.choice([0.7, 1.2, 2.0]),
        }
        settings = {name: value for name, value in offers.items() if choose.random() < 0.4}
        truth = transformers_scores(logits.double(), previous, **settings).log_softmax(-1)
        tokens, info = pygen.sample_token(logits, **settings, previous=previous, seed=case, return_info=True)
        penalty = {name: value for name, value in settings.items() if name == "repetition_penalty"}
        penalised = transformers_scores(logits, previous, **penalty)
        equal = penalised == penalised.gather(-1, tokens[:, None])
        wanted = truth.where(equal, -math.inf).amax(-1)
        assert bool(info.ok.all())
        assert bool(wanted.isfinite().all()), (case, settings)
        largest = wanted.abs().max().item()
        error = (info.log_prob.double() - wanted).abs().max().item()
        assert error <= 16 * unit_in_the_last_place(max(1.0, largest), torch.float32), (case, settings, error)


@BY_FILTER
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_rows_are_the_same_alone_and_by_any_number_of_threads(settings: dict[str, Any], vocabulary: int) -> None:
    rows = 3
    logits = random_logits(rows, vocabulary)
    ids = torch.tensor([5, 9, 2**31])
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(pygen.sample_token(logits, **settings, seed=3, sample_ids=ids, return_info=True))
            for row in range(rows):
                one = slice(row, row + 1)
                token, info = pygen.sample_token(logits[one], **settings, seed=3, sample_ids=ids[one], return_info=True)
                results.append((torch.cat([results[0][0][:row], token, results[0][0][row + 1 :]]), results[0][1]))
                assert all(torch.equal(a, b[one]) for a, b in zip(info, results[0][1], strict=True))
    finally:
        torch.set_num_threads(before)
    for tokens, info in results:
        assert torch.equal(tokens, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(info, results[0][1], strict=True))
    assert bool(((results[0][0] >= 0) & (results[0][0] < vocabulary)).all())


@BY_FILTER
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_row_that_is_no_distribution_yields_token_0(settings: dict[str, Any], vocabulary: int) -> None:
    logits = random_logits(4, vocabulary)
    logits[0] = -math.inf
    logits[1, vocabulary // 2] = math.nan
    logits[2, vocabulary - 1] = math.inf
    tokens, info = pygen.sample_token(logits, **settings, seed=1, return_info=True)
    assert tokens[:3].tolist() == [0, 0, 0]
    assert info.ok.tolist() == [False, False, False, True]
    assert info.log_prob[:3].tolist() == [-math.inf] * 3
    assert 0 <= int(tokens[3]) < vocabulary


@BY_FILTER
def test_no_token_outside_the_mask(settings: dict[str, Any]) -> None:
    vocabulary, rows = 1003, 4000
    words = torch.randint(-(2**31), 2**31, (rows, 32), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    words &= words.roll(1) & words.roll(2)
    allowed = (words[..., None] >> torch.arange(32) & 1).bool().flatten(1)[:, :vocabulary]
    tokens, info = pygen.sample_token(
        random_logits(1, vocabulary).expand(rows, -1), **settings, bitmask=words, seed=1, return_info=True
    )
    assert bool(info.ok.all())
    assert bool(allowed.gather(1, tokens[:, None]).all())


def test_ties_go_as_transformers_has_them() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 1.0]]).expand(2000, -1)
    assert pygen.sample_token(logits, temperature=0.0).unique().tolist() == [1]
    assert pygen.sample_token(logits, top_k=2, seed=1).unique().tolist() == [1, 2, 3]
    assert pygen.sample_token(logits, top_p=0.5, seed=1).unique().tolist() == [2, 3]
    assert pygen.sample_token(logits, top_p=0.0, seed=1).unique().tolist() == [3]
    assert pygen.sample_token(logits, min_p=1.0, seed=1).unique().tolist() == [1, 2, 3]


def test_numbers_are_tensors_of_one() -> None:
    logits = random_logits(5, 3000)
    previous = torch.arange(20).expand(5, -1)
    settings: dict[str, Any] = {"temperature": 0.7, "top_p": 0.8, "min_p": 0.01, "typical_p": 0.9}
    settings |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    expected = pygen.sample_token(logits, **settings, top_k=70, previous=previous, seed=4, step=6)
    rows = {name: torch.full((5,), value) for name, value in settings.items()}
    seed, step = torch.full((5,), 4), torch.tensor([6])
    tokens = pygen.sample_token(logits, **rows, top_k=torch.full((5,), 70), previous=previous, seed=seed, step=step)
    assert torch.equal(tokens, expected)


def test_without_a_seed_torch_decides() -> None:
    logits = random_logits(50, 100)
    draws = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        draws.append(pygen.sample_token(logits))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    before = torch.get_rng_state()
    pygen.sample_token(logits, temperature=0.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_penalties_are_those_of_the_formula() -> None:
    logits = torch.tensor([[1.0, -1.0, 0.5, 0.25]])
    previous = torch.tensor([[0, 1, 1, -1, 99]])
    _, info = pygen.sample_token(logits, temperature=0.0, previous=previous, repetition_penalty=2.0,
                                 frequency_penalty=0.25, presence_penalty=0.125, return_info=True)  # fmt: skip
    changed = torch.tensor([1.0 / 2 - 0.25 - 0.125, -1.0 * 2 - 0.5 - 0.125, 0.5, 0.25])
    torch.testing.assert_close(info.log_prob[0], changed.log_softmax(-1)[2])
    torch.testing.assert_close(info.raw_log_prob[0], logits[0].log_softmax(-1)[2])


def test_values_that_no_number_may_have_stay_harmless() -> None:
    logits = random_logits(6, 5000)
    for name, neutral in {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}.items():
        wild = torch.tensor([math.nan, math.inf, -math.inf, -3.0, 1e-45, 7.0])
        tokens = pygen.sample_token(logits, **{name: wild}, seed=1)
        assert bool(((tokens >= 0) & (tokens < 5000)).all()), (name, neutral)
    top_k = torch.tensor([-1, 0, 1, 2**62, -(2**63), 5000])
    tokens = pygen.sample_token(logits, top_k=top_k, seed=1)
    assert bool(((tokens >= 0) & (tokens < 5000)).all())
    assert int(tokens[2]) == int(logits[2].argmax())


def test_out_and_info() -> None:
    logits = random_logits(3, 2000).bfloat16()
    out = torch.full((3,), -1)
    assert pygen.sample_token(logits, seed=1, out=out) is out
    tokens, info = pygen.sample_token(logits, seed=1, top_p=0.9, temperature=0.5, return_info=True)
    truth = sample_token_reference(logits.double(), temperature=torch.tensor([0.5]).double(), seed=torch.tensor([1]),
                                   top_p=torch.tensor([0.9]).double())  # fmt: skip
    assert torch.equal(tokens, truth[0])
    for result, expected in zip(info, truth[1:], strict=True):
        torch.testing.assert_close(result, expected.to(result.dtype))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(8)}, ValueError, "logits must have shape"),
        ({"logits": torch.zeros(3, 0)}, ValueError, "vocabulary must hold"),
        ({"logits": torch.zeros(3, 8, dtype=torch.float64)}, TypeError, "logits must be float32"),
        ({"logits": torch.zeros(3, 8, requires_grad=True)}, RuntimeError, "not differentiable"),
        ({"temperature": -0.5}, ValueError, "temperature must lie in"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
        ({"top_k": 2.5}, TypeError, "top_k must be a number"),
        ({"top_k": -1}, ValueError, "top_k must lie in"),
        ({"top_p": 1.5}, ValueError, "top_p must lie in"),
        ({"min_p": math.nan}, ValueError, "min_p must lie in"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty must lie in"),
        ({"top_p": torch.ones(2)}, ValueError, "top_p must hold one number, or one per sample"),
        ({"top_k": torch.ones(3)}, TypeError, "top_k must be Long"),
        ({"previous": torch.zeros(8, dtype=torch.int64)}, ValueError, "previous must have shape"),
        ({"bitmask": torch.zeros(3, 2, dtype=torch.int32)}, ValueError, "bitmask must have shape"),
        ({"bitmask": torch.zeros(3, 1)}, TypeError, "bitmask must be Int"),
        ({"repetition_penalty": 1.3}, ValueError, "repetition_penalty is about the tokens in previous"),
        ({"previous_lengths": torch.zeros(3, dtype=torch.int64)}, ValueError, "previous_lengths is about the tokens"),
        ({"seed": 1.5}, TypeError, "seed, step and key must be integers"),
        ({"step": "first"}, TypeError, "seed, step and key must be integers"),
        ({"logit_bias": torch.zeros(3, 7)}, ValueError, "logit_bias must have shape"),
        ({"seed": torch.tensor([1, 2])}, ValueError, "seed must hold one number, or one per sample"),
        ({"out": torch.zeros(4, dtype=torch.int64)}, ValueError, "token must have shape"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pygen.sample_token(**{"logits": torch.zeros(3, 8), **change})
