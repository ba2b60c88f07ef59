"""diffusion_loss beyond its spec: its gradients, the order of its sums, and what it says of wrong arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import pygen
from pygen.ops.affine_step import make_table as make_steps
from pygen.ops.diffusion_loss import COLUMNS, diffusion_loss_reference, make_table
from tests.error_rule import assert_error_rule

ZERO = torch.tensor(0)
TABLE = make_table(
    [
        {"noise": 1.0, "step": 4, "weight": 0.7},
        {"x0": 1.0, "huber_c": 0.2},
        {"x0": -0.6, "noise": 0.8, "step": 9, "huber_c": 3.0, "weight": 1.5},
    ]
)
ROWS = torch.tensor([2, 0, 1])


def test_is_what_training_scripts_write() -> None:
    output, x0, noise = torch.randn(3, 3, 4, 8, 8)
    for row, target in ((0, noise), (1, x0), (2, 0.8 * noise - 0.6 * x0)):
        losses = pygen.diffusion_loss(output, x0, TABLE, torch.tensor(row), noise=noise)
        weight, c = (TABLE[row, COLUMNS[name]].item() for name in ("weight", "huber_c"))
        expected = functional.mse_loss(output, target, reduction="none")
        if c < math.inf:  # as diffusers' scheduled_huber_loss_training has it
            expected = 2 * c * (torch.sqrt((output - target) ** 2 + c**2) - c)
        torch.testing.assert_close(losses, weight * expected.mean(dim=(1, 2, 3)))


def test_noise_is_that_of_the_row(isa: str) -> None:
    """The mean squared distance to what affine_step drew with the same row is nothing at all."""
    x0, seed, ids = torch.randn(3, 5, 7), torch.tensor([77]), torch.tensor([4, 0, 2**32 - 1])
    steps = make_steps([{"noise0": 1.0, "step": 4}, {"noise0": 1.0, "step": 4}, {"noise0": 1.0, "step": 9}])
    table = make_table([{"noise": 1.0, "step": 4}, {"noise": 1.0, "step": 4}, {"noise": 1.0, "step": 9}])
    drawn = pygen.affine_step(x0, None, steps, ROWS, seed=seed, sample_ids=ids)
    assert pygen.diffusion_loss(drawn, x0, table, ROWS, seed=seed, sample_ids=ids).tolist() == [0, 0, 0]


@pytest.mark.parametrize("by_seed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [ROWS, torch.tensor(2), torch.tensor([[0, 1], [2, 1], [1, 0]])])
def test_gradcheck(rows: Tensor, masked: bool, by_seed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    output, x0 = (torch.randn(3, 2, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    noise = torch.randn(1, 2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(5, generator=generator, dtype=torch.float64) if masked else None

    def losses(output: Tensor, x0: Tensor, noise: Tensor | None = None) -> Tensor:
        seed = torch.tensor([3]) if noise is None else None
        return pygen.diffusion_loss(output, x0, TABLE, rows, noise=noise, mask=mask, seed=seed)

    with pygen.backend("reference"):
        assert torch.autograd.gradcheck(losses, (output, x0) if by_seed else (output, x0, noise))


def test_gradcheck_of_the_variance() -> None:
    """At the decoder too, whose x0 lies within, at both ends, and far from the mean."""
    table = make_table(
        [
            {"noise": 1.0, "bound": 1.4, "mean": 1.7, "spread": 0.9},
            {"noise": 1.0, "weight": 0.0, "bound": 0.8, "mean": -1.4, "spread": 0.7, "bin": 0.55},
        ]
    )
    generator = torch.Generator().manual_seed(0)
    output, noise, variance = torch.randn(3, 2, 3, 30, generator=generator, dtype=torch.float64)
    x0 = torch.linspace(-1, 1, 90, dtype=torch.float64).reshape(3, 30).round(decimals=1).repeat(2, 1, 1)
    output[:, 1] *= 5

    def losses(variance: Tensor) -> Tensor:
        return pygen.diffusion_loss(output, x0, table, torch.tensor([0, 1]), noise=noise, variance=variance)

    with pygen.backend("reference"):
        assert torch.autograd.gradcheck(losses, variance.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autograd_is_within_the_error_rule(dtype: torch.dtype, isa: str) -> None:
    """Beside what torch's autograd makes of the formula, in the same dtype and in float64."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(3, 4, 33, generator=generator).to(dtype) for _ in range(3)]
    upstream = torch.randn(3, generator=generator)

    def formula(output: Tensor, x0: Tensor, table: Tensor, rows: Tensor, noise: Tensor) -> Tensor:
        losses = []
        for i, row in enumerate(rows.tolist()):
            x0_c, noise_c, weight, c = (float(table[row, COLUMNS[n]]) for n in ("x0", "noise", "weight", "huber_c"))
            r = output[i] - (x0_c * x0[i] + noise_c * noise[i])
            losses.append((weight * (r**2 if c == math.inf else 2 * c * (torch.sqrt(r**2 + c**2) - c))).mean())
        return torch.stack(losses)

    def gradients(loss: Any, to: torch.dtype) -> list[Tensor]:
        inputs = [tensor.to(to).requires_grad_() for tensor in given]
        losses = loss(*inputs[:2], TABLE, ROWS, noise=inputs[2])
        return list(torch.autograd.grad(losses, inputs, upstream.to(losses.dtype)))

    ours, same = gradients(pygen.diffusion_loss, dtype), gradients(formula, dtype)
    truth = gradients(formula, torch.float64)
    for triple in zip(ours, same, truth, strict=True):
        assert_error_rule([triple])


