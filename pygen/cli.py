"""The command line: options in, one line of error out; the work is done elsewhere."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import click
import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

import pygen
from pygen import _C
from pygen.diffusion import SOLVERS
from pygen.diffusion.adaptive import ADAPTIVE
from pygen.diffusion.schedules import SPACINGS
from pygen.files import replacing
from pygen.images import grid, to_pixels
from pygen.models.checkpoint import CheckpointError, ModelDescription, load_model
from pygen.models.fields import MAX_COUNT
from pygen.ops.packed_linear import FORMATS, WeightFormat

DIGITS = Path(__file__).parent / "models" / "digits"
TEXT = Path(__file__).parent / "models" / "text"
SEED = click.IntRange(0, 2**64 - 1)
TILE = 40  # pixels that a small sample is enlarged to fill in a grid


@click.group(invoke_without_command=True)
@click.version_option(pygen.__version__, message="pygen %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Fast generative sampling for PyTorch."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
        return
    try:
        _C.isa()  # reads PYGEN_CPU_ISA, which no command can do without
    except RuntimeError as error:
        raise click.ClickException(str(error)) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. Bad input is one line on stderr and 2, an interrupt is 130."""
    try:
        code = cli.main(args=arguments, prog_name="pygen", standalone_mode=False)
    except click.Abort:
        return 130
    except click.ClickException as error:
        click.echo(f"pygen: error: {' '.join(error.format_message().split())}", err=True)
        return 2
    return code if isinstance(code, int) else 0


