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
        ({"weight": torch.ones(16)[::2]}, ValueError, "weight's last dimension must be contiguous"),
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


def ada(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """As diffusers and DiT write it."""
    middle = (slice(None), *(None,) * (x.dim() - 2))
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[middle]) + shift[middle]


@pytest.mark.parametrize("size", [(3, 77, 384), (2, 5, 6, 40), (4, 33), (1, 1, 1152), (0, 5, 16)])
@BY_DTYPE
def test_ada_layer_norm(size: tuple[int, ...], dtype: torch.dtype) -> None:
    """Its results and gradients, a scale and a shift being parts of one projection."""
    x, projected = torch.randn(size).to(dtype), torch.randn(size[0], 6 * size[-1]).to(dtype)
    grad = torch.randn(size).to(dtype)

    def results(function: Any, to: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(to, copy=True).requires_grad_() for tensor in (x, projected)]
        shift, scale = leaves[1].chunk(6, dim=1)[:2]
        y = function(leaves[0], scale, shift)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(to))]

    ours, same, truth = results(pygen.ada_layer_norm, dtype), results(ada, dtype), results(ada, torch.float64)
    assert_error_rule(zip(ours, same, truth, strict=True))
    scale, shift = projected[:, : size[-1]].float(), projected[:, -size[-1] :].float()
    held = x.clone()
    assert pygen.ada_layer_norm(held, scale, shift, out=held) is held
    assert torch.equal(held, pygen.ada_layer_norm(x, scale, shift))
    for i in range(size[0]):
        assert torch.equal(held[i], pygen.ada_layer_norm(x[i : i + 1], scale[i : i + 1], shift[i : i + 1])[0])
    with pygen.backend("reference"):
        reference = pygen.ada_layer_norm(x, scale, shift)
    assert_error_rule([(held, reference, ada(x.double(), scale.double(), shift.double()))])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [(3, 77, 384), (2, 5, 6, 40), (4, 33), (0, 5, 16)])
@BY_DTYPE
def test_ada_layer_norm_after_a_residual(size: tuple[int, ...], dtype: torch.dtype, gated: bool) -> None:
    """y and h, and the gradients of all that they are made of."""
    inputs = [torch.randn(size), torch.randn(size), *(torch.randn(size[0], size[-1]) for _ in range(3))]
    inputs = [tensor.to(dtype) for tensor in inputs]
    grads = [torch.randn(size).to(dtype) for _ in range(2)]

    def composed(x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        middle = (slice(None), *(None,) * (x.dim() - 2))
        h = torch.addcmul(residual, gate[middle], x) if gated else residual + x
        return ada(h, scale, shift), h

    def fused(x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        return pygen.ada_layer_norm(x, scale, shift, residual=residual, gate=gate if gated else None)

    def results(function: Any, to: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(to, copy=True).requires_grad_() for tensor in inputs]
        outputs = function(*leaves)
        of = leaves if gated else leaves[:-1]
        return [*outputs, *torch.autograd.grad(outputs, of, [grad.to(to) for grad in grads])]

    ours, same, truth = results(fused, dtype), results(composed, dtype), results(composed, torch.float64)
    assert_error_rule(zip(ours, same, truth, strict=True))
    with pygen.backend("reference"):
        assert_error_rule(zip(ours[:2], fused(*inputs), truth[:2], strict=True))


def test_gradients_of_a_gate_in_double() -> None:
    inputs = [torch.randn(2, 3, 5), torch.randn(2, 3, 5), *(torch.randn(2, 5) for _ in range(3))]
    leaves = [tensor.double().requires_grad_() for tensor in inputs]

    def function(x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        return pygen.ada_layer_norm(x, scale, shift, residual=residual, gate=gate)

    with pygen.backend("reference"):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((X[0, 0], ONES[None], ONES[None]), ValueError, r"ada_layer_norm: x must have shape \(batch, ..., elements\)"),
        ((X, ONES, ONES), ValueError, r"ada_layer_norm: scale must have shape \[2, 8\], got \[8\]"),
        ((X, torch.ones(2, 8), torch.ones(3, 8)), ValueError, r"shift must have shape \[2, 8\], got \[3, 8\]"),
        ((X, torch.ones(2, 8).double(), torch.ones(2, 8)), TypeError, "ada_layer_norm: scale must have x's dtype"),
        ((X.double(), torch.ones(2, 8), torch.ones(2, 8)), TypeError, "x must be float32, bfloat16 or float16"),
        ((X, torch.ones(2, 8), torch.ones(8, 2).T), ValueError, "ada_layer_norm: shift must have contiguous rows"),
    ],
)
def test_wrong_arguments_of_ada_layer_norm(arguments: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        pygen.ada_layer_norm(*arguments)
    with pytest.raises(ValueError, match=r"ada_layer_norm: gate must have shape \[2, 8\], got \[2, 1\]"):
        pygen.ada_layer_norm(X, torch.ones(2, 8), torch.ones(2, 8), residual=X, gate=torch.ones(2, 1))
    with pytest.raises(ValueError, match="gate needs a residual"):
        pygen.ada_layer_norm(X, torch.ones(2, 8), torch.ones(2, 8), gate=torch.ones(2, 8))
    with pytest.raises(ValueError, match="out must have x's shape"):
        pygen.ada_layer_norm(X, torch.ones(2, 8), torch.ones(2, 8), out=torch.ones(2, 3, 9))
