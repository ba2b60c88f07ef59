"""linear_decode: y = x W^T for a few rows of x, at the speed of reading W, which is packed once.

With the norm before it and the activation, the gate and the residual behind it: what a decoder's layer is made of,
beside its attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from pygen import _C  # noqa: F401  (registers the operator)
from pygen.ops.backend import use_reference
from pygen.ops.packed_linear import FORMATS, PackedLinear, pack_experts, pack_linear
from pygen.ops.spec import Example, OpSpec, tensor_bytes

_BACKENDS = ("reference", "cpu", "cuda")
Activation = Literal["none", "silu", "gelu", "gelu_tanh"]
Norm = Literal["none", "rms", "layer"]


def linear_decode(
    x: Tensor,
    weight: PackedLinear,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: Activation = "none",
    norm: Norm = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    soft_cap: float | None = None,
    experts: Tensor | None = None,
    blocked: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """activation(norm(x) W^T + bias) + residual; where the weight is gated, activation(gate) * up + residual.

    Computed in float32 or better and rounded once, but for the normed rows against bfloat16 weights: where x is
    bfloat16, they are too. A row's bits do not depend on the rows beside it, however many, on the number of threads or
    on the instruction set (but for bfloat16's subnormal products, which the BF16 dot product takes for 0).

    On a GPU sums have another order than on a CPU. Rows are computed eight at a time: each eight read the weight.

    With ``experts``, a mixture of experts (Shazeer et al. 2017): the weight is a stack of layers, of which each row
    goes through those it chose. Those that no row chose are not read, and rows of one expert share the reading of it.

    Args:
        x: (..., inputs), float32, bfloat16 or float16, of any strides. With experts, (..., inputs), each row going
            through all of its choices, or (..., choices, inputs), each of which has a row of its own.
        weight: as ``pack_linear`` makes it, or with experts as ``pack_experts`` does.
        bias: (outputs,), or (2 outputs,), the gate's first; in x's dtype or float32.
        residual: (..., outputs), in x's dtype.
        activation: "none", "silu", "gelu" or "gelu_tanh".
        norm: "none", "rms" (Zhang & Sennrich 2019) or "layer" (Ba et al. 2016), over the inputs of each row.
        norm_weight, norm_bias: (inputs,), in x's dtype or float32; 1 and 0 where None.
        eps: added to the mean square, or the variance.
        soft_cap: y becomes soft_cap * tanh(y / soft_cap), after the bias and before the residual (Gemma 2's logits); of
            a layer without activation and gate.
        experts: int64 (..., choices), contiguous, read through a pointer, as ``route_experts`` makes them; without
            bias. One that there is not counts as a layer of zeros on a GPU, and in a program that is replayed.
        blocked: whether bfloat16 rows may meet bfloat16 weights in torch's blocked matrix product, where a CPU has one:
            several times faster from some tens of rows on, and in multiples of 32. A row's bits are then those that it
            has in any other blocked call, and not those of a call that is not.
        out: (..., outputs), or with experts (..., choices, outputs), in x's dtype or float32, which from halves
            takes int8 and int4 twice the products; may be ``residual``. New, in x's dtype, where left out.

    Returns:
        ``out``.

    Raises:
        ValueError, TypeError: naming the argument.
        IndexError: where the host can read them, on an expert that there is not.
    """
    if out is None:
        out = x.new_empty(*(x.shape[:-1] if experts is None else experts.shape), weight.outputs)
    if use_reference("linear_decode", _BACKENDS, x.device):
        arguments = (x, weight, bias, residual, activation, norm, norm_weight, norm_bias, eps, soft_cap, experts)
        return out.copy_(linear_decode_reference(*arguments).view(out.shape))
    rows, to = x, out
    if x.dim() > 2 or experts is not None:
        rows, to = x.flatten(0, -2), out.view(-1, out.shape[-1])
        residual = None if residual is None else residual.flatten(0, -2)
        experts = None if experts is None else experts.flatten(0, -2)
    _kernel(
        rows, *weight, bias, residual, activation, norm, norm_weight, norm_bias, eps, soft_cap, experts, blocked, to
    )
    return out


def linear_decode_reference(
    x: Tensor,
    weight: PackedLinear,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation = "none",
    norm: Norm = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    soft_cap: float | None = None,
    experts: Tensor | None = None,
) -> Tensor:
    """In the dtype of its arithmetic."""
    compute = torch.promote_types(x.dtype, torch.float32)
    bias, residual, norm_weight, norm_bias = (
        None if tensor is None else tensor.to(compute) for tensor in (bias, residual, norm_weight, norm_bias)
    )
    row = x.to(compute)
    if norm == "layer":
        row = functional.layer_norm(row, row.shape[-1:], norm_weight, norm_bias, eps)
    elif norm == "rms":
        row = functional.rms_norm(row, row.shape[-1:], norm_weight, eps)
        row = row if norm_bias is None else row + norm_bias
    if experts is None:
        y = functional.linear(row, weight.unpack(compute), bias)
    else:
        row = row if row.dim() > experts.dim() else row[..., None, :]
        y = (weight.unpack(compute)[experts] @ row[..., None])[..., 0]
    y, *up = y.chunk(2, dim=-1) if weight.gated else (y,)
    if activation == "silu":
        y = functional.silu(y)
    elif activation != "none":
        y = functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    y = y * up[0] if up else y
    if soft_cap is not None:
        y = soft_cap * torch.tanh(y / soft_cap)
    return y if residual is None else y + residual.reshape(y.shape)


_kernel = torch.ops.pygen.linear_decode.default


@torch.library.register_fake("pygen::linear_decode")
def _fake(*arguments: object) -> None:
    return None


def _flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """With the operator's arguments: the parts of the weight, its data by the name `weight`."""

    @wraps(function)
    def flat(*, weight: Tensor, outputs: int, inputs: int, format: Any, group: int, **rest: Any) -> Any:
        packed = PackedLinear(weight, outputs, inputs, format, group, rest.pop("zeros"), rest.pop("gated"))
        return function(weight=packed, **rest)

    return flat


def _example(name: str, x: Tensor, weight: PackedLinear, **more: Any) -> Example:
    arguments: dict[str, Any] = {"x": x} | weight._asdict()
    arguments["weight"] = arguments.pop("data")
    arguments |= {"bias": None, "residual": None, "activation": "none", "norm": "none"}
    arguments |= {"norm_weight": None, "norm_bias": None, "eps": 1e-6, "soft_cap": None, "experts": None}
    arguments["blocked"] = False
    rows = more["experts"].numel() if "experts" in more else x.shape[0]
    out = torch.full((rows, weight.outputs), math.nan, dtype=more.pop("to", x.dtype))
    return Example(name, arguments | {"out": out} | more, own_bits=more.get("blocked", False))


def _weights(
    draw: Callable[..., Tensor], outputs: int, inputs: int, gated: bool = False, experts: int = 0
) -> Iterator[tuple[str, Any]]:
    """The same weight in every format; a stack where there are experts."""
    size = (experts, outputs, inputs) if experts else (outputs, inputs)
    weight, up, pack = draw(*size), draw(*size) if gated else None, pack_experts if experts else pack_linear
    for format in FORMATS:
        for group in (0, 32, 64, 128) if format in ("int8", "int4") else (None,):
            for symmetric in (True, False) if group is not None else (True,):
                name = f"{format}, groups of {group}{'' if symmetric else ', zeros'}" if group is not None else format
                yield name, pack(weight, up, format=format, group=group, symmetric=symmetric)


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def x(rows: int, inputs: int) -> Tensor:
        return draw(rows, inputs).to(dtype)

    for outputs, inputs in ((1, 1), (33, 7), (40, 72), (70, 333)):
        for name, weight in _weights(draw, outputs, inputs):
            yield _example(f"odd sizes, {name}", x(16, inputs), weight)
    for name, weight in _weights(draw, 48, 160):
        for rows in (1, 3, 4, 9, 16, 17):
            yield _example(f"rows, {name}", x(rows, 160), weight)
        yield _example(f"large x, {name}", 1000 * x(24, 160), weight)
        yield _example(f"small x, {name}", 1e-3 * x(24, 160), weight)
        ramp = (x(24, 160) * 2.0 ** -torch.arange(160).div(8, rounding_mode="floor")).to(dtype)
        yield _example(f"from large to small, {name}", ramp, weight)
        special = x(6, 160)
        special[0, 3], special[1, 159], special[2, 7] = math.nan, math.inf, -math.inf
        special[3, 5:7], special[4] = torch.tensor([math.inf, -math.inf]).to(dtype), math.inf
        yield _example(f"NaN and Inf, {name}", special, weight)
        yield _example(f"zeros, {name}", torch.zeros(2, 160, dtype=dtype), weight)
    for gated in (False, True):
        for name, weight in _weights(draw, 45, 96, gated):
            more: dict[str, Any] = {"bias": draw(45 * (1 + gated)).to(dtype), "residual": x(24, 45)}
            for activation in ("none", "silu", "gelu", "gelu_tanh"):
                name = f"{activation}{', gated' if gated else ''}, {weight.format}"
                yield _example(name, x(24, 96), weight, activation=activation, **more)
    for name, weight in _weights(draw, 40, 200):
        parameters = {"norm_weight": draw(200).to(dtype), "norm_bias": draw(200), "eps": 1e-5}
        for norm in ("rms", "layer"):
            yield _example(f"{norm}, {name}", 3 * x(24, 200) + 1, weight, norm=norm, **parameters)
            yield _example(f"{norm} alone, {name}", x(24, 200), weight, norm=norm)
        capped = {"bias": draw(40), "residual": x(24, 40)}
        for cap in (0.5, 30.0):
            yield _example(f"soft cap of {cap}, {name}", x(24, 200), weight, soft_cap=cap, **capped)
    for gated in (False, True):
        for count, outputs, inputs, sizes in ((3, 16, 40, ((1, 2), (7, 3), (70, 2))), (2, 34, 24, ((24, 1),))):
            for name, weight in _weights(draw, outputs, inputs, gated, experts=count):
                name = f"experts{', gated' if gated else ''}, {name}"
                for rows, choices in sizes:
                    chosen = torch.stack([torch.randperm(count, generator=generator)[:choices] for _ in range(rows)])
                    more = {"experts": chosen, "activation": "silu", "residual": x(rows * choices, outputs)}
                    yield _example(name, x(rows, inputs), weight, **more)
                    own = {"experts": chosen.view(-1, 1), "to": torch.float32}
                    yield _example(f"{name}, a row to each", x(rows * choices, inputs), weight, **own)
                alike = torch.full((24, 1), count - 1)
                yield _example(f"{name}, all alike", x(24, inputs), weight, experts=alike, norm="rms")
    for gated in (False, True):
        for rows in (24, 70):
            weight = pack_linear(draw(45, 203), draw(45, 203) if gated else None, format="bfloat16")
            more = {"bias": draw(45 * (1 + gated)), "residual": x(rows, 45), "norm": "rms", "activation": "silu"}
            yield _example(f"blocked{', gated' if gated else ''}, {rows}", x(rows, 203), weight, blocked=True, **more)
    layer = pack_linear(draw(64, 256), format="bfloat16")
    yield _example("latents", x(24, 256), layer)
    out = x(24, 64)
    yield _example("into float32", x(24, 256), layer, to=torch.float32)
    yield _example("in place", x(24, 256), layer, residual=out, out=out)
    yield _example("no rows", x(0, 256), layer)
    for name, weight in _weights(draw, 40, 200):
        strided = torch.full((80, 24), math.nan, dtype=dtype)[::2].T
        wide = x(24, 401)
        yield _example(f"strided, {name}", wide[:, 1::2], weight, residual=x(40, 24).T, out=strided)
        yield _example(f"misaligned, {name}", x(1, 4801).flatten()[1:].view(24, 200), weight)


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)
    for outputs, inputs in ((1024, 1024), (4096, 4096)):
        weight = torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)
        x = torch.randn(1, inputs, generator=generator).to(dtype)
        for format in FORMATS:
            yield _example(f"{outputs}x{inputs}, {format}", x, pack_linear(weight, format=format))
    stack = torch.randn(8, 4096, 1024, generator=generator) / 32
    x, chosen = torch.randn(1, 1024, generator=generator).to(dtype), torch.tensor([[6, 1]])
    for format in FORMATS:
        yield _example(f"2 of 8 of 4096x1024, {format}", x, pack_experts(stack, format=format), experts=chosen)


def _bytes_moved(example: Example) -> int:
    """Of a stack of layers, those that rows go through."""
    weight, experts = example.arguments["weight"], example.arguments["experts"]
    read = weight if experts is None else weight[: len(experts.unique())]
    return tensor_bytes(read, *(example.arguments[name] for name in ("x", "bias", "residual", "out")))


SPEC = OpSpec(
    name="linear_decode",
    function=_flat(linear_decode),
    reference=_flat(
        lambda out, blocked, **arguments: (linear_decode_reference(**arguments).to(out.dtype).view(out.shape),)
    ),
    operator=_kernel,
    outputs=("out",),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=_bytes_moved,
    flops=lambda example: 2 * example.arguments["inputs"] * example.arguments["out"].numel(),
    benchmarks=_benchmarks,
    bits_on_gpu=False,
)
