"""Part of the suite `steps`: ``scheduler.step(...)`` of every drop-in as a pipeline calls it, and of diffusers' own."""

from __future__ import annotations

import inspect
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial, reduce
from importlib.util import find_spec
from itertools import cycle
from operator import add
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pygen
from bench.cases import Case, Triple, Work
from bench.measure import Call
from bench.steps import LARGE, SMALL, STEPS, TIMED, in_dtype
from pygen.ops import SPECS, Example
from pygen.ops.affine_step import COLUMNS

if TYPE_CHECKING:
    from bench.run import Result

LATENTS, TOKENS = "drop-ins", "drop-ins for tokens"
# Those beside whose rows stands a compiled formula, and that are quick.
REPRESENTATIVE = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)
TIES = 1e-3  # of all tokens
GOAL, GOAL_OF_FLOOR = 25e-6, 1.3  # seconds of a SMALL step, and what a LARGE one may take beside its floor

warnings.filterwarnings("ignore", module="torchsde")  # of times that float32 moved past the ends of its path

Shape = tuple[int, ...]
Arguments = Iterable[dict[str, Any]]
Generator = Any  # torch.Generator or PhiloxGenerator


@dataclass
class Inputs:
    """What a pipeline has when the steps begin: the model's outputs are taken in turn."""

    x: Tensor
    outputs: list[Tensor]
    arguments: list[dict[str, Any]]  # further ones, of each step
    generator: Generator


# What the first sample and the model's outputs are.


def latents(scheduler: Any, shape: Shape, count: int) -> tuple[Tensor, list[Tensor]]:
    sigma = float(f"{float(getattr(scheduler, 'init_noise_sigma', 1.0)):.3g}")
    return sigma * torch.randn(shape), [torch.randn(shape) for _ in range(count)]


def one_frame(scheduler: Any, shape: Shape, count: int) -> tuple[Tensor, list[Tensor]]:
    return latents(scheduler, (*shape[:2], 1, *shape[2:]), count)


