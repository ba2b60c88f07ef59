"""Layers of diffusion transformers (Peebles and Xie 2022; Esser et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pygen.models.layers import MLP, Conv2d, Linear, sinusoidal_embedding
from pygen.ops.row_norm import ada_layer_norm, with_rows

TIME_CHANNELS = 256


class Modulation(nn.Module):
    """What an activated embedding (batch, width) says of how to scale, shift and gate: ``count`` of its width each."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = Linear(width, count * width)

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        return self.linear(embedding).chunk(self.count, dim=1)


def modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm of (batch, length, width), times 1 + scale, plus shift."""
    return ada_layer_norm(with_rows(x), scale, shift, eps)


def added_and_modulated(
    x: Tensor, gate: Tensor | None, y: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x + gate y, and that as ``modulated`` gives it, in one pass."""
    normalised, x = ada_layer_norm(with_rows(y), scale, shift, eps, residual=with_rows(x), gate=gate)
    return x, normalised


def gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y, in one pass."""
    return torch.addcmul(x, gate[:, None], y)


class ContinuousNorm(Modulation):
    """The last norm, which an embedding scales and shifts."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2)

    def of(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self(embedding)
        return modulated(x, scale, shift)


class TimeEmbedding(nn.Module):
    """Of times (batch,), and of a guidance scale and a pooled text where the model has them."""

    def __init__(self, width: int, *, pooled_width: int | None = None, guidance: bool = False) -> None:
        super().__init__()
        self.timestep_embedder = MLP(TIME_CHANNELS, width)
        if guidance:
            self.guidance_embedder = MLP(TIME_CHANNELS, width)
        if pooled_width is not None:
            self.text_embedder = MLP(pooled_width, width)

    def forward(
        self, t: Tensor, dtype: torch.dtype, *, pooled_text: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """(batch, width), before its activation."""
        embedding: Tensor = self.timestep_embedder(sinusoidal_embedding(t, TIME_CHANNELS).to(dtype))
        if (guidance is not None) != hasattr(self, "guidance_embedder"):
            raise ValueError("guidance must be given to a model of guidance_embeds, and to no other")
        if guidance is not None:
            embedding = embedding + self.guidance_embedder(sinusoidal_embedding(guidance, TIME_CHANNELS).to(dtype))
        return embedding if pooled_text is None else embedding + self.text_embedder(pooled_text)


class PatchEmbed(nn.Module):
    """An image's patches as tokens, with sines and cosines of their places.

    Args:
        base: how many patches a side of the images had that the model was trained on; places are told in its terms.
        stretch: diffusers' ``interpolation_scale``, of these places.
        crop_from: where places are cut from the middle of so many a side, which the checkpoint holds.
    """

    def __init__(
        self, channels: int, width: int, patch: int, base: int, *, stretch: float = 1.0, crop_from: int | None = None
    ) -> None:
        super().__init__()
        self.width, self.patch, self.base, self.stretch, self.crop_from = width, patch, base, stretch, crop_from
        self.proj = Conv2d(channels, width, patch, stride=patch)
        self.places: tuple[tuple[Any, ...], Tensor] | None = None  # of the last grid
        if crop_from is not None:
            self.pos_embed = nn.Buffer(self._places(crop_from, crop_from)[None])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, patches, width)."""
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        if self.crop_from is None:
            grid = (rows, columns, x.device)
            if self.places is None or self.places[0] != grid:
                self.places = (grid, self._places(*grid))
            places = self.places[1]
        elif max(rows, columns) > self.crop_from:
            raise ValueError(f"x may have {self.crop_from} patches a side, got {rows} x {columns}")
        else:
            top, left = (self.crop_from - rows) // 2, (self.crop_from - columns) // 2
            all_places = self.pos_embed.view(self.crop_from, self.crop_from, -1)
            places = all_places[top : top + rows, left : left + columns].flatten(0, 1)
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens + places.to(tokens.dtype)

    def _places(self, rows: int, columns: int, device: torch.device | None = None) -> Tensor:
        def axis(count: int) -> Tensor:
            """(count, width / 2)"""
            at = torch.arange(count, dtype=torch.float64, device=device) / (count / self.base) / self.stretch
            quarter = self.width // 4
            frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
            angles = at[:, None] * frequencies
            return torch.cat([angles.sin(), angles.cos()], dim=1)

        across, down = axis(columns)[None].expand(rows, -1, -1), axis(rows)[:, None].expand(-1, columns, -1)
        return torch.cat([across, down], dim=2).flatten(0, 1).float()

    def image(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(batch, patches, patch * patch * channels) to (batch, channels, height, width)."""
        grid = (height // self.patch, width // self.patch)
        pixels = tokens.unflatten(1, grid).unflatten(-1, (self.patch, self.patch, -1))
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, height, width)
