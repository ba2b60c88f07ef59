"""The sampling loop: whose noise is whose over whole trajectories, one compiled graph, and what it refuses."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import pygen
from pygen import _C
from pygen.diffusion import SOLVERS, Stepper, stack_plans
from pygen.models.checkpoint import load_model
from tests import k_diffusion_loops
from tests.error_rule import assert_error_rule

DIGITS = "pygen/models/digits"
NOISY: dict[str, dict[str, Any]] = {"ddpm": {}, "ddim": {"eta": 0.7}}
ALL = pytest.mark.parametrize("solver", SOLVERS)


def elementwise(x: Tensor, t: Tensor) -> Tensor:
    """A denoiser whose bits do not depend on the batch: products and sums only, one element at a time."""
    return 0.5 * x - 0.125 * x * x * x


def bounded(x: Tensor, t: Tensor) -> Tensor:
    """The same, for runs that nothing clips."""
    return 0.5 * torch.clamp(x, -2.0, 2.0)


def draw(solver: str, batch: int, **arguments: Any) -> Tensor:
    shape = (batch, 3, 9, 11)
    options = {"steps": 6, "schedule": "scaled_linear", "clip": (-3.0, 3.0)} | NOISY.get(solver, {})
    return pygen.sample(elementwise, shape, solver=solver, **(options | arguments))


@ALL
def test_samples_are_the_same_in_any_batch(solver: str, isa: str, threads: int) -> None:
    whole = draw(solver, 64, seed=5)
    assert torch.equal(draw(solver, 7, seed=5), whole[:7])
    assert torch.equal(draw(solver, 1, seed=5, sample_ids=torch.tensor([41])), whole[41:42])
    assert not torch.equal(draw(solver, 1, seed=6), whole[:1])


@ALL
def test_samples_are_the_same_on_every_instruction_set(solver: str) -> None:
    before, results = _C.isa(), []
    for isa in _C.supported_isas():
        _C.set_isa(isa)
        results.append(draw(solver, 7, seed=5))
    _C.set_isa(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


def digits(batch: int, dtype: torch.dtype = torch.float32, first: int = 0, **arguments: Any) -> Tensor:
    """``batch`` guided digits of the shipped model, from the sample whose id is ``first`` on. That computes in float64,
    whatever the samples' dtype: a guided run magnifies roundings in some samples 100 times as much as in most, and
    those of a network would decide, though it is the same on all sides; test_models holds it to the rule."""
    model, description = load_model(DIGITS)
    ids = torch.arange(first, first + batch)
    labels = ids % 10

    def plain(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        with pygen.backend("reference"):
            predicted: Tensor = model(x.double(), t, class_labels)
        return predicted.to(x.dtype)

    model.double()
    return pygen.sample(
        plain, (batch, *description.shape), schedule=description.schedule, dtype=dtype, steps=10, seed=1,
        sample_ids=ids, guidance=2.0, clip=description.clip, cond={"class_labels": labels},
        uncond={"class_labels": torch.full_like(labels, 10)}, **arguments,
    )  # fmt: skip


@ALL
def test_samples_through_a_network_obey_the_error_rule_in_any_batch(solver: str) -> None:
    def in_batches(batch: int, samples: int) -> Tensor:
        return torch.cat([digits(batch, solver=solver, first=first) for first in range(0, samples, batch)])

    with pygen.backend("reference"):
        same, truth = (digits(42, dtype, solver=solver) for dtype in (torch.float32, torch.float64))
    runs = [in_batches(batch, samples) for batch, samples in ((1, 7), (7, 42), (42, 42))]
    assert_error_rule([(run, same[: len(run)], truth[: len(run)]) for run in runs], solver)


@ALL
def test_thresholded_samples_are_the_same_in_any_batch(solver: str) -> None:
    arguments: dict[str, Any] = {"seed": 5, "clip": None, "thresholding": (0.9, 1.5)}
    whole = draw(solver, 7, **arguments)
    assert torch.equal(draw(solver, 1, sample_ids=torch.tensor([4]), **arguments), whole[4:5])
    assert not torch.equal(draw(solver, 7, seed=5, clip=(-1.0, 1.0)), whole)
    with pygen.backend("reference"):
        same, truth = (draw(solver, 7, dtype=dtype, **arguments) for dtype in (torch.float32, torch.float64))
    assert_error_rule([(whole, same, truth)])


@pytest.mark.parametrize("clip", [None, (-3.0, 3.0)], ids=["unclipped", "clipped"])
@ALL
def test_one_graph_serves_all_steps(solver: str, clip: tuple[float, float] | None) -> None:
    plan = pygen.plan(solver, "cosine", 9, guidance=2.0, clip=clip, **NOISY.get(solver, {}))
    start, seed = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3])

    def step(stepper: Stepper, i: int, row: Tensor, x: Tensor) -> Tensor:
        return stepper.step(i, x, bounded(x, row), uncond=0.25 * x, seed=seed)

    def graph(x: Tensor, kept: list[Tensor], seconds: list[Tensor], row: Tensor) -> Tensor:
        return pygen.affine_step(
            x, bounded(x, row), plan.table, row, uncond=0.25 * x, history=[*kept, *seconds], seed=seed,
            pred=kept[-1] if kept else None, second=seconds[-1] if seconds else None,
        )  # fmt: skip

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(graph, fullgraph=True, backend=counter)
    stepper = Stepper(plan, start)
    x, expected = start, start
    kept, seconds = ([torch.zeros_like(start) for _ in range(count)] for count in (plan.predictions, plan.carried))
    for i, row in enumerate(plan.rows):
        x, expected = compiled(x, kept, seconds, row), step(stepper, i, row, expected)
        kept, seconds = kept[-1:] + kept[:-1], seconds[-1:] + seconds[:-1]
        assert torch.equal(x, expected), i
    assert counter.frame_count == 1


def test_one_graph_serves_all_steps_solvers_and_rows() -> None:
    plans = [
        pygen.plan(solver, "cosine", 5, guidance=2.0, clip=(-3, 3), **NOISY.get(solver, {}))
        for solver in SOLVERS
        if solver != "pndm"  # which keeps as many tensors as a row has
    ]
    table, begins, predictions, carried = stack_plans(plans)

    def step(x: Tensor, kept: list[Tensor], seconds: list[Tensor], rows: Tensor, seed: Tensor) -> Tensor:
        out = pygen.affine_step(
            x, bounded(x, rows), table, rows, uncond=0.25 * x, history=[*kept, *seconds], seed=seed,
            pred=kept[-1], second=seconds[-1],
        )  # fmt: skip
        return out

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    start = torch.randn(len(plans), 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def loop(run: Any, rows_of: Any) -> Tensor:
        x, seed = start.clone(), torch.tensor([3])
        kept, seconds = ([torch.zeros_like(x) for _ in range(count)] for count in (predictions, carried))
        for i in range(5):
            x = run(x, kept, seconds, rows_of(i), seed)
            kept, seconds = kept[-1:] + kept[:-1], seconds[-1:] + seconds[:-1]
        return x

    for begin in begins:  # each solver in turn for the whole batch, then a batch that mixes them
        rows = torch.full((len(plans),), begin)
        assert torch.equal(loop(compiled, lambda i, rows=rows: rows + i), loop(step, lambda i, rows=rows: rows + i))
    mixed = loop(compiled, lambda i: torch.tensor(begins) + i)
    assert torch.equal(mixed, loop(step, lambda i: torch.tensor(begins) + i))
    assert counter.frame_count == 1

    for index, plan in enumerate(plans):  # each sample of the mixed batch is its solver's own
        x = start[index : index + 1].clone()
        stepper = Stepper(plan, x)
        for i in range(5):
            x = stepper.step(
                i, x, bounded(x, x), uncond=0.25 * x, seed=torch.tensor([3]), sample_ids=torch.tensor([index])
            )
        assert torch.equal(x, mixed[index : index + 1]), plan.solver


def test_generator_draws_what_torch_would() -> None:
    """The initial noise, then one torch.randn for each noisy step."""
    plan = pygen.plan("ddpm", "cosine", 4)
    result = pygen.sample(elementwise, (2, 5), solver=plan, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(2, 5, generator=generator) * plan.initial_scale
    stepper = Stepper(plan, x)
    for i in range(4):
        noise = torch.randn(2, 5, generator=generator) if plan.noisy[i] else None
        x = stepper.step(i, x, elementwise(x, x), noise=noise)
    assert torch.equal(result, x)


def test_unseeded_sampling_follows_torchs_global_seed() -> None:
    torch.manual_seed(4)
    first = draw("euler", 2)
    second = draw("euler", 2)
    torch.manual_seed(4)
    assert torch.equal(draw("euler", 2), first)
    assert not torch.equal(first, second)


def test_callback_sees_each_step_and_guidance_its_two_halves() -> None:
    seen = []

    def model(x: Tensor, t: Tensor, label: Tensor) -> SimpleNamespace:
        assert x.shape == (4, 3)
        assert torch.equal(x[:2], x[2:])
        return SimpleNamespace(sample=x * label[:, None])

    result = pygen.sample(
        model, (2, 3), schedule="flow", prediction="flow", solver="euler", steps=3, guidance=3.0, seed=0,
        cond={"label": torch.ones(2)}, uncond={"label": torch.zeros(2)}, callback=lambda info: seen.append(
            (info.step, info.time, info.sample.clone(), info.prediction.clone())
        ),
    )  # fmt: skip
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert torch.equal(seen[-1][2], result)
    torch.testing.assert_close(seen[-1][3], result)  # the last step ends at the prediction
    x = pygen.philox_normal((2, 3), seed=0)
    for time, following in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
        x = x + (following - time) * 3.0 * x
    torch.testing.assert_close(result, x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": None}, "schedule must be given"),
        ({"schedule": "quadratic"}, "schedule must be one of"),
        ({"schedule": {"name": "cosine", "colour": 3}}, "schedule 'cosine' has no argument 'colour'"),
        ({"solver": "rk4"}, "solver must be one of"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"steps": 1001}, "exceeds the schedule's 1000 training steps"),
        ({"spacing": "random"}, "spacing must be one of"),
        ({"eta": 1.0}, "solver 'dpmpp_2m' has no option 'eta'"),
        ({"guidance": 2.0}, "guidance needs uncond"),
        ({"guidance": float("nan")}, "guidance must be a finite number|guidance needs uncond"),
        ({"seed": 1, "generator": torch.Generator()}, "give seed or generator"),
        ({"shape": ()}, "shape must be positive sizes"),
        ({"shape": (0, 3)}, "shape must be positive sizes"),
        ({"cond": {"a": torch.ones(2)}, "uncond": {"b": torch.ones(2)}}, "must name the same arguments"),
        ({"cond": {"a": torch.ones(3)}, "uncond": {"a": torch.ones(3)}}, "must hold equal shapes"),
        ({"model": lambda x, t: x[:1]}, "model returned shape"),
        ({"solver": pygen.plan("euler", "cosine", 3), "guidance": 2.0}, "guidance belongs to the plan"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"model": elementwise, "shape": (2, 3), "schedule": "cosine", "steps": 3}
    if isinstance(arguments.get("solver"), pygen.StepPlan):
        right["schedule"] = None
    with pytest.raises(ValueError, match=message):
        pygen.sample(**(right | arguments))


@pytest.mark.parametrize("schedule", ["karras", "linear"])
@pytest.mark.parametrize(
    "options",
    [{}, {"order": 2}, {"pcoeff": 0.3, "dcoeff": 0.1, "rtol": 0.02, "h_init": 2.0}, {"clip": (-0.7, 0.8)}],
    ids=str,
)
def test_adaptive_steps_are_those_of_k_diffusion(schedule: str, options: dict[str, Any]) -> None:
    """The accepted samples, and the model is not called again where a refused step began."""
    known = pygen.diffusion.make_schedule(schedule)
    low, high = options.get("clip", (-math.inf, math.inf))
    shown: list[float] = []

    def x_0(y: Tensor, rho: float) -> Tensor:
        return torch.tanh(3.0 * y / (1 + rho**2)) * 0.9

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (float(f(np.array(t[0].item()))) for f in (known.alpha, known.sigma))
        shown.append(float(t[0]))
        return x_0(x / alpha, sigma / alpha)

    arguments = {"solver": "dpm_adaptive", "schedule": schedule, "prediction": "sample", "seed": 3} | options
    with pygen.backend("reference"):
        actual = pygen.sample(model, (4, 30), dtype=torch.float64, **arguments)
        start = pygen.philox_normal((4, 30), seed=3, dtype=torch.float64)
    ends = np.array([known.t_max, known.t_min])
    sigma_max, sigma_min = (known.sigma(ends) / known.alpha(ends)).tolist()
    seen: list[Tensor] = []

    def denoise(y: Tensor, sigma: float) -> Tensor:
        seen.append(y)
        return x_0(y, sigma).clamp(low, high)

    controls = {name: value for name, value in options.items() if name != "clip"}
    expected = k_diffusion_loops.dpm_adaptive(
        sigma_max, sigma_min, start * sigma_max, denoise, lambda: start, **controls
    )
    # Timesteps are told in float32, which moves the model by as much.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    repeated = sum(any(torch.equal(y, other) for other in seen[:i]) for i, y in enumerate(seen))
    assert len(shown) == len(seen) - repeated
    assert repeated or "h_init" not in options


def test_adaptive_noise_is_drawn_anew_and_refusals_name_the_reason() -> None:
    samples = [draw("dpm_adaptive", 4, seed=seed, eta=1.0) for seed in (1, 1, 2)]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    with pytest.raises(ValueError, match="cannot begin where alpha is 0"):
        draw("dpm_adaptive", 2, schedule="flow")
    with pytest.raises(ValueError, match="order must be 2 or 3"):
        draw("dpm_adaptive", 2, order=4)
    with pytest.raises(ValueError, match="chooses its times"):
        draw("dpm_adaptive", 2, times=[999, 0])
    with pytest.raises(ValueError, match="neither a guider nor a callback"):
        draw("dpm_adaptive", 2, callback=print)
