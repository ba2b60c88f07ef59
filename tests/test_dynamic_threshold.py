"""dynamic_threshold beyond its spec: torch.quantile's own bits, the step that follows it, and wrong arguments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import pygen
from pygen.ops.affine_step import COLUMNS, make_table
from tests.error_rule import assert_error_rule

ZERO = torch.tensor(0)
AS_IT_IS = make_table([{"pred_x": 1.0, "low": -1.0, "high": 1.0, "pred0": 1.0}])


def thresholds(values: Tensor, ratio: float, max_value: float = math.inf) -> Tensor:
    factors = pygen.dynamic_threshold(values, None, AS_IT_IS, ZERO, ratio=ratio, max_value=max_value)
    return factors[:, COLUMNS["high"]]


def assert_is_torch_quantile(values: Tensor, ratio: float) -> None:
    expected = torch.quantile(values.abs(), ratio, dim=1).clamp(min=1)
    assert torch.equal(thresholds(values, ratio), expected), (values.shape, ratio)


RATIOS = (0.0, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 1.0)


@pytest.mark.parametrize("ratio", RATIOS)
def test_quantile_is_torchs_to_the_bit(ratio: float, isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 3, 4, 5, 17, 64, 65, 200, 201, 1000, 1023, 12288, 70001):
        assert_is_torch_quantile(3 + 5 * torch.randn(3, count, generator=generator), ratio)
        assert_is_torch_quantile(torch.randint(-4, 5, (2, count), generator=generator).float(), ratio)
        bits = torch.randint(-(1 << 31), 1 << 31, (2, count), generator=generator).to(torch.int32)
        assert_is_torch_quantile(bits.view(torch.float32).nan_to_num(2.0), ratio)


@pytest.mark.parametrize("ratio", RATIOS)
def test_neighbours_that_part_at_any_digit(ratio: float) -> None:
    """Magnitudes a unit of each of the three digits apart, beside the places where the digit before them turns."""
    for unit in (1, 1 << 10, 1 << 20):
        bits = 0x40400000 + unit * torch.arange(-3, 4, dtype=torch.int32)
        assert_is_torch_quantile(bits.view(torch.float32).repeat(1, 3), ratio)


def test_nan_and_infinity() -> None:
    inf, nan = math.inf, math.nan
    values = torch.tensor([[1.0, 2.0, 3.0, -inf, 4.0], [1.0, nan, 3.0, 4.0, 5.0], [-nan, inf, inf, inf, inf]])
    assert thresholds(values, 0.25).nan_to_num(-1.0).tolist() == [2.0, -1.0, -1.0]
    for ratio in RATIOS:  # between infinities, torch.lerp too makes NaN
        expected = torch.quantile(values.abs(), ratio, dim=1).clamp(1, 9)
        assert torch.equal(thresholds(values, ratio, max_value=9.0).nan_to_num(-1.0), expected.nan_to_num(-1.0))
    factors = pygen.dynamic_threshold(values, None, AS_IT_IS, ZERO, ratio=0.25, max_value=9.0)
    following = pygen.affine_step(values, None, AS_IT_IS, ZERO, scale=factors)
    assert following[0].tolist() == [0.5, 1.0, 1.0, -1.0, 1.0]
    assert following[1:].isnan().all()


def test_samples_and_threads_share_the_work_to_the_bit(isa: str) -> None:
    before, results = torch.get_num_threads(), []
    generator = torch.Generator().manual_seed(0)
    for values in (torch.randn(1, 300007, generator=generator) * 3, torch.randn(9, 20001, generator=generator) * 3):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(thresholds(values, 0.995))
        torch.set_num_threads(before)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[0], torch.cat([thresholds(sample[None], 0.995) for sample in values]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_that_follows_thresholds(dtype: torch.dtype) -> None:
    """As the paper has it, and as diffusers' schedulers compute it: clamp to [-s, s], then divide by s."""
    generator = torch.Generator().manual_seed(0)
    x, cond, uncond = (torch.randn(3, 3, 16, 16, generator=generator).to(dtype) for _ in range(3))
    row = {"guidance": 4.0, "pred_x": 1.2, "pred_out": -0.7, "low": -1.0, "high": 1.0, "x0": 0.3, "pred0": 0.6}
    table = make_table([row])
    scale = pygen.dynamic_threshold(x, cond, table, ZERO, uncond=uncond, max_value=3.0)
    ours = pygen.affine_step(x, cond, table, ZERO, uncond=uncond, scale=scale)

    def thresholded(compute: torch.dtype) -> Tensor:
        state, out = x.to(compute), uncond.to(compute) + 4.0 * (cond.to(compute) - uncond.to(compute))
        pred = 1.2 * state - 0.7 * out
        s = torch.quantile(pred.abs().flatten(1), 0.995, dim=1).clamp(1, 3.0).view(-1, 1, 1, 1)
        return 0.3 * state + 0.6 * (pred.clamp(-s, s) / s)

    assert_error_rule([(ours, thresholded(torch.float32).to(dtype), thresholded(torch.float64))])


