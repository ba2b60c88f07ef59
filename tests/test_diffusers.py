"""pygen's drop-ins beside the classes that they replace: whole runs, fixed model outputs, diffusers' own in float64."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import pygen.diffusers
from pygen.diffusers.base import FusedScheduler
from tests.diffusers_configs import SPACES, Configuration, draw
from tests.diffusers_float64 import Draws, OnlyFloat64, in_float64
from tests.diffusers_trajectories import TOKENS, Feed, Trajectory, prepared, trajectory
from tests.error_rule import assert_error_rule

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torchsde.*"
)

EXPORTED = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
OFFERED = sorted(name for name in pygen.diffusers.__all__ if name.endswith("Scheduler"))
DTYPES = [torch.float32, torch.bfloat16]


def theirs_of(name: str) -> type:
    return getattr(diffusers, name)


def ours_of(name: str) -> type:
    return getattr(pygen.diffusers, name)


def some(count: int | None = None, tokens: bool = True) -> list[Any]:
    """The first configurations of every class, as parameters of a test."""
    return [
        pytest.param(configuration, id=f"{name}-{configuration.number}")
        for name in OFFERED
        for configuration in list(draw(name))[:count]
        if tokens or name not in TOKENS  # test_diffusers_tokens.py says it of them
    ]


# Where diffusers breaks.


@dataclass(frozen=True)
class Broken:
    """Legal configurations with which diffusers raises, or gives what is not finite."""

    why: str
    when: Callable[[Configuration], Any]
    knobs: tuple[str, ...]  # of which ours names one, if it does not work
    example: Configuration


def example(name: str, steps: int = 5, prepare: Any = None, **config: Any) -> Configuration:
    return Configuration(name, 0, steps, config, prepare or {})


def of(*names: str) -> Callable[[Configuration], bool]:
    return lambda c: c.name in [f"{name}Scheduler" for name in names]


def starts_twice(c: Configuration) -> bool:
    times = prepared(theirs_of(c.name), c).timesteps.tolist()
    return getattr(theirs_of(c.name), "order", 1) == 1 and times.count(times[0]) > 1


BROKEN = [
    Broken(
        "with a terminal SNR of zero there is no x_0 in x, and epsilon does not say it",
        lambda c: c.get("rescale_betas_zero_snr") and c.get("prediction_type", "epsilon") == "epsilon",
        ("rescale_betas_zero_snr", "prediction_type"),
        example("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False),
    ),
    Broken(
        "inversion starts at sigma = 0, where x is x_0 and there is no epsilon in it",
        lambda c: of("DDIMInverse")(c) and c.get("prediction_type") == "sample" and c.get("set_alpha_to_one", True),
        ("prediction_type", "set_alpha_to_one"),
        example("DDIMInverseScheduler", prediction_type="sample"),
    ),
    Broken(
        "the Brownian tree is asked for an interval of no length, the last",
        lambda c: of("CosineDPMSolverMultistep")(c) and c.get("final_sigmas_type") == "sigma_min",
        ("final_sigmas_type",),
        example("CosineDPMSolverMultistepScheduler", final_sigmas_type="sigma_min"),
    ),
    Broken(
        "an SDE is not solved backwards: its noise would have a negative variance",
        lambda c: of("DPMSolverMultistepInverse")(c) and c.get("algorithm_type", "").startswith("sde"),
        ("algorithm_type",),
        example("DPMSolverMultistepInverseScheduler", algorithm_type="sde-dpmsolver++"),
    ),
    Broken(
        "two of the sigmas are one, and the solver divides by the step between them",
        lambda c: of("DPMSolverMultistepInverse")(c) and c.get("use_beta_sigmas"),
        ("use_beta_sigmas", "sigmas"),
        example(
            "DPMSolverMultistepInverseScheduler", use_beta_sigmas=True, solver_type="heun", lower_order_final=False
        ),
    ),
    Broken(
        "the half with the variances is cut off only where the prediction is epsilon, and after the noise was drawn",
        lambda c: (
            of("DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep", "SASolver")(c)
            and c.get("variance_type") == "learned_range"
        ),
        ("variance_type", "model_output"),
        example("DPMSolverMultistepScheduler", prediction_type="v_prediction", variance_type="learned_range"),
    ),
    Broken(
        "timesteps are taken, and their number is not",
        lambda c: c.get("use_flow_sigmas") and c.get("timesteps"),
        ("timesteps", "use_flow_sigmas"),
        example(
            "DPMSolverMultistepScheduler",
            prepare={"timesteps": [180, 120, 70]},
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
        ),
    ),
    Broken(
        "there is no third order of the SDE",
        lambda c: of("EDMDPMSolverMultistep")(c) and c.get("solver_order") == 3 and c.get("algorithm_type") is not None,
        ("solver_order", "algorithm_type"),
        example("EDMDPMSolverMultistepScheduler", 17, solver_order=3, algorithm_type="sde-dpmsolver++"),
    ),
    Broken(
        "the last two sigmas are one, and the variance between them a rounding below zero",
        lambda c: (
            of("EDMDPMSolverMultistep")(c)
            and c.get("final_sigmas_type") == "sigma_min"
            and c.get("algorithm_type") == "sde-dpmsolver++"
        ),
        ("final_sigmas_type", "algorithm_type"),
        example(
            "EDMDPMSolverMultistepScheduler",
            2,
            final_sigmas_type="sigma_min",
            rho=5.0,
            algorithm_type="sde-dpmsolver++",
        ),
    ),
    Broken(
        "the last step, to sigma = 0, is infinite in lambda: of B(h) = h, of a higher order, or of noise",
        lambda c: (
            of("UniPCMultistep", "Helios")(c)
            and c.get("final_sigmas_type", "zero") == "zero"
            and (c.get("solver_type") == "bh1" or c.get("lower_order_final") is False or c.get("predict_x0") is False)
        ),
        ("solver_type", "lower_order_final", "predict_x0", "final_sigmas_type"),
        example("UniPCMultistepScheduler", solver_type="bh1"),
    ),
    Broken(
        "the cosine schedule's largest sigma has no step down with ancestral noise",
        lambda c: of("KDPM2AncestralDiscrete")(c) and c.get("beta_schedule") == "squaredcos_cap_v2",
        ("beta_schedule",),
        example("KDPM2AncestralDiscreteScheduler", 2, beta_schedule="squaredcos_cap_v2"),
    ),
    Broken(
        "the first timestep is there twice, so the run starts at the second, and ends past the last sigma",
        starts_twice,
        ("timestep", "sigmas"),
        example("DPMSolverMultistepScheduler", beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True),
    ),
]


class BreaksError(Exception):
    """diffusers' class raised, or gave what is not finite."""


