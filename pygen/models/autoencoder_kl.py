"""The autoencoder of latent diffusion (Rombach et al. 2022): images to latents an eighth as large, and back.

Modules are named as in diffusers' ``AutoencoderKL``, whose weights it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pygen.models.layers import Attention, Conv2d, Downsample, ResnetBlock, Upsample, silu_of_norm

EPS = 1e-6  # of all norms


class Middle(nn.Module):
    """Two ResNet blocks, the coarsest pixels attending to each other between them."""

    def __init__(self, channels: int, groups: int, *, attends: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, None, groups, EPS) for _ in range(2)])
        if attends:
            self.attentions = nn.ModuleList([Attention(channels, 1, channels, bias=True, norm_groups=groups)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in getattr(self, "attentions", ()):
            tokens = attention.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)
            x = x + attention(tokens).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        y: Tensor = self.resnets[1](x)
        return y


class Level(nn.Module):
    """A resolution's ResNet blocks, then the change to the next."""

    def __init__(self, widths: Sequence[int], groups: int, resample: Downsample | Upsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(a, b, None, groups, EPS) for a, b in pairwise(widths)])
        self.downsamplers = nn.ModuleList([resample] if isinstance(resample, Downsample) else [])
        self.upsamplers = nn.ModuleList([resample] if isinstance(resample, Upsample) else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], layers: int, groups: int, *, attends: bool
    ) -> None:
        super().__init__()
        self.conv_in = Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (into, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            resample = None if i == len(widths) - 1 else Downsample(width, everywhere=False)
            self.down_blocks.append(Level([into] + [width] * layers, groups, resample))
        self.mid_block = Middle(widths[-1], groups, attends=attends)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        y: Tensor = self.conv_out(silu_of_norm(self.conv_norm_out, self.mid_block(x)))
        return y


class Decoder(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], layers: int, groups: int, *, attends: bool
    ) -> None:
        super().__init__()
        coarsest_first = tuple(reversed(widths))
        self.conv_in = Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid_block = Middle(widths[-1], groups, attends=attends)
        self.up_blocks = nn.ModuleList()
        for i, (into, width) in enumerate(zip((widths[-1], *coarsest_first), coarsest_first, strict=False)):
            resample = None if i == len(widths) - 1 else Upsample(width)
            self.up_blocks.append(Level([into] + [width] * (layers + 1), groups, resample))
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=EPS)
        self.conv_out = Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        y: Tensor = self.conv_out(silu_of_norm(self.conv_norm_out, x))
        return y


class AutoencoderKL(nn.Module):
    """Images to the mean and log variance of latents, and latents to images.

    Args:
        in_channels, out_channels: of an image.
        latent_channels: of a latent.
        block_out_channels: the width of each resolution, finest first; each is half the one before.
        layers_per_block: ResNet blocks of each resolution of the encoder; one more in the decoder.
        norm_num_groups: of the GroupNorms.
        mid_block_add_attention: whether the coarsest pixels attend to each other.
        use_quant_conv, use_post_quant_conv: whether a 1x1 convolution stands on the latents' side.
        scaling_factor, shift_factor: what a diffusion model works on is (z - shift_factor) * scaling_factor; kept for
            the caller, see ``scaled`` and ``unscaled``.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
    ) -> None:
        super().__init__()
        for width in block_out_channels:
            if width % norm_num_groups:
                raise ValueError(f"norm_num_groups must divide block_out_channels, {width} here")
        how = (tuple(block_out_channels), layers_per_block, norm_num_groups)
        attends = mid_block_add_attention
        self.encoder = Encoder(in_channels, 2 * latent_channels, *how, attends=attends)
        self.decoder = Decoder(latent_channels, out_channels, *how, attends=attends)
        self.quant_conv = Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else nn.Identity()
        self.post_quant_conv = Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else nn.Identity()
        self.factor = 2 ** (len(block_out_channels) - 1)  # between the sides of an image and of its latent
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor or 0.0

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The latents' mean and log variance, each (batch, latent_channels, height / factor, width / factor), of
        images (batch, in_channels, height, width) in [-1, 1]."""
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """Images (batch, out_channels, factor * height, factor * width) of latents."""
        y: Tensor = self.decoder(self.post_quant_conv(z))
        return y

    def tiled_decode(self, z: Tensor, *, tile: int = 64, overlap: float = 0.25) -> Tensor:
        """``decode`` of overlapping tiles, whose memory does not grow with the image; where two overlap, the one fades
        into the other. Not what ``decode`` makes: a tile does not see beyond itself.

        Args:
            z: (batch, latent_channels, height, width).
            tile: the side of a tile, in latent pixels.
            overlap: the part of a side that the next tile covers again, 0 to less than 1.
        """
        if type(tile) is not int or tile < 1:
            raise ValueError(f"tile must be a positive integer, got {tile!r}")
        if not 0 <= overlap < 1 or int(tile * (1 - overlap)) < 1:
            raise ValueError(f"overlap must be from 0 to less than 1 - 1 / tile, got {overlap!r}")
        if max(z.shape[2:]) <= tile:
            return self.decode(z)
        stride = int(tile * (1 - overlap))
        kept, fade = stride * self.factor, (tile - stride) * self.factor
        rows: list[Tensor] = []
        above: list[Tensor] = []
        for top in range(0, z.shape[2], stride):
            row: list[Tensor] = []
            for left in range(0, z.shape[3], stride):
                image = self.decode(z[:, :, top : top + tile, left : left + tile])
                if above:
                    image = _faded(above[len(row)], image, fade, dim=2)
                if row:
                    image = _faded(row[-1], image, fade, dim=3)
                row.append(image)
            rows.append(torch.cat([image[:, :, :kept, :kept] for image in row], dim=3))
            above = row
        return torch.cat(rows, dim=2)

    def scaled(self, z: Tensor) -> Tensor:
        """What a diffusion model works on, of a latent."""
        return (z - self.shift_factor) * self.scaling_factor

    def unscaled(self, x: Tensor) -> Tensor:
        """The latent, of what a diffusion model works on."""
        return x / self.scaling_factor + self.shift_factor


def _faded(before: Tensor, after: Tensor, fade: int, dim: int) -> Tensor:
    """``after``, whose beginning along a dimension the end of ``before`` fades into."""
    fade = min(fade, before.shape[dim], after.shape[dim])
    if fade == 0:
        return after
    weight = torch.arange(fade, device=after.device, dtype=after.dtype) / fade
    weight = weight.view(-1, *[1] * (3 - dim))
    begin, rest = after.narrow(dim, 0, fade), after.narrow(dim, fade, after.shape[dim] - fade)
    end = before.narrow(dim, before.shape[dim] - fade, fade)
    return torch.cat([end + (begin - end) * weight, rest], dim=dim)
