"""What the drop-ins on the flow path, and those of few steps, have that others have not: times of each token or sample,
steps to any time, samples noised at a time, long policies, a strength that leaves timesteps out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import pygen.diffusers
from pygen.diffusers import PhiloxGenerator
from tests.diffusers_float64 import Draws, in_float64
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


def of_a_stage(scheduler: Any, feed: Feed) -> list[Tensor]:
    """Helios's arithmetic on a schedule that is not the scheduler's own."""
    x, other, shape = feed(3, 2, 1, 2, 2), feed(3, 2, 1, 2, 2), (3, 2, 1, 2, 2)
    sigmas, times = scheduler.sigmas.to(x.dtype), scheduler.timesteps.clone()
    at = torch.tensor([700, 400, 12])
    found = [scheduler.add_noise(x, other, at, sigmas, times)]
    found.append(scheduler.convert_flow_pred_to_x0(other, x, at, sigmas, times))
    for i, t in enumerate(times):
        schedule = {"dmd_sigmas": sigmas, "dmd_timesteps": times, "all_timesteps": times}
        x = scheduler.step(feed(*shape), t, x, cur_sampling_step=i, dmd_noisy_tensor=other, **schedule).prev_sample
        found.append(x)
    return found


def stage_by_unipc(scheduler: Any, feed: Feed) -> list[Tensor]:
    x, found, shape = feed(3, 2, 1, 2, 2), [], (3, 2, 1, 2, 2)
    for t in scheduler.timesteps:
        out = scheduler.step(feed(*shape), t, x)
        x = out.prev_sample
        found += [x, out.last_sample, scheduler.model_outputs[-1]]
    return found


def stage_in_other_hands(scheduler: Any, feed: Feed) -> list[Tensor]:
    """Whose caller keeps the state, and says where the steps lie."""
    x, found, shape = feed(3, 2, 1, 2, 2), [], (3, 2, 1, 2, 2)
    outputs, times, last, order = [None] * 3, [None] * 3, None, 1
    sigmas = scheduler.sigmas * 0.97
    for i, t in enumerate(scheduler.timesteps):
        x, outputs, last, order = scheduler.step_unipc(
            feed(*shape), t, x, False, outputs, times, sigmas[i - 1] if i else None, sigmas[i], sigmas[i + 1],
            cus_step_index=i, cus_lower_order_num=min(i, 2), cus_this_order=order, cus_last_sample=last,
        )  # fmt: skip
        outputs, times = [*outputs[1:], None], [*times[1:], t]
        found += [x, last]
    scheduler._step_index = 1
    found.append(scheduler.convert_model_output(feed(*shape), sample=feed(*shape)))
    found.append(scheduler.convert_model_output(feed(*shape), sample=feed(*shape), sigma=torch.tensor(0.25)))
    return [*found, scheduler.step_euler(feed(*shape), None, x, None, sigmas[1], sigmas[2]).prev_sample]


def stage_by_another_predictor(scheduler: Any, feed: Feed) -> list[Tensor]:
    room = pygen.diffusers if isinstance(scheduler, pygen.diffusers.HeliosScheduler) else diffusers
    scheduler.solver_p = room.MiniMaxH3Scheduler()
    scheduler.solver_p.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0])
    x, found, shape = feed(3, 2, 1, 2, 2), [], (3, 2, 1, 2, 2)
    for t in scheduler.solver_p.timesteps:
        x = scheduler.step(feed(*shape), t, x).prev_sample
        found += [x, scheduler.last_sample]
    return found


def with_strength(scheduler: Any, feed: Feed) -> list[Tensor]:
    """The last step adds noise: diffusers counts the timesteps that are left out."""
    scheduler.set_timesteps(timesteps=[900, 700, 500, 300, 100], strength=0.6)
    x, generator, found = feed(3, 4, 5), torch.Generator().manual_seed(1), []
    for t in scheduler.timesteps:
        x, denoised = scheduler.step(feed(3, 4, 5), t, x, generator=generator, return_dict=False)
        found += [x, denoised]
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
    "Helios on another schedule": ("HeliosDMDScheduler", {}, of_a_stage),
    "UniPC of epsilon": ("HeliosScheduler", {"predict_x0": False, "prediction_type": "epsilon"}, stage_by_unipc),
    "UniPC of epsilon, from v": (
        "HeliosScheduler",
        {"predict_x0": False, "prediction_type": "v_prediction", "solver_order": 3, "solver_type": "bh1"},
        stage_by_unipc,
    ),
    "UniPC of epsilon, from x_0": (
        "HeliosScheduler",
        {"predict_x0": False, "prediction_type": "sample"},
        stage_by_unipc,
    ),
    "UniPC of x_0": ("HeliosScheduler", {"prediction_type": "sample", "solver_order": 3}, stage_by_unipc),
    "UniPC of x_0, from v": (
        "HeliosScheduler",
        {"prediction_type": "v_prediction", "use_flow_sigmas": False},
        stage_by_unipc,
    ),
    "UniPC in other hands": ("HeliosScheduler", {}, stage_in_other_hands),
    "UniC after another predictor": ("HeliosScheduler", {}, stage_by_another_predictor),
    "LCM with strength": ("LCMScheduler", {}, with_strength),
    "TCD with strength": ("TCDScheduler", {"prediction_type": "v_prediction"}, with_strength),
    "a policy of 12": ("PiflowScheduler", {"n_grid": 12}, wide_policy),
    "a policy of 25": ("PiflowScheduler", {"n_grid": 25, "num_policy_substeps": 30}, wide_policy),
}


def run(scheduler_class: type, config: dict[str, Any], call: Call, dtype: torch.dtype, truth: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def feed(*shape: int) -> Tensor:
        value = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
        return value.double() if truth else value

    scheduler: Any = scheduler_class(**config)
    scheduler.set_timesteps(6, **({"stage_index": 1} if "Helios" in scheduler_class.__name__ else {}))
    return call(scheduler, feed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_diffusers(case: str, dtype: torch.dtype) -> None:
    name, config, call = CASES[case]
    ours = run(getattr(pygen.diffusers, name), config, call, dtype, False)
    with Draws() as draws:
        same = run(getattr(diffusers, name), config, call, dtype, False)
    with in_float64(getattr(diffusers, name)), draws.repeated():
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


@pytest.mark.parametrize(
    "config",
    [
        {"predict_x0": False, "prediction_type": "epsilon", "use_flow_sigmas": False},  # ends at sigma = 0
        {"stages": 1, "stage_range": [0, 1], "solver_order": 3},  # begins at alpha = 0
    ],
    ids=str,
)
def test_unipc_where_diffusers_multiplies_nothing_by_infinity(config: dict[str, Any]) -> None:
    ours, theirs = (
        run(room.HeliosScheduler, config, stage_by_unipc, torch.float32, False) for room in (pygen.diffusers, diffusers)
    )
    assert theirs[-3].isnan().all()
    assert all(x.isfinite().all() for x in ours)


@pytest.mark.parametrize(
    ("knob", "config"),
    [
        ("thresholding", {"thresholding": True}),
        ("prediction_type", {"predict_x0": False}),
        ("solver_type", {"stages": 1, "stage_range": [0, 1], "solver_type": "bh1"}),
        ("lower_order_final", {"lower_order_final": False, "use_flow_sigmas": False}),
    ],
)
def test_what_unipc_cannot_do_is_named(knob: str, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=knob):
        run(pygen.diffusers.HeliosScheduler, config, stage_by_unipc, torch.float32, False)


def test_noise_after_the_clean_end_is_refused() -> None:
    scheduler = pygen.diffusers.LTXEulerAncestralRFScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.0, 0.3, 0.0])
    with pytest.raises(ValueError, match="sigmas"):
        scheduler.step(torch.ones(1, 2), scheduler.timesteps[0], torch.ones(1, 2))


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
