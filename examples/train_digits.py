"""Train the digits model that ships with pygen: a small U-Net on scikit-learn's 1,797 scans of handwritten digits.

    python examples/train_digits.py --out /tmp/digits

The same seed, machine and thread count give the same file. With --reference, plain PyTorch does all, for comparing: the
losses are the same within noise.
"""

from __future__ import annotations

import argparse
import copy
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

import pygen
from pygen.diffusion.schedules import Schedule, make_schedule
from pygen.models.checkpoint import save_model
from pygen.models.unet import UNet

TIMES = 1000
SCHEDULE = {"name": "cosine", "num_train_timesteps": TIMES}
LABEL_DROPOUT = 0.1
LEARNING_RATE = 1e-3
WARMUP_STEPS = 200
EMA_DECAY = 0.999


def load_scans() -> tuple[Tensor, Tensor]:
    """The scans, (1797, 1, 8, 8) in [-1, 1], and their classes, (1797,)."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8.0 - 1.0
    return images, torch.from_numpy(digits.target).long()


class NoisePredictionLoss:
    """The mean squared error of the predicted noise (Ho et al. 2020, equation 14)."""

    def __init__(self, schedule: Schedule) -> None:
        t = np.arange(TIMES, dtype=np.float64)
        self.alpha = torch.from_numpy(schedule.alpha(t)).float()
        self.sigma = torch.from_numpy(schedule.sigma(t)).float()

    def __call__(self, model: UNet, images: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        alpha, sigma = self.alpha[t][:, None, None, None], self.sigma[t][:, None, None, None]
        return F.mse_loss(model(alpha * images + sigma * noise, t, labels), noise)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 + 0.5 * math.cos(math.pi * (step - WARMUP_STEPS) / max(steps - WARMUP_STEPS, 1))


@torch.no_grad()
def update_average(average: UNet, model: UNet, step: int) -> None:
    """Move the average towards the model; the decay warms up so that the random start is soon forgotten."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1.0 - decay)


def train(steps: int, batch_size: int, seed: int) -> tuple[UNet, list[float], float]:
    """The averaged model, the loss of every step, and the averaged model's over every scan at times and noise drawn
    once."""
    torch.manual_seed(seed)
    images, labels = load_scans()
    loss_of = NoisePredictionLoss(make_schedule(SCHEDULE))
    model = UNet().to(memory_format=torch.channels_last)  # the faster one to learn in, of convolutions on CPUs
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))

    losses: list[float] = []
    progress = tqdm(range(steps), desc="train", unit="step")
    for step in progress:
        index = torch.randint(len(images), (batch_size,))
        t = torch.randint(TIMES, (batch_size,))
        dropped = torch.rand(batch_size) < LABEL_DROPOUT
        given = labels[index].masked_fill(dropped, model.num_classes)
        loss = loss_of(model, images[index], given, t, torch.randn(batch_size, *model.sample_shape))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        update_average(average, model, step)
        losses.append(loss.item())
        if step % 20 == 0:
            progress.set_postfix(loss=f"{losses[-1]:.4f}")

    average.eval()
    t = torch.linspace(0, TIMES - 1, len(images)).round().long()
    with torch.no_grad():
        final = loss_of(average, images, labels, t[torch.randperm(len(t))], torch.randn_like(images))
    return average, losses, final.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = Path(pygen.models.__file__).parent / "digits"
    parser.add_argument("--out", type=Path, default=shipped, help="directory of the checkpoint (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="scans per step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, batches and noise (default: %(default)s)")
    parser.add_argument("--reference", action="store_true", help="train by plain PyTorch in the place of pygen's ops")
    options = parser.parse_args()

    with pygen.backend("reference") if options.reference else nullcontext():
        model, _, loss = train(options.steps, options.batch_size, options.seed)
    save_model(
        options.out,
        model,
        schedule=SCHEDULE,
        prediction="epsilon",
        clip=[-1.0, 1.0],
        shape=list(model.sample_shape),
        num_classes=model.num_classes,
    )
    print(f"final EMA loss {loss:.4f}; wrote {options.out}")


if __name__ == "__main__":
    main()
