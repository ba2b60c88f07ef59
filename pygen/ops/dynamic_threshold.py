"""dynamic_threshold: the thresholds of dynamic thresholding, as factors on the rows of affine_step.

    s = clamp(quantile(|pred|, ratio), 1, max_value)     of each sample, pred as in affine_step, before its clamp

affine_step(..., scale=factors) with a row that clamps to [-1, 1] then clamps pred to [-s, s] and divides it by s
(Saharia et al. 2022, "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding", section 2.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pygen.ops.affine_step import COLUMNS, HISTORY_COLUMN, affine_step_reference, make_table
from pygen.ops.backend import use_reference
from pygen.ops.spec import Example, OpSpec, tensor_bytes

_BACKENDS = ("reference", "cpu", "cuda")


def dynamic_threshold(
    x: Tensor,
    model_output: Tensor | None,
    table: Tensor,
    rows: Tensor,
    *,
    uncond: Tensor | None = None,
    negative: Tensor | None = None,
    ratio: float = 0.995,
    max_value: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Per sample, s = clamp(quantile(|pred|, ratio), 1, max_value), in the form of ``affine_step``'s ``scale``.

    pred is made as ``affine_step`` makes it of the same arguments, before its clamp, in float32, and is not stored. The
    quantile is exactly that of ``torch.quantile``: linear between two order statistics, and NaN where a sample holds
    one.

    Args:
        x: the state, (batch, ...), in float32, bfloat16 or float16, of any strides.
        model_output, uncond, negative: broadcast to x, as in ``affine_step``.
        table: float64 (rows, columns), as in ``affine_step``.
        rows: int64, one index, or shape (batch,).
        ratio: which quantile, in [0, 1].
        max_value: the largest threshold; the smallest is 1.
        out: float32 (batch, columns), receives the factors; new where left out.

    Returns:
        The factors, float32 (batch, columns): 1, but for low and high, which are s, and rescale, which is 1 / s.

    Raises:
        ValueError, TypeError, IndexError: naming the argument.
    """
    if out is None:
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32  # float64 for the reference
        out = x.new_empty((x.shape[0], table.shape[1]), dtype=compute)
    if use_reference("dynamic_threshold", _BACKENDS, x.device):
        arguments: dict[str, Any] = {"uncond": uncond, "negative": negative, "ratio": ratio, "max_value": max_value}
        return out.copy_(dynamic_threshold_reference(x, model_output, table, rows, **arguments)[0])
    _kernel(x, model_output, table, rows, uncond, negative, ratio, max_value, out)
    return out


