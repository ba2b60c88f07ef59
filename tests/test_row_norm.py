"""rms_norm and layer_norm beyond their specs: autograd, peers, the order of sums, and wrong arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import pygen
from pygen.ops.row_norm import row_norm_backward
from tests.error_rule import assert_error_rule
from tests.test_ops import BY_DTYPE
from tests.test_triton import needs_triton

ROOT = Path(__file__).resolve().parent.parent
NORMS = pytest.mark.parametrize("norm", [pygen.rms_norm, pygen.layer_norm], ids=lambda norm: norm.__name__)
X, ONES = torch.ones(2, 3, 8), torch.ones(8)


def peer(norm: Any, x: Tensor, weight: Tensor | None, eps: float = 1e-5) -> Tensor:
    return getattr(functional, norm.__name__)(x, x.shape[-1:], weight, eps=eps)


@NORMS
@BY_DTYPE
def test_is_torchs(norm: Any, dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 1152).to(dtype), torch.randn(1152).to(dtype)
    truth = peer(norm, x.double(), weight.double())
    assert_error_rule([(norm(x, weight, eps=1e-5), peer(norm, x, weight), truth)])


@BY_DTYPE
def test_is_that_of_transformers(dtype: torch.dtype) -> None:
    """Llama's rounds to x's dtype before it multiplies by the weight; Gemma's weight is a distance from 1."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    x, weight = torch.randn(7, 1152).to(dtype), torch.randn(1152).to(dtype)
    for module, offset in ((llama.LlamaRMSNorm(1152), 0.0), (gemma.GemmaRMSNorm(1152), 1.0)):
        with torch.no_grad():
            module.weight.copy_(weight)
            theirs = module.to(dtype)(x)
            truth = functional.rms_norm(x.double(), (1152,), weight.double() + offset, 1e-6)
        assert_error_rule([(pygen.rms_norm(x, weight, offset=offset), theirs, truth)])


