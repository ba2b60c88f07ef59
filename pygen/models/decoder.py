"""A decoder-only transformer on pygen's ops: one description that every family of checkpoints fills in.

It runs eagerly over whole prompts and is recorded, one token per sequence, for decoding; both by the same lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pygen.ops.cache_append import cache_append
from pygen.ops.combine_experts import combine_experts
from pygen.ops.decode_attention import decode_attention
from pygen.ops.embedding import embedding
from pygen.ops.linear_decode import Activation, linear_decode
from pygen.ops.packed_linear import PackedLinear
from pygen.ops.route_experts import route_experts
from pygen.ops.row_norm import rms_norm

QUERIES = 16  # that decode_attention takes at once


class Norm(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None = None


class Linear(NamedTuple):
    weight: PackedLinear
    bias: Tensor | None = None


class Experts(NamedTuple):
    """A mixture of experts in the place of an MLP: stacks of their layers, of which each token goes through ``top_k``.

    normalise: whether the weights of those chosen are divided by their sum.
    """

    router: PackedLinear
    up: PackedLinear
    down: PackedLinear
    top_k: int
    normalise: bool


@dataclass(frozen=True)
class Layer:
    """The weights of one layer.

    qkv: the projections to queries, keys and values, in this order. up: gated, in most families.
    query_norm, key_norm: of each head (Qwen3, Gemma 3). after_attention, after_mlp: RMSNorms of what a block gives,
    before it is added to the residual stream (Gemma). rope: a table as ``rope_table`` makes it. window: how many
    positions a token sees, its own included. experts: where the layer has no up and down.
    """

    attention_norm: Norm
    qkv: Linear
    merge: Linear
    mlp_norm: Norm
    up: Linear | None = None
    down: Linear | None = None
    experts: Experts | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    after_attention: Tensor | None = None
    after_mlp: Tensor | None = None
    rope: Tensor | None = None
    window: int | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """What the layers of a decoder have in common. Lengths in tokens, widths in elements.

    activation: of the MLP. scale: of attention scores. attention_soft_cap, logit_soft_cap: cap tanh(x / cap) (Gemma 2).
    embedding_scale: what embeddings are multiplied by (Gemma). parallel: attention and MLP both read the layer's input
    (GPT-NeoX). positions: the most that a sequence may have.
    """

    vocabulary: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    norm: Literal["rms", "layer"]
    eps: float
    activation: Activation
    scale: float
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    embedding_scale: float = 1.0
    parallel: bool = False


class LayerCache(NamedTuple):
    """A layer's keys and values, of all sequences, (pages, kv_heads, page_size, head_dim); int8 ones with scales."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@dataclass(frozen=True)
