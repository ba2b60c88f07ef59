"""verify_draft: what its spec cannot say. Its tokens are the target's, whatever the draft."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import pygen

DRAWS = 200_000
SPREAD = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.5, -3.0, 0.2, -0.5])
EVEN = torch.where(torch.arange(8) % 2 == 0, SPREAD, -math.inf)
ODD = torch.where(torch.arange(8) % 2 == 1, SPREAD, -math.inf)
PAIRS: dict[str, tuple[Tensor, Tensor | None]] = {
    "close": (SPREAD, SPREAD + torch.linspace(-1, 1, 8)),
    "far": (SPREAD, -SPREAD),
    "uniform target": (torch.zeros(8), SPREAD),
    "uniform draft": (SPREAD, torch.zeros(8)),
    "filtered target": (EVEN, SPREAD),
    "filtered draft": (SPREAD, EVEN),
    "apart": (EVEN, ODD),
    "the same": (SPREAD, SPREAD),
    "looked up": (SPREAD, None),
    "long": (torch.linspace(-3, 3, 2500).sin() * 3, torch.linspace(-3, 3, 2500).cos() * 3),
}


def assert_drawn_from(tokens: Tensor, p: Tensor, what: str) -> None:
    count = torch.bincount(tokens, minlength=len(p)).double()
    assert count[p == 0].sum() == 0, what
    expected = p.double() / p.double().sum() * len(tokens)
    order = expected.argsort()
    sums, groups = expected[order].cumsum(0), torch.zeros_like(order)
    groups[order] = (sums / max(20.0, len(tokens) / 64)).long()  # of 20 and more expected tokens, but for the last
    observed, wanted = (torch.zeros(int(groups.max()) + 1).double().index_add(0, groups, v) for v in (count, expected))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    if len(wanted) > 1:
        assert stats.chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-6, what


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("pair", PAIRS)
def test_tokens_are_distributed_as_the_targets(pair: str, seed: int, temperature: float) -> None:
    target, drafted = PAIRS[pair]
    targets = torch.stack([target, target.roll(3), target.flip(0)])
    draws = DRAWS if len(target) < 100 else DRAWS // 10
    logits, accepted = targets.expand(draws, -1, -1), torch.empty(draws, dtype=torch.int64)
    if drafted is None:
        q, draft = None, torch.randint(8, (1, 2)).expand(draws, -1)
    else:
        q = torch.stack([drafted, drafted.roll(5)]).expand(draws, -1, -1)
        draft = pygen.token_confidence(q, seed=seed, temperature=temperature)
    tokens = pygen.verify_draft(draft, q, logits, seed=seed, step=3, temperature=temperature, accepted=accepted)
    assert torch.equal((tokens >= 0).sum(1) - 1, accepted)
    within = torch.arange(2) < accepted[:, None]
    assert torch.equal(tokens[:, :2][within], draft[within])
    for place in range(3):
        drawn = tokens[accepted >= place, place]
        if len(drawn) > 1000:
            assert_drawn_from(drawn, (targets[place] / temperature).softmax(-1), f"{pair}, {place}")
    if q is not None:
        rate = torch.minimum(*((x[0] / temperature).softmax(-1) for x in (targets, q[0]))).sum().item()
        expected = stats.binom(draws, min(rate, 1.0))
        assert expected.ppf(1e-7) - 1 <= (accepted >= 1).sum() <= expected.ppf(1 - 1e-7) + 1
        if pair == "apart":
            assert not accepted.any()


def test_a_draft_of_the_target_itself_is_always_accepted() -> None:
    logits = torch.randn(20_000, 5, 40)
    draft = pygen.token_confidence(logits[:, :-1], seed=5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        p = logits.to(dtype)
        tokens = pygen.verify_draft(draft, p[:, :-1], p, seed=6, temperature=0.9)
        assert torch.equal(tokens[:, :-1], draft)


def test_temperature_0_accepts_the_most_likely_tokens_alone() -> None:
    logits = torch.randn(500, 5, 40).round()  # ties: the first of them
    draft = torch.where(torch.rand(500, 4) < 0.8, logits.argmax(-1)[:, :4], 3)
    tokens = pygen.verify_draft(draft, logits[:, :-1], logits, seed=1, temperature=0)
    assert torch.equal(tokens, pygen.verify_draft(draft, None, logits))
    for row, drafted, best in zip(tokens.tolist(), draft.tolist(), logits.argmax(-1).tolist(), strict=True):
        expected: list[int] = []
        for place, token in enumerate(best):
            expected.append(token)
            if place == 4 or drafted[place] != token:
                break
        assert row == expected + [-1] * (5 - len(expected))


def test_a_token_hangs_on_its_sample_and_not_on_the_batch() -> None:
    logits, q = torch.randn(6, 4, 70), torch.randn(6, 3, 70)
    draft = pygen.token_confidence(q, seed=1)
    settings: dict[str, Any] = {"seed": torch.arange(6) + 9, "step": torch.arange(6)}
    together = pygen.verify_draft(draft, q, logits, sample_ids=torch.arange(6) + 40, **settings)
    for b in range(6):
        one = {"seed": 9 + b, "step": torch.tensor([b]), "sample_ids": torch.tensor([b + 40])}
        alone = pygen.verify_draft(draft[b : b + 1], q[b : b + 1], logits[b : b + 1], **one)
        assert torch.equal(alone, together[b : b + 1])
    shorter = pygen.verify_draft(draft[:, :2], q[:, :2], logits[:, :3], sample_ids=torch.arange(6) + 40, **settings)
    cut = pygen.verify_draft(draft, q, logits, sample_ids=torch.arange(6) + 40, lengths=torch.full((6,), 2), **settings)
    assert torch.equal(shorter, cut[:, :3])
    assert bool((cut[:, 3] == -1).all())


def test_no_token_lies_outside_of_the_vocabulary() -> None:
    logits, q = torch.randn(64, 4, 33), torch.randn(64, 3, 33)
    values = torch.tensor([math.nan, math.inf, -math.inf])
    for x in (logits, q):
        bad = torch.rand(x.shape) < 0.05
        x[bad] = values[torch.randint(3, (int(bad.sum()),))]
    logits[5], q[6] = -math.inf, -math.inf
    draft = torch.randint(-5, 50, (64, 3))
    ok = torch.empty(64, dtype=torch.bool)
    for drawn in (q, None):
        tokens = pygen.verify_draft(draft, drawn, logits, seed=3, ok=ok)
        counted = tokens != -1
        assert bool(((tokens >= 0) & (tokens < 33))[counted].all())
        assert bool((counted[:, 0]).all())
        assert ok.any()
        assert not ok.all()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"draft": torch.zeros(2, 3, 1, dtype=torch.int64)}, ValueError, "draft must have shape"),
        ({"draft": torch.zeros(2, 3)}, TypeError, "draft must be Long"),
        ({"logits": torch.zeros(2, 3, 9)}, ValueError, "logits must have shape"),
        ({"logits": torch.zeros(2, 4, 0)}, ValueError, "vocabulary must hold"),
        ({"logits": torch.zeros(2, 4, 9).double()}, TypeError, "logits must be float32"),
        ({"logits": torch.zeros(2, 4, 9, requires_grad=True)}, RuntimeError, "not differentiable"),
        ({"draft_logits": torch.zeros(2, 4, 9)}, ValueError, "draft_logits must have shape"),
        ({"lengths": torch.tensor([1, 4])}, ValueError, r"lengths must lie in \[0, 3\], got 4"),
        ({"lengths": torch.tensor([1, 2, 3])}, ValueError, "lengths must hold one number, or one per sample"),
        ({"temperature": -1.0}, ValueError, "temperature must lie in"),
        ({"temperature": math.nan}, ValueError, "temperature must lie in"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, "seed must hold one number, or one per sample"),
        ({"step": torch.zeros(3, dtype=torch.int64)}, ValueError, "step must hold one number"),
        ({"sample_ids": torch.zeros(2)}, TypeError, "sample_ids must be Long"),
        ({"token": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "token must have shape"),
        ({"accepted": torch.zeros(3, dtype=torch.int64)}, ValueError, "accepted must have shape"),
        ({"ok": torch.zeros(2)}, TypeError, "ok must be Bool"),
    ],
)
def test_wrong_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"draft": torch.zeros(2, 3, dtype=torch.int64), "draft_logits": torch.zeros(2, 3, 9), "seed": 1}
    with pytest.raises(error, match=f"verify_draft.*{message}"):
        pygen.verify_draft(**(arguments | {"logits": torch.zeros(2, 4, 9)} | changed))
