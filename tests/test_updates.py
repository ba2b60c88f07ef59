"""A step's coefficients, taken one by one: against diffusers' update functions and against integrals by quadrature."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from pygen.diffusion.solvers import Grid
from pygen.diffusion.solvers.base import Update, phi
from pygen.diffusion.solvers.dpm import ALGORITHM_TYPES, SOLVER_TYPES, multistep_update, singlestep_update
from pygen.diffusion.solvers.multistep import ADAMS_BASHFORTH, deis_update, lagrange_integrals, lms_update
from tests.diffusers_float64 import in_float64

# Strides in lambda that differ, so that an index off by one shows.
SIGMAS = np.array([11.0, 6.5, 4.8, 2.0, 0.9, 0.7, 0.11])


def preserving(sigmas: np.ndarray) -> Grid:
    return Grid(1 / np.hypot(1, sigmas), sigmas / np.hypot(1, sigmas))


def apply(update: Update, x: torch.Tensor, values: list[torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
    terms = [c * value for c, value in zip(update.model, values, strict=True)]
    return update.x * x + sum(terms) + update.noise * noise


def diffusers_update(
    name: str, method: str, index: int, values: list[torch.Tensor], x: torch.Tensor, noise: torch.Tensor, **config: Any
) -> torch.Tensor:
    """What its update makes at a step index; ``values`` are the newest first."""
    diffusers = pytest.importorskip("diffusers")
    scheduler_class = getattr(diffusers, name)
    with in_float64(scheduler_class):
        scheduler = scheduler_class(**config)
        scheduler.set_timesteps(len(SIGMAS) - 1)
        scheduler.sigmas = torch.from_numpy(SIGMAS)
        scheduler.set_begin_index(0)
        scheduler._step_index = index
        arguments = {"noise": noise} if "dpm" in method else {}
        first = values[0] if "first_order" in method else None
        return getattr(scheduler, method)(values[::-1] if first is None else first, sample=x, **arguments)


NAMES = {1: "first", 2: "second", 3: "third"}
TENSORS = [torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(5)]


@pytest.mark.parametrize("algorithm_type", ALGORITHM_TYPES)
@pytest.mark.parametrize("solver_type", SOLVER_TYPES)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["multistep", "singlestep"])
def test_dpm_is_diffusers_update(kind: str, order: int, solver_type: str, algorithm_type: str) -> None:
    if algorithm_type == "sde-dpmsolver" and (order == 3 or kind == "singlestep"):
        pytest.skip("diffusers has none")
    x, noise, *values = TENSORS
    name = f"DPMSolver{kind.capitalize()}Scheduler"
    method = "dpm_solver_first_order_update" if order == 1 else f"{kind}_dpm_solver_{NAMES[order]}_order_update"
    config = {"algorithm_type": algorithm_type, "solver_type": solver_type, "final_sigmas_type": "sigma_min"}
    i = 4
    expected = diffusers_update(name, method, i, values[:order], x, noise, **config)
    half = -0.5 if algorithm_type == "sde-dpmsolver++" else 0.5
    options: dict[str, Any] = {"algorithm_type": algorithm_type, "solver_type": solver_type, "half": half}
    grid = preserving(SIGMAS)
    if kind == "multistep":
        update, values = multistep_update(grid, i, order, **options), values[:order]
    else:
        start = i - order + 1
        update = singlestep_update(grid, start, range(start + 1, i + 1), i + 1, **options)
        values = values[:order][::-1]
    torch.testing.assert_close(apply(update, x, values, noise), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_is_diffusers_update(order: int) -> None:
    x, noise, *values = TENSORS
    method = "dpm_solver_first_order_update" if order == 1 else f"multistep_deis_{NAMES[order]}_order_update"
    method = "deis_first_order_update" if order == 1 else method
    expected = diffusers_update("DEISMultistepScheduler", method, 4, values[:order], x, noise)
    update = deis_update(preserving(SIGMAS), 4, (3, 2)[: order - 1])
    torch.testing.assert_close(apply(update, x, values[:order], noise), expected, rtol=1e-11, atol=1e-11)


def lagrange(nodes: list[float], j: int, at: float) -> float:
    return math.prod((at - other) / (nodes[j] - other) for k, other in enumerate(nodes) if k != j)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("z", [-9.0, -0.3, 0.0, 1e-9, 0.7, 5.0])
def test_lagrange_integrals(order: int, z: float) -> None:
    nodes = [0.0, -0.7, -1.9, -2.5][:order]
    expected = [
        quad(lambda s, j=j: math.exp(z * (1 - s)) * lagrange(nodes, j, s), 0, 1, epsabs=0, epsrel=1e-13)[0]
        for j in range(order)
    ]
    np.testing.assert_allclose(lagrange_integrals(nodes, z), expected, rtol=1e-11)


def test_adams_bashforth_is_the_integral_over_equal_steps() -> None:
    for order, weights in enumerate(ADAMS_BASHFORTH, 1):
        np.testing.assert_allclose(weights, lagrange_integrals(-np.arange(order)), rtol=1e-13)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_is_the_quadrature_of_k_diffusion_and_diffusers(order: int) -> None:
    i = 4
    update = lms_update(Grid(np.ones_like(SIGMAS), SIGMAS), i, range(i - 1, i - order, -1))
    nodes = SIGMAS[i - order + 1 : i + 1][::-1].tolist()
    for j, weight in enumerate(update.model):
        expected = quad(lambda tau, j=j: lagrange(nodes, j, tau), SIGMAS[i], SIGMAS[i + 1], epsrel=1e-12)[0]
        assert weight == pytest.approx(expected, rel=1e-11)
    assert update.x == 1


def test_phi() -> None:
    for n in (1, 2, 3, 4):
        for z in (-700.0, -30.0, -1.0, -0.99, -1e-12, 0.0, 0.5, 1.0, 30.0):
            integral = quad(lambda s: math.exp(z * (1 - s)) * s ** (n - 1), 0, 1, epsabs=0, epsrel=1e-13, limit=200)[0]  # noqa: B023
            assert phi(n, z) == pytest.approx(integral / math.factorial(n - 1), rel=1e-11)
