"""gated_unit: activation(gate) * up, the feed-forward units of Shazeer 2020 (GLU variants improve transformer).

One kernel for SwiGLU and GEGLU, forwards and backwards: the backward pass reads gate, up and the gradient once, writes
both gradients, and computes the activation again, so that nothing but gate and up is kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pygen import _C  # noqa: F401  (registers the operator)
from pygen.ops.backend import triton_kernels, use_reference, use_triton
from pygen.ops.spec import Example, OpSpec, tensor_bytes

Activation = Literal["silu", "gelu", "gelu_tanh"]
_BACKENDS = ("reference", "cpu", "triton")


def swiglu(gate: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up, in float32 with one rounding at the end; differentiable.

    The halves of one projection need no copy: ``swiglu(*x.chunk(2, -1))``.

    Args:
        gate, up: of one shape and dtype, float32, bfloat16 or float16; any strides.
        out: likewise; may be gate or up. New where left out; where it is given, nothing is recorded for autograd.

    Returns:
        ``out``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    return _apply(gate, up, "silu", out)


def geglu(
    gate: Tensor, up: Tensor, *, approximate: Literal["none", "tanh"] = "none", out: Tensor | None = None
) -> Tensor:
    """gelu(gate) * up, else as ``swiglu``; ``approximate`` as for ``torch.nn.functional.gelu``."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: approximate must be none or tanh, got {approximate!r}")
    return _apply(gate, up, "gelu" if approximate == "none" else "gelu_tanh", out)


def _apply(gate: Tensor, up: Tensor, activation: Activation, out: Tensor | None) -> Tensor:
    if out is None:
        if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
            recorded: Tensor = _GatedUnit.apply(gate, up, activation)
            return recorded
        out = torch.empty_like(gate)
    gated_unit(gate, up, activation, out=out)
    return out


