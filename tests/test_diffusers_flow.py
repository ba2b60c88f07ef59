"""The flow family's own: times of each token or sample, steps to any time, samples noised at a time, long policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import pygen.diffusers
from pygen.diffusers import PhiloxGenerator
from tests.diffusers_float64 import in_float64
from tests.error_rule import assert_error_rule

Feed = Callable[..., Tensor]
Call = Callable[[Any, Feed], list[Tensor]]
EULER = "FlowMatchEulerDiscreteScheduler"
MAP = "FlowMapEulerDiscreteScheduler"
H3 = "MiniMaxH3Scheduler"


def per_token(scheduler: Any, feed: Feed) -> list[Tensor]:
    """Tokens at the present time, at times between, and clean, as conditioning of LTX-Video makes them."""
    x, found = feed(2, 5, 7), []
    limits = feed(2, 5).abs() * 1000
    limits[0, 0] = 0
    for t in scheduler.timesteps:
        times = torch.minimum(t.to(limits), limits)
        generator = torch.Generator().manual_seed(3)
        x = scheduler.step(feed(2, 5, 7), t, x, generator=generator, per_token_timesteps=times).prev_sample
        found.append(x)
    return found


def noised(scheduler: Any, feed: Feed) -> list[Tensor]:
    x, noise = feed(3, 4, 5), feed(3, 4, 5)
    return [scheduler.scale_noise(x, times, noise) for times in (scheduler.timesteps[:3], scheduler.timesteps[2:3])]


def noised_on_the_way(scheduler: Any, feed: Feed) -> list[Tensor]:
    x, noise, time = feed(3, 4, 5), feed(3, 4, 5), scheduler.timesteps[2:3]
    scheduler.set_begin_index(2)
    found = [scheduler.scale_noise(x, time, noise)]
    scheduler.step(feed(3, 4, 5), time[0], x)
    return [*found, scheduler.scale_noise(x, time, noise)]


def noised_at(*shape: int, scale: float = 1.0) -> Call:
    """At times in [0, scale], which need not be of the schedule, of each sample or token."""
    return lambda scheduler, feed: [
        scheduler.scale_noise(feed(3, 4, 5), feed(*shape).abs().clamp(max=1) * scale, feed(3, 4, 5))
    ]


def to_any_time(scheduler: Any, feed: Feed) -> list[Tensor]:
    x, first = feed(3, 4, 5), scheduler.timesteps[0]
    times = [(first, None), (first, 0.0), (first, scheduler.timesteps[3]), (321.5, 100), (first.expand(3), 12.25)]
    times += [
        (feed(3).abs() * 100, torch.tensor([3.0, 2.0, 1.5], dtype=x.dtype)),
        (scheduler.timesteps[2] + 5e-4, None),
    ]
    return [scheduler.step(feed(3, 4, 5), t, x, r).prev_sample for t, r in times]


def one_time_per_sample(scheduler: Any, feed: Feed) -> list[Tensor]:
    scheduler.set_begin_index(1)
    return [scheduler.step(feed(3, 4, 5), feed(3).abs().clamp(max=1), feed(3, 4, 5)).prev_sample]


def wide_policy(scheduler: Any, feed: Feed) -> list[Tensor]:
    x, found = feed(2, 3, 4), []
    for t in scheduler.timesteps:
        x = scheduler.step(feed(2, 3, 4 * scheduler.n_grid), t, x).prev_sample
        found.append(x)
    return found


CASES: dict[str, tuple[str, dict[str, Any], Call]] = {
    "times of tokens": (EULER, {"shift": 3.0}, per_token),
    "times of tokens, stochastic": (EULER, {"stochastic_sampling": True}, per_token),
    "noised by timestep": (EULER, {}, noised),
    "noised on the way": (EULER, {}, noised_on_the_way),
    "noised by LCM": ("FlowMatchLCMScheduler", {"invert_sigmas": True}, noised),
    "noised by Heun": (
        "FlowMatchHeunDiscreteScheduler",
        {},
        lambda scheduler, feed: [scheduler.scale_noise(feed(3, 4), scheduler.timesteps[2], feed(3, 4))],
    ),
    "flow map to any time": (MAP, {"shift": 3.0}, to_any_time),
    "noised by flow map": (MAP, {}, noised_at(3, scale=1000.0)),
    "noised by MiniMax": (H3, {}, noised_at(3)),
    "noised by MiniMax, tokens": (H3, {}, noised_at(3, 4)),
    "noised by MiniMax, at a number": (
        H3,
        {},
        lambda scheduler, feed: [scheduler.scale_noise(feed(3, 4), 0.3, feed(3, 4))],
    ),
    "one time per sample": (H3, {}, one_time_per_sample),
    "noised by RFD4": (
        "RFD4ProteinaScheduler",
        {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 2.0, "tsr_sigma": 1.5, "tail_steps": 0},
        lambda scheduler, feed: [
            scheduler.add_noise(feed(2, 4, 3), feed(2, 4, 3), t) for t in (0.25, torch.tensor([0.5, 0.125]))
        ],
    ),
    "a policy of 12": ("PiflowScheduler", {"n_grid": 12}, wide_policy),
    "a policy of 25": ("PiflowScheduler", {"n_grid": 25, "num_policy_substeps": 30}, wide_policy),
}


def run(scheduler_class: type, config: dict[str, Any], call: Call, dtype: torch.dtype, truth: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def feed(*shape: int) -> Tensor:
        value = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
        return value.double() if truth else value

    scheduler: Any = scheduler_class(**config)
    scheduler.set_timesteps(6)
    return call(scheduler, feed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_diffusers(case: str, dtype: torch.dtype) -> None:
    name, config, call = CASES[case]
    ours, same = (run(getattr(room, name), config, call, dtype, False) for room in (pygen.diffusers, diffusers))
    with in_float64(getattr(diffusers, name)), torch.no_grad():
        truth = run(getattr(diffusers, name), config, call, dtype, True)
    assert [x.dtype for x in ours] == [x.dtype for x in same]
    assert_error_rule(zip(ours, same, truth, strict=True), case)


@pytest.mark.parametrize("name", [EULER, MAP, H3])
def test_the_index_of_a_step_is_no_timestep(name: str) -> None:
    scheduler = getattr(pygen.diffusers, name)()
    scheduler.set_timesteps(6)
    if name != MAP:
        with pytest.raises(ValueError, match="timestep"):
            scheduler.step(torch.ones(1, 2), 3, torch.ones(1, 2))
    with pytest.raises(ValueError, match="timestep"):
        scheduler.step(torch.ones(1, 2), 12.5, torch.ones(1, 2))


def test_heun_keeps_what_diffusers_keeps() -> None:
    ours, theirs = (room.FlowMatchHeunDiscreteScheduler() for room in (pygen.diffusers, diffusers))
    x, v = torch.randn(2, 3), torch.randn(2, 3)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
        scheduler.step(v, scheduler.timesteps[0], x, s_churn=2.0, generator=torch.Generator().manual_seed(1))
    assert not ours.state_in_first_order
    torch.testing.assert_close(ours.prev_derivative, theirs.prev_derivative)
    torch.testing.assert_close(ours.sample, theirs.sample)
    assert ours.dt == pytest.approx(theirs.dt.item())


@pytest.mark.parametrize("name", ["FlowMatchLCMScheduler", "LTXEulerAncestralRFScheduler"])
def test_philox_noise_is_the_samples_own(name: str) -> None:
    x, v = torch.randn(3, 4, 5), torch.randn(3, 4, 5)

    def step(rows: slice) -> Tensor:
        scheduler = getattr(pygen.diffusers, name)()
        scheduler.set_timesteps(6)
        out: Tensor = scheduler.step(
            v[rows], scheduler.timesteps[0], x[rows], generator=PhiloxGenerator().manual_seed(7), return_dict=False
        )[0]
        return out

    assert torch.equal(step(slice(0, 2)), step(slice(0, 3))[:2])
