"""Samples as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]


def to_pixels(samples: Tensor, low: float, high: float) -> Pixels:
    """(batch, channels, height, width) to (batch, height, width, channels) bytes; values outside the range are cut."""
    scaled = (samples.float() - low) * (255.0 / max(high - low, 1e-9))
    return scaled.clamp(0, 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def grid(pixels: Pixels, columns: int, *, scale: int = 1, gap: int = 2, background: int = 0) -> Image:
    """The pictures in rows of ``columns``, each enlarged ``scale`` times, ``gap`` pixels apart."""
    from PIL import Image

    count, height, width, channels = pixels.shape
    tall, wide = height * scale + gap, width * scale + gap
    rows = -(-count // columns)
    mode = "L" if channels == 1 else "RGB"
    sheet = Image.new(mode, (columns * wide - gap, rows * tall - gap), color=(background,) * channels)
    for index, picture in enumerate(pixels):
        tile = Image.fromarray(picture[:, :, 0] if channels == 1 else picture)
        if scale > 1:
            tile = tile.resize((width * scale, height * scale), Image.Resampling.BICUBIC)
        sheet.paste(tile, (index % columns * wide, index // columns * tall))
    return sheet
