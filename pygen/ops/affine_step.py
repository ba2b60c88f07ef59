"""affine_step: one row of a solver's table, executed over a batch in one pass over memory.

    out  = base * uncond + guidance * (cond - uncond) + negative * (neg - uncond)
    pred = rescale * clamp(pred_x * x + pred_out * out, low, high)
    y_r  = x_r * x + out_r * out + pred_r * pred + sum_j history_rj * history_j + noise_r * s * z,   r = 0, 1
    next = y_0, or (1 - mask) * y_0 + mask * y_1 where there is a mask;     second = y_1

where cond is the model's output, alone where there is no uncond; and s is 1, or what ``noise_scale`` holds: s itself, a
variance (s = sqrt(v)), or a logarithm of one (s = exp((log_var_shift + log_var_scale * v) / 2)).

The coefficients are the columns of a float64 table, the row of each sample (or token) an integer: nothing that changes
from step to step is a Python number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pygen import _C
from pygen.ops.backend import use_reference
from pygen.ops.philox_normal import DRAW_AFFINE_STEP, philox_normal_reference
from pygen.ops.spec import Example, OpSpec, tensor_bytes

# The table's columns; from HISTORY_COLUMN on, two per history term: for y_0 and for y_1.
COLUMNS: dict[str, int] = {name: i for i, name in enumerate(_C.AFFINE_COLUMNS)}
HISTORY_COLUMN = len(COLUMNS)
MAX_HISTORY: int = _C.MAX_HISTORY
NoiseScaleKind = Literal["factor", "variance", "log_variance"]
_BACKENDS = ("reference", "cpu", "cuda")


def affine_step(
    x: Tensor,
    model_output: Tensor | None,
    table: Tensor,
    rows: Tensor,
    *,
    uncond: Tensor | None = None,
    negative: Tensor | None = None,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    noise_scale: Tensor | None = None,
    noise_scale_kind: NoiseScaleKind = "factor",
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    seed: Tensor | None = None,
    sample_ids: Tensor | None = None,
    out: Tensor | None = None,
    pred: Tensor | None = None,
    second: Tensor | None = None,
) -> Tensor:
    """One solver step; see the module's formula. A term whose coefficient is exactly 0 is not read; that of uncond is
    base - guidance - negative.

    Elementwise tensors broadcast to x's shape (batch, ...), have any strides, and are float32, bfloat16 or float16,
    each by itself; arithmetic is float32. An output may be the very tensor that an input is, and not a part of one.

    Args:
        x: the state, (batch, ...).
        model_output: the (conditional) output of the model.
        table: float64 (rows, columns), as ``StepPlan.table``; the columns are ``COLUMNS``, then two per history term.
        rows: int64, one index, or shape (batch,), or (batch, tokens) where x is (batch, tokens, ...).
        uncond: the unconditional output; without it the columns base, guidance and negative are not used.
        negative: a third output (neg), as that for a negative prompt, or for an image without its instruction.
        history: up to 12 tensors.
        noise: z. Or
        seed: int64, one element or (batch,): z is drawn by Philox, as ``philox_normal(..., draw=DRAW_AFFINE_STEP)``
            with the row's step and ``sample_ids`` (int64 (batch,)) would, without being stored.
        noise_scale: the deviation of the noise, read as ``noise_scale_kind`` says: "factor", "variance" or
            "log_variance".
        mask: blends y_0 (where 0) with y_1 (where 1); may be bool.
        scale: float32 (batch, columns), factors on the coefficients made on the device.
        out: receives next; new where left out.
        pred, second: receive pred and y_1 where given.

    Returns:
        next, in ``out``.

    Raises:
        ValueError, TypeError, IndexError: naming the argument.
    """
    return affine_results(
        x, model_output, table, rows, uncond, negative, history, noise, noise_scale, noise_scale_kind, mask, scale,
        seed, sample_ids, out, pred, second,
    )[0]  # fmt: skip


def affine_results(
    x: Tensor,
    model_output: Tensor | None,
    table: Tensor,
    rows: Tensor,
    uncond: Tensor | None = None,
    negative: Tensor | None = None,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    noise_scale: Tensor | None = None,
    noise_scale_kind: NoiseScaleKind = "factor",
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    seed: Tensor | None = None,
    sample_ids: Tensor | None = None,
    out: Tensor | torch.dtype | None = None,
    pred: Tensor | torch.dtype | None = None,
    second: Tensor | torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """All of ``affine_step``'s results: next, and pred and y_1 where given, or as new tensors of the dtype given."""
    reference = use_reference("affine_step", _BACKENDS, x.device)
    kind = None if noise_scale is None else noise_scale_kind
    if not (reference or torch.compiler.is_compiling()):
        return _C.affine_step(
            x, model_output, table, rows, uncond, negative, history, noise, noise_scale, kind, mask, scale, seed,
            sample_ids, out, pred, second,
        )  # fmt: skip

    def place(result: Any) -> Any:
        return torch.empty_like(x, dtype=result) if isinstance(result, torch.dtype) else result

    places = place(x.dtype if out is None else out), place(pred), place(second)
    if reference:
        results = affine_step_reference(
            x, model_output, table, rows, uncond=uncond, negative=negative, history=history, noise=noise,
            noise_scale=noise_scale, noise_scale_kind=noise_scale_kind, mask=mask, scale=scale, seed=seed,
            sample_ids=sample_ids,
        )  # fmt: skip
        for tensor, result in zip(places, results, strict=True):
            if tensor is not None:
                tensor.copy_(result)
    else:  # the compiler's eyes do not reach into C
        _kernel(
            x, model_output, table, rows, uncond, negative, history, noise, noise_scale, kind, mask, scale, seed,
            sample_ids, *places,
        )  # fmt: skip
    return places


