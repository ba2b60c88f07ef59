"""The schedules and their times against closed forms and against diffusers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pygen.diffusion import SCHEDULES, make_schedule
from tests.diffusers_float64 import in_float64

EPS = float(np.finfo(np.float64).eps)
DISCRETE = ("linear", "scaled_linear", "cosine", "sigmoid")
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_runs_from_noise_to_clean(name: str) -> None:
    schedule = make_schedule(name)
    t = np.linspace(schedule.t_max, schedule.t_clean, 501)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert alpha.dtype == sigma.dtype == np.float64
    assert (alpha[-1], sigma[-1]) == (1.0, 0.0)
    assert (np.diff(sigma / np.maximum(alpha, 1e-300)) < 0).all()
    invariant = {"flow": alpha + sigma, "karras": alpha}.get(name, alpha**2 + sigma**2)
    np.testing.assert_allclose(invariant, 1.0, rtol=2 * EPS)


@pytest.mark.parametrize(
    ("name", "zero_terminal_snr"), [*((name, False) for name in DISCRETE), ("linear", True), ("scaled_linear", True)]
)
def test_alphas_are_those_of_diffusers(name: str, zero_terminal_snr: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    steps, start, end = 600, 0.0007, 0.013
    arguments = {} if name == "cosine" else {"beta_start": start, "beta_end": end}
    with in_float64(diffusers.DDPMScheduler):
        peer = diffusers.DDPMScheduler(
            steps, start, end, beta_schedule=BETAS[name], rescale_betas_zero_snr=zero_terminal_snr
        )
    if zero_terminal_snr:
        arguments["zero_terminal_snr"] = True
    schedule = make_schedule({"name": name, "num_train_timesteps": steps, **arguments})
    t = np.arange(steps)
    # A product of 600 factors, each rounded a few times; 1 - beta loses three digits where beta is capped at 0.999.
    np.testing.assert_allclose(schedule.alpha(t) ** 2, peer.alphas_cumprod.numpy(), rtol=4e3 * EPS, atol=EPS)
    if zero_terminal_snr:
        assert (schedule.alpha(t)[-1], schedule.sigma(t)[-1]) == (0.0, 1.0)
        plain = make_schedule({"name": name, "num_train_timesteps": steps, "beta_start": start, "beta_end": end})
        assert schedule.alpha(t)[0] == pytest.approx(plain.alpha(t)[0], rel=4 * EPS)


def test_closed_forms() -> None:
    t = np.array([0.0, 1.0, 2.0])
    linear = make_schedule({"name": "linear", "num_train_timesteps": 3, "beta_start": 0.1, "beta_end": 0.3})
    np.testing.assert_allclose(linear.alpha(t) ** 2, [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], rtol=4 * EPS)
    scaled = make_schedule({"name": "scaled_linear", "num_train_timesteps": 3, "beta_start": 0.01, "beta_end": 0.09})
    np.testing.assert_allclose(scaled.alpha(t) ** 2, [0.99, 0.99 * 0.96, 0.99 * 0.96 * 0.91], rtol=4 * EPS)
    # The cosine's own alpha^2 is kept until the last beta, which alone is capped.
    cosine, at = make_schedule("cosine"), np.arange(999)
    expected = [math.cos(((i + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in at]
    expected = np.array(expected) / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(cosine.alpha(at) ** 2, expected, rtol=1e-9)
    assert cosine.alpha(np.array([999.0]))[0] ** 2 == pytest.approx(expected[-1] * 0.001, rel=1e-9)
    # Between two training steps alpha^2 is a straight line.
    np.testing.assert_allclose(linear.alpha(np.array([0.25])) ** 2, 0.75 * 0.9 + 0.25 * 0.72, rtol=4 * EPS)
    np.testing.assert_allclose(linear.alpha(np.array([-0.5])) ** 2, 0.95, rtol=4 * EPS)
    karras = make_schedule({"name": "karras", "sigma_min": 0.01, "sigma_max": 10.0, "rho": 3.0})
    assert karras.sigma(np.array([0.0, 1.0])) == pytest.approx([0.01, 10.0], rel=8 * EPS)
    middle = (0.5 * (0.01 ** (1 / 3) + 10.0 ** (1 / 3))) ** 3
    assert karras.sigma(np.array([0.5]))[0] == pytest.approx(middle, rel=8 * EPS)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_flow_shift_is_that_of_diffusers(shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    t = np.linspace(1.0, 0.01, 23)
    with in_float64(diffusers.FlowMatchEulerDiscreteScheduler):
        peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        peer.set_timesteps(sigmas=t.tolist())
    schedule = make_schedule({"name": "flow", "shift": shift})
    np.testing.assert_allclose(schedule.sigma(np.append(t, 0.0)), peer.sigmas.numpy(), rtol=4 * EPS)


def test_karras_sigmas_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    with in_float64(diffusers.EulerDiscreteScheduler):
        peer = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, sigma_min=0.02, sigma_max=40.0)
        peer.set_timesteps(17)
    schedule = make_schedule({"name": "karras", "sigma_min": 0.02, "sigma_max": 40.0})
    np.testing.assert_allclose(schedule.sigma(schedule.times(17, "linspace")), peer.sigmas.numpy(), rtol=32 * EPS)


@pytest.mark.parametrize("trained", [1000, 100])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_spacings_are_those_of_diffusers(spacing: str, trained: int) -> None:
    """At every number of steps, times that fall half way between two training steps included."""
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDPMScheduler(trained, timestep_spacing=spacing)
    schedule = make_schedule({"name": "linear", "num_train_timesteps": trained})
    for steps in range(1, trained + 1):
        peer.set_timesteps(steps)
        times = schedule.times(steps, spacing)
        assert len(times) == steps + 1
        assert times[-1] == -1
        assert (np.diff(times) < 0).all()
        if steps == 1 and spacing == "linspace":  # there diffusers begins at the clean end
            assert times[0] == trained - 1
            continue
        # Its arange sometimes yields one time too many, -1.
        assert times[:-1].tolist() == peer.timesteps[:steps].tolist(), steps


@pytest.mark.parametrize("name", ["karras", "flow"])
def test_spacings_of_continuous_time(name: str) -> None:
    schedule = make_schedule(name)
    for steps in (1, 2, 7):
        trailing, linspace, leading = (schedule.times(steps, s) for s in ("trailing", "linspace", "leading"))
        np.testing.assert_allclose(np.diff(trailing), (schedule.t_clean - schedule.t_max) / steps, rtol=16 * EPS)
        np.testing.assert_allclose(np.diff(leading[:-1]), (schedule.t_clean - schedule.t_max) / steps, rtol=16 * EPS)
        assert trailing[0] == linspace[0] == schedule.t_max
        assert leading[-2] == schedule.t_min
        assert steps == 1 or linspace[-2] == schedule.t_min
        assert trailing[-1] == linspace[-1] == leading[-1] == schedule.t_clean


def test_a_schedule_is_made_from_itself_a_name_or_a_mapping() -> None:
    schedule = make_schedule({"name": "flow", "shift": 2.0})
    assert make_schedule(schedule) is schedule
    assert schedule.sigma(np.array([0.5]))[0] == pytest.approx(2 / 3, rel=4 * EPS)
    given = {"name": "linear", "num_train_timesteps": 10}
    assert make_schedule(given).t_max == 9.0
    assert given == {"name": "linear", "num_train_timesteps": 10}  # left as it was


@pytest.mark.parametrize(
    ("schedule", "steps", "spacing", "message"),
    [
        ("quadratic", 5, "trailing", "schedule must be one of linear, .*, got 'quadratic'"),
        ({"shift": 3.0}, 5, "trailing", "schedule must be one of linear, .*, got None"),
        (
            {"name": "flow", "sigma_max": 3.0},
            5,
            "trailing",
            "schedule 'flow' has no argument 'sigma_max'; it takes shift",
        ),
        ("flow", 0, "trailing", "steps must be .*at least 1, got 0"),
        ("flow", 2.5, "trailing", "steps must be a whole number of at least 1, got 2.5"),
        ("flow", -3, "leading", "steps must be .*at least 1, got -3"),
        ("cosine", 1001, "leading", "steps=1001 exceeds the schedule's 1000 training steps"),
        ("cosine", 5, "random", "spacing must be one of leading, linspace, trailing, got 'random'"),
    ],
)
def test_refuses(schedule: Any, steps: Any, spacing: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(schedule).times(steps, spacing)
