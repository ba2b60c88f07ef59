"""swiglu and geglu beyond their spec: gradients, accuracy, threads, and what they say of wrong arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import pygen
from pygen.ops.gated_unit import gated_unit
from tests.error_rule import assert_error_rule
from tests.test_ops import BY_DTYPE

X = torch.ones(3, 8)
UNITS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    "swiglu": (pygen.swiglu, functional.silu),
    "geglu": (pygen.geglu, functional.gelu),
    "geglu_tanh": (
        lambda gate, up: pygen.geglu(gate, up, approximate="tanh"),
        lambda gate: functional.gelu(gate, approximate="tanh"),
    ),
}
EVERY = pytest.mark.parametrize("name", UNITS)


@EVERY
@BY_DTYPE
def test_gradients_of_both_halves_obey_the_error_rule(name: str, dtype: torch.dtype, isa: str) -> None:
    unit, activation = UNITS[name]
    x, grad = (3 * torch.randn(7, 2 * 150)).to(dtype), torch.randn(7, 150).to(dtype)

    def run(x: Tensor, grad: Tensor, unit: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        out = unit(*x.chunk(2, -1))
        return out.detach(), torch.autograd.grad(out, x, grad)[0]

    ours = run(x, grad, unit)
    same = run(x, grad, lambda gate, up: activation(gate) * up)
    truth = run(x.double(), grad.double(), lambda gate, up: activation(gate) * up)
    for triple in zip(ours, same, truth, strict=True):
        assert_error_rule([triple], name)


@EVERY
def test_gradcheck_of_the_reference(name: str) -> None:
    gate, up = (2 * torch.randn(4, 9, dtype=torch.float64) for _ in range(2))
    with pygen.backend("reference"):
        assert torch.autograd.gradcheck(UNITS[name][0], (gate.requires_grad_(), up.requires_grad_()))
        assert torch.autograd.gradcheck(UNITS[name][0], (gate.detach(), up))
        assert torch.autograd.gradcheck(UNITS[name][0], (gate, up.detach()))


def test_keeps_nothing_but_its_inputs() -> None:
    gate, up = torch.randn(2, 5, 64, requires_grad=True).unbind(0)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        pygen.swiglu(gate, up)
    assert [tensor.data_ptr() for tensor in kept] == [gate.data_ptr(), up.data_ptr()]


def test_there_is_no_second_derivative() -> None:
    gate = torch.randn(8, requires_grad=True)
    (grad,) = torch.autograd.grad((pygen.swiglu(gate, gate) ** 2).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@EVERY
def test_a_training_step_compiles_without_a_break(name: str) -> None:
    unit = UNITS[name][0]

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return (unit(*(x @ weight).chunk(2, -1)) ** 2).sum()

    torch._dynamo.reset()
    x, weight = torch.randn(6, 10), torch.randn(10, 40, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(x, weight), weight)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, weight), weight)
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_tails_keep_their_digits(activation: str, isa: str) -> None:
    """In float32 torch's 1 + erf leaves none of them."""
    gate = torch.linspace(-7, 0, 5001)
    out = gated_unit(gate, torch.ones_like(gate), activation, out=torch.empty_like(gate))
    x = gate.double()
    truth = {
        "silu": x * torch.sigmoid(x),
        "gelu": x * torch.exp(torch.special.log_ndtr(x)),
        "gelu_tanh": x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
    }[activation]
    assert ((out - truth).abs() <= 4e-5 * truth.abs() + 1e-36).all()


@EVERY
@BY_DTYPE
def test_threads_do_not_matter_to_the_bit(name: str, dtype: torch.dtype) -> None:
    x, grad = torch.randn(300, 2 * 517).to(dtype), torch.randn(300, 517).to(dtype)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        out = UNITS[name][0](*leaf.chunk(2, -1))
        results.append((out.detach(), *torch.autograd.grad(out, leaf, grad)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_allocates_nothing_with_out() -> None:
    gate, up = torch.randn(4, 2 * 640).chunk(2, -1)
    out = torch.empty(4, 640)
    with torch.profiler.profile(profile_memory=True) as profile:
        assert pygen.swiglu(gate, up, out=out) is out
        assert pygen.geglu(gate, up, out=out) is out
    assert sum(event.self_cpu_memory_usage for event in profile.key_averages()) == 0


WRONG = [
    ({"up": torch.ones(8)}, ValueError, r"up must have gate's shape \[3, 8\], got \[8\]"),
    ({"gate": X.double()}, TypeError, "gate must be float32, bfloat16 or float16"),
    ({"gate": X.int()}, TypeError, "gate must be float32, bfloat16 or float16"),
    ({"up": X.half()}, TypeError, "up must have gate's dtype"),
    ({"activation": "relu"}, ValueError, "activation must be silu, gelu or gelu_tanh, got relu"),
    ({"out": torch.ones(8, 3)}, ValueError, r"out must have gate's shape \[3, 8\], got \[8, 3\]"),
    ({"out": X.bfloat16()}, TypeError, "out must have gate's dtype"),
    ({"grad_gate": X.clone()}, ValueError, "grad_gate and grad_up need grad"),
    ({"grad": torch.ones(3, 1)}, ValueError, r"grad must have gate's shape \[3, 8\], got \[3, 1\]"),
    ({"gate": X.clone().requires_grad_()}, RuntimeError, "not differentiable, and gate requires grad"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_wrong_arguments(
    backend: str, arguments: dict[str, object], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The checks come before Triton is imported, which in this process must compile and not interpret.
    monkeypatch.setattr("pygen.ops.gated_unit.use_triton", lambda *_: backend == "triton")
    right = {"gate": X, "up": X, "activation": "silu", "out": torch.empty_like(X)}
    with pygen.backend(backend), pytest.raises(error, match=message):
        gated_unit(**(right | arguments))


def test_overlap_and_more_wrong_arguments() -> None:
    memory = torch.zeros(40)
    with pytest.raises(RuntimeError, match="single memory location"):
        pygen.swiglu(memory[:30], memory[:30], out=memory[10:])
    with pytest.raises(RuntimeError, match="single memory location"):
        gated_unit(memory, memory, "silu", grad=memory, out=memory, grad_gate=memory)
    with pytest.raises(RuntimeError, match="more than one element"):
        pygen.swiglu(X, X, out=torch.ones(8).expand(3, 8))
    with pytest.raises(ValueError, match="approximate must be none or tanh, got 'erf'"):
        pygen.geglu(X, X, approximate="erf")
    with pytest.raises(RuntimeError, match="not differentiable"):
        pygen.swiglu(X.clone().requires_grad_(), X, out=torch.empty_like(X))
