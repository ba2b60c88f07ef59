"""pygen's attention as an ``attn_implementation`` of transformers: for who calls a model itself, or trains it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pygen.ops.attention import attention
from pygen.ops.decode_attention import decode_attention
from pygen.patch import Found, Left, Replacement

NAME = "pygen"


def implementation(target: Any) -> Found:
    """The rule for a transformers model whose attention is torch's."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    present = target.config._attn_implementation
    if getattr(target.config, "attn_logit_softcapping", None):
        yield Left("attention", "its configuration has attn_logit_softcapping")
    elif present == "sdpa":
        yield Replacement(target.config, "_attn_implementation", NAME, "attention")
    elif present != NAME:
        yield Left("attention", f"its attn_implementation is {present!r}, not 'sdpa'")


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (batch, heads, queries, head_dim), keys and values of fewer heads; the mask is
    bool or added to the scores, and without one the queries are the last positions or, where there are as many keys,
    all, and see what is before them.

    Returns:
        (batch, queries, heads, head_dim), and no weights.
    """
    for name in ("softcap", "position_bias", "s_aux", "cache"):
        if given.get(name) is not None:
            raise ValueError(f"pygen's attention does not take {name}: set_attn_implementation('eager')")
    queries = query.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = queries > 1 and attention_mask is None and is_causal
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if (
        queries == 1 and attention_mask is None and not (learns or dropout)
    ):  # keys and values are read once, and not packed
        lengths = torch.full((query.shape[0],), key.shape[2], dtype=torch.int64, device=query.device)
        y = decode_attention(query, key, value, lengths, scale=scaling)
    else:
        if causal:
            key, value = key[:, :, :queries], value[:, :, :queries]
        y = attention(query, key, value, mask=attention_mask, causal=causal, scale=scaling, dropout_p=dropout)
    return y.transpose(1, 2).contiguous(), None
