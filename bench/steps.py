"""The step ops beside their floors and their peers, in one run: python -m bench.steps

Every row is checked first; a row whose check fails shows no time. The floor of a row is a copy that moves as many bytes
at the same working set, measured in the same run.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pygen
from bench.measure import Call, copy_call, interleaved
from pygen import _C
from pygen.diffusion import SOLVERS, Stepper
from pygen.ops.affine_step import make_table

ROW = {"guidance": 7.5, "pred_x": 1.1, "pred_out": -0.45, "x0": 0.7, "pred0": 0.35}
ZERO = torch.tensor(0)


@dataclass
class Line:
    """One line of the table: named calls of one piece of work, the bytes it moves, and its results to be compared."""

    name: str
    calls: dict[str, Call]
    bytes_moved: int
    results: Callable[[], tuple[Tensor, Tensor]]
    unit: int = 1


def formula(x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
    pred = ROW["pred_x"] * x + ROW["pred_out"] * (uncond + ROW["guidance"] * (cond - uncond))
    return ROW["x0"] * x + ROW["pred0"] * pred


def formula_in_place(x: Tensor, cond: Tensor, uncond: Tensor) -> None:
    x.copy_(formula(x, cond, uncond))


def guided_step(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Line:
    x, cond, uncond = (torch.randn(shape).to(dtype) for _ in range(3))
    table, out = make_table([ROW]), torch.empty_like(x)
    compiled = torch.compile(formula, fullgraph=True, dynamic=False)
    return Line(
        f"guided step {shape} {str(dtype)[6:]}",
        {
            "pygen": lambda: pygen.affine_step(x, cond, table, ZERO, uncond=uncond),
            "pygen, out=": lambda: pygen.affine_step(x, cond, table, ZERO, uncond=uncond, out=out),
            "eager": lambda: formula(x, cond, uncond),
            "torch.compile": lambda: compiled(x, cond, uncond),
        },
        4 * x.numel() * x.element_size(),
        lambda: (pygen.affine_step(x, cond, table, ZERO, uncond=uncond), formula(x, cond, uncond)),
    )


def guided_step_in_place(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Line:
    x, cond, uncond = (torch.randn(shape).to(dtype) for _ in range(3))
    table = make_table([ROW | {"x0": 0.99, "pred_x": 0.0, "pred0": 0.01}])  # stays bounded however often it runs
    compiled = torch.compile(formula_in_place, fullgraph=True, dynamic=False)
    small = torch.randn(3, 64, 64).to(dtype)
    return Line(
        f"in place {shape} {str(dtype)[6:]}",
        {
            "pygen": lambda: pygen.affine_step(x, cond, table, ZERO, uncond=uncond, out=x),
            "eager": lambda: formula_in_place(x, cond, uncond),
            "torch.compile": lambda: compiled(x, cond, uncond),
        },
        4 * x.numel() * x.element_size(),
        lambda: (
            pygen.affine_step(small[:1], small[1:2], make_table([ROW]), ZERO, uncond=small[2:]),
            formula(*small.unsqueeze(1)),
        ),
    )


def normals(count: int) -> Line:
    out, seed = torch.empty(1, count), torch.tensor([1])
    with pygen.backend("reference"):
        truth = pygen.philox_normal((1, 4096), seed=seed)
    return Line(
        f"{count} normals",
        {
            "pygen": lambda: pygen.philox_normal(seed=seed, step=ZERO, out=out),
            "eager": lambda: torch.randn(1, count, out=out),
        },
        out.numel() * out.element_size(),
        lambda: (pygen.philox_normal((1, 4096), seed=seed), truth),
    )


def solver_step(solver: str, shape: tuple[int, ...]) -> Line:
    """The tenth of twenty steps, as diffusers' own scheduler takes it and as a Stepper does."""
    plan = pygen.plan(solver, "scaled_linear", 20)
    x, outputs = torch.randn(shape), [torch.randn(shape) for _ in range(20)]
    stepper, seed = Stepper(plan, x), torch.tensor([0])
    for i in range(9):
        x = stepper.step(i, x, outputs[i], seed=seed)
    out = torch.empty_like(x)
    calls: dict[str, Call] = {"pygen": lambda: stepper.step(9, x, outputs[9], seed=seed, out=out)}
    results = lambda: (x, x)  # noqa: E731
    if find_spec("diffusers"):
        scheduler = diffusers_scheduler(solver)
        scheduler.set_timesteps(20)
        state = torch.randn(shape)

        def run(until: int) -> Tensor:
            scheduler.set_timesteps(20)
            y = state
            for t, output in zip(scheduler.timesteps[:until], outputs, strict=False):
                scheduler.scale_model_input(y, t)  # what a pipeline calls first
                y = scheduler.step(output, t, y).prev_sample
            return y

        def ours(until: int) -> Tensor:
            y, fresh = state, Stepper(plan, state)
            for i in range(until):
                y = fresh.step(i, y, outputs[i], seed=seed)
            return y

        if not any(plan.noisy) and solver != "euler":  # theirs draws other noise, or holds the sample in other units
            results = lambda: (ours(20), run(20))  # noqa: E731
        run(9)
        t = scheduler.timesteps[9]

        def theirs() -> None:
            if hasattr(scheduler, "_step_index"):
                scheduler._step_index = 9  # the same step again
            scheduler.step(outputs[9], t, x)

        calls["diffusers"] = theirs
    moved = 3 + plan.history + 2 * plan.carries
    return Line(f"{solver} step {shape}", calls, moved * x.numel() * 4, results)


def diffusers_scheduler(solver: str) -> Any:
    import diffusers

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
    make: dict[str, Callable[[], Any]] = {
        "ddpm": lambda: diffusers.DDPMScheduler(**betas, clip_sample=False),
        "ddim": lambda: diffusers.DDIMScheduler(**betas, clip_sample=False),
        "euler": lambda: diffusers.EulerDiscreteScheduler(**betas),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**betas),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**betas),
    }
    return make[solver]()


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    small, large = (2, 4, 64, 64), (8, 4, 128, 128)
    lines = [
        guided_step(small),
        guided_step(large),
        guided_step(small, torch.bfloat16),
        guided_step_in_place((16, 1 << 20)),
        guided_step_in_place((32, 1 << 20), torch.bfloat16),
        normals(1 << 20),
        *(solver_step(solver, shape) for shape in (small, large) for solver in SOLVERS),
    ]
    columns = ("pygen", "pygen, out=", "eager", "torch.compile", "diffusers", "copy")
    table = Table(title="microseconds, medians, warm, calls interleaved", title_justify="left")
    table.add_column("work")
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("share of copy", justify="right")
    table.add_column("beside the best peer", justify="right")
    for line in lines:
        ours, theirs = line.results()
        scale = theirs.abs().max().item()
        if not torch.allclose(ours.float(), theirs.float(), rtol=0, atol=scale * 64 * torch.finfo(ours.dtype).eps):
            table.add_row(line.name, "[red]results differ", *[""] * (len(columns) + 1))
            continue
        times = interleaved(line.calls | {"copy": copy_call(line.bytes_moved)})
        best = min(time for name, time in times.items() if name.startswith("pygen"))
        peers = [times[name] for name in ("eager", "torch.compile", "diffusers") if name in times]
        table.add_row(
            line.name,
            *(f"{times[column] * 1e6:.1f}" if column in times else "" for column in columns),
            f"{times['copy'] / best:.2f}",
            f"{min(peers) / best:.1f}x" if peers else "",
        )
    console = Console(width=150)
    console.print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {_C.isa()}, python {platform.python_version()}"
    )
    console.print(table)


if __name__ == "__main__":
    main()