def finite(values: Trajectory) -> bool:
    return all(bool(value.isfinite().all()) for column in values.values() for value in column)


def run_theirs(c: Configuration, dtype: torch.dtype) -> tuple[Trajectory, Draws]:
    draws = Draws()
    try:
        with draws:
            values = trajectory(prepared(theirs_of(c.name), c), Feed(c, dtype))
    except Exception as error:
        raise BreaksError(repr(error)) from error
    if not finite(values):
        raise BreaksError("not finite")
    return values, draws


def assert_ours_says_or_does(c: Configuration, dtype: torch.dtype) -> None:
    case = next((case for case in BROKEN if case.when(c)), None)
    assert case is not None, f"diffusers breaks, and no case says why: {c}"
    said = ""
    try:
        values = trajectory(prepared(ours_of(c.name), c), Feed(c, dtype))
    except ValueError as error:
        said = str(error)
    if said:
        assert any(knob in said for knob in case.knobs), f"{c}: {said!r} names none of {case.knobs}"
    else:
        assert finite(values), f"{c} gives what is not finite, and says nothing"


@pytest.mark.parametrize("case", [pytest.param(case, id=case.why) for case in BROKEN])
def test_where_diffusers_breaks_ours_works_or_names_the_knob(case: Broken) -> None:
    c = case.example
    assert case.when(c)
    with pytest.raises(BreaksError):
        run_theirs(c, torch.float32)
    if c.name in OFFERED:
        assert_ours_says_or_does(c, torch.float32)


