"""The parts of diffusers' models on pygen's ops: what ``pygen.accelerate`` puts in the place of their forwards.

A rule is a class of modules, taken exactly, and what its instances' forward becomes. Parameters stay where they are;
convolutions and linear layers hold them once more, in oneDNN's order, where nothing learns. Where something does, those
two run as ever, and the others with their gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.activations import GEGLU
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from pygen.ops.attention import attention
from pygen.ops.gated_unit import geglu
from pygen.ops.group_norm_silu import group_norm_silu
from pygen.ops.row_norm import layer_norm
from pygen.patch import Left, Replacement

Found = Iterator[Replacement | Left]
_TAKEN = "its forward has been replaced already"


def modules(model: ModelMixin) -> Found:
    """Of a model, whatever there is a rule for."""
    for name, module in model.named_modules():
        rule = _RULES.get(type(module))
        forward = vars(module).get("forward")
        if rule is not None and forward is None:
            yield from rule(name, module)
        elif rule is not None and not _is_ours(forward):
            yield Left(name, _TAKEN)
        processor = getattr(module, "processor", None)
        if processor is not None:
            yield from _attention(name, module, processor)


def _is_ours(forward: Any) -> bool:
    return getattr(forward, "func", forward).__module__ == __name__


def _learning(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _packs(module: nn.Conv2d | nn.Linear, x: Tensor) -> bool:
    """Whether oneDNN computes it as torch would, on a packed weight, and nothing learns by it."""
    return (
        x.device.type == "cpu"
        and x.dtype == module.weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and not _learning(x, module.weight, module.bias)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _state(tensor: Tensor) -> tuple[int, int | None, torch.dtype]:
    """What changes with a tensor's values; those of inference mode do not tell."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version, tensor.dtype


class _Packed:
    """A parameter in the order of a library, made when it is first needed and again when the parameter has changed.

    Whoever writes to a parameter's ``data`` hides it from autograd, and so from this; ``load_state_dict``, optimisers
    and whatever else works under ``no_grad`` do not.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.state: tuple[int, int | None, torch.dtype] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Packed, (self.parameter,)

    def get(self, pack: Callable[[Tensor], Tensor]) -> Tensor:
        state = _state(self.parameter)
        if state != self.state:
            self.packed, self.state = pack(self.parameter.detach()), state
        return self.packed


# A forward is a function of its module, and bound to it by partial: whoever copies a model copies that too.


def _convolution(name: str, module: nn.Conv2d) -> Found:
    """Channels-last, on a weight that oneDNN has put in its own order once and not at every call."""
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        yield Left(name, f"Conv2d with padding {module.padding!r}, {module.padding_mode}")
        return
    yield Replacement(module, "forward", partial(_convolve, module, _Packed(module.weight)), "Conv2d")


def _convolve(module: nn.Conv2d, packed: _Packed, input: Tensor) -> Tensor:
    if not _packs(module, input):
        return nn.Conv2d.forward(module, input)
    input = input.contiguous(memory_format=torch.channels_last)
    how = (module.padding, module.stride, module.dilation, module.groups)
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    weight = packed.get(lambda weight: reorder(weight.to_mkldnn(), *how, list(input.shape)))
    return torch.ops.mkldnn._convolution_pointwise(input, weight, module.bias, *how, "none", [], "")


def _linear(name: str, module: nn.Linear) -> Found:
    """Likewise; and the bias goes with the product, where torch copies it into the result first."""
    yield Replacement(module, "forward", partial(_project, module, _Packed(module.weight)), "Linear")


def _project(module: nn.Linear, packed: _Packed, input: Tensor) -> Tensor:
    if not _packs(module, input):
        return nn.Linear.forward(module, input)
    rows = input.numel() // module.in_features
    weight = packed.get(lambda weight: torch.ops.mkldnn._reorder_linear_weight(weight, rows))
    return torch.ops.mkldnn._linear_pointwise(input, weight, module.bias, "none", [], "")


def _layer_norm(name: str, module: nn.LayerNorm) -> Found:
    if len(module.normalized_shape) != 1:
        yield Left(name, "LayerNorm over several dimensions")
        return
    yield Replacement(module, "forward", partial(_normalise, module), "LayerNorm")


def _normalise(module: nn.LayerNorm, input: Tensor) -> Tensor:
    rows = input if input.stride(-1) == 1 else input.contiguous()
    return layer_norm(rows, module.weight, module.bias, eps=module.eps)


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


def _geglu(name: str, module: GEGLU) -> Found:
    yield Replacement(module, "forward", partial(_gate, module), "GEGLU")


def _gate(module: GEGLU, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
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
    ResnetBlock2D: _resnet_block,
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
        elif not _is_ours(module.forward):
            yield Left(name, _TAKEN)
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
    if dropout_p or query.dim() != 4:
        raise ValueError("pygen's attention has four dimensions and no dropout: undo pygen.accelerate for others")
    return attention(query, key, value, mask=attn_mask, causal=is_causal, scale=scale)


class PygenAttnProcessor:
    """``AttnProcessor2_0`` on ``pygen.attention``; keys and values of one text are made once for all steps."""

    def __init__(self) -> None:
        self.text: weakref.ref[Tensor] | None = None
        self.state: tuple[object, ...] = ()

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
        query = _heads(attn, attn.to_q(hidden_states), attn.norm_q)
        if encoder_hidden_states is None:
            key, value = self._keys_and_values(attn, hidden_states)
        else:
            key, value = self._of_text(attn, encoder_hidden_states)
        y = attention(query, key, value, mask=attention_mask)
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
        parameters = [p for layer in (attn.to_k, attn.to_v) for p in layer.parameters()]
        changes = _learning(text, *parameters) or text.is_inference()
        if changes or torch.compiler.is_compiling() or torch.is_autocast_enabled(text.device.type):
            return self._keys_and_values(attn, text)
        state = tuple(_state(tensor) for tensor in (text, *parameters))
        if self.text is None or self.text() is not text or self.state != state:
            self.held = self._keys_and_values(attn, text)
            self.text, self.state = weakref.ref(text), state
        return self.held


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
