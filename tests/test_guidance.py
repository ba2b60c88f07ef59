"""Guidance by the model's outputs: each paper's formula, written out in float64, beside a step of the fused row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pygen
from pygen.diffusion import APG, PerpNeg, Rescale, Stepper
from pygen.diffusion.guidance import Guider
from tests.error_rule import assert_error_rule

SHAPE = (3, 4, 16, 18)
DIMS = (1, 2, 3)
GUIDANCE, WEIGHT = 7.5, 2.0


def outputs(steps: int = 1) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(SHAPE, generator=generator)
    return [[shared + 0.4 * torch.randn(SHAPE, generator=generator) for _ in range(3)] for _ in range(steps)]


def guided(guider: Guider, steps: list[list[Tensor]], **options: Any) -> list[Tensor]:
    """What the step takes for the model's output: the last step to time 0, with x_0 predicted, is the prediction."""
    plan = pygen.plan("euler", "cosine", len(steps), prediction="sample", guidance=GUIDANCE, **options)
    stepper, results = Stepper(plan, steps[0][0], guider), []
    for i, (cond, uncond, negative) in enumerate(steps):
        pred = torch.empty_like(cond)
        three = {"negative": negative} if options else {}
        stepper.step(i, torch.zeros_like(cond), cond, uncond=uncond, pred=pred, **three)
        results.append(pred)
    return results


def check(guider: Guider, formula: Any, steps: int = 1, **options: Any) -> None:
    made = outputs(steps)
    truth = formula([[tensor.double() for tensor in tensors] for tensors in made])
    triples = zip(guided(guider, made, **options), formula(made), truth, strict=True)
    assert_error_rule(list(triples), str(guider))


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale_is_lin_et_als(phi: float, isa: str) -> None:
    def formula(steps: list[list[Tensor]]) -> list[Tensor]:
        ((pos, neg, _),) = steps
        cfg = neg + GUIDANCE * (pos - neg)
        rescaled = cfg * (pos.std(DIMS, keepdim=True) / cfg.std(DIMS, keepdim=True))
        return [phi * rescaled + (1 - phi) * cfg]

    check(Rescale(phi), formula)


def test_rescale_counts_the_third_output(isa: str) -> None:
    def formula(steps: list[list[Tensor]]) -> list[Tensor]:
        ((pos, uncond, neg),) = steps
        cfg = uncond + GUIDANCE * (pos - uncond) - WEIGHT * (neg - uncond)
        return [0.7 * cfg * (pos.std(DIMS, keepdim=True) / cfg.std(DIMS, keepdim=True)) + 0.3 * cfg]

    check(Rescale(), formula, negative=-WEIGHT)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("norm_threshold", [None, 5.0])
@pytest.mark.parametrize("momentum", [0.0, -0.75])
def test_apg_is_sadat_et_als(eta: float, norm_threshold: float | None, momentum: float, isa: str) -> None:
    def formula(steps: list[list[Tensor]]) -> list[Tensor]:
        running, results = torch.zeros_like(steps[0][0]), []
        for cond, uncond, _ in steps:
            running = diff = cond - uncond + momentum * running
            if norm_threshold is not None:
                norm = torch.linalg.vector_norm(diff, dim=DIMS, keepdim=True)
                diff = diff * torch.minimum(torch.ones_like(norm), norm_threshold / norm)
            unit = cond / torch.linalg.vector_norm(cond, dim=DIMS, keepdim=True)
            parallel = (diff * unit).sum(DIMS, keepdim=True) * unit
            results.append(cond + (GUIDANCE - 1) * (diff - parallel + eta * parallel))
        return results

    check(APG(eta, norm_threshold, momentum), formula, steps=3)


def test_perp_neg_is_armandpour_et_als(isa: str) -> None:
    def formula(steps: list[list[Tensor]]) -> list[Tensor]:
        ((pos, uncond, neg),) = steps
        positive, negative = pos - uncond, neg - uncond
        along = (negative * positive).sum(DIMS, keepdim=True) / (positive * positive).sum(DIMS, keepdim=True)
        return [uncond + GUIDANCE * positive - WEIGHT * (negative - along * positive)]

    check(PerpNeg(), formula, negative=-WEIGHT)


def model(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
    return 0.5 * x - 0.125 * x * x * x + 0.25 * shift[:, None, None, None] * (x * x)


def draw(**arguments: Any) -> Tensor:
    conditions = {"cond": {"shift": torch.ones(2)}, "uncond": {"shift": torch.zeros(2)}}
    options = {"schedule": "cosine", "steps": 6, "clip": (-3.0, 3.0), "seed": 1, "guidance": 3.0} | conditions
    return pygen.sample(model, (2, 3, 9, 11), **(options | arguments))


def test_a_guider_that_changes_nothing_changes_nothing() -> None:
    assert torch.equal(draw(guider=Rescale(0.0)), draw())
    assert not torch.equal(draw(guider=Rescale(0.7)), draw())
    assert not torch.equal(draw(guider=APG()), draw())


def test_guided_samples_are_the_same_in_any_batch() -> None:
    for guider in (Rescale(), APG(0.2, 10.0, -0.5)):
        one = {"cond": {"shift": torch.ones(1)}, "uncond": {"shift": torch.zeros(1)}}
        alone = pygen.sample(
            model, (1, 3, 9, 11), schedule="cosine", steps=6, clip=(-3.0, 3.0), seed=1, guidance=3.0, guider=guider,
            sample_ids=torch.tensor([1]), **one,
        )  # fmt: skip
        assert torch.equal(alone, draw(guider=guider)[1:])


def test_guidance_in_an_interval_is_a_factor_per_step() -> None:
    """Kynkäänniemi et al. 2024: outside of it the conditional output stands alone, and the other is not read."""

    def poisoned(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        out = model(x, t, shift)
        return torch.where((shift == 0)[:, None, None, None] & (seen[-1] not in (2, 3)), torch.nan, out)

    seen = [0]
    factors = [1.0, 1.0, 3.0, 3.0, 1.0, 1.0]
    arguments = {"schedule": "cosine", "steps": 6, "clip": (-3.0, 3.0), "seed": 1, "guidance": factors}
    conditions = {"cond": {"shift": torch.ones(2)}, "uncond": {"shift": torch.zeros(2)}}
    result = pygen.sample(
        poisoned, (2, 3, 9, 11), **arguments, **conditions, callback=lambda info: seen.append(info.step + 1)
    )
    assert torch.equal(result, draw(guidance=factors))
    assert not torch.equal(result, draw())


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="guider needs uncond"):
        draw(guider=Rescale(), uncond=None, guidance=None, cond={"shift": torch.ones(2)})
    with pytest.raises(ValueError, match="PerpNeg needs negative"):
        draw(guider=PerpNeg())
    with pytest.raises(ValueError, match="give guider or a plan with thresholding"):
        draw(guider=Rescale(), clip=None, thresholding=(0.99, 2.0))
    with pytest.raises(ValueError, match="negative must be finite"):
        pygen.plan("euler", "cosine", 3, negative=float("nan"))
    with pytest.raises(ValueError, match="APG takes no negative"):
        guided(APG(), outputs(), negative=-1.0)