# Whole runs.

# What diffusers makes in float64 whatever it is given, and ours in float32.
IN_FLOAT32 = {"corrected_sampled_probs"}

# Where diffusers' float32 logarithms happen to undo what is wrong with its float32 sigmas. What such a sigma does to a
# sample shows in add_noise too, so that there the two are one population.
LUCKY = (
    "DEISMultistepScheduler(trained_betas=..., num_train_timesteps=200, prediction_type=v_prediction, use_beta_sigmas",
)


def assert_same(ours: Trajectory, theirs: Trajectory, truth: Trajectory, what: str) -> None:
    """Floating-point values by the error rule, each field one population; others bit by bit as diffusers has them."""
    assert ours.keys() >= theirs.keys(), f"{what}: {[*ours]} for {[*theirs]}"
    lucky = any(what.startswith(start) for start in LUCKY)
    for field, expected in theirs.items():
        found = ours[field]
        if field in IN_FLOAT32:
            expected = [x.float() for x in expected]
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected], f"{what}: {field}"
        if lucky and field in ("model_input", "prev_sample"):
            found, expected, exact = ([*run["add_noise"], *run[field]] for run in (ours, theirs, truth))
            assert_error_rule(zip(found, expected, exact, strict=True), f"{what}: {field}")
        elif expected[0].is_floating_point():
            assert_error_rule(zip(found, expected, truth[field], strict=True), f"{what}: {field}")
        else:
            assert all(map(torch.equal, found, expected)), f"{what}: {field}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("configuration", some())
def test_a_run_is_as_exact_as_diffusers(configuration: Configuration, dtype: torch.dtype) -> None:
    c = configuration
    if c.name in TOKENS and dtype is not torch.float32:
        pytest.skip("probabilities rounded to bfloat16 tie; test_diffusers_tokens.py asks by margins")
    try:
        theirs, draws = run_theirs(c, dtype)
    except BreaksError:
        assert_ours_says_or_does(c, dtype)
        return
    with in_float64(theirs_of(c.name)), draws.repeated():
        truth = trajectory(prepared(theirs_of(c.name), c), Feed(c, dtype, truth=True))
    assert_same(trajectory(prepared(ours_of(c.name), c), Feed(c, dtype)), theirs, truth, str(c))


@pytest.mark.parametrize("name", EXPORTED)
def test_the_truth_is_float64_throughout(name: str) -> None:
    for c in [c for c in draw(name) if not any(case.when(c) for case in BROKEN)][:2]:
        _, draws = run_theirs(c, torch.bfloat16)
        with in_float64(theirs_of(name)), draws.repeated(), OnlyFloat64():
            trajectory(prepared(theirs_of(name), c), Feed(c, torch.bfloat16, truth=True))


def test_there_are_spaces_for_all_that_diffusers_exports() -> None:
    assert len(EXPORTED) == 49
    assert sorted(SPACES) == EXPORTED


def test_every_scheduler_is_offered() -> None:
    assert EXPORTED == OFFERED


# What a step does beside its numbers.

STEPS = ("step", "step_pred", "step_correct", "undo_step", "add_noise_to_input", "batch_step_no_noise")
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
DRAWS_NOISE = {"randn", "normal_"}
ASKS = {"promote_types", "result_type"}  # of dtypes, not of tensors
# (class, operation): why it is there.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("RFD4ProteinaScheduler", "cat"): "diffusers' randn_tensor puts the draws of one generator per sample together",
} | {
    ("ScoreSdeVeScheduler", operation): "the length of a correction, from the norms of the batch's samples"
    for operation in ("sqrt", "mean", "div", "mul", "pow", "ones", "fill_")
}


