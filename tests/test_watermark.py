"""The green-list watermark, written and found again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import pygen

VOCABULARY = 500


def generate(batch: int, length: int, delta: float, **settings: Any) -> Tensor:
    """Texts of a model that knows nothing: equal logits, and the watermark."""
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    for i in range(length):
        lengths = torch.full((batch,), i)
        logits = pygen.watermark_logits(
            torch.zeros(batch, VOCABULARY), tokens, delta=delta, lengths=lengths, **settings
        )
        tokens[:, i] = pygen.token_confidence(logits[:, None], seed=7, step=i)[:, 0]
    return tokens


@pytest.mark.parametrize("context", [0, 1, 4])
@pytest.mark.parametrize("gamma", [0.25, 0.5])
def test_what_was_written_is_found(context: int, gamma: float) -> None:
    settings: dict[str, Any] = {"key": 15485863, "gamma": gamma, "context": context}
    tokens = generate(40, 80, 2.0, **settings)
    found = pygen.detect_watermark(tokens, **settings)
    assert torch.equal(found.scored, torch.full((40,), 80 - context))
    share = gamma * math.exp(2.0) / (gamma * math.exp(2.0) + 1 - gamma)
    green = stats.binom(40 * (80 - context), share)
    if context > 0:  # else the one list has a share of its own
        assert green.ppf(1e-6) <= found.green.sum() <= green.ppf(1 - 1e-6)
    assert bool((found.z > 3).all())
    torch.testing.assert_close(found.p_value, torch.from_numpy(stats.norm.sf(found.z.numpy())))
    if context > 0:
        for other in ({"key": 15485864}, {"context": context + 1}):
            assert pygen.detect_watermark(tokens, **(settings | other)).z.abs().mean() < 2


def test_text_of_no_watermark_scores_as_chance_would_have_it() -> None:
    tokens = torch.randint(VOCABULARY, (4000, 100))
    for gamma in (0.1, 0.25, 0.5, 0.9):
        found = pygen.detect_watermark(tokens, key=1, gamma=gamma, context=2)
        green = stats.binom(4000 * 98, gamma)
        assert green.ppf(1e-6) <= found.green.sum() <= green.ppf(1 - 1e-6)
        assert found.z.mean().abs() < 5 / math.sqrt(4000)
        assert abs(found.z.std() - 1) < 0.06
        wanted = (found.green - gamma * 98) / math.sqrt(98 * gamma * (1 - gamma))
        torch.testing.assert_close(found.z, wanted.double(), rtol=1e-6, atol=1e-6)


def test_delta_is_added_where_the_detector_sees_green() -> None:
    tokens = torch.randint(VOCABULARY, (3, 9))
    settings: dict[str, Any] = {"key": -5, "gamma": torch.tensor([0.2, 0.5, 0.7]), "context": 3}
    lengths = torch.tensor([9, 3, 2])
    bias = pygen.watermark_logits(torch.zeros(3, VOCABULARY), tokens, delta=1.5, lengths=lengths, **settings)
    for b, length in enumerate(lengths.tolist()):
        last = tokens[b, :length].expand(VOCABULARY, -1)
        texts = torch.cat([last, torch.arange(VOCABULARY)[:, None]], dim=1)
        of_row = settings | {"gamma": settings["gamma"][b : b + 1]}
        assert torch.equal(pygen.green_tokens(texts, **of_row)[:, -1], bias[b] == 1.5)
        assert (bias[b] == 1.5).any() == (length >= 3)


def test_positions_are_those_of_one_text() -> None:
    tokens = torch.randint(VOCABULARY, (2, 12))
    logits = torch.randn(2, 4, VOCABULARY)
    lengths = torch.tensor([10, 3])
    together = pygen.watermark_logits(logits, tokens, key=3, context=2, lengths=lengths)
    for i in range(4):
        alone = pygen.watermark_logits(logits[:, i], tokens, key=3, context=2, lengths=(lengths - 3 + i).clamp(min=0))
        assert torch.equal(together[:, i], alone)


def test_repeated_tokens_count_once_per_context() -> None:
    tokens = torch.tensor([[1, 2, 1, 2, 1, 2, 3, 1, 2]])
    for context, scored in ((0, [1, 1, 0, 0, 0, 0, 1, 0, 0]), (1, [0, 1, 1, 0, 0, 0, 1, 1, 0])):
        mask = torch.empty(tokens.shape, dtype=torch.bool)
        pygen.green_tokens(tokens, key=1, context=context, ignore_repeated=True, scored=mask)
        assert mask.long().tolist() == [scored]
        found = pygen.detect_watermark(tokens, key=1, context=context, ignore_repeated=True)
        assert found.scored.tolist() == [sum(scored)]


def test_a_text_too_short_has_no_score() -> None:
    found = pygen.detect_watermark(torch.zeros(2, 9, dtype=torch.int64), key=1, context=4, lengths=torch.tensor([4, 5]))
    assert found.scored.tolist() == [0, 1]
    assert found.z.isnan().tolist() == found.p_value.isnan().tolist() == [True, False]


def test_the_colours_are_these() -> None:
    """What was written with one version is found by the next."""
    tokens = torch.arange(32)[None] * 7919 % 30011
    colours = pygen.green_tokens(tokens, key=15485863, gamma=0.25, context=2)
    assert "".join("01"[c] for c in colours[0].tolist()) == "00101000000000000010111000000010"


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"tokens": torch.zeros(10, dtype=torch.int64)}, ValueError, "tokens must have shape"),
    ({"tokens": torch.zeros(2, 5)}, TypeError, "tokens must be Long"),
    ({"key": torch.zeros(2, dtype=torch.int64)}, ValueError, "key must hold one number"),
    ({"key": torch.zeros(1)}, TypeError, "key must be Long"),
    ({"gamma": 1.5}, ValueError, r"gamma must lie in \[0, 1\], got 1.5"),
    ({"gamma": math.nan}, ValueError, r"gamma must lie in \[0, 1\], got nan"),
    ({"gamma": torch.tensor([0.1, 0.2, 0.3])}, ValueError, "gamma must hold one number, or one per sample"),
    ({"context": -1}, ValueError, "context must not be negative"),
    ({"lengths": torch.tensor([2, 6])}, ValueError, r"lengths must lie in \[0, 5\], got 6"),
    ({"lengths": torch.tensor([2.0, 3.0])}, TypeError, "lengths must be Long"),
]
WRONG_LOGITS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": torch.zeros(9)}, ValueError, "logits must have shape"),
    ({"logits": torch.zeros(3, 9)}, ValueError, "tokens must have shape"),
    ({"logits": torch.zeros(2, 9).double()}, TypeError, "logits must be float32"),
    ({"logits": torch.zeros(2, 9, requires_grad=True)}, RuntimeError, "not differentiable"),
    ({"delta": torch.tensor([1])}, TypeError, "delta must be Float"),
    ({"out": torch.zeros(2, 8)}, ValueError, "out must have shape"),
    ({"out": torch.zeros(2, 9, dtype=torch.bfloat16)}, TypeError, "out must be Float"),
]


@pytest.mark.parametrize(("changed", "error", "message"), WRONG + WRONG_LOGITS)
def test_wrong_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 9), "tokens": torch.zeros(2, 5, dtype=torch.int64), "key": 1}
    with pytest.raises(error, match=f"watermark_logits.*{message}"):
        pygen.watermark_logits(**(arguments | changed))


@pytest.mark.parametrize(("changed", "error", "message"), WRONG)
def test_wrong_arguments_of_the_detector(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"green_tokens.*{message}"):
        pygen.detect_watermark(**({"tokens": torch.zeros(2, 5, dtype=torch.int64), "key": 1} | changed))


def test_wrong_outputs_of_green_tokens() -> None:
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    for name in ("green", "scored"):
        with pytest.raises(ValueError, match=f"{name} must have shape"):
            pygen.green_tokens(tokens, key=1, **{name: torch.zeros(2, 6, dtype=torch.bool)})
        with pytest.raises(TypeError, match=f"{name} must be Bool"):
            pygen.green_tokens(tokens, key=1, **{name: torch.zeros(2, 5)})
