"""The suite `steps`: what happens between two calls of a model, beside torch's formula and diffusers' schedulers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import pygen
from bench import ops
from bench.cases import Case, Work
from bench.measure import Call
from pygen.diffusion import Stepper
from pygen.ops import SPECS, Example
from pygen.ops.affine_step import make_table
from tests.diffusers_float64 import in_float64
from tests.error_rule import Triple

SMALL, LARGE = (2, 4, 64, 64), (8, 4, 128, 128)
# 0.5 + 0.35 * 1.1 < 1: a state that is stepped in place stays bounded, however often.
ROW = {"guidance": 7.5, "pred_x": 1.1, "pred_out": -0.45, "x0": 0.5, "pred0": 0.35}
ZERO = torch.tensor(0)
STEPS, TIMED = 20, 9  # of so many steps, the one that is timed: all history is there
SPEC = SPECS["affine_step"]
# Solvers of the plain API with the diffusers class that walks the same; the drop-ins' table has all classes.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def cases(quick: bool) -> list[Case]:
    float32, bfloat16 = torch.float32, torch.bfloat16
    guided = [(SMALL, float32), (LARGE, float32), (SMALL, bfloat16)]
    in_place = [((16, 1 << 20), float32), ((32, 1 << 20), bfloat16)]
    solvers = [(solver, shape) for shape in (SMALL, LARGE) for solver in PEERS]
    if quick:
        guided, in_place, solvers = [(SMALL, float32)], [], [("dpmpp_2m", SMALL), ("unipc", SMALL)]
    return [
        *(Case("steps", f"guided step {s} {str(d)[6:]}", partial(guided_step, s, d)) for s, d in guided),
        *(Case("steps", f"in place {s} {str(d)[6:]}", partial(guided_step, s, d, in_place=True)) for s, d in in_place),
        Case("steps", f"{1 << 20} normals", partial(normals, 1 << 20)),
        *(Case("steps", f"{solver} step {shape}", partial(solver_step, solver, shape)) for solver, shape in solvers),
    ]


def formula(x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
    pred = ROW["pred_x"] * x + ROW["pred_out"] * (uncond + ROW["guidance"] * (cond - uncond))
    return ROW["x0"] * x + ROW["pred0"] * pred


def formula_in_place(x: Tensor, cond: Tensor, uncond: Tensor) -> None:
    x.copy_(formula(x, cond, uncond))


def guided_step(shape: tuple[int, ...], dtype: torch.dtype, in_place: bool = False) -> Work:
    x, cond, uncond = (torch.randn(shape).to(dtype) for _ in range(3))
    table, out = make_table([ROW]), x if in_place else torch.empty_like(x)
    function = formula_in_place if in_place else formula
    compiled = torch.compile(function, fullgraph=True, dynamic=False)

    def results() -> list[Triple]:
        a, b, c = (tensor[:2, : 1 << 16].clone() for tensor in (x, cond, uncond))
        same, truth = formula(a, b, c), formula(a.double(), b.double(), c.double())
        return [(pygen.affine_step(a, b, table, ZERO, uncond=c, out=a if in_place else None), same, truth)]

    calls: dict[str, Call] = {
        "eager": lambda: function(x, cond, uncond),
        "torch.compile": lambda: compiled(x, cond, uncond),
        "pygen, out=": lambda: pygen.affine_step(x, cond, table, ZERO, uncond=uncond, out=out),
    }
    if not in_place:
        calls["pygen"] = lambda: pygen.affine_step(x, cond, table, ZERO, uncond=uncond)
    example = Example("", {"x": x, "model_output": cond, "uncond": uncond, "history": [], "out": out})
    return Work(calls, SPEC.bytes_moved(example), SPEC.flops(example), dtype, results)


def normals(count: int) -> Work:
    out, seed = torch.empty(1, count), torch.tensor([1])
    spec = SPECS["philox_normal"]
    example = Example("", {"out": out, "seed": seed, "step": ZERO})
    calls: dict[str, Call] = {
        "eager": lambda: torch.randn(1, count, out=out),
        "pygen, out=": lambda: pygen.philox_normal(seed=seed, step=ZERO, out=out),
    }
    return Work(calls, spec.bytes_moved(example), spec.flops(example), out.dtype, lambda: ops.results(spec, example))


def solver_step(solver: str, shape: tuple[int, ...]) -> Work:
    """One step of a run, as diffusers' own scheduler takes it and as a Stepper does."""
    plan = pygen.plan(solver, "scaled_linear", STEPS)
    start, outputs = torch.randn(shape), [torch.randn(shape) for _ in range(STEPS)]
    seed = torch.tensor([0])

    def ours(until: int, dtype: torch.dtype = torch.float32) -> tuple[Stepper, Tensor]:
        x = start.to(dtype)
        stepper = Stepper(plan, x)
        for i in range(until):
            x = stepper.step(i, x, outputs[i].to(dtype), seed=seed)
        return stepper, x

    def results() -> list[Triple]:
        actual = ours(STEPS)[1]
        if find_spec("diffusers") and not any(plan.noisy):  # whose noise is another
            same, truth = (diffusers_walk(solver, start, outputs, STEPS, d)[1] for d in (torch.float32, torch.float64))
        else:
            with pygen.backend("reference"):
                same, truth = ours(STEPS)[1], ours(STEPS, torch.float64)[1]
        return [(actual, same, truth)]

    stepper, x = ours(TIMED)
    out = torch.empty_like(x)
    calls: dict[str, Call] = {"pygen, out=": lambda: stepper.step(TIMED, x, outputs[TIMED], seed=seed, out=out)}
    if find_spec("diffusers"):
        scheduler, _ = diffusers_walk(solver, start, outputs, TIMED)
        t = scheduler.timesteps[TIMED]

        def theirs() -> None:
            if hasattr(scheduler, "_step_index"):
                scheduler._step_index = TIMED  # the same step again
            scheduler.scale_model_input(x, t)  # what a pipeline calls first
            scheduler.step(outputs[TIMED], t, x)

        calls["diffusers"] = theirs
    read = {"x": x, "model_output": x, "history": [*stepper.predictions, *stepper.carried]}
    written = {"out": out, "pred": x if stepper.predictions else None, "second": x if stepper.carried else None}
    example = Example("", read | written)
    return Work(calls, SPEC.bytes_moved(example), SPEC.flops(example), torch.float32, results)


def in_dtype(kind: type, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Where a class of diffusers' schedulers computes in this dtype: float32, or float64 for the truth."""
    return in_float64(kind) if dtype is torch.float64 else nullcontext()


def scheduler_of(solver: str) -> tuple[type, dict[str, Any]]:
    import diffusers

    name, options = PEERS[solver]
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
    return getattr(diffusers, name), betas | options


def diffusers_walk(
    solver: str, start: Tensor, outputs: list[Tensor], until: int, dtype: torch.dtype = torch.float32
) -> tuple[Any, Tensor]:
    """The scheduler and the sample after so many steps, over the same outputs of the model."""
    kind, options = scheduler_of(solver)
    with in_dtype(kind, dtype):
        scheduler = kind(**options)
        scheduler.set_timesteps(STEPS)
        x = start.to(dtype)
        if solver == "euler":  # it holds x / alpha; at the end alpha is 1
            x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
        for t, output in zip(scheduler.timesteps[:until], outputs, strict=False):
            scheduler.scale_model_input(x, t)
            x = scheduler.step(output.to(dtype), t, x).prev_sample
    return scheduler, x


if __name__ == "__main__":  # python -m bench.steps: this suite alone
    from bench.run import main

    raise SystemExit(main(["steps"]))