class OnlyOurs(TorchDispatchMode):
    """Allows pygen's operations, allocation, views, and the noise that the caller's generator asks for."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = function.overloadpacket.__name__
        assert (
            function.namespace == "pygen"
            or function.is_view
            or op in ALLOCATES | DRAWS_NOISE | ASKS
            or (self.name, op) in EXCEPTIONS
        ), f"{self.name}'s step calls {function}"
        return function(*args, **(kwargs or {}))


def skip_broken(c: Configuration) -> None:
    if any(case.when(c) for case in BROKEN):
        pytest.skip("diffusers breaks")


def each_step(scheduler: Any, wrapped: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """The scheduler, with every method that steps wrapped."""
    for name in STEPS:
        if hasattr(scheduler, name):
            method = getattr(scheduler, name)
            setattr(scheduler, name, functools.wraps(method)(wrapped(method)))
    return scheduler


@pytest.mark.parametrize("configuration", some(6, tokens=False))
def test_a_step_is_ours_alone(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    c = configuration
    skip_broken(c)
    find = FusedScheduler._find
    brownian = getattr(ours_of(c.name), "_brownian", None)

    def find_unwatched(scheduler: FusedScheduler, *args: Any) -> Any:
        """Rows are numbers that the host makes and uploads: no tensor is among what it makes them of."""
        assert not any(isinstance(arg, Tensor) for arg in args)
        with _disable_current_modes():
            return find(scheduler, *args)

    def brownian_unwatched(*args: Any) -> Any:
        """The noise of a Brownian path is drawn by torchsde, as diffusers' is."""
        with _disable_current_modes():
            return brownian(*args)

    monkeypatch.setattr(FusedScheduler, "_find", find_unwatched)
    if brownian:
        monkeypatch.setattr(ours_of(c.name), "_brownian", brownian_unwatched)

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            with OnlyOurs(c.name):
                return method(*args, **kwargs)

        return step

    trajectory(each_step(prepared(ours_of(c.name), c), watched), Feed(c, torch.float32))


def tensors(value: Any) -> Iterator[Tensor]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else [value]
    return (x for x in values if isinstance(x, Tensor))


@pytest.mark.parametrize("configuration", some(3, tokens=False))
def test_what_a_step_returns_is_new_and_stays(configuration: Configuration) -> None:
    c = configuration
    skip_broken(c)
    kept: list[tuple[Tensor, Tensor]] = []

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            inputs = [*tensors(args), *tensors(kwargs)]
            alive = {x.data_ptr() for x in inputs if x.numel()} | {x.data_ptr() for x, _ in kept}
            out = method(*args, **kwargs)
            # The derivative of a step that is corrected is handed on as it came.
            derivative = inputs[-1] if method.__name__ == "step_correct" else None
            for x in tensors(out):
                if x is not derivative and x.ndim:
                    assert x.data_ptr() not in alive, f"{c}: a step returned memory that is in use"
                    alive.add(x.data_ptr())
                    kept.append((x, x.clone()))
            return out

        return step

    trajectory(each_step(prepared(ours_of(c.name), c), watched), Feed(c, torch.float32))
    assert kept
    assert all(torch.equal(x, copied) for x, copied in kept), f"{c}: a later step changed what an earlier returned"


# Files and copies.


def assert_equal_runs(first: Trajectory, second: Trajectory, what: str) -> None:
    assert first.keys() == second.keys(), what
    for field in first:
        assert all(map(torch.equal, first[field], second[field])), f"{what}: {field}"


