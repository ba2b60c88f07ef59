"""The norms, gated MLPs and rotary embeddings of transformers' models on pygen's ops, with their gradients: for who
calls a model itself, or trains it.

Each family has classes of its own: what a norm computes is told by what it makes of a few numbers, and what an MLP does
by its forward's code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pygen.ops.gated_unit import geglu, swiglu
from pygen.ops.row_norm import layer_norm, rms_norm, with_rows
from pygen.patch import Found, Left, Replacement, forwards
from pygen.transformers.rope import has_rope, rotary

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The names in the forward of a gated MLP, with two projections or a fused one, and its activation's.
_TWO = ({"gate_proj", "up_proj", "act_fn", "down_proj"}, "act_fn")
_FUSED = ({"gate_up_proj", "chunk", "activation_fn", "down_proj"}, "activation_fn")
_UNITS: tuple[tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]], ...] = (
    (functional.silu, swiglu),
    (functional.gelu, geglu),
    (partial(functional.gelu, approximate="tanh"), partial(geglu, approximate="tanh")),
)


def modules(target: Any) -> Found:
    """The rule for a transformers model: whatever of its parts there is a rule for."""
    yield from forwards(target, _rule_of)


def _rule_of(module: nn.Module) -> Callable[[str, Any], Found] | None:
    kind = type(module)
    if kind is nn.LayerNorm:
        return _layer_norm
    if not kind.__module__.startswith("transformers.models."):
        return None
    if kind.__name__.endswith("RMSNorm"):
        return _rms_norm
    if has_rope(module):
        return rotary
    return _mlp if kind.__name__.endswith("MLP") and _shape_of(module) is not None else None


def _ours(x: Tensor, weight: Tensor) -> bool:
    """Whether the ops take it, and give what the module would."""
    return x.dtype == weight.dtype and x.dtype in _DTYPES


def _layer_norm(name: str, module: nn.LayerNorm) -> Found:
    if len(module.normalized_shape) != 1 or module.weight is None:
        yield Left(name, "LayerNorm over several dimensions or without a weight")
        return
    yield Replacement(module, "forward", partial(_centre, module), "LayerNorm")


def _centre(module: nn.LayerNorm, input: Tensor) -> Tensor:
    if not _ours(input, module.weight):
        return nn.LayerNorm.forward(module, input)
    return layer_norm(with_rows(input), module.weight, module.bias, eps=module.eps)


def _rms_norm(name: str, module: Any) -> Found:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if isinstance(weight, Tensor) and weight.dtype in _DTYPES and not weight.is_meta and isinstance(eps, float):
        with torch.no_grad():
            x = torch.linspace(-1, 2, len(weight), dtype=weight.dtype, device=weight.device)[None]
            theirs, rounding = module(x), 8 * torch.finfo(weight.dtype).eps
            for offset in (0.0, 1.0):
                if torch.allclose(rms_norm(x, weight, eps, offset=offset), theirs, rtol=rounding, atol=rounding):
                    yield Replacement(module, "forward", partial(_normalise, module, eps, offset), "RMSNorm")
                    return
    yield Left(name, f"{type(module).__name__} is not the norm that pygen has")


def _normalise(module: Any, eps: float, offset: float, x: Tensor) -> Tensor:
    if not _ours(x, module.weight):
        y: Tensor = type(module).forward(module, x)
        return y
    return rms_norm(with_rows(x), module.weight, eps, offset=offset)


def _shape_of(module: nn.Module) -> str | None:
    """The name of a gated MLP's activation."""
    code = getattr(type(module).forward, "__code__", None)
    for names, activation in (_TWO, _FUSED):
        if code is not None and set(code.co_names) == names:
            return activation
    return None


def _mlp(name: str, module: Any) -> Found:
    activation = getattr(module, str(_shape_of(module)))
    x = torch.linspace(-8, 8, 65)
    for theirs, unit in _UNITS:
        if torch.allclose(activation(x), theirs(x), rtol=1e-6, atol=1e-6):
            yield Replacement(module, "forward", partial(_gate, module, unit), "gated MLP")
            return
    yield Left(name, f"{type(activation).__name__} is not an activation that pygen has a gated unit of")


def _gate(module: Any, unit: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    if x.dtype not in _DTYPES:
        given: Tensor = type(module).forward(module, x)
        return given
    if hasattr(module, "gate_up_proj"):
        gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = module.gate_proj(x), module.up_proj(x)
    y: Tensor = module.down_proj(unit(gate, up))
    return y