def test_explicit_gradients_are_autograds_to_the_bit() -> None:
    inputs = [torch.randn(3, 4, 5, requires_grad=True) for _ in range(3)]
    output, x0, noise = inputs
    grad, out = torch.randn(3), torch.empty(3)
    losses = pygen.diffusion_loss(output, x0, TABLE, ROWS, noise=noise)
    expected = torch.autograd.grad(losses, inputs, grad)
    results = [torch.empty(3, 4, 5) for _ in range(3)]
    with torch.no_grad():
        named = dict(zip(("grad_output", "grad_x0", "grad_noise"), results, strict=True))
        pygen.diffusion_loss(output, x0, TABLE, ROWS, noise=noise, grad=grad, out=out, **named)
    assert torch.equal(out, losses)
    assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))


def test_noise_that_changed_before_the_backward_pass_is_refused() -> None:
    output, x0, seed = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5), torch.tensor([1])
    losses = pygen.diffusion_loss(output, x0, TABLE, ROWS, seed=seed)
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_threads_batch_and_layout_do_not_matter_to_the_bit(isa: str) -> None:
    output, x0, seed, ids = torch.randn(3, 5, 70, 65), torch.randn(3, 5, 70, 65), torch.tensor([1]), torch.arange(3)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(pygen.diffusion_loss(output, x0, TABLE, ROWS, seed=seed))
    torch.set_num_threads(before)
    alone = [
        pygen.diffusion_loss(output[i : i + 1], x0[i : i + 1], TABLE, ROWS[i], seed=seed, sample_ids=ids[i : i + 1])
        for i in range(3)
    ]
    last = output.to(memory_format=torch.channels_last)
    results += [torch.cat(alone), pygen.diffusion_loss(last, x0, TABLE, ROWS, seed=seed)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_large_samples_are_summed_without_loss() -> None:
    output = torch.full((1, 1 << 24), 0.1)
    losses = pygen.diffusion_loss(output, torch.zeros_like(output), make_table([{"x0": 1.0}]), ZERO)
    assert losses.item() == (output[0, 0].double() ** 2).float().item()


def test_compiles_with_its_gradients() -> None:
    def step(output: Tensor, x0: Tensor, seed: Tensor) -> Tensor:
        return pygen.diffusion_loss(output, x0, TABLE, ROWS, seed=seed).mean()

    compiled = torch.compile(step, fullgraph=True)
    x0, gradients = torch.randn(3, 4, 5), []
    output = torch.randn(3, 4, 5, requires_grad=True)
    for seed in (torch.tensor([5]), torch.tensor([6])):
        for function in (step, compiled):
            gradients += torch.autograd.grad(function(output, x0, seed), output)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[2], gradients[3])
    assert not torch.equal(gradients[0], gradients[2])


X = torch.ones(2, 8)
BOUNDED = make_table([{"noise": 1.0, "bound": 1.0}])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model_output": torch.tensor(1.0), "x0": torch.tensor(1.0)}, ValueError, "model_output must begin with the"),
        ({"model_output": X.double()}, TypeError, "model_output must be float32, bfloat16 or float16"),
        ({"x0": torch.ones(2, 4)}, ValueError, "x0 must have model_output's shape"),
        ({"table": TABLE.float()}, TypeError, "table must be Double"),
        ({"table": TABLE[:, :3]}, ValueError, "table must have shape"),
        ({"rows": torch.tensor([0, 0, 0])}, ValueError, "rows must hold one index, one per sample"),
        ({"rows": torch.tensor([0, 3])}, IndexError, "rows holds 3, but the table has 3 rows"),
        ({"rows": torch.tensor([0, -1])}, IndexError, "rows holds -1, but the table has 3 rows"),
        ({"noise": None}, ValueError, "row 0 reads the noise: give seed or noise"),
        ({"seed": torch.tensor([1])}, ValueError, "give noise or seed, not both"),
        ({"noise": None, "seed": torch.tensor([1, 2, 3])}, ValueError, "seed must hold one number, or one per sample"),
        ({"table": BOUNDED}, ValueError, "row 0 reads the variance, and variance is None"),
        ({"variance": torch.ones(2, 4)}, ValueError, "variance of shape .* does not broadcast"),
        ({"sample_ids": torch.tensor([1])}, ValueError, "sample_ids must have shape"),
        ({"mask": X.long()}, TypeError, "mask must be float32, bfloat16 or float16 or bool"),
        ({"mask": torch.ones(3, 8)}, ValueError, "mask of shape .* does not broadcast"),
        ({"grad": torch.ones(2)}, ValueError, "grad and the gradients need out"),
        ({"grad": torch.ones(3), "out": torch.ones(2)}, ValueError, r"grad must have shape \(2,\)"),
        ({"out": torch.ones(2).half()}, TypeError, "out must be Float"),
        ({"out": torch.ones(2), "grad_x0": torch.ones(8)}, ValueError, "grad_x0 must have model_output's shape"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    right: dict[str, Any] = {"model_output": X, "x0": X, "table": TABLE, "rows": ZERO, "noise": X}
    with pytest.raises(error, match=message):
        pygen.diffusion_loss(**(right | arguments))


def test_overlap_is_refused() -> None:
    memory, out = torch.zeros(3, 8), torch.empty(2)
    for gradients in ({"grad_x0": memory[1:]}, {"grad_x0": memory[:2], "grad_output": memory[:2]}):
        with pytest.raises(RuntimeError, match="single memory location"):
            pygen.diffusion_loss(memory[:2], memory[:2], TABLE, ZERO, noise=X, out=out, **gradients)


def test_the_reference_asks_for_what_rows_read() -> None:
    with pytest.raises(ValueError, match="a row reads the noise"):
        diffusion_loss_reference(X, X, TABLE, ZERO)
    with pytest.raises(ValueError, match="a row reads the variance"):
        diffusion_loss_reference(X, X, BOUNDED, ZERO, noise=X)