def affine_step_reference(
    x: Tensor,
    model_output: Tensor | None,
    table: Tensor,
    rows: Tensor,
    *,
    uncond: Tensor | None = None,
    negative: Tensor | None = None,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    noise_scale: Tensor | None = None,
    noise_scale_kind: NoiseScaleKind = "factor",
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    seed: Tensor | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    coefficients = table[rows.reshape(1) if rows.numel() == 1 else rows]
    step = coefficients[..., COLUMNS["step"]].to(torch.int64)
    if scale is not None:
        coefficients = coefficients * scale.reshape(len(scale), *[1] * (coefficients.dim() - 2), -1)

    def exact(index: int) -> Tensor:
        values = coefficients[..., index]
        return values.reshape(values.shape + (1,) * (x.dim() - values.dim()))

    def column(index: int) -> Tensor:
        return exact(index).to(compute)

    def term(coefficient: Tensor, tensor: Tensor | None) -> Tensor:
        """coefficient * tensor, and 0 where the coefficient is, whatever the tensor holds there."""
        if tensor is None:
            if bool((coefficient != 0).any()):
                raise ValueError("affine_step: a row reads a tensor that is None")
            return torch.zeros((), dtype=compute)
        return torch.where(coefficient == 0, 0, coefficient * tensor.to(compute))

    out = model_output
    if uncond is not None and model_output is not None:
        base, guidance, third = (COLUMNS[name] for name in ("base", "guidance", "negative"))
        unread = exact(base) - exact(guidance) - exact(third) == 0
        uncond = torch.where(unread, 0, uncond.to(compute))
        out = term(column(base), uncond) + term(column(guidance), model_output.to(compute) - uncond)
        out = out + term(column(third), None if negative is None else negative.to(compute) - uncond)

    pred = term(column(COLUMNS["pred_x"]), x) + term(column(COLUMNS["pred_out"]), out)
    pred = torch.clamp(pred, column(COLUMNS["low"]), column(COLUMNS["high"])) * column(COLUMNS["rescale"])

    z = noise
    if seed is not None:
        steps = step.expand(x.shape[0]) if step.dim() == 1 else step
        z = noise_of_rows(x, seed, steps, sample_ids, compute)
    if z is not None and noise_scale is not None:
        deviation = noise_scale.to(compute)
        if noise_scale_kind == "variance":
            deviation = torch.sqrt(deviation)
        elif noise_scale_kind == "log_variance":
            log_variance = column(COLUMNS["log_var_shift"]) + column(COLUMNS["log_var_scale"]) * deviation
            deviation = torch.exp(0.5 * log_variance)
        elif noise_scale_kind != "factor":
            raise ValueError(
                f"affine_step: noise_scale_kind must be factor, variance or log_variance, got {noise_scale_kind}"
            )
        z = z.to(compute) * deviation

    y = []
    for result in (0, 1):
        y_r = term(column(COLUMNS[f"x{result}"]), x) + term(column(COLUMNS[f"out{result}"]), out)
        y_r = y_r + term(column(COLUMNS[f"pred{result}"]), pred)
        for j, previous in enumerate(history):
            y_r = y_r + term(column(HISTORY_COLUMN + 2 * j + result), previous)
        y.append(y_r + term(column(COLUMNS[f"noise{result}"]), z))
    following, second = y
    if mask is not None:
        mask = mask.to(compute)
        following = (1 - mask) * following + mask * second
    following, pred, second = (result.to(x.dtype).expand(x.shape) for result in (following, pred, second))
    return following, pred, second


def noise_of_rows(x: Tensor, seed: Tensor, steps: Tensor, sample_ids: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The noise of each (sample, token), whose counter is its own row's step."""
    noise = torch.empty(x.shape, dtype=dtype)
    for step in steps.unique():
        drawn = philox_normal_reference(
            x.shape, seed=seed, step=step.reshape(1), sample_ids=sample_ids, draw=DRAW_AFFINE_STEP, dtype=dtype
        )[0]
        here = (steps == step).reshape(steps.shape + (1,) * (x.dim() - steps.dim()))
        noise = torch.where(here, drawn, noise)
    return noise


_kernel = torch.ops.pygen.affine_step.default


@torch.library.register_fake("pygen::affine_step")
def _fake(*arguments: object, **named: object) -> None:
    return None


def make_table(rows: Sequence[dict[str, float]], n_history: int = 0) -> Tensor:
    """A table from rows of named columns; ``h<j>_<r>`` names the factor of history term j in y_r."""
    defaults = {"base": 1.0, "guidance": 1.0, "low": -math.inf, "high": math.inf, "rescale": 1.0}
    column = COLUMNS | {f"h{j}_{r}": HISTORY_COLUMN + 2 * j + r for j in range(n_history) for r in (0, 1)}
    table = np.zeros((len(rows), len(column)))
    for values, row in zip(table, rows, strict=True):
        for name, value in (defaults | row).items():
            values[column[name]] = value
    return torch.from_numpy(table)


def history_terms(row: dict[str, float]) -> int:
    """How many history terms a row of named columns has."""
    return max((int(name[1:-2]) + 1 for name in row if name[0] == "h" and name not in COLUMNS), default=0)


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def tensor(*size: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(like)

    full = {"step": 7, "guidance": 3.5, "pred_x": 1.3, "pred_out": -0.7, "x0": 0.6, "out0": 0.1, "pred0": 0.5}
    full |= {"h0_0": -0.25, "h1_0": 0.125, "noise0": 0.3, "x1": 0.2, "pred1": 0.9, "h0_1": 0.4, "noise1": -0.1}
    clamped = full | {"step": 3, "guidance": 1.0, "low": -0.5, "high": 0.75, "rescale": 1.5, "h0_0": 0.0}
    plain = {"pred_x": 1.1, "pred_out": -0.4, "x0": 0.8, "pred0": 0.2}
    unconditional = plain | {"guidance": 0.0, "out0": 0.5, "step": 1}

    def example(
        name: str, table: Tensor, *size: int, rows: object = 0, model: torch.dtype = dtype, **more: Any
    ) -> Example:
        n_history = (table.shape[1] - HISTORY_COLUMN) // 2
        arguments = {
            "x": tensor(*size), "model_output": tensor(*size, like=model), "table": table, "rows": torch.tensor(rows),
            "history": [tensor(*size) for _ in range(n_history)], "out": torch.full(size, math.nan, dtype=dtype),
        }  # fmt: skip
        return Example(name, arguments | more)

    def everything(*size: int, like: torch.dtype = dtype) -> dict[str, Any]:
        return {
            "uncond": tensor(*size, like=like), "seed": torch.tensor([42]),
            "pred": torch.full(size, math.nan, dtype=dtype), "second": torch.full(size, math.nan, dtype=dtype),
        }  # fmt: skip

    table = make_table([full, clamped, plain, unconditional], n_history=2)
    learning = make_table(
        [row | {"log_var_shift": -3.0, "log_var_scale": 1.75} for row in (full, clamped, plain)], n_history=2
    )
    # Two guidances at once; rescaled; and where uncond, cond or the third are not read, or nothing is.
    weights = [(1.0, 7.5, -1.5), (0.7, 5.25, 0.0), (0.5, 0.5, 0.0), (3.5, 2.0, 1.5), (1.0, 0.0, 2.0), (0.0, 0.0, 0.0)]
    thirds = make_table(
        [full | dict(zip(("base", "guidance", "negative"), row, strict=True)) for row in weights], n_history=2
    )
    for count in range(0, 132):
        yield example("every count", table, 1, count, **everything(1, count))
    for row in range(4):
        yield example(f"row {row}", table, 2, 4, 8, 8, rows=row, **everything(2, 4, 8, 8))
    shape = (5, 3, 7, 9)
    yield example("no guidance", table, *shape, rows=0, noise=tensor(*shape))
    yield example("rows differ", table, *shape, rows=[2, 0, 3, 1, 0], **everything(*shape))
    yield example("rows by token", table, 2, 3, 65, rows=[[0, 1, 2], [3, 1, 0]], **everything(2, 3, 65))
    yield example("tokens without channels", table, 2, 3, rows=[[0, 1, 2], [3, 1, 0]], **everything(2, 3))
    for row in range(len(weights)):
        more = everything(*shape) | {"negative": tensor(*shape)}
        yield example(f"three outputs, row {row}", thirds, *shape, rows=row, **more)
    more = everything(*shape) | {"negative": tensor(5, 6, 7, 9)[:, ::2], "uncond": tensor(5, 1, 7, 9)}
    more["scale"] = torch.rand(5, thirds.shape[1], generator=generator) + 0.5
    yield example("three outputs, rows and scales differ", thirds, *shape, rows=[0, 1, 4, 3, 5], **more)
    seeds = torch.tensor([3, -1, 2**62, 3, 0])
    yield example("seeds", table, *shape, **everything(*shape) | {"seed": seeds})
    yield example("sample ids", table, *shape, **everything(*shape) | {"sample_ids": torch.tensor([5, 1, 9, 2**31, 0])})
    yield example("noise given", table, *shape, noise=tensor(*shape), noise_scale=tensor(*shape))
    for kind in ("variance", "log_variance"):
        learned = tensor(5, 6, 7, 9)[:, 3:]  # as the second half of a model's channels
        learned = learned.abs() if kind == "variance" else learned
        more = everything(*shape) | {"noise_scale": learned, "noise_scale_kind": kind}
        yield example(f"noise by {kind}", learning, *shape, rows=[0, 1, 2, 1, 0], **more)
    special = tensor(2, 64)
    special[:, ::5], special[:, 1::7], special[0, 2::9] = math.nan, math.inf, -math.inf
    for kind in ("variance", "log_variance"):
        more = {"noise": tensor(2, 64), "noise_scale": special, "noise_scale_kind": kind}
        yield example(f"NaN and Inf as {kind}", learning, 2, 64, rows=[0, 2], **more)
    yield example("broadcast", table, *shape, noise=tensor(5, 1, 1, 9), noise_scale=tensor(7, 1))
    yield example("mask", table, *shape, **everything(*shape) | {"mask": torch.rand(5, 1, 7, 9, generator=generator)})
    yield example("bool mask", table, *shape, mask=torch.rand(shape, generator=generator) > 0.5, noise=tensor(*shape))
    yield example(
        "scale", table, *shape, rows=[0, 1, 2, 3, 0], scale=torch.rand(5, table.shape[1], generator=generator) + 0.5,
        **everything(*shape),
    )  # fmt: skip
    for run in (64, 192, 40):  # of several histories that lie beside each other, as a policy's
        beside = list(tensor(2, 30, 2 * run).chunk(2, dim=-1))
        out = torch.full((2, 30, 3 * run), math.nan, dtype=dtype)[..., run : 2 * run]
        noises: list[dict[str, Any]] = [
            {"noise": tensor(2, 30, run)},
            {"seed": seeds[:1], "mask": tensor(2, 30, 1) > 0},
        ]
        for noise in noises:
            yield example(f"runs of {run}", table, 2, 30, run, history=beside, **noise)
            yield example(f"runs of {run}, strided", table, 2, 30, run, history=beside, **noise | {"out": out})
    for model in (torch.float32, torch.bfloat16, torch.float16):
        yield example(f"model output in {model}", table, *shape, model=model, **everything(*shape, like=model))
    yield example(
        "channels-last", table, *shape, x=tensor(*shape).to(memory_format=torch.channels_last),
        out=torch.full(shape, math.nan, dtype=dtype).to(memory_format=torch.channels_last), noise=tensor(*shape),
    )  # fmt: skip
    wide = tensor(5, 6, 7, 18)
    yield example(
        "sliced", table, *shape, x=wide[:, 1:4, :, ::2], model_output=wide[:, 3:, :, 1::2], **everything(*shape)
    )
    misaligned: dict[str, Any] = {"x": tensor(388)[1:].view(3, 129), "model_output": tensor(390)[3:].view(3, 129)}
    yield example("misaligned", table, 3, 129, **misaligned, noise=tensor(3, 129))
    x = tensor(*shape)
    yield example("in place", table, *shape, x=x, **everything(*shape) | {"out": x})
    ring = [tensor(*shape), tensor(*shape)]
    yield example("history overwritten", table, *shape, history=ring, **everything(*shape) | {"pred": ring[1]})
    yield example("NaN and Inf", table, 2, 64, rows=[0, 1], x=special, **everything(2, 64))
    unread = torch.full((2, 64), math.nan, dtype=dtype)
    yield example("unread NaN", table, 2, 64, rows=2, history=[unread, unread], uncond=unread, noise=unread)
    some = everything(2, 64) | {"uncond": unread, "negative": tensor(2, 64)}
    yield example("unread NaN in uncond", thirds, 2, 64, rows=[2, 3], **some)
    some |= {"uncond": tensor(2, 64), "model_output": unread}
    yield example("unread NaN in cond", thirds, 2, 64, rows=[4, 5], **some)
    some |= {"negative": unread, "model_output": tensor(2, 64)}
    yield example("unread NaN in the third", thirds, 2, 64, rows=[1, 2], **some)
    yield example(
        "no model output", make_table([{"x0": 0.5, "noise0": 2.0}]), 2, 9, model_output=None, noise=tensor(2, 9)
    )
    many = make_table([{f"h{j}_{r}": 0.1 * (j + 1) - r for j in range(12) for r in (0, 1)}], 12)
    yield example("12 history terms", many, 2, 77, second=torch.full((2, 77), math.nan, dtype=dtype))


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    """A guided step with one previous prediction, as DPM++ 2M's; and one that draws its noise, as an SDE solver's."""
    row = {"guidance": 7.5, "pred_x": 1.1, "pred_out": -0.45, "x0": 0.7, "pred0": 0.35, "h0_0": -0.15}
    sizes = {"latents": (2, 4, 64, 64), "large latents": (8, 4, 128, 128), "past the caches": (24, 4, 256, 256)}
    for name, size in sizes.items():
        x, cond, uncond, previous = (torch.randn(size).to(dtype) for _ in range(4))
        arguments = {
            "x": x, "model_output": cond, "uncond": uncond, "history": [previous], "rows": torch.tensor(0),
            "out": torch.empty_like(x), "pred": torch.empty_like(x),
        }  # fmt: skip
        yield Example(name, arguments | {"table": make_table([row], 1)})
        if name == "latents":
            noisy = make_table([row | {"noise0": 0.3}], 1)
            yield Example(f"{name} with noise", arguments | {"table": noisy, "seed": torch.tensor([42])})


def _bytes_moved(example: Example) -> int:
    a = example.arguments
    elementwise = ("x", "model_output", "uncond", "negative", "noise", "noise_scale", "mask", "out", "pred", "second")
    return tensor_bytes(*(a.get(name) for name in elementwise), *a["history"])


AFFINE_STEP = OpSpec(
    name="affine_step",
    function=affine_step,
    reference=lambda out, pred=None, second=None, **arguments: affine_step_reference(**arguments),
    operator=_kernel,
    outputs=("out", "pred", "second"),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=_bytes_moved,
    flops=lambda example: 2 * example.arguments["x"].numel() * (4 + 2 * len(example.arguments["history"])),
    benchmarks=_benchmarks,
)
