"""A small class-conditional U-Net, after Ho et al. 2020 and Dhariwal & Nichol 2021."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pygen.models.layers import Conv2d, Linear, Upsample, attend, silu_of_norm
from pygen.ops.timestep_embedding import timestep_embedding


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), where the embedding scales and shifts the second norm."""

    def __init__(self, in_channels: int, out_channels: int, embedding_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = Linear(embedding_channels, 2 * out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        _zero(self.conv2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(silu_of_norm(self.norm1, x))
        h = self.conv2(silu_of_norm(self.norm2, h, *self.scale_shift(embedding).chunk(2, dim=1)))
        return self.skip(x) + h


class SelfAttention(nn.Module):
    """x + attention over the pixels of norm(x)."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        _zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, channels // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each (batch, heads, pixels, channels of a head)
        h = attend(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(x.shape))


class Level(nn.Module):
    """The ResBlocks of one resolution, then the change to the next."""

    def __init__(self, blocks: Sequence[ResBlock], resample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


class DownLevel(Level):
    """A level on the way down; leaves each block's output."""

    def forward(self, x: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, embedding)
            skips.append(x)
        return self.resample(x)


class UpLevel(Level):
    """A level on the way up; each block is given what its mirror image left."""

    def forward(self, x: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        return self.resample(x)


class UNet(nn.Module):
    """Predicts the noise in an image, given the time and the class.

    ``channels`` has one width per resolution, finest first; each resolution is half the one before. The coarsest
    resolution attends to itself. Class ``num_classes`` is the null class: the unconditional model of classifier-free
    guidance.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        out_channels: int = 1,
        sample_size: int = 8,
        channels: Sequence[int] = (64, 96),
        blocks_per_level: int = 1,
        num_classes: int = 10,
        heads: int = 4,
        groups: int = 16,
    ) -> None:
        super().__init__()
        if not channels:
            raise ValueError("channels must name at least one width")
        if sample_size % 2 ** (len(channels) - 1):
            raise ValueError(f"sample_size={sample_size} cannot be halved for each level of channels={channels}")
        for width in channels:
            if width % groups:
                raise ValueError(f"groups={groups} must divide channels={channels}")
        if channels[-1] % heads:
            raise ValueError(f"heads={heads} must divide channels[-1]={channels[-1]}")
        self.config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "sample_size": sample_size,
            "channels": list(channels),
            "blocks_per_level": blocks_per_level,
            "num_classes": num_classes,
            "heads": heads,
            "groups": groups,
        }
        self.sample_shape = (in_channels, sample_size, sample_size)
        self.num_classes = num_classes

        embedding_channels = 2 * channels[0]
        self.time_channels = channels[0]
        self.time_embedding = nn.Sequential(
            Linear(self.time_channels, embedding_channels),
            nn.SiLU(),
            Linear(embedding_channels, embedding_channels),
        )
        self.class_embedding = nn.Embedding(num_classes + 1, embedding_channels)

        def block(width_in: int, width_out: int) -> ResBlock:
            return ResBlock(width_in, width_out, embedding_channels, groups)

        width = channels[0]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)

        self.down = nn.ModuleList()
        skip_widths: list[int] = []
        for level, level_width in enumerate(channels):
            blocks = []
            for _ in range(blocks_per_level):
                blocks.append(block(width, level_width))
                width = level_width
                skip_widths.append(width)
            coarsest = level == len(channels) - 1
            resample = nn.Identity() if coarsest else nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.down.append(DownLevel(blocks, resample))

        self.middle = nn.ModuleList(
            [block(width, width), SelfAttention(width, heads, groups), block(width, width)],
        )

        self.up = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(channels))):
            blocks = []
            for _ in range(blocks_per_level):
                blocks.append(block(width + skip_widths.pop(), level_width))
                width = level_width
            finest = level == 0
            next_width = width if finest else channels[level - 1]
            self.up.append(UpLevel(blocks, nn.Identity() if finest else Upsample(width, next_width)))
            width = next_width

        self.norm_out = nn.GroupNorm(groups, width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        _zero(self.conv_out)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """The noise in x, (B, out_channels, H, W).

        x: (B, in_channels, H, W); t: (B,) times in training steps, integer or float; class_labels: (B,) int64.
        """
        time = timestep_embedding(t, self.time_channels).to(x.dtype)
        embedding = F.silu(self.time_embedding(time) + self.class_embedding(class_labels))

        h = self.conv_in(x)
        skips: list[Tensor] = []
        for level in self.down:
            h = level(h, skips, embedding)
        before, attention, after = self.middle
        h = after(attention(before(h, embedding)), embedding)
        for level in self.up:
            h = level(h, skips, embedding)
        y: Tensor = self.conv_out(silu_of_norm(self.norm_out, h))
        return y


def _zero(layer: nn.Conv2d) -> None:
    """Start a residual branch (or the output) at zero, so that the model starts as the identity (or zero)."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
