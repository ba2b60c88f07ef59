"""Generative fractional diffusion: noise with memory, as rows of affine_step.

Nobis et al. 2024, "Generative fractional diffusion models". Fractional Brownian motion of Hurst index H (type II,
rough below 1/2, with a memory above, Brownian motion at 1/2) is approximated by B = sum_k omega_k Y_k, a sum of
Ornstein-Uhlenbeck processes dY_k = -gamma_k Y_k dt + dW that one Brownian motion W drives (Daems et al. 2024,
"Variational inference for SDEs driven by fractional noise", proposition 5, for the omega_k). The data are noised by
dX = g dB with g growing as e^(rate t), which explodes the variance.

X and the Y_k together are Markov and Gaussian given X_0, so they are the state. What of X is not known from the Y_k is
what the model sees: x = X - E[X - X_0 | Y] = X_0 + sigma eps, an ordinary schedule, and the training is the ordinary
one. The state is kept as (x, U_1, ..., U_K), the U_k being the Y_k made independent and of unit variance: at the start
all of it is white noise. With a = (U, (x - m) / sigma) white as well, the forward process is a_t = F a_s + noise, and
the way back, where the prediction m of X_0 is held, is F^T a_t + (I - F^T F)^(1/2) z, or for the probability flow the
rotation nearest to F^T. So each member of the state is one row of affine_step over the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pygen.diffusion.rows import PREDICTIONS, conversion
from pygen.diffusion.schedules import Array, Schedule
from pygen.ops.affine_step import affine_step, make_table
from pygen.ops.philox_normal import philox_normal
from pygen.ops.spec import index_tensor

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def _quadrature(start: float, end: float) -> tuple[Array, Array]:
    """Gauss-Legendre from start to end: exact to rounding for the exponentials here."""
    return (start + end) / 2 + (end - start) / 2 * _NODES, (end - start) / 2 * _WEIGHTS


def approximation_weights(hurst: float, gamma: Array) -> Array:
    """The omega that make the mean square of sum_k omega_k Y_k - B_H least, on average over t from 0 to 1."""
    both = gamma[:, None] + gamma
    gram = 1 / both + np.expm1(-both) / both**2  # the integral of (1 - u) e^(-both u)
    # u^(H - 1/2) may be infinite at 0: a double exponential rule.
    s = np.linspace(-4.5, 4.5, 1001)
    u = 1 / (1 + np.exp(-np.pi * np.sinh(s)))
    du = (s[1] - s[0]) * np.pi * np.cosh(s) * u * (1 - u)
    target = (du * (1 - u) * u ** (hurst - 0.5) * np.exp(-gamma[:, None] * u)).sum(axis=1) / math.gamma(hurst + 0.5)
    return np.linalg.lstsq(gram, target, rcond=1e-15)[0]


@dataclass(frozen=True)
class FractionalProcess:
    """The forward process on t from 0 to 1.

    hurst: in (0, 1). processes: K, how many Ornstein-Uhlenbeck processes; their gamma are spaced geometrically from
    1 / gamma_max to gamma_max. sigma_max: the noise that the model sees at t = 1. rate: of the growth of g.
    """

    hurst: float = 0.5
    processes: int = 3
    sigma_max: float = 50.0
    rate: float = 6.0
    gamma_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.hurst < 1:
            raise ValueError(f"hurst must lie in (0, 1), got {self.hurst!r}")
        if not 1 <= self.processes <= 5:
            raise ValueError(f"processes must be 1 to 5, got {self.processes!r}")

    @cached_property
    def gamma(self) -> Array:
        k = np.arange(self.processes) - (self.processes - 1) / 2
        return self.gamma_max ** (2 * k / max(self.processes - 1, 1))

    @cached_property
    def omega(self) -> Array:
        return approximation_weights(self.hurst, self.gamma)

    @cached_property
    def _g(self) -> float:
        """g(0), for the noise of sigma_max."""
        return self.sigma_max / float(self._factor(1.0, *_quadrature(0.0, 1.0), g=1.0)[1][-1, -1])

    def kernels(self, t: float, u: Array, g: float | None = None) -> Array:
        """What dW at the times u < t adds to Y_1, ..., Y_K and X - X_0 at t: (times, K + 1)."""
        g = self._g if g is None else g
        decay = np.exp(-self.gamma * (t - u[:, None]))
        # The integral of g(s) e^(-gamma (s - u)) over s from u to t.
        net = self.rate - self.gamma
        lasting = np.expm1(net * (t - u[:, None])) / np.where(net == 0, 1, net)
        lasting = np.where(net == 0, t - u[:, None], lasting) * np.exp(self.rate * u[:, None])
        of_x = np.exp(self.rate * u) * self.omega.sum() - lasting @ (self.omega * self.gamma)
        return np.concatenate([decay, g * of_x[:, None]], axis=1)

    def _factor(self, t: float, u: Array, w: Array, g: float | None = None) -> tuple[Array, Array]:
        """Q and R of the kernels: orthonormal combinations of them, and what they are combined of."""
        q, r = np.linalg.qr(np.sqrt(w)[:, None] * self.kernels(t, u, g))
        sign = np.sign(np.diag(r))
        return q * sign, sign[:, None] * r

    def covariance(self, t: float) -> Array:
        """Of (Y_1, ..., Y_K, X - X_0) at t."""
        r = self._factor(t, *_quadrature(0.0, t))[1]
        return r.T @ r

    def sigma(self, t: float) -> float:
        """The deviation of X given X_0 and the Y_k: what the model sees as noise."""
        return float(self._factor(t, *_quadrature(0.0, t))[1][-1, -1]) if t > 0 else 0.0

    def schedule(self) -> Schedule:
        """That of x, for the model's training, and for solvers that do without the memory."""
        sigma = np.vectorize(self.sigma, otypes=[np.float64])
        ones: Callable[[Array], Array] = lambda t: np.ones_like(t, dtype=np.float64)  # noqa: E731
        return Schedule("fractional", ones, sigma, t_max=1.0, t_min=1e-3, t_clean=0.0)

    def forward(self, s: float, t: float) -> Array:
        """F of a_t = F a_s + noise for s < t, a being the state as white noise: U_1, ..., U_K, (x - X_0) / sigma."""
        early, late = _quadrature(0.0, s), _quadrature(s, t)
        q_t, _ = self._factor(t, np.concatenate([early[0], late[0]]), np.concatenate([early[1], late[1]]))
        return q_t[: len(early[0])].T @ self._factor(s, *early)[0]

    def backward(self, t: float, s: float, stochastic: bool) -> tuple[Array, Array]:
        """B and N of a_s = B a_t + N z."""
        f = self.forward(s, t)
        left, singular, right = np.linalg.svd(f.T)
        if stochastic:
            return f.T, left * np.sqrt(np.maximum(1 - singular**2, 0.0))
        return left @ right, np.zeros_like(f)


