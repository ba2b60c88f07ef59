"""Small models of diffusers' own classes, and calls of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.error_rule import Triple

Calls = list[dict[str, Any]]


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unet(**config: Any) -> tuple[nn.Module, Calls]:
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1, cross_attention_dim=24,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **config,
    )  # fmt: skip
    mask = (torch.arange(7) < torch.tensor([[7], [4]])).double()
    given = {"sample": drawn(2, 4, 8, 12), "timestep": torch.tensor([5, 300]), "encoder_hidden_states": drawn(2, 7, 24)}
    return model, [given, given | {"encoder_attention_mask": mask}]


def unet_of_linear_projections() -> tuple[nn.Module, Calls]:
    return unet(use_linear_projection=True, resnet_time_scale_shift="scale_shift")


def unconditional() -> tuple[nn.Module, Calls]:
    model = diffusers.UNet2DModel(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, attention_head_dim=4, in_channels=1,
        out_channels=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, [{"sample": drawn(3, 1, 16, 8), "timestep": 10}]


def autoencoder() -> tuple[nn.Module, Calls]:
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    return model, [{"sample": drawn(2, 3, 16, 24)}]


def wide_autoencoder() -> tuple[nn.Module, Calls]:
    """One head of 320, as wide as the coarsest resolution: in Stable Diffusion's it has 512."""
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 320), norm_num_groups=32, layers_per_block=2, latent_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.2,
    )  # fmt: skip
    return model, [{"sample": drawn(1, 3, 16, 24)}]


def dit() -> tuple[nn.Module, Calls]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    given = {"timestep": torch.tensor([3, 900]), "class_labels": torch.tensor([1, 7])}
    return model, [given | {"hidden_states": drawn(2, 4, 8, 8)}]


def pixart() -> tuple[nn.Module, Calls]:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=24, caption_channels=10,
    )  # fmt: skip
    given = {"timestep": torch.tensor([3, 900]), "encoder_hidden_states": drawn(2, 5, 10, seed=1)}
    given |= {"encoder_attention_mask": (torch.arange(5) < torch.tensor([[5], [2]])).double()}
    return model, [
        given | {"hidden_states": drawn(2, 4, 8, 8), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    ]


def stable_diffusion_3() -> tuple[nn.Module, Calls]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=3, joint_attention_dim=16, caption_projection_dim=24, pooled_projection_dim=12,
    )  # fmt: skip
    text = {"encoder_hidden_states": drawn(2, 5, 16, seed=1), "pooled_projections": drawn(2, 12, seed=2)}
    return model, [text | {"hidden_states": drawn(2, 4, 8, 8), "timestep": torch.tensor([30, 600])}]


def stable_diffusion_3_5() -> tuple[nn.Module, Calls]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=3, joint_attention_dim=16, caption_projection_dim=24, pooled_projection_dim=12,
        dual_attention_layers=(0, 1), qk_norm="rms_norm", pos_embed_max_size=12,
    )  # fmt: skip
    text = {"encoder_hidden_states": drawn(2, 5, 16, seed=1), "pooled_projections": drawn(2, 12, seed=2)}
    return model, [text | {"hidden_states": drawn(2, 4, 10, 6), "timestep": torch.tensor([30, 600])}]


def flux() -> tuple[nn.Module, Calls]:
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=12, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    given = {"encoder_hidden_states": drawn(2, 5, 16, seed=1), "pooled_projections": drawn(2, 12, seed=2)}
    given |= {"hidden_states": drawn(2, 12, 16), "timestep": torch.tensor([0.3, 0.8])}
    return model, [given | {"img_ids": drawn(12, 3).abs().round(), "txt_ids": torch.zeros(5, 3)}]


def built(build: Callable[[], tuple[nn.Module, Calls]]) -> tuple[nn.Module, Calls]:
    """In float32, no parameter 0 or 1 by its name alone, so that each has a say."""
    torch.manual_seed(0)
    model, calls = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), calls


def in_dtype(given: Any, dtype: torch.dtype) -> Any:
    if isinstance(given, dict):
        return {name: in_dtype(value, dtype) for name, value in given.items()}
    return given.to(dtype) if isinstance(given, Tensor) and given.dtype == torch.float64 else given


def rounded_to(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What a model of that dtype is given, in float64."""
    floats = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.dtype == torch.float64}
    return given | {name: x.to(dtype).double() for name, x in floats.items()}


def outputs(model: nn.Module, calls: Calls, dtype: torch.dtype) -> list[Tensor]:
    return [model(**in_dtype(call, dtype)).sample for call in calls]


def rounded(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The model in a dtype, and what it rounds to in float64. Channels-last, as accelerated ones compute: other layouts
    are summed in another order, whose error in float32 is up to four times as small on some machines."""
    model = copy.deepcopy(model).to(dtype, memory_format=torch.channels_last)
    return model, copy.deepcopy(model).double()


def gradient_triples(found: dict[str, Tensor], same: dict[str, Tensor], truth: dict[str, Tensor]) -> list[Triple]:
    """Each parameter's gradient by its own size, so that all are one population; those that are 0 but for rounding, as
    that of a bias of keys, by the size of the largest."""
    sizes = {name: true.abs().max() for name, true in truth.items()}
    largest = max(sizes.values())
    scales = {name: size if size > 1e-9 * largest else largest for name, size in sizes.items()}
    return [(found[name] / scale, same[name] / scale, truth[name] / scale) for name, scale in scales.items()]
