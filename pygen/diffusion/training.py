"""Training: what a model sees and what it is to predict, as rows; the noise between them is drawn twice, never stored.

    noising = Noising.from_schedule("cosine", prediction="v_prediction", weighting=min_snr(5.0), device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    for x0 in batches:
        t = torch.randint(len(noising), (len(x0),), device=device)
        x_t = noising.add_noise(x0, t, seed=seed)
        noising.loss(model(x_t, noising.timesteps[t]), x0, t, seed=seed).mean().backward()
        optimizer.step()
        seed += 1

Nothing here waits for the device. Where several devices train together, each has seeds or sample_ids of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pygen.diffusion.rows import PREDICTIONS
from pygen.diffusion.schedules import Schedule, make_schedule
from pygen.ops import diffusion_loss as op
from pygen.ops.affine_step import COLUMNS, HISTORY_COLUMN, affine_step

# From alpha and sigma, the weight of x_0's squared error.
Weighting = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Noising:
    """x_t = alpha_t x_0 + sigma_t eps and what a model learns of it, one row for each time.

    timesteps: what the model is told at each row: int64 where the schedule counts training steps, else float32.
    table: rows of ``affine_step`` that add noise.
    gradients: as many that take a gradient back to x_0, then as many to the noise.
    targets: rows of ``diffusion_loss``.
    """

    timesteps: Tensor
    table: Tensor
    gradients: Tensor
    targets: Tensor

    @classmethod
    def from_schedule(
        cls,
        schedule: Schedule | str | dict[str, Any],
        times: ArrayLike | None = None,
        *,
        prediction: str = "epsilon",
        weighting: Weighting | None = None,
        huber_c: float | ArrayLike = np.inf,
        variational_weight: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> Noising:
        """A row for each of a schedule's training steps, or of ``times`` where given; made on the host, once.

        Args:
            schedule: a ``Schedule``, its name, or its name and arguments in a dict.
            times: what rows stand for; must be given where the schedule does not count training steps.
            prediction: what the model returns: "epsilon", "sample" (x_0), "v_prediction" or "flow" (eps - x_0).
            weighting: ``min_snr()``, ``edm()``, or any function from alpha and sigma to the weight of x_0's squared
                error, whatever the prediction. Left out, the prediction's own squared error has weight 1.
            huber_c: where the pseudo-Huber loss turns from squared to absolute (Charbonnier et al. 1997), one number
                or one per row (scheduled: Khrapov et al. 2024); infinite for the squared error.
            variational_weight: of the variational bound L_vlb in bits per dimension, from which a learned variance
                learns (0.001 in Nichol & Dhariwal 2021, equation 16; at t = 0 it takes x_0 for 8-bit values scaled to
                [-1, 1]). Needs the schedule's own training steps, each as likely as the other, and ``variance``.
            device: where the tables will lie.

        Raises:
            ValueError: naming the argument that is wrong.
        """
        schedule = make_schedule(schedule)
        if times is None:
            if schedule.num_train_timesteps is None:
                raise ValueError(f"times must be given: schedule {schedule.name!r} does not count training steps")
            times = np.arange(schedule.num_train_timesteps)
        at = np.asarray(times, dtype=np.float64)
        if at.ndim != 1 or not ((at >= schedule.t_clean) & (at <= schedule.t_max)).all():
            raise ValueError(
                f"times must be a sequence of numbers between {schedule.t_clean:g} and {schedule.t_max:g}, the ends of "
                f"schedule {schedule.name!r}"
            )
        if not (np.asarray(huber_c) > 0).all():
            raise ValueError(f"huber_c must be positive, got {huber_c!r}")
        made = cls.at(
            torch.from_numpy(np.asarray(schedule.alpha(at))),
            torch.from_numpy(np.asarray(schedule.sigma(at))),
            prediction=prediction,
            weighting=weighting,
            huber_c=huber_c,
        )
        if variational_weight:
            if not np.array_equal(at, np.arange(schedule.num_train_timesteps or 0)):
                raise ValueError("variational_weight needs the schedule's own training steps: leave times out")
            _bound(made, variational_weight)
        if not bool(made.targets[:, [op.COLUMNS["weight"], op.COLUMNS["mean"]]].isfinite().all()):
            raise ValueError(
                f"the loss of prediction {prediction!r} is not finite at all times of schedule {schedule.name!r}"
            )
        whole = schedule.num_train_timesteps is not None and (at == np.round(at)).all()
        timesteps = torch.from_numpy(at).to(device, torch.int64 if whole else torch.float32)
        return cls(timesteps, *(table.to(device) for table in (made.table, made.gradients, made.targets)))

    @classmethod
    def at(
        cls,
        alpha: Tensor,
        sigma: Tensor,
        timesteps: Tensor | None = None,
        *,
        prediction: str = "epsilon",
        weighting: Weighting | None = None,
        huber_c: float | ArrayLike = np.inf,
    ) -> Noising:
        """Rows for noise levels that lie on the device, as drawn for one batch: with ``torch.arange(batch)`` as rows.

        Args:
            alpha, sigma: (rows,), floating-point. Of t: 1 - t and t on the straight path of rectified flow; 1 and
                the noise level in Karras et al. 2022.
            timesteps: what the model is told; sigma where left out.
            prediction, weighting, huber_c: as for ``from_schedule``.
        """
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
        if alpha.dim() != 1 or alpha.shape != sigma.shape:
            raise ValueError(
                f"alpha and sigma must have one shape (rows,), got {tuple(alpha.shape)} and {tuple(sigma.shape)}"
            )
        timesteps = sigma if timesteps is None else timesteps
        alpha, sigma = alpha.double(), sigma.double()
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        x0, noise = {
            "epsilon": (zero, one),
            "sample": (one, zero),
            "v_prediction": (-sigma, alpha),
            "flow": (-one, one),
        }[prediction]
        # x_t = alpha x_0 + sigma eps and the prediction = x0 x_0 + noise eps, solved for x_0.
        weight = one if weighting is None else weighting(alpha, sigma) * (sigma / (alpha * noise - sigma * x0)) ** 2

        def rows(*named: dict[str, Tensor | float]) -> Tensor:
            """What a row leaves at 0 it does not read."""
            table = alpha.new_zeros(len(named), len(alpha), HISTORY_COLUMN)
            for part, columns in zip(table, named, strict=True):
                for name, values in columns.items():
                    part[:, COLUMNS[name]] = values
            return table.flatten(0, 1)

        huber = torch.as_tensor(huber_c, dtype=torch.float64) * one
        columns = {"x0": x0, "noise": noise, "weight": weight, "huber_c": huber}
        return cls(
            timesteps=timesteps,
            table=rows({"x0": alpha, "noise0": sigma}),
            gradients=rows({"x0": alpha}, {"x0": sigma}),
            targets=torch.stack([columns.get(name, zero) for name in op.COLUMNS], dim=1),
        )

    def __len__(self) -> int:
        return len(self.table)

    def add_noise(
        self,
        x0: Tensor,
        rows: Tensor,
        *,
        noise: Tensor | None = None,
        seed: Tensor | None = None,
        sample_ids: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x_t, differentiable with respect to x0 and the noise given: one row of ``affine_step``.

        Args:
            x0: (batch, ...), float32, bfloat16 or float16.
            rows: int64, one index, or shape (batch,), or (batch, tokens) for noise levels that differ per token.
            noise: eps; broadcasts to x0. Or
            seed: int64, one or (batch,): eps is ``philox_normal(x0.shape, seed=seed, sample_ids=sample_ids,
                draw=DRAW_AFFINE_STEP)``, not stored. A number that no other batch has: the training step's.
            sample_ids: int64 (batch,); 0, 1, 2, ... where left out.
            out: receives x_t, outside of autograd; new where left out.

        Raises:
            ValueError, TypeError, IndexError: naming the argument.
        """
        if out is not None:
            return affine_step(x0, None, self.table, rows, noise=noise, seed=seed, sample_ids=sample_ids, out=out)
        x_t: Tensor = _AddNoise.apply(x0, noise, self.table, self.gradients, rows, seed, sample_ids)
        return x_t

    def loss(
        self,
        model_output: Tensor,
        x0: Tensor,
        rows: Tensor,
        *,
        noise: Tensor | None = None,
        variance: Tensor | None = None,
        mask: Tensor | None = None,
        seed: Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> Tensor:
        """The weighted loss of each sample, (batch,), with the noise of ``add_noise``; see ``pygen.diffusion_loss``."""
        return op.diffusion_loss(
            model_output, x0, self.targets, rows,
            noise=noise, variance=variance, mask=mask, seed=seed, sample_ids=sample_ids,
        )  # fmt: skip


def _bound(noising: Noising, weight: float) -> None:
    """Fills in the columns of the variational bound, where rows are all steps of a variance-preserving schedule."""
    named = {name: noising.targets[:, column] for name, column in op.COLUMNS.items()}
    alpha, sigma = noising.table[:, COLUMNS["x0"]], noising.table[:, COLUMNS["noise0"]]
    before = torch.cat([torch.ones_like(alpha[:1]), alpha[:-1]])
    beta = 1 - (alpha / before) ** 2
    posterior = beta * (1 - before**2) / sigma**2
    posterior[0] = posterior[1]  # it is 0, whose logarithm is clipped
    # The posterior's mean (Ho et al. 2020, equation 7) with the model's x_0 instead of the true one.
    x0_error = sigma / (alpha * named["noise"] - sigma * named["x0"])
    named["mean"][:] = before * beta / sigma**2 * x0_error / posterior.sqrt()
    named["spread"][:] = torch.log(beta / posterior)
    named["bin"][0] = 1 / 255 / posterior[0].sqrt()
    named["bound"][:] = weight * len(noising) / math.log(2)  # a sum over all steps, in bits


class _AddNoise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x0: Tensor,
        noise: Tensor | None,
        table: Tensor,
        gradients: Tensor,
        rows: Tensor,
        seed: Tensor | None,
        sample_ids: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(gradients, rows, noise)
        return affine_step(x0, None, table, rows, noise=noise, seed=seed, sample_ids=sample_ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, rows, noise = ctx.saved_tensors
        to_x0 = to_noise = None
        if ctx.needs_input_grad[0]:
            to_x0 = affine_step(grad, None, gradients, rows)
        if ctx.needs_input_grad[1]:
            to_noise = torch.empty_like(grad, dtype=noise.dtype)
            affine_step(grad, None, gradients, rows + len(gradients) // 2, out=to_noise)
            to_noise = to_noise.sum_to_size(noise.shape)
        return to_x0, to_noise, None, None, None, None, None


def min_snr(gamma: float = 5.0) -> Weighting:
    """min(SNR, gamma) (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy")."""
    return lambda alpha, sigma: torch.clamp((alpha / sigma) ** 2, max=gamma)


def edm(sigma_data: float = 0.5) -> Weighting:
    """(s^2 + sigma_data^2) / (s sigma_data)^2 at s = sigma / alpha (Karras et al. 2022, table 1)."""
    return lambda alpha, sigma: 1 / sigma_data**2 + (alpha / sigma) ** 2
