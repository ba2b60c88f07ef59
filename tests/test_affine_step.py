"""affine_step beyond its spec: its noise, its aliasing rules, and what it says of wrong arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pygen
from pygen.ops.affine_step import COLUMNS, HISTORY_COLUMN, affine_results, make_table
from pygen.ops.philox_normal import DRAW_AFFINE_STEP

ZERO = torch.tensor(0)


def test_noise_is_that_of_philox_normal(isa: str) -> None:
    x, ids, seed = torch.zeros(3, 5, 7), torch.tensor([4, 0, 2**32 - 1]), torch.tensor([77])
    table = make_table([{"noise0": 1.0, "step": 3}, {"noise0": 1.0, "step": 8}])
    rows = torch.tensor([1, 0, 1])
    drawn = pygen.affine_step(x, None, table, rows, seed=seed, sample_ids=ids)
    steps = torch.tensor([8, 3, 8])
    assert torch.equal(
        drawn, pygen.philox_normal(x.shape, seed=seed, sample_ids=ids, step=steps, draw=DRAW_AFFINE_STEP)
    )


def test_noise_per_token_follows_each_tokens_row() -> None:
    x, seed = torch.zeros(2, 3, 5), torch.tensor([77])
    table = make_table([{"noise0": 1.0, "step": step} for step in range(3)])
    drawn = pygen.affine_step(x, None, table, torch.tensor([[0, 1, 2], [2, 2, 0]]), seed=seed)
    for step in range(3):
        whole = pygen.philox_normal(x.shape, seed=seed, step=step, draw=DRAW_AFFINE_STEP)
        assert torch.equal(drawn[0, step], whole[0, step])


def test_seeds_of_the_samples_are_their_own(isa: str) -> None:
    x, seeds = torch.randn(3, 5, 7), torch.tensor([4, -1, 2**62])
    table, first = make_table([{"x0": 0.5, "noise0": 1.0, "step": 3}]), torch.tensor([0])
    together = pygen.affine_step(x, None, table, ZERO, seed=seeds)
    same = pygen.affine_step(x, None, table, ZERO, seed=torch.tensor([9, 9, 9]))
    assert torch.equal(same, pygen.affine_step(x, None, table, ZERO, seed=torch.tensor([9])))
    for i in range(3):
        own = {"seed": seeds[i : i + 1], "sample_ids": first + i}
        assert torch.equal(pygen.affine_step(x[i : i + 1], None, table, ZERO, **own), together[i : i + 1])


def test_learned_range_is_one_row() -> None:
    """log s^2 from min to max as v goes from -1 to 1 (Nichol & Dhariwal 2021)."""
    x, output, z = torch.zeros(2, 3, 8, 8), torch.randn(2, 6, 8, 8).clamp(-1, 1), torch.randn(2, 3, 8, 8)
    low, high, v = -9.0, -4.0, output[:, 3:]
    table = make_table([{"noise0": 1.0, "log_var_shift": (high + low) / 2, "log_var_scale": (high - low) / 2}])
    ours = pygen.affine_step(x, None, table, ZERO, noise=z, noise_scale=v, noise_scale_kind="log_variance")
    share = (v.double() + 1) / 2
    expected = torch.exp(0.5 * (share * high + (1 - share) * low)) * z
    torch.testing.assert_close(ours, expected.float(), rtol=2e-6, atol=0)


def test_row_scale_reaches_each_coefficient() -> None:
    x = torch.randn(2, 6)
    table = make_table([{"x0": 2.0, "pred_x": 1.0, "pred0": 1.0, "low": -1.0, "high": 1.0}])
    scale = torch.ones(2, table.shape[1])
    scale[1, [COLUMNS["low"], COLUMNS["high"]]] = 0.5
    expected = 2 * x + torch.stack([x[0].clamp(-1, 1), x[1].clamp(-0.5, 0.5)])
    torch.testing.assert_close(pygen.affine_step(x, None, table, ZERO, scale=scale), expected)


def test_mask_is_exact_at_both_ends() -> None:
    x, known = torch.randn(2, 64), torch.randn(2, 64)
    table = make_table([{"x0": 1 / 3, "h0_1": 1.0}], n_history=1)
    mask = torch.arange(64) % 2 == 0
    result = pygen.affine_step(x, None, table, ZERO, history=[known], mask=mask)
    assert torch.equal(result[:, mask], known[:, mask])
    assert torch.equal(result[:, ~mask], pygen.affine_step(x, None, table, ZERO, history=[known])[:, ~mask])


def test_allocates_nothing_with_out() -> None:
    x = torch.randn(2, 4, 32, 32)
    table, model_output, out = make_table([{"x0": 1.0, "out0": 1.0}]), torch.randn(2, 4, 32, 32), torch.empty_like(x)
    with torch.profiler.profile(profile_memory=True) as profile:
        assert pygen.affine_step(x, model_output, table, ZERO, out=out) is out
        assert pygen.affine_step(x, model_output, table, ZERO, out=x) is x
    assert sum(event.self_cpu_memory_usage for event in profile.key_averages()) == 0


def test_threads_share_the_work_to_the_bit(isa: str) -> None:
    x, seed = torch.randn(3, 70001), torch.tensor([1])
    table = make_table([{"x0": 0.5, "noise0": 1.0}])
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(pygen.affine_step(x, None, table, ZERO, seed=seed))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("how", ["short", "compiled", "reference"])
def test_results_given_as_dtypes_are_new(how: str) -> None:
    x, out = torch.randn(2, 3, 64).mT, torch.randn(2, 64, 3)
    table = make_table([{"pred_x": 1.5, "x0": 0.5, "out0": -0.25, "x1": 2.0}])
    given = {name: torch.empty_like(x, dtype=torch.bfloat16) for name in ("pred", "second")}
    call = torch.compile(affine_results, fullgraph=True, backend="eager") if how == "compiled" else affine_results
    with pygen.backend("reference" if how == "reference" else "cpu"):
        following = pygen.affine_step(x, out, table, ZERO, **given)
        results = call(x, out, table, ZERO, pred=torch.bfloat16, second=torch.bfloat16)
    for result, expected in zip(results, (following, *given.values()), strict=True):
        assert result is not None
        assert torch.equal(result, expected)
        assert (result.dtype, result.stride()) == (expected.dtype, x.stride())
    assert affine_results(x, out, table, ZERO)[1:] == (None, None)


def test_dispatch_modes_see_the_op() -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        pygen.affine_step(torch.randn(2, 5), None, make_table([{"x0": 0.5}]), ZERO)
    assert "pygen.affine_step.default" in seen


def test_offsets_beyond_32_bits() -> None:
    far = torch.empty(1 << 31, dtype=torch.float32)[:: (1 << 30) + 7].view(1, -1)
    far.copy_(torch.tensor([[1.0, 2.0]]))
    assert pygen.affine_step(far, None, make_table([{"x0": 3.0}]), ZERO, out=far).tolist() == [[3.0, 6.0]]


X = torch.ones(2, 8)
READS_ALL = make_table([{"x0": 1.0, "out0": 1.0, "noise0": 1.0, "h0_0": 1.0}], n_history=1)

READS_THIRD = make_table([{"x0": 1.0, "out0": 1.0, "noise0": 1.0, "negative": 1.0}], n_history=1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x must begin with the batch"),
        ({"x": X.double()}, TypeError, "out must be float32, bfloat16 or float16"),
        ({"model_output": torch.ones(3, 8)}, ValueError, r"model_output of shape \[3, 8\] does not broadcast to x"),
        ({"model_output": X.long()}, TypeError, "model_output must be float32, bfloat16 or float16"),
        ({"model_output": None}, ValueError, "row 0 reads the model output, and model_output is None"),
        ({"model_output": None, "uncond": X}, ValueError, "uncond needs model_output"),
        ({"negative": X}, ValueError, "negative needs uncond"),
        ({"uncond": X, "table": READS_THIRD}, ValueError, "row 0 reads negative, and negative is None"),
        (
            {"noise_scale": X, "noise_scale_kind": "deviation"},
            ValueError,
            "noise_scale_kind must be factor, variance or log_variance",
        ),
        ({"table": READS_ALL.float()}, TypeError, "table must be Double"),
        ({"table": READS_ALL[0]}, ValueError, "table must have shape"),
        ({"history": []}, ValueError, "table must have shape .* for 0 history terms"),
        ({"history": [X] * 13}, ValueError, "history holds 13 tensors, more than 12"),
        ({"rows": torch.tensor([0, 0, 0])}, ValueError, "rows must hold one index, one per sample"),
        ({"rows": torch.tensor([0, -1])}, IndexError, "rows holds -1, but the table has 1 rows"),
        ({"rows": torch.tensor([1, 0])}, IndexError, "rows holds 1, but the table has 1 rows"),
        ({"rows": torch.tensor([0], dtype=torch.int32)}, TypeError, "rows must be Long"),
        ({"noise": None}, ValueError, "row 0 adds noise: give seed or noise"),
        ({"seed": torch.tensor([1])}, ValueError, "give noise or seed, not both"),
        ({"noise": None, "seed": torch.tensor([1, 2, 3])}, ValueError, "seed must hold one number, or one per sample"),
        ({"sample_ids": torch.tensor([1])}, ValueError, "sample_ids must have shape"),
        ({"scale": torch.ones(2, 3)}, ValueError, "scale must have shape"),
        ({"mask": X.long()}, TypeError, "mask must be float32, bfloat16 or float16 or bool"),
        ({"out": torch.ones(8)}, ValueError, "out must have x's shape"),
        ({"rows": 0}, TypeError, "rows must be a tensor, got int"),
        ({"history": [X, None]}, TypeError, "history must be a sequence of tensors, got NoneType"),
        ({"pred": torch.ones(2, 8, dtype=torch.int32)}, TypeError, "pred must be float32"),
        ({"x": X.clone().requires_grad_()}, RuntimeError, "not differentiable, and x requires grad"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    right = {"x": X, "model_output": X, "table": READS_ALL, "rows": ZERO, "history": [X], "noise": X}
    with pytest.raises(error, match=message):
        pygen.affine_step(**(right | arguments))


def test_overlap_is_refused() -> None:
    memory = torch.zeros(3, 8)
    table = make_table([{"x0": 1.0, "pred_x": 1.0}])
    with pytest.raises(RuntimeError, match="single memory location"):
        pygen.affine_step(memory[:2], None, table, ZERO, out=memory[1:])
    with pytest.raises(RuntimeError, match="single memory location"):
        pygen.affine_step(memory[:2], None, table, ZERO, out=memory[:2], pred=memory[:2])


def test_table_holds_two_columns_per_history_term() -> None:
    assert make_table([{}], n_history=3).shape[1] == HISTORY_COLUMN + 6
    assert make_table([{}])[0, COLUMNS["high"]] == math.inf
