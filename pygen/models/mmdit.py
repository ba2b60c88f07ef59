"""Transformers in which an image and a text attend to each other and themselves, each with weights of its own: MMDiT
of Stable Diffusion 3 (Esser et al. 2024), and Flux (Black Forest Labs 2024), whose later blocks share them.

Modules are named as in diffusers' ``SD3Transformer2DModel`` and ``FluxTransformer2DModel``, whose weights they take.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pygen.held import Held
from pygen.models.layers import (
    FeedForward,
    Linear,
    Packed,
    RMSNorm,
    heads_of,
    joined,
    may_hold,
    project_gelu,
    project_together,
)
from pygen.models.transformer_layers import (
    ContinuousNorm,
    Modulation,
    PatchEmbed,
    TimeEmbedding,
    added_and_modulated,
    gated,
    modulated,
)
from pygen.ops.attention import attention
from pygen.ops.rope import rope

EPS = 1e-6
silu = nn.functional.silu
Rotary = tuple[Tensor, Tensor]  # positions of the tokens, and the table


class JointAttention(nn.Module):
    """Attention of an image's tokens, and of a text's before them.

    Args:
        qk_norm: whether queries and keys are normed.
        text: whether there is a text; text_out: whether it is given a result; out: whether the result is projected.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        qk_norm: bool,
        text: bool = False,
        text_out: bool = False,
        out: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.qk_norm = heads, qk_norm
        self.together: Held[Packed] = Held()
        self.text_together: Held[Packed] = Held()
        inner = heads * head_dim
        self.to_q, self.to_k, self.to_v = (Linear(width, inner) for _ in range(3))
        if out:
            self.to_out = nn.ModuleList([Linear(inner, width)])
        if text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (Linear(width, inner) for _ in range(3))
        if text_out:
            self.to_add_out = Linear(inner, width)
        if qk_norm:
            self.norm_q, self.norm_k = (RMSNorm(head_dim, EPS) for _ in range(2))
            if text:
                self.norm_added_q, self.norm_added_k = (RMSNorm(head_dim, EPS) for _ in range(2))

    def _heads(
        self, x: Tensor, projections: Sequence[Linear], held: Held[Packed], norms: Sequence[str], turns: Rotary | None
    ) -> list[Tensor]:
        """Queries, keys and values of tokens, (batch, heads, length, head_dim), normed and turned."""
        parts = [heads_of(part, self.heads) for part in project_together(projections, held, x)]
        for i, name in enumerate(norms):
            norm: RMSNorm | None = getattr(self, name) if self.qk_norm else None
            if turns is not None:
                weight, eps = (None, EPS) if norm is None else (norm.weight, norm.eps)
                parts[i] = rope(parts[i], *turns, interleaved=True, norm=weight, eps=eps)
            elif norm is not None:
                parts[i] = norm(parts[i])
        return parts

    def forward(self, x: Tensor, text: Tensor | None = None, rotary: Rotary | None = None) -> Tensor:
        """(batch, length, heads * head_dim) of all tokens, the text's first, not yet projected."""
        length = 0 if text is None else text.shape[1]
        turns = None if rotary is None else (rotary[0][length:], rotary[1])
        parts = self._heads(x, (self.to_q, self.to_k, self.to_v), self.together, ("norm_q", "norm_k"), turns)
        if text is not None:
            turns = None if rotary is None else (rotary[0][:length], rotary[1])
            projections = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
            of_text = self._heads(text, projections, self.text_together, ("norm_added_q", "norm_added_k"), turns)
            parts = joined(of_text, parts)
        return attention(*parts).transpose(1, 2).flatten(2)


