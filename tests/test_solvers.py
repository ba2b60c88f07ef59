"""The solvers against their papers' loops, diffusers' own classes, the exact ODE, and the distribution they sample."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import pygen
from pygen.diffusion import Schedule, StepPlan, Stepper, make_schedule
from pygen.ops.philox_normal import DRAW_AFFINE_STEP
from tests import paper_loops
from tests.diffusers_float64 import in_float64
from tests.error_rule import assert_error_rule

SEED = 20
SHAPE = (3, 5, 7)
STEPS = 12
# Twelve steps of some ten terms each, whose coefficients lose a digit in the differences of lambda: 4096 roundings.
FLOAT64_BOUND = 4096 * torch.finfo(torch.float64).eps
Model = Callable[[int, Tensor], tuple[Tensor, Tensor]]


def assert_same_trajectory(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """To float64 rounding, relative to the largest value that the trajectory passes through."""
    assert len(actual) == len(expected)
    bound = FLOAT64_BOUND * max(float(x.abs().max()) for x in expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = float((a - e).abs().max())
        assert error <= bound, f"x_{i} differs by {error:.2e}, more than {bound:.2e}"


def draw(shape: Sequence[int], dtype: torch.dtype, step: int | None = None) -> Tensor:
    """The initial noise, or that of a step, as Philox has it for ``dtype`` under the backend in use."""
    if step is None:
        return pygen.philox_normal(shape, seed=SEED, dtype=dtype)
    return pygen.philox_normal(shape, seed=SEED, step=step, draw=DRAW_AFFINE_STEP, dtype=dtype)


def run(plan: StepPlan, x: Tensor, model: Model, **noise: Any) -> list[Tensor]:
    """The samples of a plan at all its times; ``model`` gives the conditional and the unconditional output."""
    stepper = Stepper(plan, x)
    trajectory = [x]
    for i in range(plan.steps):
        cond, uncond = model(i, x)
        x = stepper.step(i, x, cond, uncond=uncond, **noise)
        trajectory.append(x)
    return trajectory


def toy_model(plan: StepPlan, prediction: str) -> Model:
    """A smooth denoiser, different with and without its condition, in the terms of ``prediction``."""
    alpha, sigma = grid(plan)

    def output(i: int, x: Tensor, condition: float) -> Tensor:
        a, s = alpha[i], sigma[i]
        x_0 = 2 * torch.tanh(a * x / (a**2 + s**2) + condition)
        epsilon = (x - a * x_0) / s
        return {"epsilon": epsilon, "sample": x_0, "v_prediction": a * epsilon - s * x_0, "flow": epsilon - x_0}[prediction]

    return lambda i, x: (output(i, x, 0.3), output(i, x, -0.1))


def grid(plan: StepPlan) -> tuple[list[float], list[float]]:
    return plan.schedule.alpha(plan.times).tolist(), plan.schedule.sigma(plan.times).tolist()


def predictor(
    plan: StepPlan, model: Model, prediction: str, guidance: float, clip: tuple[float, float] | None
) -> paper_loops.Predict:
    """x_0 and epsilon, from the definition of each prediction and x = alpha x_0 + sigma epsilon."""
    alpha, sigma = grid(plan)

    def predict(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        a, s = alpha[i], sigma[i]
        cond, uncond = model(i, x)
        out = uncond + guidance * (cond - uncond)
        if prediction == "epsilon":
            epsilon, x_0 = out, (x - s * out) / a
        elif prediction == "sample":
            x_0, epsilon = out, (x - a * out) / s
        elif prediction == "v_prediction":
            angle = math.atan2(s, a)  # x and v are x_0 and epsilon turned by it, and both longer by the radius
            radius = math.hypot(a, s)
            x_0 = (math.cos(angle) * x - math.sin(angle) * out) / radius
            epsilon = (math.sin(angle) * x + math.cos(angle) * out) / radius
        else:
            assert prediction == "flow"
            epsilon = (x + a * out) / (a + s)
            x_0 = epsilon - out
        return (x_0 if clip is None else x_0.clamp(*clip)), epsilon

    return predict


def paper(
    plan: StepPlan, x: Tensor, predict: paper_loops.Predict, z: Sequence[Tensor], options: dict[str, Any]
) -> list[Tensor]:
    """The samples of the paper's loop, brought to the coordinates of the plan's schedule."""
    alpha, sigma = grid(plan)
    if plan.solver in ("ddpm", "ddim"):  # written for alpha^2 + sigma^2 = 1
        norm = [math.hypot(a, s) for a, s in zip(alpha, sigma, strict=True)]
        squares = [(Decimal(a) ** 2, Decimal(s) ** 2) for a, s in zip(alpha, sigma, strict=True)]
        alpha_bar = [a / (a + s) for a, s in squares]
        preserving = lambda i, y: predict(i, y * norm[i])  # noqa: E731
        if plan.solver == "ddpm":
            loop = paper_loops.ddpm(alpha_bar, x / norm[0], preserving, z, options.get("variance", "fixed_small"))
        else:
            clipped = options.get("use_clipped_model_output", False)
            loop = paper_loops.ddim(alpha_bar, x / norm[0], preserving, z, options.get("eta", 0.0), clipped)
        return [y * n for y, n in zip(loop, norm, strict=True)]
    if plan.solver == "euler" and plan.schedule.name == "flow":
        velocity = lambda i, y: (y - predict(i, y)[0]) / sigma[i]  # noqa: E731
        return paper_loops.rectified_flow(sigma, x, velocity)
    if plan.solver == "euler":
        t = [s / a for a, s in zip(alpha, sigma, strict=True)]
        loop = paper_loops.euler(t, x / alpha[0], lambda i, y: predict(i, y * alpha[i])[0])
        return [y * a for y, a in zip(loop, alpha, strict=True)]
    lower = options.get("lower_order_final", True)
    if plan.solver == "dpmpp_2m":
        return paper_loops.dpmpp_2m(alpha, sigma, x, predict, lower)
    order, variant = options.get("order", 2), options.get("variant", "bh2")
    return paper_loops.unipc(alpha, sigma, x, predict, order, variant, options.get("corrector", True), lower)


SOLVER_CASES: list[tuple[str, dict[str, Any]]] = [
    *[("ddpm", {"variance": variance}) for variance in ("fixed_small", "fixed_large")],
    *[
        ("ddim", {"eta": eta, "use_clipped_model_output": clipped})
        for eta in (0.0, 0.5, 1.0)
        for clipped in (False, True)
    ],
    ("euler", {}),
    *[("dpmpp_2m", {"lower_order_final": lower}) for lower in (True, False)],
    *[
        ("unipc", {"order": order, "corrector": corrector, "variant": variant})
        for order in (1, 2, 3)
        for corrector in (True, False)
        for variant in ("bh1", "bh2")
    ],
    ("unipc", {"order": 3, "lower_order_final": False}),
]


@dataclass(frozen=True)
class Setting:
    """What a solver may be asked to run on."""

    schedule: str | dict[str, Any]
    prediction: str
    spacing: str = "trailing"
    guidance: float = 1.0
    clip: tuple[float, float] | None = None
    times: tuple[float, ...] | None = None

    def plan(self, solver: str, options: dict[str, Any]) -> StepPlan:
        where = {"steps": STEPS, "spacing": self.spacing} if self.times is None else {"times": self.times}
        return pygen.plan(
            solver, self.schedule, prediction=self.prediction, guidance=self.guidance, clip=self.clip, **where, **options
        )

    def __str__(self) -> str:
        name = self.schedule if isinstance(self.schedule, str) else "-".join(map(str, self.schedule.values()))
        return f"{name}-{self.prediction}-{self.spacing if self.times is None else 'times'}-{self.guidance:g}-{self.clip}"


INSIDE_FLOW = tuple(np.linspace(0.98, 0.03, STEPS + 1))
SETTINGS = [
    Setting("scaled_linear", "epsilon", "leading", guidance=7.5),
    Setting("scaled_linear", "epsilon", "trailing", guidance=2.0, clip=(-1.0, 1.0)),
    Setting("linear", "v_prediction", "linspace", clip=(-0.5, 1.5)),
    Setting({"name": "linear", "zero_terminal_snr": True}, "v_prediction", "trailing", guidance=3.0),
    Setting("cosine", "sample", "linspace", guidance=0.0),
    # From t = 913, since at 999 alpha is 5e-5 and x_0 = (x - sigma epsilon) / alpha loses as many digits in any form.
    Setting("cosine", "epsilon", "leading", clip=(-1.0, 1.0)),
    Setting("sigmoid", "flow"),
    Setting("flow", "flow", times=INSIDE_FLOW, guidance=3.0),
    Setting({"name": "flow", "shift": 3.0}, "flow", "trailing", clip=(-1.5, 1.5)),
    Setting("flow", "v_prediction", times=INSIDE_FLOW),
    Setting("karras", "epsilon", "linspace", guidance=1.5),
    Setting("karras", "sample", "trailing", clip=(-1.0, 1.0)),
]
CASES = [
    pytest.param(solver, options, setting, id=f"{solver}-{'-'.join(map(str, options.values()))}-{setting}")
    for solver, options in SOLVER_CASES
    for setting in SETTINGS
    # In sigma / alpha, the coordinates of Karras et al., alpha = 0 lies at infinity: only the flow path has a form there.
    if not (solver == "euler" and isinstance(setting.schedule, dict) and "zero_terminal_snr" in setting.schedule)
]


@pytest.mark.parametrize(("solver", "options", "setting"), CASES)
def test_plan_is_the_papers_loop(solver: str, options: dict[str, Any], setting: Setting) -> None:
    plan = setting.plan(solver, options)
    model = toy_model(plan, setting.prediction)
    with pygen.backend("reference"):
        x = draw(SHAPE, torch.float64) * plan.initial_scale
        z = [draw(SHAPE, torch.float64, step) for step in range(plan.steps)]
        actual = run(plan, x, model, seed=torch.tensor([SEED]))
    predict = predictor(plan, model, setting.prediction, setting.guidance, setting.clip)
    assert_same_trajectory(actual, paper(plan, x, predict, z, options))


@pytest.mark.parametrize(("solver", "options", "setting"), CASES)
def test_kernel_keeps_the_error_rule(solver: str, options: dict[str, Any], setting: Setting) -> None:
    """On given model outputs, a whole run is as near the float64 loop as that loop in float32 is, twice over."""
    plan = setting.plan(solver, options)
    toy = toy_model(plan, setting.prediction)
    shape = (2, 3, 500)
    x = draw(shape, torch.float32) * plan.initial_scale
    outputs = []
    for i, a in enumerate(grid(plan)[0][:-1]):  # along a straight line to zero: any values would do
        outputs.append(toy(i, x * (plan.steps - i) / plan.steps + a))
    actual = run(plan, x, lambda i, _: outputs[i], seed=torch.tensor([SEED]))

    loops = {}
    for dtype in (torch.float64, torch.float32):
        given = [(cond.to(dtype), uncond.to(dtype)) for cond, uncond in outputs]
        predict = predictor(plan, lambda i, _: given[i], setting.prediction, setting.guidance, setting.clip)  # noqa: B023
        with pygen.backend("reference"):
            z = [draw(shape, dtype, step) for step in range(plan.steps)]
        loops[dtype] = paper(plan, x.to(dtype), predict, z, options)
    assert_error_rule(zip(actual, loops[torch.float32], loops[torch.float64], strict=True), plan.solver)
