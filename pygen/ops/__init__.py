"""The ops: one module each, and nothing else to edit when adding one but this list."""

from pygen.ops import (
    affine_step,
    diffusion_loss,
    dynamic_threshold,
    gated_unit,
    green_tokens,
    group_norm_silu,
    linear_decode,
    philox_normal,
    posterior_token,
    rope,
    route_token,
    sample_gram,
    token_confidence,
    unmask_step,
    verify_draft,
    watermark_logits,
)
from pygen.ops.spec import SPECS, Example, OpSpec

__all__ = [
    "SPECS",
    "Example",
    "OpSpec",
    "affine_step",
    "diffusion_loss",
    "dynamic_threshold",
    "gated_unit",
    "green_tokens",
    "group_norm_silu",
    "linear_decode",
    "philox_normal",
    "posterior_token",
    "rope",
    "route_token",
    "sample_gram",
    "token_confidence",
    "unmask_step",
    "verify_draft",
    "watermark_logits",
]