class JointBlock(nn.Module):
    """One of MMDiT and of Flux's first. In the last of MMDiT the text is only read.

    dual: whether the image attends to itself alone, too (Stable Diffusion 3.5).
    """

    def __init__(
        self, width: int, heads: int, head_dim: int, *, qk_norm: bool, dual: bool = False, text_out: bool = True
    ) -> None:
        super().__init__()
        self.dual, self.text_out = dual, text_out
        self.norm1 = Modulation(width, 9 if dual else 6)
        self.norm1_context = Modulation(width, 6) if text_out else ContinuousNorm(width)
        self.attn = JointAttention(width, heads, head_dim, qk_norm=qk_norm, text=True, text_out=text_out)
        if dual:
            self.attn2 = JointAttention(width, heads, head_dim, qk_norm=qk_norm)
        self.ff = FeedForward(width, gated=False)
        if text_out:
            self.ff_context = FeedForward(width, gated=False)

    def forward(
        self, x: Tensor, text: Tensor, embedding: Tensor, rotary: Rotary | None = None
    ) -> tuple[Tensor, Tensor]:
        """The image's tokens and the text's; embedding: (batch, width), activated."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self.norm1(embedding)
        rest: list[Tensor] = []
        if isinstance(self.norm1_context, ContinuousNorm):
            of_text = self.norm1_context.of(text, embedding)
        else:
            text_shift, text_scale, *rest = self.norm1_context(embedding)
            of_text = modulated(text, text_scale, text_shift)
        y = self.attn(modulated(x, scale, shift), of_text, rotary)
        length = text.shape[1]
        alone = None
        if self.dual:
            shift_alone, scale_alone, gate_alone = second
            alone = self.attn2.to_out[0](self.attn2(modulated(x, scale_alone, shift_alone)))
        of_image = self.attn.to_out[0](y[:, length:])
        if alone is not None:
            x, of_image, gate = gated(x, gate, of_image), alone, gate_alone
        x, of_image = added_and_modulated(x, gate, of_image, scale_ff, shift_ff)
        x = gated(x, gate_ff, self.ff(of_image))
        if self.text_out:
            text_gate, text_shift, text_scale, text_gate_ff = rest
            of_text = self.attn.to_add_out(y[:, :length])
            text, of_text = added_and_modulated(text, text_gate, of_text, text_scale, text_shift)
            text = gated(text, text_gate_ff, self.ff_context(of_text))
        return x, _finite(text)


def _finite(x: Tensor) -> Tensor:
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x


class MMDiT(nn.Module):
    """Predicts the flow of a latent, given the time and a text.

    Args:
        num_attention_heads, attention_head_dim, num_layers: of the blocks.
        in_channels, out_channels: of a latent.
        sample_size: the latents' side that places are told by; patch_size: the side of a patch.
        pos_embed_max_size: the most patches that a side of a latent may have.
        joint_attention_dim, caption_projection_dim: the text's width as it is given, and as the blocks take it.
        pooled_projection_dim: the pooled text's.
        dual_attention_layers: the blocks in which the image attends to itself alone, too.
        qk_norm: "rms_norm" or None.
    """

    def __init__(
        self,
        *,
        num_attention_heads: int = 18,
        attention_head_dim: int = 64,
        num_layers: int = 18,
        in_channels: int = 16,
        out_channels: int | None = 16,
        sample_size: int = 128,
        patch_size: int = 2,
        pos_embed_max_size: int = 96,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        dual_attention_layers: Sequence[int] = (),
        qk_norm: str | None = None,
    ) -> None:
        super().__init__()
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm must be rms_norm or None, got {qk_norm!r}")
        width = num_attention_heads * attention_head_dim
        if caption_projection_dim != width:
            raise ValueError(f"caption_projection_dim must be the blocks' width, {width}, got {caption_projection_dim}")
        self.pos_embed = PatchEmbed(
            in_channels, width, patch_size, sample_size // patch_size, crop_from=pos_embed_max_size
        )
        self.time_text_embed = TimeEmbedding(width, pooled_width=pooled_projection_dim)
        self.context_embedder = Linear(joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            [
                JointBlock(
                    width, num_attention_heads, attention_head_dim, qk_norm=qk_norm is not None,
                    dual=layer in dual_attention_layers, text_out=layer != num_layers - 1,
                )
                for layer in range(num_layers)
            ]
        )  # fmt: skip
        self.norm_out = ContinuousNorm(width)
        self.proj_out = Linear(width, patch_size * patch_size * (out_channels or in_channels))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, pooled_text: Tensor) -> Tensor:
        """(batch, out_channels, height, width).

        x: (batch, in_channels, height, width), of the parameters' dtype; t: (batch,) or (), 0 to 1000; text: (batch,
        length, joint_attention_dim); pooled_text: (batch, pooled_projection_dim).
        """
        tokens = self.pos_embed(x)
        embedding = silu(self.time_text_embed(t.expand(len(x)), tokens.dtype, pooled_text=pooled_text))
        text = self.context_embedder(text)
        for block in self.transformer_blocks:
            tokens, text = block(tokens, text, embedding)
        return self.pos_embed.image(self.proj_out(self.norm_out.of(tokens, embedding)), *x.shape[2:])


class SingleBlock(nn.Module):
    """Attention and a feed-forward of the text's and the image's tokens alike, side by side."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.norm = Modulation(width, 3)
        self.proj_mlp = Linear(width, 4 * width)
        self.proj_out = Linear(5 * width, width)
        self.attn = JointAttention(width, heads, head_dim, qk_norm=True, out=False)

    def forward(self, x: Tensor, embedding: Tensor, rotary: Rotary) -> Tensor:
        shift, scale, gate = self.norm(embedding)
        y = modulated(x, scale, shift)
        hidden = self.proj_mlp(y, project_gelu)
        return _finite(gated(x, gate, self.proj_out(torch.cat([self.attn(y, rotary=rotary), hidden], dim=2))))