def continued(scheduler: Any, c: Configuration) -> Trajectory:
    """The run of a scheduler that was made elsewhere."""
    if not c.name.startswith("Helios"):
        own = any(option in c.prepare for option in ("timesteps", "sigmas"))
        scheduler.set_timesteps(*([] if own else [c.steps]), **c.prepare)
    return trajectory(scheduler, Feed(c, torch.float32))


@pytest.mark.parametrize("configuration", some(4))
def test_files_and_configs_are_the_same_as_diffusers(configuration: Configuration, tmp_path: Path) -> None:
    c = configuration
    skip_broken(c)
    ours, theirs = ours_of(c.name), theirs_of(c.name)
    expected = trajectory(prepared(ours, c), Feed(c, torch.float32))
    made, other = ours(**c.config), theirs(**c.config)
    assert dict(made.config) == dict(other.config)
    made.save_pretrained(tmp_path / "ours")
    other.save_pretrained(tmp_path / "theirs")
    saved = [(tmp_path / who / "scheduler_config.json").read_text() for who in ("ours", "theirs")]
    assert saved[0] == saved[1]
    for scheduler in (theirs.from_pretrained(tmp_path / "ours"), theirs.from_config(made.config)):
        assert {**other.config, **scheduler.config} == dict(other.config)
    for scheduler in (ours.from_pretrained(tmp_path / "theirs"), ours.from_config(other.config)):
        assert type(scheduler) is ours
        assert_equal_runs(continued(scheduler, c), expected, str(c))


def pickles(scheduler: Any) -> bool:
    try:
        return bool(pickle.dumps(scheduler))
    except (AttributeError, pickle.PicklingError):  # a function of the scheduler's own
        return False


@pytest.mark.parametrize("name", OFFERED)
def test_copies_step_as_the_scheduler_does(name: str) -> None:
    c = next(iter(draw(name)))
    scheduler = prepared(ours_of(name), c)
    copies = [copy.deepcopy(scheduler)]
    if pickles(prepared(theirs_of(name), c)):
        copies.append(pickle.loads(pickle.dumps(scheduler)))
    expected = trajectory(scheduler, Feed(c, torch.float32))
    for copied in copies:
        assert type(copied) is ours_of(name)
        assert_equal_runs(trajectory(copied, Feed(c, torch.float32)), expected, str(c))
    copied = copy.deepcopy(scheduler)
    assert_equal_runs(continued(copied, c), continued(scheduler, c), f"{c}, after a run")


X = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("name", "config", "call", "error", "message"),
    [
        ("DDIM", {}, lambda s: s.step(X, 5000, X), IndexError, "timestep must be less than num_train_timesteps=1000"),
        ("DDIM", {"prediction_type": "flow"}, lambda s: s.step(X, 0, X), ValueError, "prediction_type must be epsilon"),
        ("DDIM", {}, lambda s: s.step(X, 0, X, eta=2.0), ValueError, "eta must lie in"),
        ("DDIM", {}, lambda s: s.step(X[:, :2], 0, X), ValueError, "model_output of shape"),
        ("DDIM", {}, lambda s: s.step(X.double(), 0, X.double()), TypeError, "must be float32, bfloat16 or float16"),
        ("DDIM", {}, lambda s: s.add_noise(X, X, torch.arange(3)), ValueError, "timesteps must be one, or one per"),
        ("DDPM", {"variance_type": "learned"}, lambda s: s.step(X, 750, X), ValueError, "model_output must have 6"),
        ("EulerDiscrete", {}, lambda s: s.step(X, 3, X), ValueError, "timestep must be one of scheduler.timesteps"),
        ("UniPCMultistep", {}, lambda s: [s.step(X, 999, X) for _ in range(5)], ValueError, "past the last of sigmas"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(name: str, config: dict, call: Callable, error: type, message: str) -> None:
    scheduler = ours_of(f"{name}Scheduler")(**config)
    scheduler.set_timesteps(4)
    with pytest.raises(error, match=message):
        call(scheduler)