def dynamic_threshold_reference(
    x: Tensor,
    model_output: Tensor | None,
    table: Tensor,
    rows: Tensor,
    *,
    uncond: Tensor | None = None,
    negative: Tensor | None = None,
    ratio: float = 0.995,
    max_value: float = 1.0,
) -> tuple[Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    unclamped = table.clone()
    for name, value in {"low": -math.inf, "high": math.inf, "rescale": 1.0}.items():
        unclamped[:, COLUMNS[name]] = value
    results = [COLUMNS[f"{term}{result}"] for term in ("x", "out", "pred", "noise") for result in (0, 1)]
    unclamped[:, results] = 0.0
    _, pred, _ = affine_step_reference(x.to(compute), model_output, unclamped, rows, uncond=uncond, negative=negative)
    s = torch.quantile(pred.abs().flatten(1), ratio, dim=1).clamp(1, max_value)
    factors = torch.ones(x.shape[0], table.shape[1], dtype=compute, device=x.device)
    factors[:, COLUMNS["low"]] = factors[:, COLUMNS["high"]] = s
    factors[:, COLUMNS["rescale"]] = 1 / s
    return (factors,)


_kernel = torch.ops.pygen.dynamic_threshold.default


@torch.library.register_fake("pygen::dynamic_threshold")
def _fake(*arguments: object, **named: object) -> None:
    return None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)
    table = make_table(
        [
            {"guidance": 7.5, "pred_x": 1.1, "pred_out": -0.45, "low": -1.0, "high": 1.0, "x0": 0.5, "noise0": 0.3},
            {"pred_x": 2.3, "pred_out": -2.1, "low": -1.0, "high": 1.0, "pred0": 0.5, "h0_0": 0.2},
            {"guidance": 0.0, "pred_out": 1.0},
        ],
        n_history=1,
    )

    def tensor(*size: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(like)

    def example(name: str, *size: int, rows: object = 0, **more: Any) -> Example:
        arguments = {
            "x": tensor(*size), "model_output": tensor(*size), "table": table, "rows": torch.tensor(rows),
            "uncond": tensor(*size), "ratio": 0.995, "max_value": 50.0,
            "out": torch.full((size[0], table.shape[1]), math.nan),
        }  # fmt: skip
        return Example(name, arguments | more)

    for count in range(1, 67):
        for ratio in (0.0, 0.5, 0.9, 0.995, 1.0):
            yield example(f"every count, ratio {ratio}", 2, count, ratio=ratio)
    yield example("latents", 2, 4, 64, 64)
    yield example("shared by blocks", 1, 3, 80, 83)
    yield example("large", 2, 3, 128, 131, rows=[1, 0])
    shape = (5, 3, 7, 9)
    for row in range(3):
        yield example(f"row {row}", *shape, rows=row)
    yield example("rows differ", *shape, rows=[2, 0, 1, 1, 0])
    third = make_table([{"base": 0.7, "guidance": 5.0, "negative": -1.5, "pred_x": 1.1, "pred_out": -0.45}], 1)
    yield example("three outputs", *shape, table=third, negative=tensor(*shape))
    yield example("no guidance", *shape, uncond=None)
    yield example("no model output", *shape, model_output=None, uncond=None, table=make_table([{"pred_x": 1.7}], 1))
    yield example("below 1", *shape, rows=1, ratio=0.1)
    yield example("beyond the largest", *shape, max_value=1.5)
    for model in (torch.float32, torch.bfloat16, torch.float16):
        yield example(f"model output in {model}", *shape, model_output=tensor(*shape, like=model))
    yield example("channels-last", *shape, x=tensor(*shape).to(memory_format=torch.channels_last))
    wide = tensor(5, 6, 7, 18)
    yield example("sliced", *shape, x=wide[:, 1:4, :, ::2], model_output=wide[:, 3:, :, 1::2])
    yield example("misaligned", 3, 129, x=tensor(388)[1:].view(3, 129), model_output=tensor(390)[3:].view(3, 129))
    yield example("broadcast", *shape, model_output=tensor(5, 1, 1, 9), uncond=tensor(7, 1))
    columns = torch.full((table.shape[1], shape[0]), math.nan)
    yield example("strided out", *shape, out=columns.t())
    alike = torch.full((2, 300), 2.5, dtype=dtype)
    yield example("alike", 2, 300, x=alike, model_output=alike, uncond=alike)
    few = torch.randint(-3, 4, (3, 500), generator=generator).to(dtype)
    for ratio in (0.3, 0.7, 0.995):
        yield example("few values", 3, 500, x=few, uncond=None, model_output=few, ratio=ratio)
    special = tensor(3, 64)
    special[0, 5], special[1, ::3], special[2, 1] = math.nan, math.inf, -math.inf
    yield example("NaN and Inf", 3, 64, x=special, ratio=0.5)
    yield example("thresholds beyond all", 3, 64, x=special, ratio=1.0, max_value=math.inf)
    unread = torch.full((2, 64), math.nan, dtype=dtype)
    yield example("unread NaN", 2, 64, rows=2, x=unread, model_output=unread)


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    """Guided predictions as at a trajectory's beginning, where many are beyond 1."""
    table = make_table([{"guidance": 7.5, "pred_x": 1.1, "pred_out": -0.45, "low": -1.0, "high": 1.0}])
    sizes = {"pixels": (2, 3, 64, 64), "latents": (2, 4, 64, 64), "large pixels": (4, 3, 256, 256)}
    for name, size in sizes.items():
        x, cond, uncond = (torch.randn(size).to(dtype) for _ in range(3))
        arguments = {"x": x, "model_output": cond, "uncond": uncond, "table": table, "rows": torch.tensor(0)}
        yield Example(name, arguments | {"max_value": 3.0, "out": torch.empty(size[0], HISTORY_COLUMN)})


DYNAMIC_THRESHOLD = OpSpec(
    name="dynamic_threshold",
    function=dynamic_threshold,
    reference=lambda out, **arguments: dynamic_threshold_reference(**arguments),
    operator=_kernel,
    outputs=("out",),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(*(example.arguments[name] for name in ("x", "model_output", "uncond"))),
    flops=lambda example: 10 * example.arguments["x"].numel(),  # of one pass; the selection's are integers
    benchmarks=_benchmarks,
)