class Flux(nn.Module):
    """Predicts the flow of a latent's tokens, given the time and a text.

    Args:
        num_attention_heads, attention_head_dim, num_layers, num_single_layers: of the blocks, and of those that image
            and text share.
        in_channels, out_channels: of a token: a latent's 2 x 2 patch, for one.
        joint_attention_dim, pooled_projection_dim: the width of the text, and of the pooled text.
        guidance_embeds: whether the model takes a guidance scale.
        axes_dims_rope: how much of a head turns by each of a token's coordinates.
    """

    def __init__(
        self,
        *,
        num_attention_heads: int = 24,
        attention_head_dim: int = 128,
        num_layers: int = 19,
        num_single_layers: int = 38,
        in_channels: int = 64,
        out_channels: int | None = None,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
    ) -> None:
        super().__init__()
        if sum(axes_dims_rope) != attention_head_dim or any(dim % 2 for dim in axes_dims_rope):
            raise ValueError(f"axes_dims_rope must be even and have the sum {attention_head_dim}, got {axes_dims_rope}")
        width = num_attention_heads * attention_head_dim
        self.axes = tuple(axes_dims_rope)
        self.time_text_embed = TimeEmbedding(width, pooled_width=pooled_projection_dim, guidance=guidance_embeds)
        self.context_embedder = Linear(joint_attention_dim, width)
        self.x_embedder = Linear(in_channels, width)
        heads = (num_attention_heads, attention_head_dim)
        self.transformer_blocks = nn.ModuleList([JointBlock(width, *heads, qk_norm=True) for _ in range(num_layers)])
        self.single_transformer_blocks = nn.ModuleList([SingleBlock(width, *heads) for _ in range(num_single_layers)])
        self.norm_out = ContinuousNorm(width)
        self.proj_out = Linear(width, out_channels or in_channels)
        self.rotary: Held[Rotary] = Held()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        pooled_text: Tensor,
        image_ids: Tensor,
        text_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """(batch, tokens, out_channels).

        x: (batch, tokens, in_channels), of the parameters' dtype; t: (batch,) or (), 0 to 1; text: (batch, length,
        joint_attention_dim); pooled_text: (batch, pooled_projection_dim); image_ids: (tokens, 3), coordinates of each
        token, and text_ids: (length, 3); guidance: (batch,), where the model takes it.
        """
        dtype = x.dtype
        times = [None if value is None else value.to(dtype).expand(len(x)) * 1000 for value in (t, guidance)]
        embedding = silu(self.time_text_embed(times[0], dtype, pooled_text=pooled_text, guidance=times[1]))
        x, text = self.x_embedder(x), self.context_embedder(text)
        if may_hold(image_ids, text_ids) and not text_ids.is_inference():
            rotary = self.rotary.get((image_ids, text_ids), lambda: self._rotary(text_ids, image_ids))
        else:
            rotary = self._rotary(text_ids, image_ids)
        for block in self.transformer_blocks:
            x, text = block(x, text, embedding, rotary)
        both = torch.cat([text, x], dim=1)
        for block in self.single_transformer_blocks:
            both = block(both, embedding, rotary)
        y: Tensor = self.proj_out(self.norm_out.of(both[:, text.shape[1] :], embedding))
        return y

    def _rotary(self, text_ids: Tensor, image_ids: Tensor) -> Rotary:
        ids = torch.cat([text_ids, image_ids]).double()
        angles = []
        for axis, dim in enumerate(self.axes):
            powers = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
            angles.append(ids[:, axis, None] / 10000.0**powers)
        all_angles = torch.cat(angles, dim=1)
        table = torch.stack([all_angles.cos(), all_angles.sin()], dim=1).float()
        return torch.arange(len(ids), device=ids.device), table
