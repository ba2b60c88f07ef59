"""Blocks of diffusion transformers, and the norms that a time scales and shifts: gates, sums and norms go together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from pygen.held import Held
from pygen.models.layers import is_plain, project_gelu
from pygen.models.transformer_layers import added_and_modulated, gated, modulated
from pygen.patch import Found, Left, Replacement, Rule


def _adaptive(name: str, module: Any) -> Found:
    """AdaLayerNormZero of DiT, and its kin."""
    if type(module.norm) is not nn.LayerNorm or module.norm.elementwise_affine:
        yield Left(name, f"{type(module).__name__} with {type(module.norm).__name__}, or with a weight")
        return
    yield Replacement(module, "forward", partial(_ADAPTIVE[type(module)], module), type(module).__name__)


def _modulated(module: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    if scale.dtype != x.dtype:
        y: Tensor = module.norm(x) * (1 + scale[:, None]) + shift[:, None]
        return y
    return modulated(x, scale, shift, module.norm.eps)


def _zero(
    module: AdaLayerNormZero,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: torch.dtype | None = None,
    emb: Tensor | None = None,
) -> tuple[Tensor, ...]:
    if module.emb is not None:
        emb = module.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, *rest = module.linear(module.silu(emb)).chunk(6, dim=1)
    return _modulated(module, x, scale, shift), *rest


def _zero_single(module: AdaLayerNormZeroSingle, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
    shift, scale, gate = module.linear(module.silu(emb)).chunk(3, dim=1)
    return _modulated(module, x, scale, shift), gate


def _zero_twice(module: SD35AdaLayerNormZeroX, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
    shift, scale, *rest, shift_alone, scale_alone, gate_alone = module.linear(module.silu(emb)).chunk(9, dim=1)
    return _modulated(module, x, scale, shift), *rest, _modulated(module, x, scale_alone, shift_alone), gate_alone


def _continuous(module: AdaLayerNormContinuous, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    scale, shift = module.linear(module.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return _modulated(module, x, scale, shift)


_ADAPTIVE: dict[type, Callable[..., Any]] = {
    AdaLayerNormZero: _zero,
    AdaLayerNormZeroSingle: _zero_single,
    SD35AdaLayerNormZeroX: _zero_twice,
    AdaLayerNormContinuous: _continuous,
}


def _no_weights(*norms: Any) -> bool:
    return all(type(norm) is nn.LayerNorm and not norm.elementwise_affine for norm in norms)


def _together(module: Any, x: Tensor, *conditions: Tensor) -> bool:
    """Whether a block may do with fewer passes: in one dtype, and its feed-forward not in chunks."""
    chunked = getattr(module, "_chunk_size", None) is not None
    same = all(condition.dtype == x.dtype for condition in conditions)
    return same and not chunked and not torch.is_autocast_enabled(x.device.type)


def _basic(name: str, module: Any) -> Found:
    """Of DiT and PixArt, whose times scale, shift and gate."""
    zero = module.norm_type == "ada_norm_zero" and module.attn2 is None
    norms = [module.norm3] if zero else [module.norm1, module.norm2]
    simple = module.pos_embed is None and not module.only_cross_attention and not hasattr(module, "fuser")
    if simple and (zero or module.norm_type == "ada_norm_single") and _no_weights(*norms):
        yield Replacement(module, "forward", partial(_through_basic, module), type(module).__name__)


def _through_basic(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Any = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    x, zero = hidden_states, module.norm_type == "ada_norm_zero"
    conditions = () if zero or timestep is None else (timestep, module.scale_shift_table)
    if not _together(module, x, *conditions) or cross_attention_kwargs or not (zero or conditions):
        forward: Any = BasicTransformerBlock.forward
        whole: Tensor = forward(
            module, x, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep, cross_attention_kwargs,
            class_labels, added_cond_kwargs,
        )  # fmt: skip
        return whole
    if zero:
        y, gate, shift_ff, scale_ff, gate_ff = module.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
        norm = module.norm3
    else:
        rows = module.scale_shift_table + timestep.view(len(x), 6, -1)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = rows.unbind(1)
        y = modulated(x, scale, shift, module.norm1.eps)
        norm = module.norm2
    y = module.attn1(y, attention_mask=attention_mask)
    if module.attn2 is not None:
        x, gate = gated(x, gate, y), None
        y = module.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
    x, y = added_and_modulated(x, gate, y, scale_ff, shift_ff, norm.eps)
    return gated(x, gate_ff, module.ff(y))


def _joint(name: str, module: Any) -> Found:
    """Of Stable Diffusion 3 and Flux: an image's tokens and a text's attend to both."""
    norms = [norm for norm in (module.norm2, module.norm2_context) if norm is not None]
    if _no_weights(*norms):
        yield Replacement(module, "forward", partial(_JOINT[type(module)], module), type(module).__name__)


def _through_joint(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    x, text, given = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}
    if not _together(module, x, text, temb):
        forward: Any = JointTransformerBlock.forward
        whole: tuple[Tensor | None, Tensor] = forward(module, x, text, temb, joint_attention_kwargs)
        return whole
    return _both_streams(module, x, text, temb, given, text_ends=module.context_pre_only)


def _through_flux(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    x, text = hidden_states, encoder_hidden_states
    if not _together(module, x, text, temb):
        forward: Any = FluxTransformerBlock.forward
        whole: tuple[Tensor, Tensor] = forward(module, x, text, temb, image_rotary_emb, joint_attention_kwargs)
        return whole
    given = {"image_rotary_emb": image_rotary_emb, **(joint_attention_kwargs or {})}
    text, x = _both_streams(module, x, text, temb, given, text_ends=False)
    return _finite(text), x


def _both_streams(
    module: Any, x: Tensor, text: Tensor, temb: Tensor, given: dict[str, Any], *, text_ends: bool
) -> tuple[Any, Tensor]:
    """The text, None where it ends here, and the image."""
    y, gate, *of_feed_forward = module.norm1(x, emb=temb)
    of_feed_forward, alone = of_feed_forward[:3], of_feed_forward[3:]
    of_text, *rest = (module.norm1_context(text, temb),) if text_ends else module.norm1_context(text, emb=temb)
    y, of_text, *of_adapter = module.attn(hidden_states=y, encoder_hidden_states=of_text, **given)
    if alone:  # the image attends to itself alone, too
        x, (y, gate) = gated(x, gate, y), alone
        y = module.attn2(hidden_states=y, **given)
    x = _fed_forward(module.norm2, module.ff, x, y, gate, *of_feed_forward)
    for more in of_adapter:
        x = x + more
    if text_ends:
        return None, x
    return _fed_forward(module.norm2_context, module.ff_context, text, of_text, *rest), x


def _fed_forward(
    norm: nn.LayerNorm,
    feed_forward: nn.Module,
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate_after: Tensor,
) -> Tensor:
    x, y = added_and_modulated(x, gate, y, scale, shift, norm.eps)
    return gated(x, gate_after, feed_forward(y))


def _single(name: str, module: FluxSingleTransformerBlock) -> Found:
    """Of Flux: attention and feed-forward side by side, the text's tokens before the image's."""
    if type(module.act_mlp) is not nn.GELU:
        yield Left(name, f"FluxSingleTransformerBlock with {type(module.act_mlp).__name__}")
        return
    yield Replacement(module, "forward", partial(_through_single, module, Held()), type(module).__name__)


def _through_single(
    module: Any,
    held: Held[Tensor],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    y, gate = module.norm(x, emb=temb)
    if is_plain(module.proj_mlp):
        hidden = project_gelu(module.proj_mlp, held, y, module.act_mlp.approximate)
    else:
        hidden = module.act_mlp(module.proj_mlp(y))
    y = module.attn(hidden_states=y, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    x = _finite(gated(x, gate, module.proj_out(torch.cat([y, hidden], dim=2))))
    return x[:, : encoder_hidden_states.shape[1]], x[:, encoder_hidden_states.shape[1] :]


def _finite(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


_JOINT: dict[type, Callable[..., Any]] = {JointTransformerBlock: _through_joint, FluxTransformerBlock: _through_flux}

RULES: dict[type, Rule] = {
    **dict.fromkeys(_ADAPTIVE, _adaptive),
    BasicTransformerBlock: _basic,
    **dict.fromkeys(_JOINT, _joint),
    FluxSingleTransformerBlock: _single,
}
