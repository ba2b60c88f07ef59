"""Generative fractional diffusion: the forward process against its equations, the way back against its distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import pygen
from pygen.diffusion.fractional import FractionalProcess, sample_fractional

HURST = [0.2, 0.5, 0.8]


@pytest.mark.parametrize("hurst", HURST)
def test_the_sum_of_processes_nears_fractional_brownian_motion(hurst: float) -> None:
    """The error of the variance, on average over time, falls with K; that of fBM (type II) is t^2H / (2 H Gamma^2)."""
    errors = []
    for count in (1, 3, 5):
        process = FractionalProcess(hurst, count)
        error = 0.0
        for t in np.linspace(0.05, 1, 20):
            variance = float(process.omega @ process.covariance(t)[:count, :count] @ process.omega)
            exact = t ** (2 * hurst) / (2 * hurst * math.gamma(hurst + 0.5) ** 2)
            error += abs(variance - exact)
        errors.append(error)
    assert errors[2] < errors[1] < errors[0]


def test_hurst_one_half_is_brownian_motion() -> None:
    """Covariance min(s, t), and X that of x_0 + sigma eps with the integral of g^2: as K grows, to a per cent."""
    process = FractionalProcess(0.5, 5)
    for t in (0.2, 0.6, 1.0):
        variance = float(process.omega @ process.covariance(t)[:5, :5] @ process.omega)
        assert variance == pytest.approx(t, rel=0.01)
        of_x = process._g**2 * math.expm1(2 * process.rate * t) / (2 * process.rate)
        assert process.covariance(t)[-1, -1] == pytest.approx(of_x, rel=0.02)


@pytest.mark.parametrize("hurst", HURST)
@pytest.mark.parametrize("count", [1, 3])
def test_covariance_solves_the_equations_of_the_forward_process(hurst: float, count: int) -> None:
    """dC/dt = A C + C A^T + b b^T, for dY_k = -gamma_k Y_k dt + dW and dX = g sum_k omega_k dY_k."""
    process = FractionalProcess(hurst, count)

    def slope(t: float, flat: np.ndarray) -> np.ndarray:
        c = flat.reshape(count + 1, count + 1)
        g = process._g * math.exp(process.rate * t)
        a = np.zeros_like(c)
        a[:count, :count] = -np.diag(process.gamma)
        a[count, :count] = -g * process.omega * process.gamma
        b = np.append(np.ones(count), g * process.omega.sum())
        return (a @ c + c @ a.T + np.outer(b, b)).ravel()

    for t in (0.1, 0.5, 1.0):
        c = solve_ivp(slope, (0, t), np.zeros((count + 1) ** 2), rtol=1e-11, atol=1e-14, method="DOP853").y[:, -1]
        c = c.reshape(count + 1, count + 1)
        np.testing.assert_allclose(process.covariance(t), c, rtol=1e-7, atol=1e-9 * c.max())
        given_y = c[-1, -1] - c[-1, :-1] @ np.linalg.solve(c[:-1, :-1], c[:-1, -1])
        assert process.sigma(t) ** 2 == pytest.approx(given_y, rel=1e-3)


@pytest.mark.parametrize("hurst", HURST)
def test_the_white_state_is_markov_and_the_way_back_keeps_it_white(hurst: float) -> None:
    process = FractionalProcess(hurst)
    whole, parts = process.forward(0.2, 0.9), process.forward(0.5, 0.9) @ process.forward(0.2, 0.5)
    np.testing.assert_allclose(whole, parts, atol=1e-9)
    for stochastic in (True, False):
        b, n = process.backward(0.9, 0.2, stochastic)
        np.testing.assert_allclose(b @ b.T + n @ n.T, np.eye(4), atol=1e-12)


@pytest.mark.parametrize("hurst", HURST)
@pytest.mark.parametrize("stochastic", [True, False])
def test_samples_of_a_gaussian(hurst: float, stochastic: bool) -> None:
    """With the exact denoiser of N(1/2, 1/4) and small steps, its mean and deviation come back."""
    process = FractionalProcess(hurst)

    def model(x: Tensor, t: Tensor) -> Tensor:
        noise = process.sigma(float(t[0])) ** 2
        return (0.25 * x + noise * 0.5) / (0.25 + noise)

    samples = sample_fractional(model, (200, 100), process, steps=200, prediction="sample", stochastic=stochastic)
    assert float(samples.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(samples.std()) == pytest.approx(0.5, rel=0.05)


def test_samples_belong_to_their_seed_and_id() -> None:
    process = FractionalProcess(0.7)
    whole = sample_fractional(lambda x, t: 0.5 * x, (7, 3, 5), process, steps=5, seed=3)
    ids = torch.tensor([4])
    assert torch.equal(
        sample_fractional(lambda x, t: 0.5 * x, (1, 3, 5), process, steps=5, seed=3, sample_ids=ids), whole[4:5]
    )
    with pygen.backend("reference"):
        truth = sample_fractional(lambda x, t: 0.5 * x, (7, 3, 5), process, steps=5, seed=3, dtype=torch.float64)
    torch.testing.assert_close(whole.double(), truth, rtol=1e-4, atol=1e-4)


def test_its_schedule_serves_every_solver() -> None:
    schedule = FractionalProcess(0.3).schedule()
    samples = pygen.sample(
        lambda x, t: 0.0 * x, (4, 3), solver="dpmpp_2m", schedule=schedule, steps=6, prediction="sample", seed=1
    )
    assert samples.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"), [({"hurst": 1.0}, "hurst"), ({"processes": 6}, "processes must be 1 to 5")]
)
def test_wrong_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FractionalProcess(**arguments)