class _GatedUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        out = torch.empty_like(gate)
        gated_unit(gate, up, activation, out=out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        gradients = [torch.empty_like(gate) if wanted else None for wanted in ctx.needs_input_grad[:2]]
        gated_unit(gate, up, ctx.activation, grad=grad, grad_gate=gradients[0], grad_up=gradients[1])
        return *gradients, None


def gated_unit(
    gate: Tensor,
    up: Tensor,
    activation: Activation,
    *,
    grad: Tensor | None = None,
    out: Tensor | None = None,
    grad_gate: Tensor | None = None,
    grad_up: Tensor | None = None,
) -> Tensor | None:
    """Writes what is given of ``out`` and, from ``grad``, of ``grad_gate`` and ``grad_up``, in one pass.

    For whoever writes a backward pass: with ``out`` too, the activation that was not kept is made again beside the
    gradients. Each may be one of the inputs, whose place it takes. Returns ``out``.
    """
    outputs = (out, grad_gate, grad_up)
    if use_reference("gated_unit", _BACKENDS, gate.device):
        for tensor, result in zip(outputs, gated_unit_reference(gate, up, activation, grad=grad), strict=True):
            if tensor is not None:
                tensor.copy_(result)
    elif use_triton("gated_unit", gate.device):
        _triton(gate, up, activation, grad, *outputs)
    else:
        _kernel(gate, up, activation, grad, *outputs)
    return out


def gated_unit_reference(
    gate: Tensor, up: Tensor, activation: Activation, *, grad: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the gradients of gate and up."""
    dtype = gate.dtype
    compute = torch.promote_types(dtype, torch.float32)
    gate, up = gate.to(compute), up.to(compute)
    grad = torch.ones_like(gate) if grad is None else grad.to(compute)
    if activation == "silu":
        value, slope = functional.silu(gate), torch.ops.aten.silu_backward(torch.ones_like(gate), gate)
    else:
        approximate = "none" if activation == "gelu" else "tanh"
        value = functional.gelu(gate, approximate=approximate)
        slope = torch.ops.aten.gelu_backward(torch.ones_like(gate), gate, approximate=approximate)
    return (value * up).to(dtype), (grad * up * slope).to(dtype), (grad * value).to(dtype)


_kernel = torch.ops.pygen.gated_unit.default


@torch.library.register_fake("pygen::gated_unit")
def _fake(*arguments: object) -> None:
    return None


def _triton(
    gate: Tensor,
    up: Tensor,
    activation: Activation,
    grad: Tensor | None,
    out: Tensor | None,
    grad_gate: Tensor | None,
    grad_up: Tensor | None,
) -> None:
    named = {"gate": gate, "up": up, "grad": grad, "out": out, "grad_gate": grad_gate, "grad_up": grad_up}
    _check(activation, named)
    if gate.numel() == 0:
        return
    present = [tensor for tensor in named.values() if tensor is not None]
    size, strides = _merge([*gate.shape], [tensor.stride() for tensor in present])
    by_tensor = {id(tensor): stride for tensor, stride in zip(present, strides, strict=True)}
    nothing = [0] * len(size)
    all_strides = [nothing if tensor is None else by_tensor[id(tensor)] for tensor in named.values()]
    with torch.cuda.device_of(gate):
        triton_kernels("gated_unit").launch(activation, size, [*named.values()], all_strides)


torch.library.impl("pygen::gated_unit", "CUDA", _triton)


def _check(activation: str, named: dict[str, Tensor | None]) -> None:
    """What csrc checks for the CPU."""
    gate = named["gate"]
    assert gate is not None
    if activation not in ("silu", "gelu", "gelu_tanh"):
        raise ValueError(f"gated_unit: activation must be silu, gelu or gelu_tanh, got {activation}")
    if gate.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"gated_unit: gate must be float32, bfloat16 or float16, got {gate.dtype}")
    if named["grad"] is None and not (named["grad_gate"] is None and named["grad_up"] is None):
        raise ValueError("gated_unit: grad_gate and grad_up need grad, the gradient of out")
    for name, tensor in named.items():
        if tensor is None:
            continue
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(
                f"gated_unit is not differentiable, and {name} requires grad: call it under torch.no_grad()"
            )
        if tensor.device != gate.device:
            raise ValueError(f"gated_unit: {name} lies on {tensor.device}, the others on {gate.device}")
        if tensor.shape != gate.shape:
            raise ValueError(f"gated_unit: {name} must have gate's shape {[*gate.shape]}, got {[*tensor.shape]}")
        if tensor.dtype != gate.dtype:
            raise TypeError(f"gated_unit: {name} must have gate's dtype {gate.dtype}, got {tensor.dtype}")


def _merge(size: list[int], strides: list[tuple[int, ...]]) -> tuple[list[int], list[list[int]]]:
    """The dimensions in the order of the first tensor's strides, merged where every tensor allows it."""
    dims = [d for d in sorted(range(len(size)), key=lambda d: -strides[0][d]) if size[d] != 1]
    merged: list[int] = []
    ends: list[int] = []  # the innermost dimension merged into each
    for d in dims:
        if ends and all(stride[ends[-1]] == stride[d] * size[d] for stride in strides):
            merged[-1] *= size[d]
            ends[-1] = d
        else:
            merged.append(size[d])
            ends.append(d)
    if len(merged) > 3:
        raise ValueError(f"gated_unit: the tensors need {len(merged)} strided dimensions, 3 at most: call contiguous()")
    return merged or [1], [[stride[d] for d in ends] or [1] for stride in strides]


_OUTPUTS = ("out", "grad_gate", "grad_up")


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def tensor(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    def example(
        name: str, gate: Tensor, up: Tensor | None = None, activation: Activation = "silu", gradients: bool = True,
        **more: Any,
    ) -> Example:  # fmt: skip
        arguments: dict[str, Any] = {"gate": gate, "up": tensor(*gate.shape) if up is None else up}
        arguments |= {"activation": activation, "grad": tensor(*gate.shape) if gradients else None}
        for output in _OUTPUTS if gradients else _OUTPUTS[:1]:
            arguments[output] = torch.full(gate.shape, math.nan, dtype=dtype)
        return Example(name, arguments | more)

    activations: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")
    special = (0.0, -0.0, 1.0, -0.5, 100.0, -1000.0, math.inf, -math.inf, math.nan)
    every = torch.tensor(list(itertools.product(special, repeat=3)), dtype=dtype)
    for activation in activations:
        for count in range(0, 132):
            yield example(f"every count, {activation}", tensor(count), activation=activation, gradients=count % 2 == 0)
        rising = torch.linspace(-12, 12, 4099).to(dtype)
        for gradients in (False, True):
            yield example(f"the whole range, {activation}", rising, None, activation, gradients)
        for scale in (1e-30, 30.0, 1e4):
            yield example(
                f"values about {scale}, {activation}", (scale * tensor(3, 100).float()).to(dtype), None, activation
            )
        for far in (80.0, -80.0, 3e4, -3e4):
            yield example(f"{far}, {activation}", torch.full((40,), far, dtype=dtype), None, activation)
        gate, up, grad = every.unbind(1)
        yield example(f"NaN and Inf, {activation}", gate, up, activation, grad=grad)
        yield example(f"NaN and Inf forwards, {activation}", gate, up, activation, gradients=False)
        halves = tensor(2, 9, 2 * 96)
        gate, up = halves.chunk(2, -1)
        yield example(f"halves of a projection, {activation}", gate, up, activation)
        yield example("in place", gate.clone(), None, activation, gradients=False)
    gate, up, grad = (tensor(4, 33) for _ in range(3))
    yield example("in place", gate, up, gradients=False, out=gate)
    yield example("in place of up", gate, up, gradients=False, out=up)
    yield example("gradients in place", gate, up, grad=grad, out=grad, grad_gate=gate, grad_up=up)
    yield example("no gradient of gate", gate, up, grad_gate=None)
    yield example("no gradient of up", gate, up, grad_up=None)
    gate, up = tensor(3, 2 * 37).chunk(2, -1)
    yield example("odd halves", gate, up)
    gate, up = tensor(2, 2 * 5, 7, 6).chunk(2, 1)
    yield example("halves of channels", gate, up)
    gate, up = tensor(2, 2 * 5, 7, 6).to(memory_format=torch.channels_last).chunk(2, 1)
    yield example("halves of channels, channels-last", gate, up)
    gate, up = tensor(5, 70, 2).unbind(-1)
    yield example("interleaved", gate, up, "gelu")
    yield example("transposed", tensor(40, 21).t(), tensor(21, 40), "gelu")
    yield example("broadcast", tensor(3, 4, 30), tensor(3, 1, 30).expand(3, 4, 30))
    yield example("misaligned", tensor(1 + 3 * 129)[1:].view(3, 129), tensor(3 + 3 * 129)[3:].view(3, 129))
    yield example("strided output", tensor(6, 50), out=torch.full((6, 100), math.nan, dtype=dtype)[:, ::2])
    yield example("a number", tensor())
    yield example("many rows", tensor(700, 3))
    yield example("several chunks", tensor(3, 2500), tensor(2500, 3).t(), "gelu_tanh")


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    for name, tokens, hidden in (("one token", 1, 11008), ("a prompt", 256, 11008), ("a U-Net's", 2 * 4096, 1280)):
        for activation in ("silu", "gelu") if tokens > 1 else ("silu",):
            gate, up = torch.randn(tokens, 2 * hidden).to(dtype).chunk(2, -1)
            arguments = {"gate": gate, "up": up, "activation": activation}
            yield Example(f"{name}, {activation}", arguments | {"out": torch.empty(tokens, hidden, dtype=dtype)})
            if tokens == 256:
                grad, out, grad_gate, grad_up = torch.randn(4, tokens, hidden).to(dtype)
                arguments |= {"grad": grad, "out": out, "grad_gate": grad_gate, "grad_up": grad_up}
                yield Example(f"{name}, {activation}, with gradients", arguments)


def _tensors(example: Example) -> list[Tensor]:
    return [value for value in example.arguments.values() if isinstance(value, Tensor)]


_FLOPS = {"silu": 22, "gelu": 40, "gelu_tanh": 26}

GATED_UNIT = OpSpec(
    name="gated_unit",
    function=gated_unit,
    reference=lambda **arguments: gated_unit_reference(
        **{name: value for name, value in arguments.items() if name not in _OUTPUTS}
    ),
    operator=_kernel,
    outputs=_OUTPUTS,
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(*_tensors(example)),
    flops=lambda example: _FLOPS[example.arguments["activation"]] * example.arguments["gate"].numel(),
    benchmarks=_benchmarks,
)
