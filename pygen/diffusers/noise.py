"""The noise of a step: drawn by torch from the caller's generator as diffusers would, or by Philox inside the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from pygen.ops.spec import index_tensor


class PhiloxGenerator(torch.Generator):
    """Choose Philox for the noise of pygen's schedulers: ``pipe(..., generator=PhiloxGenerator().manual_seed(7))``.

    The steps then draw their noise inside the fused kernel, from the seed, the step and the sample's number, so that a
    sample does not depend on the batch, the device or the number of threads. A list of them, one per sample, gives
    each sample the noise it has alone. For everything else (a pipeline's initial latents) this is a
    ``torch.Generator`` like any other.
    """

    def key(self, device: torch.device) -> Tensor:
        """The seed as kernels read it, int64 (1,) on the device; made once."""
        seed = self.initial_seed()
        keys: dict[tuple[int, torch.device], Tensor] = self.__dict__.setdefault("_keys", {})
        if (seed, device) not in keys:
            keys[seed, device] = index_tensor(seed, device)
        return keys[seed, device]


Generators = torch.Generator | list[torch.Generator] | None


def draw_noise(
    shape: Sequence[int],
    generator: Generators,
    device: torch.device,
    dtype: torch.dtype,
    drawn_on: torch.device | None = None,
) -> dict[str, Tensor]:
    """The arguments of ``affine_step`` that say where a step's noise comes from.

    ``drawn_on``: where torch draws it, if not on the device of the sample.
    """
    if isinstance(generator, PhiloxGenerator):
        return {"seed": generator.key(device)}
    philox = [one for one in generator if isinstance(one, PhiloxGenerator)] if isinstance(generator, list) else []
    if philox and philox == generator:
        seeds = torch.cat([one.key(device) for one in philox])
        return {"seed": seeds, "sample_ids": torch.zeros_like(seeds)}
    noise = randn_tensor(tuple(shape), generator=generator, device=drawn_on or device, dtype=dtype)
    return {"noise": noise.to(device)}
