"""The drop-ins on a grid of sigmas where a whole run, as tests/test_diffusers.py makes it, does not lead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import pygen.diffusers as ours
from pygen.diffusers import PhiloxGenerator
from pygen.ops.philox_normal import DRAW_AFFINE_STEP, philox_normal
from tests.diffusers_float64 import Draws, in_float64
from tests.error_rule import assert_error_rule

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SHAPE = (2, 3, 5)


def normal(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, dtype=torch.float32, generator=numbers).to(dtype)


Run = Callable[[Any, torch.dtype], list[Tensor]]


def assert_as_exact(name: str, run: Run, **config: Any) -> None:
    """``run(scheduler, dtype)`` of ours against diffusers' class, and its truth."""
    theirs = getattr(diffusers, name)
    torch.manual_seed(0)
    with Draws() as draws:
        expected = run(theirs(**config), torch.float32)
    with in_float64(theirs), draws.repeated():
        truth = run(theirs(**config), torch.float64)
    torch.manual_seed(0)
    found = run(getattr(ours, name)(**config), torch.float32)
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert_error_rule(zip(found, expected, truth, strict=True), name)


@pytest.mark.parametrize("begin", [2, 6])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("EulerDiscreteScheduler", {"prediction_type": "sample"}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {"clip_sample": True}),
        ("KDPM2DiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("KDPM2AncestralDiscreteScheduler", {}),
        ("LMSDiscreteScheduler", {}),
        ("IPNDMScheduler", {}),
        ("EDMEulerScheduler", {}),
        ("CMStochasticIterativeScheduler", {"sigma_min": 0.1}),
        ("DPMSolverSDEScheduler", {"noise_sampler_seed": 3}),
    ],
)
def test_a_run_may_begin_in_the_middle(name: str, config: dict[str, Any], begin: int) -> None:
    def run(scheduler: Any, dtype: torch.dtype) -> list[Tensor]:
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(begin)
        x, found = normal(0, dtype), []
        for i, t in enumerate(scheduler.timesteps[begin:]):
            if hasattr(scheduler, "add_noise"):
                found.append(scheduler.add_noise(x, normal(1, dtype), scheduler.timesteps[begin : begin + 1]))
            found.append(scheduler.scale_model_input(x, t))
            x = scheduler.step(normal(i + 2, dtype), t, x, return_dict=False)[0]
            found.append(x)
        return found

    assert_as_exact(name, run, **config)


def test_noise_and_velocity_by_timestep() -> None:
    def run(scheduler: Any, dtype: torch.dtype) -> list[Tensor]:
        scheduler.set_timesteps(10)
        times = scheduler.timesteps[[7, 2]]
        mixed = (scheduler.add_noise, scheduler.get_velocity)
        return [method(normal(0, dtype), normal(1, dtype), times) for method in mixed]

    assert_as_exact("EulerDiscreteScheduler", run)


def test_edm_steps_by_a_known_prediction() -> None:
    def run(scheduler: Any, dtype: torch.dtype) -> list[Tensor]:
        scheduler.set_timesteps(5)
        known = normal(1, dtype)
        out = scheduler.step(
            torch.full(SHAPE, torch.nan, dtype=dtype), scheduler.timesteps[0], normal(0, dtype),
            s_churn=3.0, pred_original_sample=known,
        )  # fmt: skip
        return [out.prev_sample, out.pred_original_sample]

    assert_as_exact("EDMEulerScheduler", run)


@pytest.mark.parametrize(
    "name",
    [
        "EulerAncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DPMSolverSDEScheduler",
    ],
)
def test_what_diffusers_leaves_to_be_implemented_ends_at_the_predicted_sample(name: str) -> None:
    scheduler = getattr(ours, name)(prediction_type="sample")
    scheduler.set_timesteps(6)
    x, clean = 14.0 * normal(0), normal(1)
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        x, pred = scheduler.step(clean, t, x, return_dict=False)
        assert torch.equal(pred, clean)
    torch.testing.assert_close(x, clean)