class Numbers(click.ParamType[list[int]]):
    """Classes: numbers and ranges, "0,2,5-7"."""

    name = "classes"

    def convert(self, value: object, param: click.Parameter | None, context: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        numbers: list[int] = []
        for part in str(value).split(","):
            first, dash, last = part.strip().partition("-")
            if not (_is_count(first) and (_is_count(last) if dash else True)):
                self.fail(f"{value!r} is not numbers and ranges, such as 0,2,5-7", param, context)
            begin, end = int(first), int(last or first)
            if end < begin:
                self.fail(f"the range {part.strip()!r} runs backwards", param, context)
            if end >= MAX_COUNT:
                self.fail(f"{end} is not a class of any model", param, context)
            numbers += range(begin, end + 1)
        return numbers


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


class Finite(click.ParamType[float]):
    """A number that is neither NaN nor infinite."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        number = float(click.FLOAT.convert(value, param, context))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, context)
        return number


class Output(click.Path):
    """A file to write, in a folder that is there, with a suffix that says what to write."""

    def __init__(self, *suffixes: str) -> None:
        super().__init__(dir_okay=False, path_type=Path)
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, context)))
        if path.suffix not in self.suffixes:
            self.fail(f"{value!r} must end in {' or '.join(self.suffixes)}", param, context)
        if not path.parent.is_dir():
            self.fail(f"the folder {str(path.parent)!r} does not exist", param, context)
        return path


@contextmanager
def _writing(out: Path, option: str = "--out") -> Iterator[IO[bytes]]:
    """``replacing``, with what the disk refuses told as an error of the option."""
    try:
        with replacing(out) as stream:
            yield stream
    except OSError as error:
        raise click.BadParameter(
            f"cannot write {str(out)!r}: {error.strerror or error}", param_hint=f"'{option}'"
        ) from None


def _need(module: str, package: str, extra: str = "demo") -> None:
    try:
        import_module(module)
    except ModuleNotFoundError:
        raise click.ClickException(f"{package} is not installed: pip install 'pygen-kernels[{extra}]'") from None


@cli.command()
def doctor() -> None:
    """Show versions, instruction sets, CUDA, and every op x backend."""
    from pygen._doctor import doctor

    doctor()


@cli.command()
@click.option("--out", type=Output(".png"), default="digits.png", show_default=True, help="Where the pictures go.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the noise.")
def demo(out: Path, seed: int) -> None:
    """Draw digits by five solvers, time them, and write the pictures; then generate text, and time that."""
    _need("PIL", "pillow")
    _need("sklearn", "scikit-learn")
    from pygen import demo_text
    from pygen.demo import run

    with _writing(out) as stream:
        picture, _ = run(DIGITS, seed)
        picture.save(stream, "PNG")
    click.echo(f"pictures in {out}\n")
    if not demo_text.run(TEXT):
        raise click.ClickException("pygen's tokens are not transformers'")


@cli.command()
@click.option("--model", type=click.Path(path_type=Path), default=TEXT, help="A checkpoint: a directory, or a .gguf.")
@click.option("--prompt", help="Text to go on from.")
@click.option("--prompt-ids", type=Numbers(), metavar="IDS", help="Tokens to go on from: 1,2,3.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=200, show_default=True)
@click.option("--weights", type=click.Choice(FORMATS), default="bfloat16", show_default=True, help="Packed as.")
@click.option("--temperature", type=Finite(), default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=click.IntRange(0), default=0, help="0 keeps all.")
@click.option("--top-p", type=Finite(), default=1.0, show_default=True)
@click.option("--min-p", type=Finite(), default=0.0, show_default=True)
@click.option("--repetition-penalty", type=Finite(), default=1.0, show_default=True)
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--stop", multiple=True, help="Text to end at; may be given several times.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text as it comes.")
def generate(
    model: Path,
    prompt: str | None,
    prompt_ids: list[int] | None,
    max_new_tokens: int,
    weights: WeightFormat,
    stop: tuple[str, ...],
    as_json: bool,
    **sampling: Any,
) -> None:
    """Go on from a prompt, by default as a small model of Python's language reference does."""
    if (prompt is None) == (prompt_ids is None):
        raise click.UsageError("give --prompt or --prompt-ids")
    try:
        decoder = pygen.Decoder.from_pretrained(model, weights, progress=sys.stderr.isatty())
        ids = prompt_ids or [] if prompt is None else decoder.text.encode(prompt)
        begin = time.perf_counter()
        request = decoder.submit(ids, max_new_tokens, stop=stop, **sampling)
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from None
    words = decoder.text.stream() if decoder.has_text else None
    held = max(map(len, stop), default=1) - 1  # characters that may turn out to begin a stop string
    text, shown = prompt or "", 0
    while request.ended is None:
        for _, token in decoder.step():
            text += f" {token}" if words is None else words.put(token)
            if stop:
                text = (prompt or "") + request.text
            end = len(text) - (held if request.ended is None else 0)
            if not as_json and end > shown:
                click.echo(text[shown:end], nl=False)
                shown = end
    seconds = time.perf_counter() - begin
    if not as_json:
        return click.echo()
    result = {"prompt_ids": ids, "ids": request.tokens, "ended": request.ended, "seconds": seconds}
    if words is not None:
        result["text"] = text.removeprefix(prompt or "")
    click.echo(json.dumps(result | {"tokens_per_second": len(request.tokens) / seconds}))


@cli.command()
@click.argument("suites", nargs=-1, metavar="[steps|decode|decoder|attention|unet|ops]...")
@click.option("--quick", is_flag=True, help="Few small cases in a few seconds, nothing compiled.")
@click.option("--json", "json_out", type=Output(".json"), help="Where all medians and quartiles go.")
@click.option("--compare", type=click.Path(path_type=Path), metavar="OLD", help="What --json wrote at another time.")
@click.option("--fail-slower", type=Finite(), metavar="RATIO", help="Exit with 1 where a case takes RATIO x OLD.")
@click.option("--plot", type=Output(".png"), help="Where a roofline goes.")
def bench(
    suites: tuple[str, ...],
    quick: bool,
    json_out: Path | None,
    compare: Path | None,
    fail_slower: float | None,
    plot: Path | None,
) -> int:
    """Time the suites (all if none is named) beside their peers and floors, each case once it is proved right."""
    checkout = Path(pygen.__file__).resolve().parent.parent
    if not (checkout / "bench" / "run.py").is_file():
        raise click.ClickException("bench needs the source checkout, of which this is an installed part: git clone it")
    if fail_slower is not None and compare is None:
        raise click.UsageError("--fail-slower needs --compare")
    if plot is not None:
        _need("matplotlib", "matplotlib", "bench")
    sys.path.insert(0, str(checkout))
    run = import_module("bench.run")
    for suite in suites:
        if suite not in run.SUITES:
            raise click.BadParameter(f"{suite!r} is not one of {', '.join(run.SUITES)}", param_hint="'SUITE'")
    try:
        old = None if compare is None else run.read_old(compare)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--compare'") from None
    with ExitStack() as files:
        streams = [
            None if path is None else files.enter_context(_writing(path, option))
            for path, option in ((json_out, "--json"), (plot, "--plot"))
        ]
        code: int = run.main(suites or run.SUITES, quick, old, fail_slower, *streams)
    return code


@cli.command()
@click.option(
    "--model",
    "directory",
    type=click.Path(path_type=Path),
    default=DIGITS,
    help="Folder of a model; digits if left out.",
)
@click.option("--solver", type=click.Choice([*SOLVERS, ADAPTIVE]), default="dpmpp_2m", show_default=True)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True)
@click.option("--spacing", type=click.Choice(SPACINGS), default="trailing", show_default=True, help="Of the times.")
@click.option("--classes", type=Numbers(), help="Such as 0,2,5-7; taken in turn. All if left out.")
@click.option("--count", type=click.IntRange(1, 2**32), default=100, show_default=True, help="How many samples.")
@click.option("--guidance", type=Finite(), default=2.0, show_default=True, help="Factor of classifier-free guidance.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the noise.")
@click.option(
    "--batch", type=click.IntRange(1), default=256, show_default=True, help="Samples at once; bounds the memory."
)
@click.option("--out", type=Output(".png", ".npy", ".safetensors"), required=True, help="A grid (.png) or the tensor.")
def sample(
    directory: Path,
    solver: str,
    steps: int,
    spacing: str,
    classes: list[int] | None,
    count: int,
    guidance: float,
    seed: int,
    batch: int,
    out: Path,
) -> None:
    """Draw samples from a model and write them to a file."""
    try:
        model, description = load_model(directory)
    except CheckpointError as error:
        raise click.BadParameter(str(error), param_hint="'--model'") from None
    channels = description.shape[0]
    if out.suffix == ".png":
        _need("PIL", "pillow")
        if channels not in (1, 3):
            raise click.BadParameter(f"a .png needs samples of 1 or 3 channels, not {channels}", param_hint="'--out'")
    null = description.num_classes
    classes = list(range(null)) if classes is None else classes
    if max(classes) >= null:
        raise click.BadParameter(f"{max(classes)} is not one of the classes 0 to {null - 1}", param_hint="'--classes'")
    try:
        steps_plan = pygen.plan(
            solver,
            description.schedule,
            steps,
            prediction=description.prediction,
            guidance=guidance,
            clip=description.clip,
            spacing=spacing,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    try:
        samples = torch.empty(count, *description.shape)
    except RuntimeError:
        raise click.BadParameter(f"{count} samples do not fit in the memory", param_hint="'--count'") from None

    begin = time.perf_counter()
    with _writing(out) as stream:
        labels = torch.tensor(classes)
        for first in range(0, count, batch):
            ids = torch.arange(first, min(first + batch, count))
            samples[ids] = pygen.sample(
                model,
                (len(ids), *description.shape),
                solver=steps_plan,
                cond={"class_labels": labels[ids % len(labels)]},
                uncond=None if guidance == 1.0 else {"class_labels": torch.full_like(ids, null)},
                seed=seed,
                sample_ids=ids,
            )
        if not samples.isfinite().all():
            raise click.ClickException(f"the samples are not finite: the model diverges with guidance {guidance:g}")
        _write(stream, out.suffix, samples, description)
    seconds = time.perf_counter() - begin
    click.echo(f"{count} samples by {solver} in {steps} steps: {seconds:.2f} s, {out}")


def _write(stream: IO[bytes], suffix: str, samples: Tensor, description: ModelDescription) -> None:
    if suffix == ".npy":
        np.save(stream, samples.numpy())
    elif suffix == ".safetensors":
        stream.write(save({"samples": samples}))
    else:
        low, high = description.clip or (float(samples.min()), float(samples.max()))
        scale = max(1, TILE // max(description.shape[1:]))
        picture = grid(to_pixels(samples, low, high), math.isqrt(len(samples) - 1) + 1, scale=scale)
        picture.save(stream, "PNG")
