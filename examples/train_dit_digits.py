"""Train the latent digits model that ships with pygen: a small KL autoencoder of scikit-learn's 8 x 8 scans, and a
class-conditional DiT that learns the flow x_t = (1 - t) x_0 + t eps of its latents.

    python examples/train_dit_digits.py --out /tmp/digits_dit

Both are written as diffusers writes them, and load there as AutoencoderKL and DiTTransformer2DModel. The same seed,
machine and thread count give the same files.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from train_digits import LABEL_DROPOUT, learning_rate_factor, load_scans

from pygen.models.autoencoder_kl import AutoencoderKL
from pygen.models.dit import DiT
from pygen.models.latent_digits import LATENT_DIGITS, model_inputs
from pygen.models.pretrained import from_config, save_pretrained

Model = TypeVar("Model", bound=nn.Module)
LATENTS = (4, 4, 4)  # channels, height, width
AUTOENCODER = {
    "_class_name": "AutoencoderKL", "in_channels": 1, "out_channels": 1, "latent_channels": LATENTS[0],
    "block_out_channels": [32, 64], "norm_num_groups": 8, "sample_size": 8,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
DENOISER = {
    "_class_name": "DiTTransformer2DModel", "num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 6,
    "in_channels": LATENTS[0], "out_channels": LATENTS[0], "sample_size": LATENTS[1], "patch_size": 1,
    "num_embeds_ada_norm": 10,
}  # fmt: skip
KL_WEIGHT = 1e-4
EMA_DECAY = 0.999


def batches(images: Tensor, labels: Tensor, size: int, steps: int, what: str) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in tqdm(range(steps), desc=what, unit="step"):
        index = torch.randint(len(images), (size,))
        yield images[index], labels[index]


def fit(
    model: Model, loss_of: Callable[[Tensor, Tensor], Tensor], given: Iterator[tuple[Tensor, Tensor]], steps: int,
    rate: float,
) -> Model:  # fmt: skip
    """The average of the model on its way, whose decay warms up so that the random start is soon forgotten."""
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    for step, batch in enumerate(given):
        optimizer.zero_grad()
        loss_of(*batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1.0 - decay)
    return average.eval()


def train_autoencoder(images: Tensor, labels: Tensor, steps: int, batch_size: int) -> AutoencoderKL:
    """With a scaling factor that gives latents a variance of 1 (Rombach et al. 2022)."""
    model: AutoencoderKL = from_config(AUTOENCODER)

    def loss_of(x: Tensor, _: Tensor) -> Tensor:
        mean, log_variance = model.encode(x)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()
        return F.mse_loss(model.decode(z), x) + KL_WEIGHT * divergence

    average = fit(model, loss_of, batches(images, labels, batch_size, steps, "autoencoder"), steps, 1e-3)
    with torch.no_grad():
        average.scaling_factor = 1.0 / average.encode(images)[0].std().item()
    return average


def train_denoiser(latents: Tensor, labels: Tensor, steps: int, batch_size: int) -> DiT:
    """By flow matching: the velocity eps - x_0, at times that are logit-normal (Esser et al. 2024)."""
    model: DiT = from_config(DENOISER)
    for block in model.transformer_blocks:  # adaLN-zero: each begins as the identity
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)

    def loss_of(x: Tensor, given: Tensor) -> Tensor:
        noise, t = torch.randn_like(x), torch.randn(len(x)).sigmoid()
        dropped = torch.rand(len(x)) < LABEL_DROPOUT
        noisy = torch.lerp(x, noise, t[:, None, None, None])
        return F.mse_loss(model(*model_inputs(noisy, t), given.masked_fill(dropped, model.num_classes)), noise - x)

    return fit(model, loss_of, batches(latents, labels, batch_size, steps, "denoiser"), steps, 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=LATENT_DIGITS, help="directory of both (default: %(default)s)")
    parser.add_argument("--autoencoder-steps", type=int, default=1000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="of the denoiser (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="scans per step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, batches and noise (default: %(default)s)")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    images, labels = load_scans()
    autoencoder = train_autoencoder(images, labels, options.autoencoder_steps, options.batch_size)
    with torch.no_grad():
        mean = autoencoder.encode(images)[0]
        error = F.mse_loss(autoencoder.decode(mean), images).item()
        latents = autoencoder.scaled(mean)
    denoiser = train_denoiser(latents, labels, options.steps, options.batch_size)
    scale = {"scaling_factor": autoencoder.scaling_factor}
    save_pretrained(options.out / "vae", autoencoder, AUTOENCODER | scale, torch.float16)
    save_pretrained(options.out / "transformer", denoiser, DENOISER, torch.float16)
    print(f"the autoencoder's mean squared error {error:.5f}; wrote {options.out}")


if __name__ == "__main__":
    main()
