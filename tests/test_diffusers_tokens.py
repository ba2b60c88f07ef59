"""The schedulers of tokens beside diffusers' classes: whole trajectories, what a step may call, and Philox's draws.

With the same generator the tokens are equal wherever rounding cannot decide otherwise. What it can decide is asked of
diffusers' own class in float64, given the same noise: a decision that it makes alike for logits moved by a few units
in the last place of float32 must be ours, too.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pygen.diffusers import PhiloxGenerator, tokens
from tests.error_rule import assert_error_rule

DTYPES = (torch.float32, torch.bfloat16)
PERTURBATIONS = 4
ULPS = 8 * 2.0**-24  # by how much the logits are moved, relative to the largest


class _Float64Draws:
    """torch, in which float32 means float64, and noise is drawn as in float32."""

    def __init__(self, drawn: torch.dtype) -> None:
        self.drawn = drawn

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, "float64" if name == "float32" else name)

    def multinomial(self, probs: Tensor, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.empty(probs.shape, dtype=self.drawn).exponential_(1, generator=generator)
        return (probs / noise.double()).argmax(-1, keepdim=True)

    def rand(self, *size: Any, **named: Any) -> Tensor:
        return torch.rand(*size, **named).double()


@contextmanager
def in_float64(scheduler: Any, drawn: torch.dtype, dtype: torch.dtype) -> Iterator[None]:
    module: ModuleType = sys.modules[type(scheduler).__module__]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "torch", _Float64Draws(drawn)))
        stack.enter_context(mock.patch.object(Tensor, "float", Tensor.double))
        if hasattr(module, "gumbel_noise"):

            def gumbel_noise(t: Tensor, generator: torch.Generator | None = None) -> Tensor:
                noise = torch.zeros(t.shape, dtype=dtype).uniform_(0, 1, generator=generator).double()
                return -torch.log((-torch.log(noise.clamp(1e-20))).clamp(1e-20))

            stack.enter_context(mock.patch.object(module, "gumbel_noise", gumbel_noise))
        yield


def states_of(scheduler: Any) -> dict[str, Any]:
    committed = getattr(scheduler, "_committed", None)
    return {} if committed is None else {"_committed": committed.clone()}


def check_step(
    ours: Any, theirs: Any, logits: Tensor, timestep: Any, sample: Tensor, seed: int, method: str = "step", **named: Any
) -> tuple[Any, int, int]:
    """One step of both from the same state; returns theirs, and how many decisions could be compared of how many."""

    def run(scheduler: Any, output: Tensor) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return getattr(scheduler, method)(output, timestep, sample.clone(), generator=generator, **named)

    drawn = torch.float64 if method == "step_correct" else torch.float32
    truths = []
    perturb = torch.Generator().manual_seed(seed)
    for i in range(PERTURBATIONS + 1):
        moved = torch.randn(logits.shape, generator=perturb, dtype=torch.float64) * logits.double().abs().amax() * ULPS
        truth = copy.deepcopy(theirs)
        with in_float64(truth, drawn, logits.dtype):
            truths.append(run(truth, logits.double() + moved * (i > 0)))
    result = run(ours, logits)
    expected = run(theirs, logits)
    compared = total = 0
    chosen_alike = None
    for name, value in expected.items():
        mine, values = result[name], [truth[name] for truth in truths]
        if name == "pred_logits":
            assert mine.dtype == value.dtype
            assert_error_rule([(mine, value, values[0])], name)
        elif value.is_floating_point():
            assert chosen_alike is not None
            alike = chosen_alike & (value.double() / values[0] - 1 < 1e-2)
            triple = (mine[alike].float(), value[alike].float(), values[0][alike].double())
            assert_error_rule([triple], name)
        else:
            assert mine.dtype == value.dtype
            assert mine.shape == value.shape
            certain = torch.stack([other == values[0] for other in values]).all(0)
            assert torch.equal(mine[certain], values[0][certain]), (name, timestep)
            if name == "sampled_tokens":
                chosen_alike = (mine == values[0]) & (value == values[0])
            compared, total = compared + int(certain.sum()), total + certain.numel()
    for name, state in states_of(theirs).items():
        setattr(ours, name, state)
    return expected, compared, total


def make_logits(seed: int, dtype: torch.dtype, *size: int, spread: float = 3.0) -> Tensor:
    return (spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))).to(dtype)


def trajectory(ours: Any, theirs: Any, logits: Any, sample: Tensor, times: Any, **named: Any) -> None:
    compared = total = 0
    for i, time in enumerate(times):
        expected, certain, all_of_them = check_step(ours, theirs, logits(i), time, sample, seed=1000 + i, **named)
        sample = expected.prev_sample
        compared, total = compared + certain, total + all_of_them
    assert compared >= 0.9 * total


AMUSED = [
    (schedule, temperature, steps, two_dim, start)
    for schedule in ("cosine", "linear")
    for temperature in ((2, 0), 3, (0, 0))
    for steps, two_dim, start in ((1, False, 1.0), (5, True, 1.0), (12, False, 0.7))
]


@pytest.mark.parametrize(("schedule", "temperature", "steps", "two_dim", "start"), AMUSED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_amused(schedule: str, temperature: Any, steps: int, two_dim: bool, start: float, dtype: torch.dtype) -> None:
    config = {"mask_token_id": 60, "masking_schedule": schedule}
    ours, theirs = tokens.AmusedScheduler(**config), diffusers.AmusedScheduler(**config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps, temperature)
    sample = torch.full((2, 6, 8) if two_dim else (2, 48), 60)
    if start < 1:
        sample[:, ::3] = 7
    size = (2, 60, 6, 8) if two_dim else (2, 48, 60)
    trajectory(ours, theirs, lambda i: make_logits(i, dtype, *size), sample, ours.timesteps, starting_mask_ratio=start)


def test_amused_masks_no_known_token() -> None:
    """Of a sample without a mask diffusers masks a token again."""
    ours, theirs = tokens.AmusedScheduler(mask_token_id=60), diffusers.AmusedScheduler(mask_token_id=60)
    sample = torch.arange(48)[None]
    for scheduler, masked in ((ours, 0), (theirs, 1)):
        scheduler.set_timesteps(4)
        after = scheduler.step(make_logits(0, torch.float32, 1, 48, 60), 2, sample).prev_sample
        assert int((after == 60).sum()) == masked


@pytest.mark.parametrize("classes", [5, 33, 1100])
@pytest.mark.parametrize("steps", [2, 10, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vq_diffusion(classes: int, steps: int, dtype: torch.dtype) -> None:
    config = {"num_vec_classes": classes, "num_train_timesteps": max(steps, 10)}
    ours, theirs = tokens.VQDiffusionScheduler(**config), diffusers.VQDiffusionScheduler(**config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    sample = torch.full((2, 24), classes - 1)

    def log_probs(i: int) -> Tensor:
        return make_logits(i, torch.float32, 2, classes - 1, 24).log_softmax(1).to(dtype)

    times = ours.timesteps if steps <= 10 else ours.timesteps[::12]
    trajectory(ours, theirs, log_probs, sample, [*times, torch.tensor(0)])


REFINEMENT = list(
    itertools.product((0.0, 0.7, 1.0), (None, 12), (None, 0.8), ("auto", "greedy", "multinomial"), (None, 99))
)


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "method", "mask"), REFINEMENT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_refinement(
    temperature: float, top_k: int | None, top_p: float | None, method: str, mask: int | None, dtype: torch.dtype
) -> None:
    if dtype is torch.bfloat16 and temperature == 0.7:
        pytest.skip("diffusers rounds logits / temperature to bfloat16: other ties")
    config = {"block_length": 20, "num_inference_steps": 6, "threshold": 0.8, "editing_threshold": 0.5}
    ours, theirs = tokens.BlockRefinementScheduler(**config), diffusers.BlockRefinementScheduler(**config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6, block_length=20)
    prompt = torch.arange(20) < 3
    sample = torch.full((3, 20), 99 if mask is not None else 5)
    sample[0, :7] = 4
    named: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "sampling_method": method}
    trajectory(
        ours, theirs, lambda i: make_logits(i, dtype, 3, 20, 100), sample, [*range(6), torch.tensor(7)],
        mask_token_id=mask, prompt_mask=prompt, **named,
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_discrete_ddim(temperature: float, steps: int, dtype: torch.dtype) -> None:
    ours, theirs = tokens.DiscreteDDIMScheduler(), diffusers.DiscreteDDIMScheduler()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    sample = torch.randint(50, (3, 30), generator=torch.Generator().manual_seed(0))
    trajectory(
        ours, theirs, lambda i: make_logits(i, dtype, 3, 30, 50), sample, ours.timesteps, temperature=temperature
    )


@pytest.mark.parametrize("selection", ["lowest_log_margin", "lowest_maxprob", "lowest_current_prob", "random"])
@pytest.mark.parametrize("tau", [0.3, 1.0])
@pytest.mark.parametrize("count", [1, 4, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_discrete_ddim_corrector(selection: str, tau: float, count: int, dtype: torch.dtype) -> None:
    config = {"corrector_k": count, "corrector_selection": selection, "corrector_selection_tau": tau}
    ours, theirs = tokens.DiscreteDDIMScheduler(**config), diffusers.DiscreteDDIMScheduler(**config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
    sample = torch.randint(50, (3, 30), generator=torch.Generator().manual_seed(0))
    trajectory(ours, theirs, lambda i: make_logits(i, dtype, 3, 30, 50), sample, range(5), method="step_correct")


def test_discrete_ddim_corrects_after_the_last_step() -> None:
    """At alpha = 1 diffusers takes the logarithm of 0 and raises."""
    ours, theirs = tokens.DiscreteDDIMScheduler(), diffusers.DiscreteDDIMScheduler()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
    logits, sample = make_logits(0, torch.float32, 3, 30, 50), torch.zeros(3, 30, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"math domain error|expected .* argument"):
        theirs.step_correct(logits, 5, sample)
    out = ours.step_correct(logits, 5, sample)
    expected = logits.softmax(-1).gather(-1, out.prev_sample[..., None])[..., 0]
    changed = out.prev_sample != sample
    assert ((expected[changed][:, None] - out.sampled_probs.flatten()).abs().amin(1) < 1e-6).all()


@pytest.mark.parametrize("bound", [0.0, 0.1, 3.0, 1e9])
@pytest.mark.parametrize("spread", [1.0, 8.0])
@pytest.mark.parametrize("temperatures", [(0.8, 0.4), (1.0, 1.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_bound(bound: float, spread: float, temperatures: tuple[float, float], dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and temperatures[0] != 1.0:
        pytest.skip("diffusers rounds logits / temperature to bfloat16 before it draws")
    config = {"entropy_bound": bound, "t_max": temperatures[0], "t_min": temperatures[1]}
    ours, theirs = tokens.EntropyBoundScheduler(**config), diffusers.EntropyBoundScheduler(**config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
    sample = torch.zeros(3, 30, dtype=torch.int64)
    trajectory(ours, theirs, lambda i: make_logits(i, dtype, 3, 30, 200, spread=spread), sample, ours.timesteps)


# ---- What a step may call -------------------------------------------------------------------------------------------

ALLOWED = {
    "empty", "new_empty", "zeros", "full", "view", "_unsafe_view", "transpose", "expand", "slice", "select", "detach",
    "as_strided", "unsqueeze", "alias", "empty_like", "clone",
    "exponential_", "uniform_", "rand", "randint",  # the caller's generator's
}  # fmt: skip
EXCEPTIONS = {"step_correct": {"_to_copy"}}  # multinomial draws for float64, and the op reads float32


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = function.name().split("::")
        self.names.add(name.split(".")[0] if space == "aten" else f"{space}::{name}")
        return function(*args, **(kwargs or {}))


def every_step() -> Iterator[tuple[str, Any]]:
    logits, sample = make_logits(0, torch.float32, 2, 16, 40), torch.full((2, 16), 39)
    amused = tokens.AmusedScheduler(mask_token_id=39)
    amused.set_timesteps(4)
    vq = tokens.VQDiffusionScheduler(num_vec_classes=41)
    vq.set_timesteps(100)
    block = tokens.BlockRefinementScheduler(editing_threshold=0.4)
    block.set_timesteps(4, block_length=16)
    ddim, bound = tokens.DiscreteDDIMScheduler(), tokens.EntropyBoundScheduler()
    for generator in (torch.Generator().manual_seed(0), PhiloxGenerator().manual_seed(0)):
        for time in (2, 0):
            yield "step", lambda t=time, g=generator: amused.step(logits, t, sample, generator=g)
            yield "step", lambda t=time, g=generator: vq.step(logits.transpose(1, 2), t, sample, generator=g)
        for mask in (39, None):
            more: dict[str, Any] = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "mask_token_id": mask}
            yield "step", lambda m=more, g=generator: block.step(logits, 1, sample, generator=g, **m)
        yield "step", lambda g=generator: ddim.step(logits, 1, sample, temperature=0.5, generator=g)
        yield "step_correct", lambda g=generator: ddim.step_correct(logits, 1, sample, generator=g)
        yield "step", lambda g=generator: bound.step(logits, 1, sample, generator=g)


def test_a_step_computes_by_pygens_ops_alone() -> None:
    for method, call in every_step():
        call()  # tables of coefficients are made at the first
        with _Calls() as calls:
            call()
        aten = {name for name in calls.names if "::" not in name}
        assert aten <= ALLOWED | EXCEPTIONS.get(method, set()), aten - ALLOWED
        assert any(name.startswith("pygen::") for name in calls.names)


def test_results_are_fresh() -> None:
    for _, call in every_step():
        first = call()
        kept = {name: value.clone() for name, value in first.items() if value is not None}
        call()
        assert all(torch.equal(first[name], value) for name, value in kept.items())


# ---- Philox --------------------------------------------------------------------------------------------------------


def assert_distribution(drawn: Tensor, probs: Tensor) -> None:
    expected = probs.double() * drawn.numel()
    counts = torch.bincount(drawn.flatten(), minlength=probs.numel()).double()
    assert (counts[probs == 0] == 0).all()
    often = expected >= 5
    observed, wanted = counts[often], expected[often]
    rest = [drawn.numel() - observed.sum(), drawn.numel() - wanted.sum()]
    if rest[1] > 5:
        observed, wanted = torch.cat([observed, rest[0][None]]), torch.cat([wanted, rest[1][None]])
    if len(wanted) < 2:
        return
    wanted = wanted * (observed.sum() / wanted.sum())
    assert stats.chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-6


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.7}, {"top_k": 9}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.6}])
@pytest.mark.parametrize("vocabulary", [2, 111, 3000])
def test_philox_draws_the_distribution(seed: int, how: dict[str, Any], vocabulary: int) -> None:
    draws = 60_000
    logits = make_logits(seed, torch.float32, 1, 1, vocabulary)
    drawn = tokens.token_confidence(logits.expand(1, draws, vocabulary), seed=seed, **how)
    x = logits[0, 0].double() / how.get("temperature", 1.0)
    x = x.masked_fill(x < x.sort(descending=True).values[min(how.get("top_k", vocabulary), vocabulary) - 1], -torch.inf)
    order = x.argsort(descending=True)
    p = x.softmax(-1)[order]
    p = torch.where(p.cumsum(-1) - p <= how.get("top_p", 1.0), p, 0)
    assert_distribution(drawn, torch.zeros(vocabulary).double().scatter(0, order, p / p.sum()))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_philox_draws_routes_and_posteriors(seed: int) -> None:
    draws = 60_000
    sample, token = torch.full((1, draws), 3), torch.full((1, draws), 5)
    weights = torch.tensor([0.2, 0.0, 0.3, 0.5])
    drawn = tokens.route_token(sample, token, weights, 8, seed=seed)
    expected = torch.full((8,), 0.5 / 8)
    expected[3] += 0.3
    expected[5] += 0.2
    assert_distribution(drawn, expected)
    logits = make_logits(seed, torch.float32, 1, 1, 50).expand(1, draws, 50)
    coefficients = torch.tensor([0.7, 0.003, -2.0, 0.5, 0.9, 0.1, 1.0, 0.0])
    drawn = tokens.posterior_token(logits, sample, coefficients, has_mask=True, seed=seed)
    x = logits[0, 0].double().clone()
    x[3] -= 2.0
    weight = (0.7 * x.softmax(-1) + 0.003) * torch.where(torch.arange(50) == 3, 0.9, 0.5)
    weight = torch.cat([weight, torch.tensor([0.1])])
    assert_distribution(drawn, weight / weight.sum())


def test_philox_noise_belongs_to_the_sample() -> None:
    logits, ids = make_logits(0, torch.float32, 3, 40, 500), torch.tensor([7, 2, 9])
    together = tokens.token_confidence(logits, seed=5, sample_ids=ids)
    for i in range(3):
        assert torch.equal(
            tokens.token_confidence(logits[i : i + 1], seed=5, sample_ids=ids[i : i + 1])[0], together[i]
        )
    assert not torch.equal(tokens.token_confidence(logits, seed=5, step=1), together)