@pytest.mark.parametrize("several", [False, True])
def test_the_increments_that_philox_draws_are_of_one_brownian_path(several: bool) -> None:
    scheduler = ours.DPMSolverSDEScheduler(prediction_type="sample")
    scheduler.set_timesteps(6)
    seeds = [PhiloxGenerator().manual_seed(7 + i) for i in range(SHAPE[0] if several else 1)]
    scheduler.noise_sampler_seed = seeds if several else seeds[0]
    x, nothing = torch.zeros(SHAPE), torch.zeros(SHAPE)  # of which only noise can come

    def drawn(step: int) -> Tensor:
        if not several:
            return philox_normal(SHAPE, seed=7, step=step, draw=DRAW_AFFINE_STEP)
        alone = (1, *SHAPE[1:])
        return torch.cat([philox_normal(alone, seed=7 + i, step=step, draw=DRAW_AFFINE_STEP) for i in range(SHAPE[0])])

    sigma, end = scheduler.sigmas[:2].tolist()
    between = (sigma * end) ** 0.5
    first = scheduler.step(nothing, scheduler.timesteps[0], x)[0]
    torch.testing.assert_close(first, between * (1 - (between / sigma) ** 2) ** 0.5 * drawn(0))
    second = scheduler.step(nothing, scheduler.timesteps[1], first)[0]
    path = (sigma - between) ** 0.5 * drawn(0) + (between - end) ** 0.5 * drawn(1)
    torch.testing.assert_close(second, end * (1 - (end / sigma) ** 2) ** 0.5 * path / (sigma - end) ** 0.5)


def test_karras_ve_takes_sigmas_of_any_kind_and_corrects_down_to_0() -> None:
    scheduler = ours.KarrasVeScheduler()
    scheduler.set_timesteps(5)
    x, output = normal(0), normal(1)
    runs = []
    for sigma in (scheduler.schedule[3], scheduler.schedule[3].clone(), scheduler.schedule[3].item()):
        seed = torch.Generator().manual_seed(0)
        noisy, high = scheduler.add_noise_to_input(x, sigma, seed)
        assert isinstance(high, Tensor) == isinstance(sigma, Tensor)
        runs.append([noisy, *scheduler.step(output, high, 0.0, noisy, return_dict=False)])
    for run in runs[1:]:
        assert all(map(torch.allclose, run, runs[0]))
    noisy, clean, slope = runs[0]
    corrected = scheduler.step_correct(output, high, 0.0, noisy, clean, slope).prev_sample
    torch.testing.assert_close(corrected, clean)
    with pytest.raises(ValueError, match="num_inference_steps must be at least 2"):
        scheduler.set_timesteps(1)


def test_corrections_that_philox_draws_belong_to_their_sample() -> None:
    scheduler = ours.ScoreSdeVeScheduler()
    seeds = [PhiloxGenerator().manual_seed(i) for i in range(SHAPE[0])]

    def two(x: Tensor, generators: list[torch.Generator]) -> list[Tensor]:
        scheduler.set_timesteps(3)
        output = torch.ones_like(x)  # a norm that is each sample's
        return [scheduler.step_correct(output, x, generators).prev_sample for _ in range(2)]

    x = normal(0)
    first, second = two(x, seeds)
    assert not torch.equal(first, second)
    assert torch.equal(two(x, seeds)[1], second)
    same = two(torch.cat([x, x]), seeds + seeds)[0]
    assert torch.equal(same[: len(x)], same[len(x) :])


def test_what_is_refused() -> None:
    x = normal(0)
    euler = ours.EulerDiscreteScheduler()
    euler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"timestep must be one of scheduler.timesteps, not the index"):
        euler.step(x, 0, x)
    with pytest.raises(ValueError, match="timestep"):
        euler.get_velocity(x, x, torch.tensor([0, 1]))
    euler.set_begin_index(3)
    with pytest.raises(ValueError, match="step 3 is past the last of sigmas"):
        euler.step(x, euler.timesteps[0], x)
    with pytest.raises(ValueError, match="prediction_type must be"):
        ours.HeunDiscreteScheduler(prediction_type="noise").step(x, 999.0, x)
    lms = ours.LMSDiscreteScheduler()
    with pytest.raises(ValueError, match="order must be at least 1"):
        lms.step(x, lms.timesteps[0], x, order=0)
    with pytest.raises(ValueError, match="set_timesteps"):
        ours.PNDMScheduler().step(x, 5, x)
    pndm = ours.PNDMScheduler()
    pndm.set_timesteps(10)
    with pytest.raises(ValueError, match="step_prk"):
        pndm.step_plms(x, 5, x)
