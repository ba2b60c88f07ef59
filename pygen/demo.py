"""The demo: handwritten digits by five solvers, what each costs, and how close it stays to its own mathematics; and
by a DiT that draws the latents of an autoencoder.

Every solver draws the same hundred digits from the same noise. The model's outputs are recorded on the way and each
run is then replayed over them without the model: by pygen's step and by the scheduler of diffusers, to time the steps
alone, and by the float64 reference, to see what float32 and the fused kernel lose.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import pygen
from pygen.diffusion import StepInfo, Stepper, StepPlan
from pygen.images import Pixels, grid, to_pixels
from pygen.models.checkpoint import load_model
from pygen.models.latent_digits import LatentDigits
from pygen.models.latent_digits import load as load_latent_digits
from pygen.ops.spec import index_tensor

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.table import Table

GUIDANCE = 2.0
PER_DIGIT = 10
REPEATS = 15


@dataclass(frozen=True)
class Run:
    """A solver of the demo, and the class of diffusers that does the same; both take the options."""

    solver: str
    label: str
    steps: int
    scheduler: str
    spacing: str = "trailing"
    options: dict[str, Any] = field(default_factory=dict)
    latent: bool = False  # by the DiT


# Without noise DDIM is Euler's method on the probability flow, so Euler visits other times, to show something else.
RUNS = (
    Run("ddpm", "DDPM", 50, "DDPMScheduler"),
    Run("ddim", "DDIM", 20, "DDIMScheduler", options={"use_clipped_model_output": True}),  # diffusers needs it said
    Run("euler", "Euler", 20, "EulerDiscreteScheduler", spacing="linspace"),
    Run("dpmpp_2m", "DPM++ 2M", 20, "DPMSolverMultistepScheduler"),
    Run("unipc", "UniPC", 20, "UniPCMultistepScheduler"),
    Run("euler", "DiT, Euler", 20, "FlowMatchEulerDiscreteScheduler", latent=True),
)
STRIP = "DPM++ 2M"  # the run whose way from noise to digit is shown
STRIP_DIGITS = (2, 3, 5)


@dataclass
class Recording:
    """What a run leaves: the model's outputs, conditional half first, and the samples and predictions on the way."""

    plan: StepPlan
    noise: Tensor
    outputs: list[Tensor] = field(default_factory=list)
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    samples: list[Tensor] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    model_seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    """A line of the table."""

    run: Run
    model_seconds: float
    step_us: float
    scheduler_us: float | None
    deviation: float
    torch_deviation: float
    share: float


def run(directory: Path, seed: int) -> tuple[Image, list[Result]]:
    """Sample, measure and print the table; the picture and the table's numbers."""
    from rich.console import Console
    from rich.progress import Progress
    from sklearn.datasets import load_digits

    model, description = load_model(directory)
    models = {False: LatentDigits(model, lambda x: x, description), True: load_latent_digits()}
    scans = load_digits()
    labels = torch.arange(description.num_classes).repeat_interleave(PER_DIGIT)
    reader = _fit_reader(scans.data, scans.target)

    recordings: dict[str, Recording] = {}
    results = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=sum(run.steps for run in RUNS))
        for run in RUNS:
            progress.update(task, description=run.label)
            recording = _record(models[run.latent], run, labels, seed, lambda: progress.advance(task))
            recordings[run.label] = recording
            results.append(_judge(run, recording, seed, reader, labels))
    Console(highlight=False).print(_table(results))

    real = torch.cat([torch.from_numpy(scans.images[scans.target == digit][:PER_DIGIT]) for digit in range(10)])
    return _picture(recordings, real[:, None] / 8 - 1), results