def sequence(scheduler: Any, shape: Shape, count: int, channels: int = 32) -> tuple[Tensor, list[Tensor]]:
    """As many numbers, as tokens of so many channels: latents of RFD4-Proteina have 32, the packed ones of FLUX 64."""
    return latents(scheduler, (shape[0], math.prod(shape[1:]) // channels, channels), count)


def policies(scheduler: Any, shape: Shape, count: int) -> tuple[Tensor, list[Tensor]]:
    x, outputs = sequence(scheduler, shape, count, channels=64)
    return x, [output.repeat(1, 1, scheduler.config.n_grid) for output in outputs]


def logits(scheduler: Any, shape: Shape, count: int) -> tuple[Tensor, list[Tensor]]:
    """Of (batch, positions, classes): the last class is the mask, of which all tokens are in the beginning."""
    return torch.full(shape[:2], shape[2] - 1), [2 * torch.randn(shape) for _ in range(count)]


def image_logits(scheduler: Any, shape: Shape, count: int) -> tuple[Tensor, list[Tensor]]:
    x, outputs = logits(scheduler, shape, count)
    side = math.isqrt(shape[1])
    return x.unflatten(1, (side, side)), [output.mT.unflatten(2, (side, side)).contiguous() for output in outputs]


def log_probabilities(scheduler: Any, shape: Shape, count: int) -> tuple[Tensor, list[Tensor]]:
    x, outputs = logits(scheduler, shape, count)
    return x, [output[..., :-1].log_softmax(dim=2).mT.contiguous() for output in outputs]


# The further arguments of each step.


def timesteps(scheduler: Any, x: Tensor, generator: Generator) -> Arguments:
    return [{"timestep": t} for t in scheduler.timesteps]


def all_but_the_last(scheduler: Any, x: Tensor, generator: Generator) -> Arguments:
    return [{"timestep": t} for t in scheduler.timesteps[:-1]]


def of_each_sample(scheduler: Any, x: Tensor, generator: Generator) -> Arguments:
    return [{"timestep": t.expand(len(x))} for t in scheduler.timesteps[:-1]]


def counted(scheduler: Any, x: Tensor, generator: Generator) -> Arguments:
    return [{"timestep": i} for i in range(len(scheduler.timesteps))]


def counted_with_the_mask(scheduler: Any, x: Tensor, generator: Generator) -> Arguments:
    return [{"mask_token_id": int(x.max()), **of_step} for of_step in counted(scheduler, x, generator)]


def with_the_next(scheduler: Any, x: Tensor, generator: Generator) -> Arguments:
    times = list(scheduler.timesteps)
    return [{"timestep": t, "prev_timestep": after} for t, after in zip(times, [*times[1:], None], strict=True)]


def inpainting(scheduler: Any, x: Tensor, generator: Generator) -> Arguments:
    image, mask = always(x.shape, 0).to(x), (always(x.shape, 1) > 0).to(x)
    return [{"timestep": t, "original_image": image, "mask": mask} for t in scheduler.timesteps]


def emitting(scheduler: Any, x: Tensor, generator: Generator) -> Arguments:
    generators = [type(generator)().manual_seed(i) for i in range(len(x))]
    mask = always(x.shape[:2], 0) > -1
    return [{"timestep": t, "emit_mask": mask, "generator": generators} for t in scheduler.timesteps]


def distilled(scheduler: Any, x: Tensor, generator: Generator) -> Arguments:
    times = scheduler.timesteps
    schedule = {"dmd_sigmas": scheduler.sigmas, "dmd_timesteps": times, "all_timesteps": times, "dmd_noisy_tensor": x}
    return [{"timestep": t, "cur_sampling_step": i, **schedule} for i, t in enumerate(times)]


def churned(scheduler: Any, x: Tensor, generator: Generator) -> Arguments:
    sigmas = list(scheduler.schedule)
    return [{"sigma_hat": sigmas[t], "sigma_prev": sigmas[t - 1] if t > 0 else 0} for t in scheduler.timesteps.tolist()]


def always(shape: Iterable[int], seed: int) -> Tensor:
    """The same numbers whoever asks for them, in float32."""
    return torch.randn(*shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))


# One run over the schedule; each call of the scheduler's is yielded.


def plain(scheduler: Any, inputs: Inputs) -> Iterator[Any]:
    x = inputs.x
    for output, arguments in zip(cycle(inputs.outputs), inputs.arguments, strict=False):
        out = scheduler.step(output, sample=x, **arguments)
        yield out
        x = out.prev_sample


def keeping_the_prediction(scheduler: Any, inputs: Inputs) -> Iterator[Any]:
    x, old, before = inputs.x, None, None
    for output, arguments in zip(cycle(inputs.outputs), inputs.arguments, strict=False):
        out = scheduler.step(output, old, timestep_back=before, sample=x, **arguments)
        yield out
        (x, old), before = out, arguments["timestep"]


def correcting(scheduler: Any, inputs: Inputs) -> Iterator[Any]:
    x, outputs, generator = inputs.x, cycle(inputs.outputs), inputs.generator
    for arguments in inputs.arguments:
        out = scheduler.step_correct(next(outputs), x, generator=generator)
        yield out
        out = scheduler.step_pred(next(outputs), sample=out.prev_sample, **arguments)
        yield out
        x = out.prev_sample


def churning(scheduler: Any, inputs: Inputs) -> Iterator[Any]:
    x, outputs, generator = inputs.x, cycle(inputs.outputs), inputs.generator
    for arguments in inputs.arguments:
        sigma, before = arguments["sigma_hat"], arguments["sigma_prev"]
        noisy, raised = scheduler.add_noise_to_input(x, sigma, generator=generator)
        yield (noisy,)
        out = scheduler.step(next(outputs), raised, before, noisy)
        yield out
        if isinstance(before, Tensor):
            out = scheduler.step_correct(next(outputs), raised, before, noisy, out.prev_sample, out.derivative)
            yield out
        x = out.prev_sample


@dataclass(frozen=True)
class Drive:
    """How a pipeline drives the schedulers of a class."""

    draw: Callable[[Any, Shape, int], tuple[Tensor, list[Tensor]]] = latents
    arguments: Callable[[Any, Tensor, Generator], Arguments] = timesteps
    run: Callable[[Any, Inputs], Iterator[Any]] = plain
    config: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)  # for set_timesteps, beside the number of steps
    step: str = "step"
    shape: Shape | None = None  # (batch, positions, classes) of tokens


