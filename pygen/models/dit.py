"""Diffusion transformers whose norms the time scales, shifts and gates: of classes (DiT, Peebles and Xie 2022) and of
texts (PixArt-alpha, Chen et al. 2023).

Modules are named as in diffusers' ``DiTTransformer2DModel`` and ``PixArtTransformer2DModel``, whose weights they take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pygen.held import Held
from pygen.models.layers import MLP, Attention, FeedForward, Linear, may_hold, sinusoidal_embedding
from pygen.models.transformer_layers import (
    TIME_CHANNELS,
    Modulation,
    PatchEmbed,
    TimeEmbedding,
    added_and_modulated,
    gated,
    modulated,
)

silu = nn.functional.silu


class ClassTimeEmbedding(TimeEmbedding):
    """Of a time and a class; class ``classes`` is the null class."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width)
        self.class_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})

    def of(self, t: Tensor, class_labels: Tensor, dtype: torch.dtype) -> Tensor:
        # Unlike other models', its wavelengths reach 20000 pi itself.
        time = self.timestep_embedder(sinusoidal_embedding(t, TIME_CHANNELS, shift=1.0).to(dtype))
        embedding: Tensor = time + self.class_embedder["embedding_table"](class_labels)
        return embedding


class ZeroModulation(Modulation):
    """adaLN-zero, whose embedding is each block's own."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, 6)
        self.emb = ClassTimeEmbedding(width, classes)


class DiTBlock(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, classes: int, eps: float, *, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.norm1 = ZeroModulation(width, classes)
        self.attn1 = Attention(width, heads, head_dim, bias=bias)
        self.ff = FeedForward(width, gated=False)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        embedding = silu(self.norm1.emb.of(t, class_labels, x.dtype))
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(embedding)
        y = self.attn1(modulated(x, scale, shift))
        x, y = added_and_modulated(x, gate, y, scale_ff, shift_ff, self.eps)
        return gated(x, gate_ff, self.ff(y))


class DiT(nn.Module):
    """Predicts the noise in a latent (and more: ``out_channels`` are as the weights were trained), given the time and
    the class.

    Args:
        num_attention_heads, attention_head_dim, num_layers: of the blocks.
        in_channels, out_channels: of a latent; ``out_channels`` is ``in_channels`` where left out.
        sample_size: the latents' side; others work too.
        patch_size: the side of a patch.
        num_embeds_ada_norm: the number of classes; that class itself is the null class.
        attention_bias: whether the projections of queries, keys and values have a bias.
        norm_eps: of the blocks' second norm.
    """

    def __init__(
        self,
        *,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        num_layers: int = 28,
        in_channels: int = 4,
        out_channels: int | None = None,
        sample_size: int = 32,
        patch_size: int = 2,
        num_embeds_ada_norm: int = 1000,
        attention_bias: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.num_classes = num_embeds_ada_norm
        self.pos_embed = PatchEmbed(in_channels, width, patch_size, sample_size // patch_size)
        self.transformer_blocks = nn.ModuleList(
            [
                DiTBlock(
                    width, num_attention_heads, attention_head_dim, num_embeds_ada_norm, norm_eps, bias=attention_bias
                )
                for _ in range(num_layers)
            ]
        )
        self.proj_out_1 = Linear(width, 2 * width)
        self.proj_out_2 = Linear(width, patch_size * patch_size * (out_channels or in_channels))

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """(batch, out_channels, height, width).

        x: (batch, in_channels, height, width), of the parameters' dtype; t: (batch,) or (), in training steps;
        class_labels: int64 (batch,).
        """
        t = t.expand(len(x))
        tokens = self.pos_embed(x)
        for block in self.transformer_blocks:
            tokens = block(tokens, t, class_labels)
        first: Any = self.transformer_blocks[0]
        embedding = silu(first.norm1.emb.of(t, class_labels, tokens.dtype))
        shift, scale = self.proj_out_1(embedding).chunk(2, dim=1)
        return self.pos_embed.image(self.proj_out_2(modulated(tokens, scale, shift)), *x.shape[2:])


class SizeTimeEmbedding(TimeEmbedding):
    """Of a time, and of the image's resolution and aspect ratio where the model was trained with them."""

    def __init__(self, width: int, *, sizes: bool) -> None:
        super().__init__(width)
        if sizes:
            self.resolution_embedder = MLP(TIME_CHANNELS, width // 3)
            self.aspect_ratio_embedder = MLP(TIME_CHANNELS, width // 3)

    def of(self, t: Tensor, dtype: torch.dtype, resolution: Tensor | None, aspect_ratio: Tensor | None) -> Tensor:
        embedding: Tensor = self(t, dtype)
        if hasattr(self, "resolution_embedder"):
            if resolution is None or aspect_ratio is None:
                raise ValueError("resolution and aspect_ratio must be given to a model of use_additional_conditions")
            parts = []
            for embedder, sizes in (
                (self.resolution_embedder, resolution), (self.aspect_ratio_embedder, aspect_ratio),
            ):  # fmt: skip
                numbers = sinusoidal_embedding(sizes.flatten(), TIME_CHANNELS).to(dtype)
                parts.append(embedder(numbers).view(len(t), -1))
            embedding = embedding + torch.cat(parts, dim=1)
        return embedding


class SingleModulation(Modulation):
    """adaLN-single: one for all blocks, each of which adds a table of its own."""

    def __init__(self, width: int, *, sizes: bool) -> None:
        super().__init__(width, 6)
        self.emb = SizeTimeEmbedding(width, sizes=sizes)


class PixArtBlock(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, text_width: int, eps: float, *, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn1 = Attention(width, heads, head_dim, bias=bias)
        self.attn2 = Attention(width, heads, head_dim, text_width, bias=bias)
        self.ff = FeedForward(width, gated=False)

    def forward(self, x: Tensor, modulation: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """modulation: (batch, 6, width)."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = (self.scale_shift_table + modulation).unbind(1)
        x = gated(x, gate, self.attn1(modulated(x, scale, shift, self.eps)))
        x, y = added_and_modulated(x, None, self.attn2(x, text, mask), scale_ff, shift_ff, self.eps)
        return gated(x, gate_ff, self.ff(y))


class PixArt(nn.Module):
    """Predicts the noise in a latent, given the time and a text.

    Args:
        num_attention_heads, attention_head_dim, num_layers, in_channels, out_channels, sample_size, patch_size,
            attention_bias: as of ``DiT``.
        cross_attention_dim: the text's width in the blocks.
        caption_channels: the text's width as it is given, where it is projected.
        norm_eps: of the blocks' norms.
        interpolation_scale: of the patches' places; by ``sample_size`` where left out.
        use_additional_conditions: whether resolution and aspect ratio are given; where left out, at a ``sample_size``
            of 128.
    """

    def __init__(
        self,
        *,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        num_layers: int = 28,
        in_channels: int = 4,
        out_channels: int | None = 8,
        sample_size: int = 128,
        patch_size: int = 2,
        cross_attention_dim: int = 1152,
        caption_channels: int | None = None,
        attention_bias: bool = True,
        norm_eps: float = 1e-6,
        interpolation_scale: float | None = None,
        use_additional_conditions: bool | None = None,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        stretch = max(sample_size // 64, 1) if interpolation_scale is None else interpolation_scale
        sizes = sample_size == 128 if use_additional_conditions is None else use_additional_conditions
        self.pos_embed = PatchEmbed(in_channels, width, patch_size, sample_size // patch_size, stretch=stretch)
        self.adaln_single = SingleModulation(width, sizes=sizes)
        if caption_channels is not None:
            self.caption_projection = MLP(caption_channels, width, "gelu_tanh")
        self.of_text: Held[Tensor] = Held()
        self.transformer_blocks = nn.ModuleList(
            [
                PixArtBlock(
                    width, num_attention_heads, attention_head_dim, cross_attention_dim, norm_eps, bias=attention_bias
                )
                for _ in range(num_layers)
            ]
        )
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = Linear(width, patch_size * patch_size * (out_channels or in_channels))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        *,
        text_mask: Tensor | None = None,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        """(batch, out_channels, height, width).

        x: (batch, in_channels, height, width), of the parameters' dtype; t: (batch,) or (), in training steps;
        text: (batch, length, caption_channels), text_mask: (batch, length), True where there is text; resolution:
        (batch, 2), height and width of the image in pixels, aspect_ratio: (batch, 1), where the model takes them.
        """
        t = t.expand(len(x))
        tokens = self.pos_embed(x)
        embedding = self.adaln_single.emb.of(t, tokens.dtype, resolution, aspect_ratio)
        modulation = torch.stack(self.adaln_single(silu(embedding)), dim=1)
        if hasattr(self, "caption_projection"):
            text = self._projected(text)
        mask = None if text_mask is None else text_mask[:, None, None].bool()
        for block in self.transformer_blocks:
            tokens = block(tokens, modulation, text, mask)
        shift, scale = (self.scale_shift_table + embedding[:, None]).unbind(1)
        return self.pos_embed.image(self.proj_out(modulated(tokens, scale, shift)), *x.shape[2:])

    def _projected(self, text: Tensor) -> Tensor:
        """The same tensor for the same text, so that the blocks' keys and values of it are made once too."""
        made_of = (text, *self.caption_projection.parameters())
        if not may_hold(*made_of):
            projected: Tensor = self.caption_projection(text)
            return projected
        return self.of_text.get(made_of, lambda: self.caption_projection(text))
