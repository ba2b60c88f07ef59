"""Guidance that looks at the model's outputs: factors on the columns base, guidance and negative of a step's row.

They follow from the outputs' Gram matrices by arithmetic on a few numbers per sample, made where the outputs lie:
``affine_step(..., scale=...)`` then guides as it would without, in its one pass. ``gram`` is ``sample_gram`` of the
conditional output c, the unconditional u and, where there is one, the negative n; ``table`` and ``rows`` say the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pygen.ops.affine_step import COLUMNS, affine_step, make_table
from pygen.ops.sample_gram import sample_gram

BASE, GUIDANCE, NEGATIVE = (COLUMNS[name] for name in ("base", "guidance", "negative"))

# From a step's table and row, c, u and n, to the u and the scale that it takes.
Guide = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def _columns(table: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row = table[rows.reshape(-1)]
    return row[:, BASE], row[:, GUIDANCE], row[:, NEGATIVE]


def _scale(gram: Tensor, table: Tensor, factors: dict[int, Tensor]) -> Tensor:
    scale = torch.ones(gram.shape[0], table.shape[1], dtype=torch.float32, device=gram.device)
    for column, factor in factors.items():
        scale[:, column] = factor
    return scale


def rescale(gram: Tensor, table: Tensor, rows: Tensor, phi: float) -> Tensor:
    """Towards the deviation of the conditional output (Lin et al. 2023, "Common Diffusion Noise Schedules and Sample
    Steps are Flawed", equations 15 and 16): out' = (phi std(c) / std(out) + 1 - phi) out.
    """
    base, guidance, negative = _columns(table, rows)
    n = gram.shape[-1] - 1
    weights = torch.stack([guidance, base - guidance - negative, negative][:n], dim=1)
    sums = gram[:, :n, n]
    covariance = gram[:, :n, :n] - sums[:, :, None] * sums[:, None, :] / gram[:, n, n, None, None]
    variance = (weights[:, :, None] * covariance * weights[:, None, :]).sum((1, 2))
    factor = phi * (covariance[:, 0, 0] / variance).sqrt() + (1 - phi)
    return _scale(gram, table, {BASE: factor, GUIDANCE: factor, NEGATIVE: factor})


def project(gram: Tensor, table: Tensor, rows: Tensor, eta: float = 0.0, norm_threshold: float | None = None) -> Tensor:
    """Adaptive projected guidance (Sadat, Hilliges & Weber 2024, "Eliminating Oversaturation and Artifacts of High
    Guidance Scales in Diffusion Models", algorithm 1), of the model's outputs as they are.

    With d = c - u, shortened to ``norm_threshold`` where it is longer, and its parts along and across c,
    out' = c + (guidance - 1) (d_across + eta d_along). Rows have base 1 and a guidance other than 0.
    """
    _, guidance, _ = _columns(table, rows)
    cc, cu, uu = gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]
    shortened = torch.ones_like(cc)
    if norm_threshold is not None:
        shortened = (norm_threshold / (cc - 2 * cu + uu).clamp_min(0).sqrt()).clamp_max(1)
    along = shortened * (cc - cu) / cc
    of_c = 1 - (guidance - 1) * (1 - eta) * along
    return _scale(gram, table, {BASE: of_c, GUIDANCE: (of_c + (guidance - 1) * shortened) / guidance})


def perpendicular(gram: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """The negative prompt's part across the positive's (Armandpour et al. 2023, "Re-imagine the Negative Prompt
    Algorithm", equation 8): out' = u + guidance (c - u) + negative (n - u)_across. Rows have a guidance other than 0.
    """
    _, guidance, negative = _columns(table, rows)
    cc, uu, cu, cn, un = gram[:, 0, 0], gram[:, 1, 1], gram[:, 0, 1], gram[:, 0, 2], gram[:, 1, 2]
    along = (cn - un - cu + uu) / (cc - 2 * cu + uu)
    return _scale(gram, table, {GUIDANCE: 1 - negative / guidance * along})


@dataclass(frozen=True)
class Rescale:
    """Guidance rescale by ``phi``, see ``rescale``; for ``pygen.sample`` and ``Stepper``, as the others."""

    phi: float = 0.7

    def begin(self, like: Tensor) -> Guide:
        def guide(
            table: Tensor, rows: Tensor, cond: Tensor, uncond: Tensor, negative: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            outputs = [cond, uncond] if negative is None else [cond, uncond, negative]
            return uncond, rescale(sample_gram(outputs), table, rows, self.phi)

        return guide


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance, see ``project``; ``momentum`` (beta, negative in the paper) of the difference."""

    eta: float = 0.0
    norm_threshold: float | None = None
    momentum: float = 0.0

    def begin(self, like: Tensor) -> Guide:
        # d' = c - u + momentum d stands for the difference if u' = c - d' = u - momentum d stands for u.
        rows = {"out0": 1.0, "h0_0": -self.momentum, "x1": 1.0, "out1": -1.0, "h0_1": self.momentum}
        averaging, row = make_table([rows], 1).to(like.device), torch.zeros((), dtype=torch.int64, device=like.device)
        difference = torch.zeros_like(like)

        def guide(
            table: Tensor, rows: Tensor, cond: Tensor, uncond: Tensor, negative: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            if negative is not None:
                raise ValueError("APG takes no negative output")
            if self.momentum != 0:
                uncond = affine_step(cond, uncond, averaging, row, history=[difference], second=difference)
            return uncond, project(sample_gram([cond, uncond]), table, rows, self.eta, self.norm_threshold)

        return guide


@dataclass(frozen=True)
class PerpNeg:
    """Perpendicular negative guidance, see ``perpendicular``; the plan's ``negative`` is minus its weight."""

    def begin(self, like: Tensor) -> Guide:
        def guide(
            table: Tensor, rows: Tensor, cond: Tensor, uncond: Tensor, negative: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            if negative is None:
                raise ValueError("PerpNeg needs negative, the output for the negative prompt")
            return uncond, perpendicular(sample_gram([cond, uncond, negative]), table, rows)

        return guide


Guider = Rescale | APG | PerpNeg