# Those that are not driven as most are.
DRIVES = {
    "AmusedScheduler": Drive(image_logits, config={"mask_token_id": 8191}, shape=(2, 256, 8192)),
    "BlockRefinementScheduler": Drive(logits, counted_with_the_mask, shape=(2, 32, 32768)),
    "CogVideoXDPMScheduler": Drive(run=keeping_the_prediction),
    "DDPMWuerstchenScheduler": Drive(arguments=of_each_sample),
    "DPMSolverSDEScheduler": Drive(config={"noise_sampler_seed": 0}),
    "DPMSolverSinglestepScheduler": Drive(config={"lower_order_final": True}),  # or it says that it must be
    "DiscreteDDIMScheduler": Drive(logits, counted, shape=(2, 32, 32768)),
    "EntropyBoundScheduler": Drive(logits, counted, shape=(2, 32, 32768)),
    "HeliosDMDScheduler": Drive(one_frame, distilled, schedule={"stage_index": 0}),
    "HeliosScheduler": Drive(one_frame, schedule={"stage_index": 0}),
    "KarrasVeScheduler": Drive(arguments=churned, run=churning),
    "PiflowScheduler": Drive(policies),
    "RFD4ProteinaScheduler": Drive(
        sequence,
        emitting,
        config={"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 2.0, "tsr_sigma": 1.5},
    ),
    "RePaintScheduler": Drive(arguments=inpainting, schedule={"jump_length": 1, "jump_n_sample": 1}),
    "SCMScheduler": Drive(arguments=all_but_the_last, schedule={"intermediate_timesteps": None}),
    "ScoreSdeVeScheduler": Drive(run=correcting, step="step_pred"),
    "UnCLIPScheduler": Drive(arguments=with_the_next),
    "VQDiffusionScheduler": Drive(log_probabilities, config={"num_vec_classes": 2049}, shape=(2, 1024, 2049)),
}


def drive_of(name: str) -> Drive:
    return DRIVES.get(name, Drive())


def schedulers() -> dict[str, type]:
    """The drop-ins, by name."""
    if find_spec("diffusers") is None:
        return {}
    import pygen.diffusers
    from pygen.diffusers.base import FusedScheduler

    every = {name: getattr(pygen.diffusers, name) for name in pygen.diffusers.__all__}
    return {name: kind for name, kind in every.items() if issubclass(kind, FusedScheduler)}


def diffusers_own(ours: type) -> type:
    return next(base for base in ours.__mro__ if base.__module__.startswith("diffusers."))


def cases(quick: bool) -> list[Case]:
    """Quick are a few of latents, which are small."""
    names = [name for name in schedulers() if not quick or name in REPRESENTATIVE]
    shapes = (SMALL,) if quick else (SMALL, LARGE)
    of_latents = [(name, shape) for shape in shapes for name in names if drive_of(name).shape is None]
    of_tokens = [(name, shape) for name in names if (shape := drive_of(name).shape)]
    return [
        Case("steps", f"{name} {shape}", partial(work, name, shape), part)
        for part, these in ((LATENTS, of_latents), (TOKENS, of_tokens))
        for name, shape in these
    ]


def work(name: str, shape: Shape) -> Work:
    ours, drive = schedulers()[name], drive_of(name)
    scheduler = prepared(ours, drive, torch.Generator())
    x, outputs = drive.draw(scheduler, shape, 3)
    runs = {"diffusers": Run(diffusers_own(ours), drive), "pygen": Run(ours, drive, ours=True)}
    watched = runs["pygen"].watched(x, outputs)
    by_philox = Run(ours, drive, ours=True, philox=True)
    drawing = by_philox.watched(x, outputs)
    if drawing.draws:
        runs["pygen, Philox"] = by_philox
    calls: dict[str, Call] = {column: run.steps(x, outputs[:1]).__next__ for column, run in runs.items()}
    if name in REPRESENTATIVE:
        # Inductor's own normals take many times as long as torch's.
        options: dict[str, Any] = {"fallback_random": True}
        compiled = torch.compile(drawn_row_formula, fullgraph=True, dynamic=False, options=options)
        calls["torch.compile"] = partial(compiled, *row_terms(watched.timed))

    def results() -> Iterator[Triple]:
        few = x[:2], [output[:2] for output in outputs]
        compared = equal_tokens if drive.shape else partial(zip, strict=True)
        diffusers = runs["diffusers"]
        truth = [] if drive.shape else diffusers.values(*few, torch.float64)
        yield from compared(runs["pygen"].values(*few), diffusers.values(*few), truth)
        if drawing.draws:
            with pygen.backend("reference"):
                same = by_philox.values(*few)
                truth = [] if drive.shape else by_philox.values(*few, torch.float64)
            yield from compared(by_philox.values(*few), same, truth)

    steps = watched.steps
    return Work(calls, drawing.bytes_moved // steps, drawing.flops // steps, torch.float32, results)


def equal_tokens(found: list[Tensor], same: list[Tensor], _: object) -> Iterable[Triple]:
    """No triples: the same tokens, of which rounding decides a few otherwise where two are as good."""
    ours, theirs = (torch.cat([v.flatten() for v in values if not v.is_floating_point()]) for values in (found, same))
    share = (ours != theirs).double().mean().item()
    if share > TIES:
        raise AssertionError(f"{share:.2%} of the tokens are others")
    return ()


def prepared(kind: type, drive: Drive, generator: Generator) -> Any:
    scheduler = kind(**drive.config)
    scheduler.set_timesteps(STEPS, **drive.schedule)
    if hasattr(scheduler, "set_sigmas"):
        scheduler.set_sigmas(STEPS)
    if hasattr(scheduler, "noise_sampler_seed") and type(generator) is not torch.Generator:
        scheduler.noise_sampler_seed = generator  # instead of the Brownian path of a seed
    return scheduler


@dataclass(frozen=True)
class Run:
    """A class and how it is driven; ``steps`` of its runs, one after the other without end, are what is timed."""

    kind: type
    drive: Drive
    ours: bool = False
    philox: bool = False

    def begin(self, x: Tensor, outputs: list[Tensor]) -> tuple[Any, Inputs]:
        from pygen.diffusers import PhiloxGenerator

        generator = (PhiloxGenerator if self.philox else torch.Generator)().manual_seed(0)
        scheduler = prepared(self.kind, self.drive, generator)
        draws = "generator" in inspect.signature(getattr(scheduler, self.drive.step)).parameters
        common = {"generator": generator} if draws else {}
        arguments = [common | of_step for of_step in self.drive.arguments(scheduler, x, generator)]
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, scheduler.timesteps[0])  # or some warn at every step
        return scheduler, Inputs(x, outputs, arguments, generator)

    def steps(self, x: Tensor, outputs: list[Tensor]) -> Iterator[Any]:
        scheduler, inputs = self.begin(x, outputs)
        state = vars(scheduler)
        before = kept(state)
        deque(self.drive.run(scheduler, inputs), maxlen=0)  # whatever is made once is made now
        while True:
            state.clear()
            state.update(kept(before))
            yield from self.drive.run(scheduler, inputs)

    def watched(self, x: Tensor, outputs: list[Tensor]) -> Watch:
        scheduler, inputs = self.begin(x, outputs)
        with Watch() as watch:
            for _ in self.drive.run(scheduler, inputs):
                watch.steps += 1
        return watch

    def values(self, x: Tensor, outputs: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """All that a run gives back, whose state is in this dtype, and diffusers' arithmetic with it."""
        if x.is_floating_point():
            x, outputs = x.to(dtype), [output.to(dtype) for output in outputs]
        with nullcontext() if self.ours else in_dtype(self.kind, dtype), DrawsInFloat32():
            run = self.drive.run(*self.begin(x, outputs))
            return [v for out in run for v in tuple_of(out) if isinstance(v, Tensor) and v.dim()]


def kept(state: dict[str, Any]) -> dict[str, Any]:
    """What a scheduler knows, with lists of its own."""
    return {name: value.copy() if isinstance(value, list) else value for name, value in state.items()}


def tuple_of(out: Any) -> tuple[Any, ...]:
    return out if isinstance(out, tuple) else out.to_tuple()


class DrawsInFloat32(TorchFunctionMode):
    """torch draws other normals in another dtype; the truth has those of the run that it is the truth of."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not torch.randn:
            return function(*args, **kwargs)
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        return function(*args, **kwargs | {"dtype": torch.float32}).to(dtype)


class Watch(TorchDispatchMode):
    """What pygen's ops move and compute in the steps of a run, and whether they draw noise."""

    OPERATORS: ClassVar = {spec.operator: spec for spec in SPECS.values()}

    def __init__(self) -> None:
        super().__init__()
        self.steps = self.bytes_moved = self.flops = 0
        self.draws = False
        self.timed: dict[str, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        spec = self.OPERATORS.get(function)
        if spec is not None:
            names = (argument.name for argument in function._schema.arguments)
            arguments = dict(zip(names, args, strict=False))
            example = Example("", arguments)
            self.bytes_moved += spec.bytes_moved(example)
            self.flops += spec.flops(example)
            self.draws |= arguments.get("seed") is not None
            if self.steps == TIMED:
                self.timed = arguments
        return function(*args, **(kwargs or {}))


def row_terms(call: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], bool, bool]:
    """Of a call of affine_step what its row reads: the coefficients that are not 0, the tensors, and what it makes."""
    history = {f"h{j}_": tensor for j, tensor in enumerate(call["history"])}
    terms = {"x": call["x"], "out": call["model_output"], **history}
    if call["noise"] is not None:
        terms["noise"] = call["noise"]
    columns = [*COLUMNS, *(f"{name}{r}" for name in history for r in (0, 1))]
    values = dict(zip(columns, call["table"][call["rows"]].tolist(), strict=True))
    reach = {name: values.pop(name) for name in ("low", "high")}
    values |= {name: value for name, value in reach.items() if math.isfinite(value)}
    row = {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items() if value}
    return row, terms, call["pred"] is not None, call["second"] is not None


def row_formula(row: dict[str, Tensor], terms: dict[str, Tensor], keeps_pred: bool, has_second: bool) -> list[Tensor]:
    """The row, written out in torch for its own terms."""

    def combined(column: str, of: dict[str, Tensor]) -> Tensor:
        return reduce(add, (row[key] * tensor for name, tensor in of.items() if (key := column.format(name)) in row))

    pred = combined("pred_{}", terms)
    if "low" in row:
        pred = pred.clamp(row["low"], row["high"])
    of_results = terms | {"pred": pred}
    results = [combined("{}0", of_results)]
    if keeps_pred:
        results.append(pred)
    if has_second:
        results.append(combined("{}1", of_results))
    return results


def drawn_row_formula(row: dict[str, Tensor], terms: dict[str, Tensor], *makes: bool) -> list[Tensor]:
    """The same with noise of its own, as a step has."""
    noise = {"noise": torch.randn_like(terms["x"])} if "noise" in terms else {}
    return row_formula(row, terms | noise, *makes)


def verdicts(results: Iterable[Result]) -> Iterator[str]:
    """How many steps reach the goals, by Philox if they draw noise, and which do not."""
    timed = [result for result in results if result.part == LATENTS and result.times]
    goals: list[tuple[Shape, str, Callable[[Result], bool]]] = [
        (SMALL, f"{GOAL * 1e6:g} us", lambda result: result.best <= GOAL),
        (LARGE, f"{GOAL_OF_FLOOR:g} floors", lambda result: result.best <= GOAL_OF_FLOOR * result.floor),
    ]
    for shape, goal, reaches in goals:
        these = [result for result in timed if result.name.endswith(str(shape))]
        missed = [result.name.split()[0] for result in these if not reaches(result)]
        if these:
            but = f", but for {', '.join(missed)}" if missed else ""
            yield f"drop-ins {shape} within {goal}: {len(these) - len(missed)} of {len(these)}{but}"