def gradients(call: Any, inputs: list[Tensor], upstream: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    outputs = call(*inputs)
    return list(torch.autograd.grad(outputs, inputs, [grad.to(dtype) for grad in upstream[: len(outputs)]]))


@pytest.mark.parametrize("offset", [None, 0.0, 1.0], ids=["layer_norm", "rms_norm", "Gemma's"])
@pytest.mark.parametrize("with_residual", [False, True])
@BY_DTYPE
def test_autograd_is_within_the_error_rule(
    dtype: torch.dtype, with_residual: bool, offset: float | None, isa: str
) -> None:
    """Beside what torch's autograd makes of its own, in the same dtype and in float64."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, 35, 100, generator=generator).to(dtype) for _ in range(4)]
    weight, bias = torch.randn(2, 100, generator=generator).to(dtype)

    def ours(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        residual, parameters = (others[0], others[1:]) if with_residual else (None, others)
        if offset is None:
            result: Any = pygen.layer_norm(x, *parameters, residual=residual)
        else:
            result = pygen.rms_norm(x, parameters[0], residual=residual, offset=offset)
        return result if with_residual else (result,)

    def theirs(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        h, parameters = (x + others[0], others[1:]) if with_residual else (x, others)
        if offset is None:
            y = functional.layer_norm(h, h.shape[-1:], *parameters)
        else:
            y = functional.rms_norm(h, h.shape[-1:], offset + parameters[0], 1e-6)
        return (y, h) if with_residual else (y,)

    inputs = [*rows[: 1 + with_residual], weight, *([bias] if offset is None else [])]
    results = [
        gradients(call, inputs, rows[2:], to) for call, to in ((ours, dtype), (theirs, dtype), (theirs, torch.float64))
    ]
    for triple in zip(*results, strict=True):
        assert_error_rule([triple])


@NORMS
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradcheck(norm: Any, with_residual: bool) -> None:
    """Of the reference: whatever is asked for, alone or with the others."""
    x, residual, weight, bias = (torch.randn(size, dtype=torch.float64) for size in ((2, 3, 5), (2, 3, 5), (5,), (5,)))
    inputs = [x, weight, *([bias] if norm is pygen.layer_norm else []), *([residual] if with_residual else [])]

    def call(*inputs: Tensor) -> Any:
        return norm(*inputs[:-1], residual=inputs[-1]) if with_residual else norm(*inputs)

    with pygen.backend("reference"):
        for wanted in [range(len(inputs)), *([i] for i in range(len(inputs)))]:
            assert torch.autograd.gradcheck(call, [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)])


def test_the_gradient_of_either_output_alone() -> None:
    x, residual = torch.randn(2, 3, 8, requires_grad=True), torch.randn(3, 2, 8).transpose(0, 1).requires_grad_()
    y, h = pygen.layer_norm(x, residual=residual)
    for grad in torch.autograd.grad(h.sum(), (x, residual), retain_graph=True):
        assert torch.equal(grad, torch.ones(2, 3, 8))
    expected = torch.autograd.grad(functional.layer_norm(x + residual, (8,)).square().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)


@NORMS
def test_a_second_derivative_is_refused(norm: Any) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@NORMS
def test_autocast_leaves_dtypes_alone(norm: Any) -> None:
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x, weight), norm(x, weight.clone()))
        assert norm(x, weight).dtype == torch.bfloat16
        assert norm(x.float(), weight).dtype == torch.float32


@NORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_batch_do_not_matter_to_the_bit(norm: Any, dtype: torch.dtype) -> None:
    x, grad, residual = torch.randn(3, 333, 700).to(dtype)
    weight, bias = torch.randn(2, 700)
    centred, before, forward, backward = norm is pygen.layer_norm, torch.get_num_threads(), [], []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        forward.append(torch.stack(norm(x, weight, residual=residual)))
        rows = [torch.stack(norm(a, weight, residual=b)) for a, b in zip(x.split(50), residual.split(50), strict=True)]
        forward.append(torch.cat(rows, 1))
        made = [torch.empty_like(t) for t in (x, weight, bias)]
        row_norm_backward(x, grad, weight, 1e-5, 0.0, centred, None, *made)
        backward.append(torch.cat([tensor.float().flatten() for tensor in made]))
    torch.set_num_threads(before)
    assert all(torch.equal(result, forward[0]) for result in forward)
    assert all(torch.equal(result, backward[0]) for result in backward)


@NORMS
def test_what_is_written_past_the_caches_is_the_same(norm: Any) -> None:
    """64 MB of it; rows that do not begin with a line of the cache too."""
    weight = torch.randn(4096)
    for rows, elements in ((4100, 4096), (16300, 1030)):
        x = torch.randn(rows, elements)
        whole = norm(x, weight[:elements])
        assert all(
            torch.equal(part, norm(given, weight[:elements]))
            for part, given in zip(whole.split(1000), x.split(1000), strict=True)
        )


@NORMS
def test_compiles_with_its_gradients(norm: Any) -> None:
    def step(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        y, h = norm(x, weight, residual=residual)
        return (y**2 + norm(h)).sum()

    torch._dynamo.reset()
    inputs = [tensor.requires_grad_() for tensor in (torch.randn(3, 5, 40), torch.randn(40), torch.randn(3, 5, 40))]
    expected, results = (
        torch.autograd.grad(call(*inputs), inputs) for call in (step, torch.compile(step, fullgraph=True))
    )
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right)


def test_allocates_nothing_with_out() -> None:
    x, residual, weight = torch.randn(5, 64), torch.randn(5, 64), torch.randn(64)
    with torch.profiler.profile(profile_memory=True) as profile:
        out, residual_out = pygen.rms_norm(x, weight, residual=residual, out=x, residual_out=residual)
    assert out is x
    assert residual_out is residual
    assert sum(event.self_cpu_memory_usage for event in profile.key_averages()) == 0


SMALL_TILES = """
import torch, pygen
from pygen.kernels.triton import row_norm, row_norm_backward
from pygen.ops.row_norm import row_norm_backward as backward, row_norm_backward_reference as reference
row_norm._TILE = row_norm_backward._TILE = 16
row_norm_backward._PROGRAMS = 1
for rows in (1, 3, 200):
    for centred in (False, True):
        x, grad, weight = torch.randn(rows, 41), torch.randn(rows, 41), torch.randn(41)
        made = [torch.empty_like(tensor) for tensor in (x, weight, weight)]
        call = (pygen.layer_norm if centred else pygen.rms_norm)
        with pygen.backend("triton"):
            backward(x, grad, weight, 1e-5, 0.0, centred, None, *made[:2], made[2] if centred else None)
            y = call(x, weight, eps=1e-5)
        torch.testing.assert_close(y, call(x, weight, eps=1e-5))
        expected = reference(x, grad, weight, 1e-5, 0.0, centred, None)
        for result, right in zip(made[: 2 + centred], expected[: 2 + centred], strict=True):
            torch.testing.assert_close(result, right, rtol=1e-5, atol=1e-4)
"""


@needs_triton
def test_triton_rows_longer_than_a_tile_in_long_chunks() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SMALL_TILES]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x must have shape"),
        ({"x": X.double()}, TypeError, "x must be float32, bfloat16 or float16"),
        ({"x": X.transpose(1, 2)}, ValueError, "x's last dimension must be contiguous"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \(8,\)"),
        ({"weight": torch.ones(1, 8)}, ValueError, r"weight must have shape \(8,\)"),
        ({"weight": ONES.half()}, TypeError, "weight must have x's dtype .* or be float32"),
        ({"weight": torch.ones(16)[::2]}, ValueError, "weight must be contiguous"),
        ({"bias": ONES.half()}, TypeError, "bias must have x's dtype .* or be float32"),
        ({"residual": torch.ones(3, 8)}, ValueError, "residual must have x's shape"),
        ({"residual": X.half()}, TypeError, "residual must have x's dtype"),
        ({"residual_out": X.clone()}, ValueError, "residual_out receives .*: give both or neither"),
        ({"eps": -1e-6}, ValueError, "eps must be finite and not negative, got -1e-06"),
        ({"out": torch.ones(6, 8)}, ValueError, "out must have x's shape"),
        ({"out": X.half()}, TypeError, "out must have x's dtype"),
        ({"out": torch.ones(1, 3, 8).expand(2, 3, 8)}, RuntimeError, "single memory location"),
        (
            {"out": X.clone(), "weight": ONES.clone().requires_grad_()},
            RuntimeError,
            "weight requires grad.*not recorded",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"layer_norm: {message}" if error is not RuntimeError else message):
        pygen.layer_norm(**({"x": X, "weight": ONES, "bias": ONES} | arguments))
    if "bias" not in arguments:
        with pytest.raises(error, match=message):
            pygen.rms_norm(**({"x": X, "weight": ONES} | arguments))


def test_overlap_is_refused() -> None:
    memory = torch.zeros(5, 8)
    for given in ({"out": memory[1:4]}, {"out": memory[:3], "weight": memory[0]}):
        with pytest.raises(RuntimeError, match="single memory location"):
            pygen.rms_norm(memory[:3], **given)
    other = torch.zeros(3, 8)
    with pytest.raises(RuntimeError, match="single memory location"):
        pygen.rms_norm(memory[:3], residual=memory[:3], out=other, residual_out=other)
