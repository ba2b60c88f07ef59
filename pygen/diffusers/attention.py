"""The attention of diffusers' models on ``pygen.attention``: of the classic U-Net and of Stable Diffusion 3 and Flux by
processors of pygen's, of other models by the dispatcher's name for it, or by what torch's is within their forwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from pygen.held import Held
from pygen.models.layers import Packed, attend, heads_of, is_plain, joined, may_hold, project_together
from pygen.ops.rope import rope
from pygen.patch import TAKEN, Found, Left, Replacement, is_ours


def attention(name: str, module: Any, processor: Any) -> Found:
    kind, of = type(processor), type(module)
    if isinstance(processor, PygenAttnProcessor) or getattr(processor, "_attention_backend", None) is _BACKEND:
        return
    if of is Attention and kind is AttnProcessor2_0:
        yield Replacement(module, "processor", PygenAttnProcessor(), "attention")
    elif (of, kind) in _JOINT and getattr(processor, "_attention_backend", None) is None:
        yield Replacement(module, "processor", PygenJointAttnProcessor(), "attention")
    elif hasattr(processor, "_attention_backend"):
        yield Replacement(processor, "_attention_backend", _BACKEND, "attention")
    elif "scaled_dot_product_attention" in getattr(kind.__call__, "__code__", attention.__code__).co_names:
        if "forward" not in vars(module):
            yield Replacement(module, "forward", partial(_redirected, module), "attention")
        elif not is_ours(module.forward):
            yield Left(name, TAKEN)
    else:
        yield Left(name, f"{kind.__module__}.{kind.__name__} is no processor that there is a rule for")


def _redirected(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A forward within which torch's attention is pygen's."""
    with _Redirection():
        return type(module).forward(module, *args, **kwargs)