def test_an_empty_batch_has_no_thresholds() -> None:
    assert pygen.dynamic_threshold(torch.empty(0, 4), None, AS_IT_IS, ZERO).shape == (0, AS_IT_IS.shape[1])


X = torch.ones(2, 8)
READS_ALL = make_table([{"pred_x": 1.0, "pred_out": 1.0, "noise0": 1.0, "h0_0": 1.0}], n_history=1)
READS_THIRD = make_table([{"pred_x": 1.0, "pred_out": 1.0, "negative": 1.0}], n_history=1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x must begin with the batch"),
        ({"x": torch.ones(2, 0)}, ValueError, "a sample of x has no elements"),
        ({"x": X.double()}, TypeError, "x must be float32, bfloat16 or float16"),
        ({"model_output": torch.ones(3, 8)}, ValueError, r"model_output of shape \[3, 8\] does not broadcast to x"),
        ({"model_output": None}, ValueError, "row 0 reads the model output, and model_output is None"),
        ({"model_output": None, "uncond": X}, ValueError, "uncond needs model_output"),
        ({"negative": X}, ValueError, "negative needs uncond"),
        ({"uncond": X, "table": READS_THIRD}, ValueError, "row 0 reads negative, and negative is None"),
        ({"table": READS_ALL.float()}, TypeError, "table must be Double"),
        ({"table": READS_ALL[0]}, ValueError, "table must have shape"),
        ({"table": READS_ALL[:, :-1]}, ValueError, "table must have shape"),
        ({"table": READS_ALL[:, :4]}, ValueError, "table must have shape"),
        ({"rows": torch.tensor([[0, 0], [0, 0]])}, ValueError, "rows must hold one index or one per sample"),
        ({"rows": torch.tensor([0, 1])}, IndexError, "rows holds 1, but the table has 1 rows"),
        ({"ratio": 1.5}, ValueError, r"ratio must lie in \[0, 1\], got 1.5"),
        ({"ratio": math.nan}, ValueError, "ratio must lie in"),
        ({"max_value": 0.0}, ValueError, "max_value must be positive, got 0"),
        ({"out": torch.ones(2, 8)}, ValueError, "out must have shape"),
        ({"out": torch.ones(2, READS_ALL.shape[1]).double()}, TypeError, "out must be Float"),
        ({"out": torch.ones(READS_ALL.shape[1]).expand(2, -1)}, RuntimeError, "single memory location"),
        ({"x": X.clone().requires_grad_()}, RuntimeError, "not differentiable, and x requires grad"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    right = {"x": X, "model_output": X, "table": READS_ALL, "rows": ZERO, "out": torch.ones(2, READS_ALL.shape[1])}
    with pytest.raises(error, match=message):
        pygen.dynamic_threshold(**(right | arguments))
