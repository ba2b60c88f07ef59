"""The rotary embeddings of transformers' attention modules on ``pygen.ops.rope``.

A family's attention calls the function ``apply_rotary_pos_emb`` of its Python module, which all models of the family
share. So an accelerated module's forward is its class's own code that calls another name, which is put beside theirs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from pygen.ops.rope import rope
from pygen.ops.row_norm import with_rows
from pygen.patch import Found, Left, Replacement

NAME, _OURS = "apply_rotary_pos_emb", "apply_rotary_pos_emb_by_pygen"
_TABLE = "_pygen_rope_table"  # an attribute of the cosines, which all layers are given
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_Turn = Callable[..., tuple[Tensor, Tensor]]


def has_rope(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and NAME in code.co_names


def rotary(name: str, module: nn.Module) -> Found:
    """The rule for an attention module."""
    forward: Any = type(module).forward
    if _turns_halves(forward.__globals__[NAME]):
        yield Replacement(module, "forward", _Forward(module), "rotary embedding")
    else:
        yield Left(name, f"{NAME} of {type(module).__module__} is not the one that pygen has")


class _Forward:
    """Of a module; copies and pickles of the module take it with them."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._function = module, _with_ours(type(module).forward)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Forward, (self._module,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._module, *args, **kwargs)


@cache
def _with_ours(forward: Any) -> Callable[..., Any]:
    names, code = forward.__globals__, forward.__code__
    names[_OURS] = partial(_turn, names[NAME])
    code = code.replace(co_names=tuple(_OURS if name == NAME else name for name in code.co_names))
    ours = FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours


def _turn(theirs: _Turn, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    """As theirs, whose ``cos`` and ``sin`` are (batch, length, 2 * pairs), the second half as the first."""
    if more or q.dtype not in _DTYPES or k.dtype not in _DTYPES or cos.dim() != 3 or cos.requires_grad:
        return theirs(q, k, cos, sin, *more)
    table, positions = _table(cos, sin)
    return rope(with_rows(q), positions, table), rope(with_rows(k), positions, table)


def _table(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token a row, and where it is."""
    made: tuple[Tensor, Tensor, Tensor] | None = getattr(cos, _TABLE, None)
    if made is None or made[0] is not sin:
        pairs = cos.shape[-1] // 2
        table = torch.stack((cos[..., :pairs], sin[..., :pairs]), dim=-2).flatten(0, 1).float()
        positions = torch.arange(len(table), device=cos.device).view(cos.shape[:2])
        made = (sin, table, positions)
        setattr(cos, _TABLE, made)
    return made[1:]


@cache
def _turns_halves(theirs: _Turn) -> bool:
    """Whether a function does what ``rope`` does, told by a few numbers."""
    if list(inspect.signature(theirs).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    with torch.no_grad():
        q, k = torch.linspace(-1, 2, 48).view(1, 2, 3, 8), torch.linspace(1, -3, 24).view(1, 1, 3, 8)
        angles = torch.linspace(0, 3, 12).view(1, 3, 4).repeat(1, 1, 2)
        cos, sin = angles.cos(), angles.sin()
        return all(map(torch.allclose, _turn(theirs, q, k, cos, sin), theirs(q, k, cos, sin)))