class _Redirection(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            return _in_place_of_torchs(*args, **kwargs)
        return function(*args, **kwargs)


def _in_place_of_torchs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.dim() != 4:
        raise ValueError(f"pygen's attention has four dimensions, got {query.dim()}: undo pygen.accelerate for others")
    return attend(query, key, value, attn_mask, causal=is_causal, scale=scale, dropout_p=dropout_p)


class PygenAttnProcessor:
    """``AttnProcessor2_0`` on ``pygen.attention``; keys and values of one text are made once for all steps."""

    def __init__(self) -> None:
        self.together: Held[Packed] = Held()
        self.of_text: Held[tuple[Tensor, Tensor]] = Held()

    def __reduce__(self) -> tuple[Any, ...]:
        return PygenAttnProcessor, ()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, text.shape[1], text.shape[0])
            attention_mask = attention_mask.view(text.shape[0], attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            parts = _projected((attn.to_q, attn.to_k, attn.to_v), self.together, hidden_states)
            query, key, value = map(_heads, (attn,) * 3, parts, (attn.norm_q, attn.norm_k, None))
        else:
            query = _heads(attn, attn.to_q(hidden_states), attn.norm_q)
            key, value = self._of_text(attn, encoder_hidden_states)
        y = attend(query, key, value, attention_mask)
        y = attn.to_out[1](attn.to_out[0](y.transpose(1, 2).flatten(2)))
        if len(shape) == 4:
            y = y.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            y = y + residual
        return y if attn.rescale_output_factor == 1 else y / attn.rescale_output_factor

    def _keys_and_values(self, attn: Attention, states: Tensor) -> tuple[Tensor, Tensor]:
        return _heads(attn, attn.to_k(states), attn.norm_k), _heads(attn, attn.to_v(states), None)

    def _of_text(self, attn: Attention, text: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the very tensor, unchanged, that they were last made of, if nothing learns by them."""
        if attn.norm_cross:
            return self._keys_and_values(attn, attn.norm_encoder_hidden_states(text))
        made_of = (text, *attn.to_k.parameters(), *attn.to_v.parameters())
        if not may_hold(*made_of):
            return self._keys_and_values(attn, text)
        return self.of_text.get(made_of, lambda: self._keys_and_values(attn, text))


class PygenJointAttnProcessor:
    """``JointAttnProcessor2_0`` of Stable Diffusion 3 and ``FluxAttnProcessor``, whose queries, keys and values are one
    product, and are normed and turned in one pass."""

    _parallel_config = None

    def __init__(self) -> None:
        self._attention_backend = _BACKEND  # until the model's set_attention_backend names another
        self.together: Held[Packed] = Held()
        self.text_together: Held[Packed] = Held()

    def __reduce__(self) -> tuple[Any, ...]:
        return PygenJointAttnProcessor, ()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        flux, text = isinstance(attn, FluxAttention), encoder_hidden_states
        if flux and attn.fused_projections:
            as_before: Any = FluxAttnProcessor.__call__
            fused: Tensor = as_before(self, attn, hidden_states, text, attention_mask, image_rotary_emb)
            return fused
        of_text, turns = 0 if text is None else text.shape[1], _turns(image_rotary_emb)
        parts = _tokens(attn, self.together, hidden_states, turns, slice(of_text, None))
        if text is not None:
            added = _tokens(attn, self.text_together, text, turns, slice(of_text), added=True)
            parts = joined(added, parts) if flux else joined(parts, added)
        query, key, value = (part.transpose(1, 2) for part in parts)
        y = dispatch_attention_fn(
            query, key, value, attention_mask if flux else None, backend=self._attention_backend,
            parallel_config=self._parallel_config,
        ).flatten(2)  # fmt: skip
        if text is None and flux:
            return y
        if flux:
            text, y = y[:, :of_text], y[:, of_text:]
        elif text is not None:
            y, text = y[:, : hidden_states.shape[1]], y[:, hidden_states.shape[1] :]
        y = attn.to_out[1](attn.to_out[0](y))
        if text is None:
            return y
        return y, text if attn.context_pre_only else attn.to_add_out(text)


Rotary = tuple[Tensor, Tensor]  # positions of tokens, and the table


def _turns(cosine_and_sine: tuple[Tensor, Tensor] | None) -> Rotary | None:
    """Of cosines and sines (length, head_dim), equal in pairs, what ``rope`` takes."""
    if cosine_and_sine is None:
        return None
    table = torch.stack([part[:, ::2] for part in cosine_and_sine], dim=1).float()
    return torch.arange(len(table), device=table.device), table


def _tokens(
    attn: Any, held: Held[Packed], states: Tensor, turns: Rotary | None, places: slice, *, added: bool = False
) -> list[Tensor]:
    """Queries, keys and values of tokens that have those places among all; by the projections added for a text."""
    if added:
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        norms = (attn.norm_added_q, attn.norm_added_k)
    else:
        projections, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
    here = None if turns is None else (turns[0][places], turns[1])
    query, key, value = _projected(projections, held, states)
    return [_heads(attn, query, norms[0], here), _heads(attn, key, norms[1], here), _heads(attn, value, None)]


def _projected(projections: Sequence[nn.Linear], held: Held[Packed], states: Tensor) -> tuple[Tensor, ...]:
    if all(map(is_plain, projections)):
        return project_together(projections, held, states)
    return tuple(projection(states) for projection in projections)


def _heads(attn: Any, x: Tensor, norm: nn.Module | None, turns: Rotary | None = None) -> Tensor:
    """(batch, heads, length, head_dim), normed and turned."""
    x = heads_of(x, attn.heads)
    if turns is None:
        return x if norm is None else norm(x)
    if norm is None:
        return rope(x, *turns, interleaved=True)
    if type(norm) is nn.RMSNorm and norm.weight is not None and norm.weight.dtype == x.dtype and norm.eps is not None:
        return rope(x, *turns, interleaved=True, norm=norm.weight, eps=norm.eps)
    return rope(norm(x), *turns, interleaved=True)


def _dispatched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """What diffusers' dispatcher calls: (batch, length, heads, head_dim)."""
    if _parallel_config is not None:
        raise ValueError("pygen's attention has no context parallelism: undo pygen.accelerate for it")
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):  # of the keys of each sample
        attn_mask = attn_mask[:, None, None]
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return _in_place_of_torchs(q, k, v, attn_mask, dropout_p, is_causal, scale).transpose(1, 2)


def _backend() -> AttentionBackendName:
    """A name beside those that diffusers' dispatcher knows, for processors that carry it."""
    name = str.__new__(AttentionBackendName, "pygen")
    name._name_, name._value_ = "PYGEN", "pygen"
    _AttentionBackendRegistry.register(name)(_dispatched)
    return name


_BACKEND = _backend()
_JOINT = {(Attention, JointAttnProcessor2_0), (FluxAttention, FluxAttnProcessor)}