def _fit_reader(images: Any, digits: Any) -> Any:
    """A logistic regression that reads digits, fitted on real scans (0 to 16) brought to the range -1 to 1."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(images / 8 - 1, digits)


def _record(model: LatentDigits, run: Run, labels: Tensor, seed: int, advance: Callable[[], None]) -> Recording:
    """The samples of a solver by ``pygen.sample``, and everything that replaying them takes."""
    description = model.description
    plan = pygen.plan(
        run.solver,
        description.schedule,
        run.steps,
        prediction=description.prediction,
        guidance=GUIDANCE,
        clip=description.clip,
        spacing=run.spacing,
        **run.options,
    )
    shape = (len(labels), *description.shape)
    recording = Recording(plan, pygen.philox_normal(shape, seed=seed) * plan.initial_scale)

    def timed(*arguments: Tensor, **named: Tensor) -> Tensor:
        begin = time.perf_counter()
        output = model.denoiser(*arguments, **named)
        recording.model_seconds += time.perf_counter() - begin
        return output

    def keep(info: StepInfo) -> None:
        recording.outputs.append(info.model_output.clone())
        recording.samples.append(info.sample.clone())
        recording.predictions.append(info.prediction.clone())
        advance()

    pygen.sample(
        timed,
        shape,
        solver=plan,
        cond={"class_labels": labels},
        uncond={"class_labels": torch.full_like(labels, description.num_classes)},
        seed=seed,
        callback=keep,
    )
    with torch.no_grad():
        recording.images = model.decode(recording.samples[-1])
    return recording


def _judge(run: Run, recording: Recording, seed: int, reader: Any, labels: Tensor) -> Result:
    final = recording.samples[-1]
    with pygen.backend("reference"):
        truth = _replay(recording, seed, torch.float64)
        eager = _replay(recording, seed, torch.float32)
    step_us, scheduler_us = _time_steps(run, recording, seed)
    return Result(
        run=run,
        model_seconds=recording.model_seconds,
        step_us=step_us,
        scheduler_us=scheduler_us,
        deviation=float((final - truth).abs().max()),
        torch_deviation=float((eager - truth).abs().max()),
        share=float((reader.predict(recording.images.flatten(1).numpy()) == labels.numpy()).mean()),
    )


def _replay(recording: Recording, seed: int, dtype: torch.dtype) -> Tensor:
    """The steps of a run once more, over the model's recorded outputs."""
    x = recording.noise.to(dtype, copy=True)
    outputs = [output.to(dtype).chunk(2) for output in recording.outputs]
    stepper, philox_seed = Stepper(recording.plan, x), index_tensor(seed, x.device)
    for i, (cond, uncond) in enumerate(outputs):
        stepper.step(i, x, cond, uncond=uncond, seed=philox_seed, out=x)
    return x


@torch.no_grad()
def _time_steps(run: Run, recording: Recording, seed: int) -> tuple[float, float | None]:
    """Microseconds of a step, by pygen and by diffusers: the median over replays of a run, which take turns."""
    outputs = [output.chunk(2) for output in recording.outputs]
    x = recording.noise.clone()
    stepper, philox_seed = Stepper(recording.plan, x), index_tensor(seed, x.device)
    scheduler = _scheduler(run)

    def ours() -> float:
        x.copy_(recording.noise)
        begin = time.perf_counter()
        for i, (cond, uncond) in enumerate(outputs):
            stepper.step(i, x, cond, uncond=uncond, seed=philox_seed, out=x)
        return time.perf_counter() - begin

    def theirs() -> float:
        scheduler.set_timesteps(len(outputs))
        y = recording.noise * getattr(scheduler, "init_noise_sigma", 1.0)
        begin = time.perf_counter()
        for t, (cond, uncond) in zip(scheduler.timesteps, outputs, strict=True):
            if not run.latent:
                scheduler.scale_model_input(y, t)
            output = uncond + GUIDANCE * (cond - uncond)
            y = scheduler.step(output, t, y, return_dict=False, **run.options)[0]
        return time.perf_counter() - begin

    replays = [ours] if scheduler is None else [ours, theirs]
    seconds = [[replay() for replay in replays] for _ in range(1 + REPEATS)][1:]  # the first one warms up
    medians = [1e6 * statistics.median(column) / len(outputs) for column in zip(*seconds, strict=True)]
    return medians[0], medians[1] if scheduler is not None else None


