"""The latent digits model that ships with pygen: a DiT that draws an autoencoder's latents by their flow."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pygen.models.autoencoder_kl import AutoencoderKL
from pygen.models.checkpoint import ModelDescription
from pygen.models.dit import DiT
from pygen.models.pretrained import from_pretrained

LATENT_DIGITS = Path(__file__).parent / "digits_dit"  # made by examples/train_dit_digits.py; diffusers loads it too
TRAINING_STEPS = 1000  # what a DiT's times are counted in


class LatentDigits(NamedTuple):
    """denoiser: called as ``pygen.sample`` does; decode: images (batch, 1, 8, 8) in [-1, 1], of what it draws."""

    denoiser: Callable[..., Tensor]
    decode: Callable[[Tensor], Tensor]
    description: ModelDescription


def load(directory: str | os.PathLike[str] = LATENT_DIGITS) -> LatentDigits:
    """The model, in float32.

    Raises:
        CheckpointError: as ``from_pretrained``.
    """
    dit: DiT = from_pretrained(Path(directory) / "transformer", dtype=torch.float32)
    autoencoder: AutoencoderKL = from_pretrained(Path(directory) / "vae", dtype=torch.float32)
    side = dit.pos_embed.base * dit.pos_embed.patch
    description = ModelDescription(
        schedule={"name": "flow"},
        prediction="flow",
        clip=None,
        shape=(dit.pos_embed.proj.in_channels, side, side),
        num_classes=dit.num_classes,
    )
    return LatentDigits(
        lambda x, t, class_labels: dit(*model_inputs(x, t), class_labels),
        lambda x: autoencoder.decode(autoencoder.unscaled(x)),
        description,
    )


def model_inputs(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What the DiT takes of a latent and of a flow's time, 0 to 1."""
    return x, t * TRAINING_STEPS
