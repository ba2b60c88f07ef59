"""The parts of diffusers' models on pygen's ops: what ``pygen.accelerate`` puts in the place of their forwards.

A rule is a class of modules, taken exactly, and what its instances' forward becomes. Parameters stay where they are;
convolutions and linear layers hold them once more, in oneDNN's order, where nothing learns. Where something does, those
two run as ever, and the others with their gradients.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.normalization import RMSNorm
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from pygen.diffusers import blocks
from pygen.diffusers.attention import attention
from pygen.held import Held
from pygen.models.layers import (
    Packed,
    convolve,
    convolve_doubled,
    doubles,
    is_plain,
    project,
    project_geglu,
    project_gelu,
    silu_of_norm,
)
from pygen.ops.gated_unit import geglu
from pygen.ops.row_norm import layer_norm, rms_norm, with_rows
from pygen.patch import Found, Left, Replacement, Rule, forwards


def modules(model: ModelMixin) -> Found:
    """Of a model, whatever there is a rule for."""
    layers: Any = model
    yield from forwards(layers, lambda module: _RULES.get(type(module)))
    for name, module in model.named_modules():
        processor = getattr(module, "processor", None)
        if processor is not None:
            yield from attention(name, module, processor)


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


def _rms_norm(name: str, module: Any) -> Found:
    shape = module.normalized_shape if type(module) is nn.RMSNorm else module.dim
    if len(shape) != 1 or getattr(module, "bias", None) is not None:
        yield Left(name, f"{type(module).__name__} over several dimensions, or with a bias")
        return
    yield Replacement(module, "forward", partial(_normalise_rms, module), "RMSNorm")


def _normalise_rms(module: Any, x: Tensor) -> Tensor:
    if module.weight is not None and module.weight.dtype != x.dtype:
        y: Tensor = type(module).forward(module, x)
        return y
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    return rms_norm(with_rows(x), module.weight, eps)


def _resnet_block(name: str, module: ResnetBlock2D) -> Found:
    if not isinstance(module.nonlinearity, nn.SiLU):
        yield Left(name, f"ResnetBlock2D with {type(module.nonlinearity).__name__}")
        return
    yield Replacement(module, "forward", partial(_through_block, module), "ResnetBlock2D")


def _through_block(module: Any, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    x = silu_of_norm(module.norm1, input_tensor)
    for sample in (module.upsample, module.downsample):
        if sample is not None:
            input_tensor, x = sample(input_tensor), sample(x)
    x = module.conv1(x)
    scale = shift = None
    if module.time_emb_proj is not None and temb is not None:
        if not module.skip_time_act:
            temb = module.nonlinearity(temb)
        temb = module.time_emb_proj(temb)
        if module.time_embedding_norm == "scale_shift":
            scale, shift = temb.chunk(2, dim=1)
        else:
            x = x + temb[:, :, None, None]
    x = module.conv2(module.dropout(silu_of_norm(module.norm2, x, scale, shift)))
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
    if not is_plain(module.proj):
        y: Tensor = GELU.forward(module, hidden_states)
        return y
    return project_gelu(module.proj, held, hidden_states, module.approximate)


def _geglu(name: str, module: GEGLU) -> Found:
    yield Replacement(module, "forward", partial(_gate, module, Held()), "GEGLU")


def _gate(module: GEGLU, held: Held[tuple[Packed, Packed]], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if is_plain(module.proj):
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


_RULES: dict[type, Rule] = {
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    RMSNorm: _rms_norm,
    **blocks.RULES,
    ResnetBlock2D: _resnet_block,
    Upsample2D: _upsample,
    GELU: _gelu,
    GEGLU: _geglu,
    Transformer2DModel: _transformer,
}


def cast(model: nn.Module, dtype: torch.dtype) -> Found:
    """Parameters and buffers in another dtype, convolutions' channels-last."""
    label = str(dtype).removeprefix("torch.")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dtype != dtype:
            new = tensor.detach().to(dtype)
            if new.dim() == 4:
                new = new.contiguous(memory_format=torch.channels_last)
            yield Replacement(tensor, "data", new, f"tensor, now {label}")
