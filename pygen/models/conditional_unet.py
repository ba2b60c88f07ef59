"""The text-conditional U-Net of latent diffusion (Rombach et al. 2022), as Stable Diffusion 1 and 2 and SDXL have it.

Modules are named as in diffusers' ``UNet2DConditionModel``, whose weights it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pygen.models.layers import (
    MLP,
    Attention,
    Conv2d,
    Downsample,
    FeedForward,
    LayerNorm,
    Linear,
    ResnetBlock,
    Upsample,
    silu_of_norm,
    sinusoidal_embedding,
)


class TextBlock(nn.Module):
    """Tokens attend to themselves, then to the text."""

    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, heads, width // heads, bias=False)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, heads, width // heads, text_width, bias=False)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width, gated=True)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text, mask)
        y: Tensor = x + self.ff(self.norm3(x))
        return y


class SpatialTransformer(nn.Module):
    """An image's pixels as tokens, projected in and out by linear layers or 1x1 convolutions."""

    def __init__(self, channels: int, heads: int, depth: int, text_width: int, groups: int, *, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        project = (lambda: Linear(channels, channels)) if linear else (lambda: Conv2d(channels, channels, 1))
        self.proj_in = project()
        self.transformer_blocks = nn.ModuleList([TextBlock(channels, heads, text_width) for _ in range(depth)])
        self.proj_out = project()

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        y = self.norm(x)
        y = y if self.linear else self.proj_in(y)
        tokens = y.permute(0, 2, 3, 1).flatten(1, 2)
        tokens = self.proj_in(tokens) if self.linear else tokens
        for block in self.transformer_blocks:
            tokens = block(tokens, text, mask)
        tokens = self.proj_out(tokens) if self.linear else tokens
        y = tokens.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)  # channels-last
        return x + (y if self.linear else self.proj_out(y))


class Level(nn.Module):
    """A resolution's ResNet blocks, each with a transformer behind it where there are some."""

    def __init__(self, resnets: Sequence[ResnetBlock], attentions: Sequence[SpatialTransformer]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)

    def through(self, i: int, x: Tensor, time: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        x = self.resnets[i](x, time)
        return self.attentions[i](x, text, mask) if hasattr(self, "attentions") else x


class DownLevel(Level):
    def __init__(
        self, resnets: Sequence[ResnetBlock], attentions: Sequence[SpatialTransformer], resample: Downsample | None
    ) -> None:
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList([resample] if resample is not None else [])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """Leaves what each block and the downsampling made."""
        for i in range(len(self.resnets)):
            x = self.through(i, x, time, text, mask)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class UpLevel(Level):
    def __init__(
        self, resnets: Sequence[ResnetBlock], attentions: Sequence[SpatialTransformer], resample: Upsample | None
    ) -> None:
        super().__init__(resnets, attentions)
        self.upsamplers = nn.ModuleList([resample] if resample is not None else [])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """Takes what the mirror image left, the last first."""
        for i in range(len(self.resnets)):
            x = self.through(i, torch.cat([x, skips.pop()], dim=1), time, text, mask)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])
        return x


