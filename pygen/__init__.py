"""pygen: fast generative sampling for PyTorch."""

import torch as _torch  # noqa: F401  (its libraries must be loaded before the extension)

from pygen._doctor import doctor
from pygen.autoregressive.decode import Decoder
from pygen.diffusion.plan import StepPlan, plan
from pygen.diffusion.sample import sample
from pygen.ops.affine_step import affine_step
from pygen.ops.attention import attention
from pygen.ops.backend import backend
from pygen.ops.cache_append import cache_append
from pygen.ops.combine_experts import combine_experts
from pygen.ops.decode_attention import decode_attention
from pygen.ops.diffusion_loss import diffusion_loss
from pygen.ops.dynamic_threshold import dynamic_threshold
from pygen.ops.embedding import embedding
from pygen.ops.gated_unit import geglu, swiglu
from pygen.ops.green_tokens import WatermarkScore, detect_watermark, green_tokens
from pygen.ops.group_norm_silu import group_norm_silu
from pygen.ops.linear_decode import linear_decode
from pygen.ops.packed_linear import PackedLinear, pack_experts, pack_linear
from pygen.ops.philox_normal import philox_normal
from pygen.ops.posterior_token import posterior_token
from pygen.ops.record import Program, record
from pygen.ops.rope import rope, rope_frequencies, rope_table
from pygen.ops.route_experts import route_experts
from pygen.ops.route_token import route_token
from pygen.ops.row_norm import ada_layer_norm, layer_norm, rms_norm
from pygen.ops.sample_gram import sample_gram
from pygen.ops.sample_token import TokenInfo, sample_token
from pygen.ops.timestep_embedding import timestep_embedding
from pygen.ops.token_confidence import token_confidence
from pygen.ops.unmask_step import unmask_step
from pygen.ops.verify_draft import verify_draft
from pygen.ops.watermark_logits import watermark_logits
from pygen.ops.winograd_conv2d import winograd_conv2d, winograd_weight
from pygen.patch import accelerate

__version__ = "0.1.0"
__all__ = [
    "Decoder",
    "PackedLinear",
    "Program",
    "StepPlan",
    "TokenInfo",
    "WatermarkScore",
    "accelerate",
    "ada_layer_norm",
    "affine_step",
    "attention",
    "backend",
    "cache_append",
    "combine_experts",
    "decode_attention",
    "detect_watermark",
    "diffusion_loss",
    "doctor",
    "dynamic_threshold",
    "embedding",
    "geglu",
    "green_tokens",
    "group_norm_silu",
    "layer_norm",
    "linear_decode",
    "pack_experts",
    "pack_linear",
    "philox_normal",
    "plan",
    "posterior_token",
    "record",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_table",
    "route_experts",
    "route_token",
    "sample",
    "sample_gram",
    "sample_token",
    "swiglu",
    "timestep_embedding",
    "token_confidence",
    "unmask_step",
    "verify_draft",
    "watermark_logits",
    "winograd_conv2d",
    "winograd_weight",
]
