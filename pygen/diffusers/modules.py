"""The parts of diffusers' models on pygen's ops: what ``pygen.accelerate`` puts in the place of their forwards.

A rule is a class of modules, taken exactly, and what its instances' forward becomes. Parameters stay where they are;
convolutions and linear layers hold them once more, in oneDNN's order, where nothing learns. Where something does, those
two run as ever, and the others with their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from pygen.held import Held
from pygen.models.layers import (
    Packed,
    attend,
    convolve,
    convolve_doubled,
    doubles,
    may_hold,
    project,
    project_geglu,
    project_gelu,
    project_together,
)
from pygen.ops.gated_unit import geglu
from pygen.ops.group_norm_silu import group_norm_silu
from pygen.ops.row_norm import ada_layer_norm, layer_norm, with_rows
from pygen.patch import TAKEN, Left, Replacement, forwards, is_ours

Found = Iterator[Replacement | Left]


def modules(model: ModelMixin) -> Found:
    """Of a model, whatever there is a rule for."""
    layers: Any = model
    yield from forwards(layers, lambda module: _RULES.get(type(module)))
    for name, module in model.named_modules():
        processor = getattr(module, "processor", None)
        if processor is not None:
            yield from _attention(name, module, processor)


# A forward is a function of its module, and bound to it by partial: whoever copies a model copies that too.


def _convolution(name: str, module: nn.Conv2d) -> Found:
    """Channels-last, on a weight that oneDNN has put in its own order once and not at every call."""
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        yield Left(name, f"Conv2d with padding {module.padding!r}, {module.padding_mode}")
        return
    yield Replacement(module, "forward", partial(convolve, module, Held()), "Conv2d")


def _linear(name: str, module: nn.Linear) -> Found:
    """Likewise; and the bias goes with the product, where torch copies it into the result first."""
    yield Replacement(module, "forward", partial(project, module, Held()), "Linear")


def _layer_norm(name: str, module: nn.LayerNorm) -> Found:
    if len(module.normalized_shape) != 1:
        yield Left(name, "LayerNorm over several dimensions")
        return
    yield Replacement(module, "forward", partial(_normalise, module), "LayerNorm")


def _normalise(module: nn.LayerNorm, input: Tensor) -> Tensor:
    return layer_norm(with_rows(input), module.weight, module.bias, eps=module.eps)


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
    return ada_layer_norm(with_rows(x), scale, shift, module.norm.eps)


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


def _continuous(module: AdaLayerNormContinuous, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    scale, shift = module.linear(module.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return _modulated(module, x, scale, shift)


_ADAPTIVE: dict[type, Callable[..., Any]] = {
    AdaLayerNormZero: _zero,
    AdaLayerNormZeroSingle: _zero_single,
    AdaLayerNormContinuous: _continuous,
}


def _transformer_block(name: str, module: Any) -> Found:
    """Of DiT and PixArt, whose times scale, shift and gate: gates, sums and norms go together."""
    zero = module.norm_type == "ada_norm_zero" and module.attn2 is None
    norms = [module.norm3] if zero else [module.norm1, module.norm2]
    simple = module.pos_embed is None and not module.only_cross_attention and not hasattr(module, "fuser")
    if simple and (zero or module.norm_type == "ada_norm_single") and not any(n.elementwise_affine for n in norms):
        yield Replacement(module, "forward", partial(_through_transformer_block, module), "BasicTransformerBlock")


def _through_transformer_block(
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
    together = module._chunk_size is None and not cross_attention_kwargs
    together = together and not torch.is_autocast_enabled(x.device.type)
    if not zero:
        together = together and timestep is not None and timestep.dtype == module.scale_shift_table.dtype == x.dtype
    if not together:
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
        y = ada_layer_norm(with_rows(x), scale, shift, module.norm1.eps)
        norm = module.norm2
    y = module.attn1(y, attention_mask=attention_mask)
    if module.attn2 is not None:
        x, gate = torch.addcmul(x, gate[:, None], y), None
        y = module.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
    y, x = ada_layer_norm(with_rows(y), scale_ff, shift_ff, norm.eps, residual=with_rows(x), gate=gate)
    return torch.addcmul(x, gate_ff[:, None], module.ff(y))


def _resnet_block(name: str, module: ResnetBlock2D) -> Found:
    if not isinstance(module.nonlinearity, nn.SiLU):
        yield Left(name, f"ResnetBlock2D with {type(module.nonlinearity).__name__}")
        return
    yield Replacement(module, "forward", partial(_through_block, module), "ResnetBlock2D")


def _through_block(module: Any, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    def norm(x: Tensor, of: nn.GroupNorm) -> Tensor:
        return group_norm_silu(x, of.weight, of.bias, of.num_groups, of.eps)

    x = norm(input_tensor, module.norm1)
    for sample in (module.upsample, module.downsample):
        if sample is not None:
            input_tensor, x = sample(input_tensor), sample(x)
    x = module.conv1(x)
    scale = shift = None
    if module.time_emb_proj is not None and temb is not None:
        if not module.skip_time_act:
            temb = module.nonlinearity(temb)
        temb = module.time_emb_proj(temb)[:, :, None, None]
        if module.time_embedding_norm == "scale_shift":
            scale, shift = temb.chunk(2, dim=1)
        else:
            x = x + temb
    if scale is None or shift is None:
        x = norm(x, module.norm2)
    else:  # group_norm_silu takes no factors of a sample
        x = module.nonlinearity(module.norm2(x) * (1 + scale) + shift)
    x = module.conv2(module.dropout(x))
    if module.conv_shortcut is not None:
        input_tensor = module.conv_shortcut(input_tensor)
    x = input_tensor + x
    return x if module.output_scale_factor == 1 else x / module.output_scale_factor


def _upsample(name: str, module: Upsample2D) -> Found:
    """Which does not make the doubled image, where it is given to a convolution."""
    if module.use_conv and not module.use_conv_transpose and module.interpolate and module.norm is None:
        yield Replacement(module, "forward", partial(_double, module, Held()), "Upsample2D")


def _double(module: Any, held: Held[Tensor], hidden_states: Tensor, output_size: Any = None, *args: Any) -> Tensor:
    conv = module.conv if module.name == "conv" else module.Conv2d_0
    exact = getattr(conv.forward, "func", None) is convolve  # in int8 it is sooner done with the doubled image
    if not args and exact and doubles(conv, hidden_states, output_size):
        return convolve_doubled(conv, held, hidden_states)
    y: Tensor = Upsample2D.forward(module, hidden_states, output_size, *args)
    return y


def _gelu(name: str, module: GELU) -> Found:
    """Which the product before it makes on its way."""
    yield Replacement(module, "forward", partial(_activate, module, Held()), "GELU")


def _activate(module: GELU, held: Held[Tensor], hidden_states: Tensor) -> Tensor:
    if not _is_plain(module.proj):
        y: Tensor = GELU.forward(module, hidden_states)
        return y
    return project_gelu(module.proj, held, hidden_states, module.approximate)


def _geglu(name: str, module: GEGLU) -> Found:
    yield Replacement(module, "forward", partial(_gate, module, Held()), "GEGLU")


def _gate(module: GEGLU, held: Held[tuple[Packed, Packed]], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if _is_plain(module.proj):
        return project_geglu(module.proj, held, hidden_states)
    up, gate = module.proj(hidden_states).chunk(2, dim=-1)
    return geglu(gate, up)


def _transformer(name: str, module: Transformer2DModel) -> Found:
    """Whose tokens become an image again in place, channels-last."""
    place = "_get_output_for_continuous_inputs"
    if module.is_input_continuous and place not in vars(module):
        yield Replacement(module, place, partial(_image_of_tokens, module), "Transformer2DModel")


def _image_of_tokens(
    module: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
) -> Tensor:
    if module.use_linear_projection:
        hidden_states = module.proj_out(hidden_states)
    image = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return residual + (image if module.use_linear_projection else module.proj_out(image))


_RULES: dict[type, Callable[[str, Any], Found]] = {
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    **dict.fromkeys(_ADAPTIVE, _adaptive),
    BasicTransformerBlock: _transformer_block,
    ResnetBlock2D: _resnet_block,
    Upsample2D: _upsample,
    GELU: _gelu,
    GEGLU: _geglu,
    Transformer2DModel: _transformer,
}


def _attention(name: str, module: Any, processor: Any) -> Found:
    kind = type(processor)
    if isinstance(processor, PygenAttnProcessor) or getattr(processor, "_attention_backend", None) is _BACKEND:
        return
    if type(module) is Attention and kind is AttnProcessor2_0:
        yield Replacement(module, "processor", PygenAttnProcessor(), "attention")
    elif hasattr(processor, "_attention_backend"):
        yield Replacement(processor, "_attention_backend", _BACKEND, "attention")
    elif "scaled_dot_product_attention" in getattr(kind.__call__, "__code__", _attention.__code__).co_names:
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
            parts = self._projected(attn, hidden_states)
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

    def _projected(self, attn: Attention, states: Tensor) -> tuple[Tensor, ...]:
        projections = (attn.to_q, attn.to_k, attn.to_v)
        if all(map(_is_plain, projections)):
            return project_together(projections, self.together, states)
        return tuple(projection(states) for projection in projections)

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


def _is_plain(linear: nn.Linear) -> bool:
    """Whether a linear layer is no more than its product: no adapter's, without hooks, and nobody else's forward."""
    forward = vars(linear).get("forward")
    ours = forward is None or getattr(forward, "func", None) is project
    return type(linear) is nn.Linear and ours and not (linear._forward_hooks or linear._forward_pre_hooks)


def _heads(attn: Attention, x: Tensor, norm: nn.Module | None) -> Tensor:
    """(batch, heads, length, head_dim)."""
    x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return x if norm is None else norm(x)


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


def cast(model: nn.Module, dtype: torch.dtype) -> Found:
    """Parameters and buffers in another dtype, convolutions' channels-last."""
    label = str(dtype).removeprefix("torch.")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dtype != dtype:
            new = tensor.detach().to(dtype)
            if new.dim() == 4:
                new = new.contiguous(memory_format=torch.channels_last)
            yield Replacement(tensor, "data", new, f"tensor, now {label}")