def _scheduler(run: Run) -> Any:
    """The scheduler of diffusers that does what the run does, or None where diffusers is not installed."""
    try:
        import diffusers
    except ModuleNotFoundError:
        return None
    how = {} if run.latent else {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": run.spacing}
    return getattr(diffusers, run.scheduler)(**how)


def _table(results: list[Result]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption=f"{PER_DIGIT} of each digit, guidance {GUIDANCE:g}, the same noise for all. A step is all that happens "
        "between two calls of the model, as the median over replays of the run: guidance, the solver's update and its "
        "noise; for diffusers the usual eager expression for guidance, scale_model_input and step. Deviation: the "
        "largest from the same steps in float64 over the same model outputs; in brackets, that of torch's float32. "
        "Read as asked: by a logistic regression fitted on real scans. DDIM without noise is Euler's method, so Euler "
        "visits other times (linspace). The DiT draws latents, by their flow; all others are a U-Net's.",
        caption_justify="left",
    )
    table.add_column("solver", no_wrap=True)
    for heading in (
        "steps",
        "in the\nmodel",
        "pygen\nstep",
        "diffusers\nstep",
        "deviation\nfrom float64",
        "read\nas asked",
    ):
        table.add_column(heading, justify="right")
    for result in results:
        theirs = "not installed" if result.scheduler_us is None else f"{result.scheduler_us:.0f} µs"
        table.add_row(
            result.run.label,
            str(result.run.steps),
            f"{result.model_seconds:.2f} s",
            f"{result.step_us:.1f} µs",
            theirs,
            f"{_short(result.deviation)} ({_short(result.torch_deviation)})",
            f"{100 * result.share:.0f} %",
        )
    return table


def _short(number: float) -> str:
    return f"{number:.1e}".replace("e-0", "e-")


MARGIN, GUTTER = 44, 40
TILE, GAP = 40, 4  # a digit in a grid
STRIP_TILE = 56
LABELS = 28  # the width of the column of labels left of a grid
BACKGROUND, BRIGHT, DIM = 16, 235, 140  # grey levels


def _picture(recordings: dict[str, Recording], scans: Tensor) -> Image:
    """A grid per solver and one of real scans, three in a row; below them, the way from noise to digit."""
    from PIL import Image, ImageDraw, ImageFont

    titles = {run.label: f"{run.steps} steps, {'latents' if run.latent else run.spacing}" for run in RUNS}
    sheets = [(label, titles[label], recording.images) for label, recording in recordings.items()]
    sheets.append(("Real scans", "what the model was trained on", scans))
    side = PER_DIGIT * (TILE + GAP) - GAP
    width = 2 * MARGIN + 3 * (LABELS + side) + 2 * GUTTER
    block = 44 + side + GUTTER  # heading, grid, space
    strip_top = MARGIN + -(-len(sheets) // 3) * block
    strip_rows = 2 * len(STRIP_DIGITS)
    height = strip_top + 70 + strip_rows * (STRIP_TILE + GAP) + (len(STRIP_DIGITS) - 1) * 12 + MARGIN

    canvas = Image.new("L", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)

    def write(at: tuple[int, int], text: str, size: int, grey: int, anchor: str) -> int:
        font = ImageFont.load_default(size)
        draw.text(at, text, fill=grey, font=font, anchor=anchor)
        return at[0] + int(draw.textlength(text, font=font))

    def heading(left: int, top: int, title: str, note: str) -> None:
        end = write((left, top + 26), title, 24, BRIGHT, "ls")
        write((end + 12, top + 26), note, 17, DIM, "ls")

    for index, (title, note, samples) in enumerate(sheets):
        left = MARGIN + LABELS + index % 3 * (LABELS + side + GUTTER)
        top = MARGIN + index // 3 * block
        heading(left, top, title, note)
        canvas.paste(_tiles(samples, PER_DIGIT, TILE), (left, top + 44))
        for digit in range(10):
            middle = top + 44 + digit * (TILE + GAP) + TILE // 2
            write((left - 14, middle), str(digit), 17, DIM, "rm")

    recording = recordings[STRIP]
    times = recording.plan.times
    path = [recording.noise, *recording.samples]
    columns = len(path)
    left = width - MARGIN - columns * (STRIP_TILE + GAP) + GAP
    heading(
        MARGIN + LABELS,
        strip_top,
        "From noise to digit",
        f"by {STRIP}: the sample at each time, and the model's prediction of its end",
    )
    top = strip_top + 70
    for column in range(columns):
        text = f"{times[column]:.0f}" if column < columns - 1 else "end"
        write((left + column * (STRIP_TILE + GAP) + STRIP_TILE // 2, top - 10), text, 15, DIM, "ms")
    for digit in STRIP_DIGITS:
        for name, tensors in (("sample", path), ("prediction", recording.predictions)):
            row = torch.stack([tensor[digit * PER_DIGIT] for tensor in tensors])
            canvas.paste(_tiles(row, columns, STRIP_TILE), (left, top))
            write((left - 16, top + STRIP_TILE // 2), name, 17, DIM, "rm")
            top += STRIP_TILE + GAP
        top += 12
    return canvas


def _tiles(samples: Tensor, columns: int, tile: int) -> Image:
    pixels: Pixels = to_pixels(samples, -1.0, 1.0)
    return grid(pixels, columns, scale=tile // pixels.shape[1], gap=GAP, background=BACKGROUND)