class DecoderModel:
    """The model. ``dtype`` is that of activations."""

    config: DecoderConfig
    embedding: Tensor
    layers: Sequence[Layer]
    final_norm: Norm
    head: Linear
    dtype: torch.dtype
    position_embedding: Tensor | None = None

    def to(self, device: str | torch.device) -> DecoderModel:
        """The same model with its weights on a device."""
        moved: dict[int, Tensor] = {}  # by the tensors that they are of, some of which layers share

        def visit(part: Any) -> Any:
            if isinstance(part, Tensor):
                if id(part) not in moved:
                    moved[id(part)] = part.to(device)
                return moved[id(part)]
            if is_dataclass(part) and not isinstance(part, type):
                return replace(part, **{field.name: visit(getattr(part, field.name)) for field in fields(part)})
            if isinstance(part, list | tuple):
                items = map(visit, part)
                return part._make(items) if hasattr(part, "_make") else type(part)(items)
            return part

        model: DecoderModel = visit(self)
        return model

    def hidden(
        self,
        tokens: Tensor,
        first: Tensor,
        lengths: Tensor,
        block_table: Tensor,
        cache: Sequence[LayerCache],
        *,
        prompt: bool = False,
    ) -> Tensor:
        """Runs all layers over the newest tokens of some sequences, and appends their keys and values to the cache.

        Args:
            tokens: int64 (batch, length).
            first: int64 (batch, 1), the position of each sequence's first of them.
            lengths: int64 (batch,), how many tokens each sequence holds, these included: first + length.
            block_table: int32 (batch, pages), the cache's pages of each sequence.
            cache: of each layer.
            prompt: whether they are many, for which there are faster products (``linear_decode``'s ``blocked``); their
                bits are then those that they have in any other such call, and not those of steps.

        Returns:
            (batch * length, width), in ``dtype``, for ``project``.
        """
        batch, length = tokens.shape
        config = self.config
        x = torch.empty(batch, length, config.width, dtype=self.dtype, device=tokens.device)
        learned = self.position_embedding is not None
        embedding(
            tokens, self.embedding, scale=config.embedding_scale, positions=first if learned else None,
            position_weight=self.position_embedding, out=x,
        )  # fmt: skip
        x = x.view(batch * length, -1)
        for layer, kv in zip(self.layers, cache, strict=True):
            y = self._attend(layer, x, (batch, length), lengths, block_table, kv, prompt)
            attended = self._add(x, y, layer.merge, layer.after_attention, prompt)
            x = self._mlp(layer, x if config.parallel else attended, attended, prompt)
        return x

    def project(self, x: Tensor) -> Tensor:
        """Logits, (rows, vocabulary), from rows of ``hidden``'s result."""
        return linear_decode(x, *self.head, **self._normed(self.final_norm), soft_cap=self.config.logit_soft_cap)

    def _attend(
        self,
        layer: Layer,
        x: Tensor,
        shape: tuple[int, int],
        lengths: Tensor,
        block_table: Tensor,
        kv: LayerCache,
        blocked: bool,
    ) -> Tensor:
        """What the heads give, (rows, heads * head_dim)."""
        config, length = self.config, shape[1]
        heads = (config.heads, config.kv_heads, config.kv_heads)
        qkv = linear_decode(x, *layer.qkv, **self._normed(layer.attention_norm), blocked=blocked)
        q, k, v = qkv.view(*shape, -1, config.head_dim).transpose(1, 2).split(heads, dim=1)
        scales: dict[str, Any] = {"k_scale": kv.k_scale, "v_scale": kv.v_scale}
        turned = cache_append(
            k, v, kv.k, kv.v, lengths, q=q, rope=layer.rope, q_norm=layer.query_norm, k_norm=layer.key_norm,
            eps=config.eps, block_table=block_table, **scales,
        )  # fmt: skip
        assert turned is not None
        out = torch.empty(*shape, config.heads, config.head_dim, dtype=self.dtype, device=x.device).transpose(1, 2)
        for begin in range(0, length, QUERIES):
            end = min(begin + QUERIES, length)
            seen = lengths if end == length else lengths - (length - end)
            decode_attention(
                turned[:, :, begin:end], kv.k, kv.v, seen, block_table=block_table, window=layer.window,
                scale=config.scale, soft_cap=config.attention_soft_cap, out=out[:, :, begin:end], **scales,
            )  # fmt: skip
        return out.transpose(1, 2).view(shape[0] * length, -1)

    def _mlp(self, layer: Layer, x: Tensor, residual: Tensor, blocked: bool) -> Tensor:
        """residual + mlp(norm(x))."""
        normed, activation = self._normed(layer.mlp_norm), self.config.activation
        if layer.up is not None and layer.down is not None:
            y = linear_decode(x, *layer.up, **normed, activation=activation, blocked=blocked)
            return self._add(residual, y, layer.down, layer.after_mlp, blocked)
        assert layer.experts is not None
        router, up, down, top_k, normalise = layer.experts
        experts, weights = route_experts(linear_decode(x, router, **normed), top_k, normalise=normalise)
        y = linear_decode(x, up, **normed, activation=activation, experts=experts)
        shares = torch.empty(
            *experts.shape, down.outputs, device=x.device
        )  # float32: rounded once, when they are added
        linear_decode(y, down, experts=experts, out=shares)
        return combine_experts(shares, weights, residual=residual)

    def _add(self, x: Tensor, y: Tensor, linear: Linear, norm: Tensor | None, blocked: bool) -> Tensor:
        """x + norm(linear(y))."""
        if norm is None:
            return linear_decode(y, *linear, residual=x, blocked=blocked)
        y = rms_norm(linear_decode(y, *linear, blocked=blocked), norm, self.config.eps)
        return rms_norm(y, residual=x)[1]  # of which only the sum is wanted

    def _normed(self, norm: Norm) -> dict[str, Any]:
        """What linear_decode is told of the norm before it."""
        return {"norm": self.config.norm, "norm_weight": norm.weight, "norm_bias": norm.bias, "eps": self.config.eps}