def fractional_table(process: FractionalProcess, times: Sequence[float], prediction: str, stochastic: bool) -> Tensor:
    """The rows: for each step, one for each member of the state (x, U_1, ..., U_K), which reads x, the prediction and
    as history U_1, ..., U_K and K + 1 tensors of noise."""
    count = process.processes
    rows = []
    for t, s in itertools.pairwise(times):
        sigma, next_sigma = process.sigma(t), process.sigma(s)
        b, n = np.zeros((2, count + 1, count + 1)) if s == 0 else process.backward(t, s, stochastic)
        (pred_x, pred_out), _ = conversion(prediction, 1.0, sigma)
        for member in (count, *range(count)):
            scale = next_sigma if member == count else 1.0
            of_x = scale * b[member, count] / sigma
            row = {"pred_x": pred_x, "pred_out": pred_out, "x0": of_x, "pred0": float(member == count) - of_x}
            row |= {f"h{k}_0": scale * b[member, k] for k in range(count)}
            row |= {f"h{count + k}_0": scale * n[member, k] for k in range(count + 1)}
            rows.append(row)
    return make_table(rows, 2 * count + 1)


@torch.no_grad()
def sample_fractional(
    model: Callable[..., Any],
    shape: Sequence[int],
    process: FractionalProcess,
    *,
    steps: int = 50,
    prediction: str = "epsilon",
    stochastic: bool = True,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw samples, (batch, ...), from a model of x = X_0 + sigma eps called as ``model(x, t)``.

    stochastic: the reverse process, or the probability flow. The other arguments are those of ``pygen.sample``.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    times = process.schedule().times(steps)
    table = fractional_table(process, times.tolist(), prediction, stochastic).to(device)
    batch, count = shape[0], process.processes
    key = index_tensor(seed, torch.device(device))
    size = (batch, count + 1, *shape[1:])
    state, following, noise = (torch.empty(size, dtype=dtype, device=device) for _ in range(3))
    philox_normal(seed=key, sample_ids=sample_ids, out=state)
    state[:, 0] *= process.sigma(1.0)
    members = torch.arange(count + 1, device=device).expand(batch, -1)
    timesteps = torch.tensor(times, dtype=torch.float32, device=device)
    for i in range(steps):
        x = state[:, 0].contiguous()
        output = model(x, timesteps[i].expand(batch))
        output = output if isinstance(output, Tensor) else output.sample
        philox_normal(seed=key, sample_ids=sample_ids, step=i + 1, out=noise)
        history = [*(state[:, k, None] for k in range(1, count + 1)), *(noise[:, k, None] for k in range(count + 1))]
        affine_step(
            x[:, None].expand(size), output[:, None].expand(size), table, members + i * (count + 1),
            history=[term.expand(size) for term in history], out=following,
        )  # fmt: skip
        state, following = following, state
    return state[:, 0].clone()