class Middle(Level):
    def forward(self, x: Tensor, time: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        y: Tensor = self.resnets[1](self.through(0, x, time, text, mask), time)
        return y


class ConditionalUNet(nn.Module):
    """Predicts the noise (or v) in a latent, given the time and a text.

    Args:
        in_channels, out_channels: of a latent.
        block_out_channels: the width of each resolution, finest first; each is half the one before.
        down_block_types, up_block_types: "CrossAttnDownBlock2D" and "CrossAttnUpBlock2D" where a resolution attends to
            the text, else "DownBlock2D" and "UpBlock2D"; ``up_block_types`` from the coarsest.
        layers_per_block: ResNet blocks of each resolution on the way down; one more on the way up.
        transformer_layers_per_block: of each transformer; of all resolutions, or of each.
        attention_head_dim: the number of heads (diffusers' name for it), of all resolutions or of each.
        cross_attention_dim: the text's width.
        use_linear_projection: of the transformers.
        addition_embed_type: "text_time" for SDXL, whose embedding of a pooled text and of sizes has
            ``projection_class_embeddings_input_dim`` numbers, ``addition_time_embed_dim`` for each size.
        norm_num_groups, norm_eps: of the GroupNorms.
        flip_sin_to_cos, freq_shift: ``cosines_first`` and ``shift`` of ``sinusoidal_embedding``.
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        down_block_types: Sequence[str] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types: Sequence[str] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        layers_per_block: int = 2,
        transformer_layers_per_block: int | Sequence[int] = 1,
        attention_head_dim: int | Sequence[int] = 8,
        cross_attention_dim: int = 1280,
        use_linear_projection: bool = False,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        projection_class_embeddings_input_dim: int | None = None,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
    ) -> None:
        super().__init__()
        levels = len(block_out_channels)
        for name, types, known in (
            ("down_block_types", down_block_types, ("DownBlock2D", "CrossAttnDownBlock2D")),
            ("up_block_types", up_block_types, ("UpBlock2D", "CrossAttnUpBlock2D")),
        ):
            if len(types) != levels or not set(types) <= set(known):
                raise ValueError(f"{name} must be {levels} of {', '.join(known)}, got {list(types)}")
        heads = _each("attention_head_dim", attention_head_dim, levels)
        depths = _each("transformer_layers_per_block", transformer_layers_per_block, levels)
        for width, count in zip(block_out_channels, heads, strict=True):
            if width % count or width % norm_num_groups:
                raise ValueError(f"attention_head_dim and norm_num_groups must divide block_out_channels, {width} here")
        if addition_embed_type not in (None, "text_time"):
            raise ValueError(f"addition_embed_type must be text_time or None, got {addition_embed_type!r}")
        self.time_channels = block_out_channels[0]
        self.wave = partial(sinusoidal_embedding, cosines_first=flip_sin_to_cos, shift=freq_shift)
        time_width = 4 * block_out_channels[0]
        self.time_embedding = MLP(self.time_channels, time_width)
        self.size_channels = addition_time_embed_dim or 0
        if addition_embed_type is not None:
            if addition_time_embed_dim is None or projection_class_embeddings_input_dim is None:
                raise ValueError("addition_embed_type needs its two dimensions")
            self.add_embedding = MLP(projection_class_embeddings_input_dim, time_width)

        def resnet(channels_in: int, channels: int) -> ResnetBlock:
            return ResnetBlock(channels_in, channels, time_width, norm_num_groups, norm_eps)

        def transformer(level: int) -> SpatialTransformer:
            return SpatialTransformer(
                block_out_channels[level], heads[level], depths[level], cross_attention_dim, norm_num_groups,
                linear=use_linear_projection,
            )  # fmt: skip

        width = block_out_channels[0]
        self.conv_in = Conv2d(in_channels, width, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        skips = [width]
        for level, channels in enumerate(block_out_channels):
            widths = [width] + [channels] * (layers_per_block - 1)
            width = channels
            last = level == levels - 1
            attends = down_block_types[level] == "CrossAttnDownBlock2D"
            self.down_blocks.append(
                DownLevel(
                    [resnet(into, channels) for into in widths],
                    [transformer(level) for _ in widths] if attends else [],
                    None if last else Downsample(channels),
                )
            )
            skips += [channels] * (layers_per_block + (not last))
        self.mid_block = Middle([resnet(width, width), resnet(width, width)], [transformer(levels - 1)])
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            channels, resnets = block_out_channels[level], []
            for _ in range(layers_per_block + 1):
                resnets.append(resnet(width + skips.pop(), channels))
                width = channels
            attends = up_block_types[levels - 1 - level] == "CrossAttnUpBlock2D"
            self.up_blocks.append(
                UpLevel(
                    resnets,
                    [transformer(level) for _ in resnets] if attends else [],
                    None if level == 0 else Upsample(channels),
                )
            )
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, width, eps=norm_eps)
        self.conv_out = Conv2d(width, out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        *,
        text_mask: Tensor | None = None,
        pooled_text: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """The prediction, (batch, out_channels, height, width).

        Args:
            x: (batch, in_channels, height, width), of the parameters' dtype.
            t: (batch,) or (), in training steps, integer or float.
            text: (batch, length, cross_attention_dim). Its keys and values are made once and held for as long as the
                same tensor comes again, unchanged.
            text_mask: (batch, length), True where there is text.
            pooled_text, sizes: of SDXL: (batch, width), and (batch, 6): original size, crop and target size.
        """
        time = self.wave(t.expand(len(x)), self.time_channels).to(x.dtype)
        embedding = self.time_embedding(time)
        if hasattr(self, "add_embedding"):
            if pooled_text is None or sizes is None:
                raise ValueError("pooled_text and sizes must be given to a U-Net of addition_embed_type text_time")
            of_sizes = self.wave(sizes.flatten(), self.size_channels).to(x.dtype).view(len(x), -1)
            embedding = embedding + self.add_embedding(torch.cat([pooled_text, of_sizes], dim=1))
        embedding = nn.functional.silu(embedding)
        mask = None if text_mask is None else text_mask[:, None, None].bool()

        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            x = level(x, skips, embedding, text, mask)
        x = self.mid_block(x, embedding, text, mask)
        for level in self.up_blocks:
            x = level(x, skips, embedding, text, mask)
        y: Tensor = self.conv_out(silu_of_norm(self.conv_norm_out, x))
        return y


def _each(name: str, value: int | Sequence[int], count: int) -> list[int]:
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count:
        raise ValueError(f"{name} must be one number or {count}, got {value}")
    return values
