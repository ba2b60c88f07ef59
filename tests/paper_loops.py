"""The samplers as their papers print them: one plain loop each, in the paper's names, over tensors of any dtype.

They share nothing with ``pygen.diffusion.solvers``: no coefficients, no merged rows. Each takes the schedule as numbers
at the times of the trajectory, noisy to clean, the sample at the first of them, and ``predict(i, x)``, which returns
the predictions (x_0, clipped where asked; epsilon, as the model has it) at the i-th time. Each returns the samples at
all times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext

import numpy as np
from torch import Tensor

Predict = Callable[[int, Tensor], tuple[Tensor, Tensor]]
Floats = Sequence[float]
Decimals = Sequence[Decimal]  # of 28 digits, so that 1 - alpha_bar is worth 16 of them


def ddpm(alpha_bar: Decimals, x_t: Tensor, predict: Predict, z: Sequence[Tensor], variance: str) -> list[Tensor]:
    """Ho et al. 2020, algorithm 2, with the mean and the variances of equations 6 and 7 and section 3.2."""
    trajectory = [x_t]
    for i in range(len(alpha_bar) - 1):
        alpha_bar_t, alpha_bar_before = alpha_bar[i], alpha_bar[i + 1]
        alpha_t = alpha_bar_t / alpha_bar_before
        beta_t = 1 - alpha_t
        x_0, _ = predict(i, x_t)
        of_x_0 = alpha_bar_before.sqrt() * beta_t / (1 - alpha_bar_t)
        of_x_t = alpha_t.sqrt() * (1 - alpha_bar_before) / (1 - alpha_bar_t)
        beta_tilde = (1 - alpha_bar_before) / (1 - alpha_bar_t) * beta_t
        sigma_t = {"fixed_small": beta_tilde, "fixed_large": beta_t}[variance].sqrt()
        x_t = float(of_x_0) * x_0 + float(of_x_t) * x_t
        if alpha_bar_before != 1:  # "z = 0 if t = 1"
            x_t = x_t + float(sigma_t) * z[i]
        trajectory.append(x_t)
    return trajectory


def ddim(
    alpha: Decimals, x_t: Tensor, predict: Predict, z: Sequence[Tensor], eta: float, clipped_epsilon: bool
) -> list[Tensor]:
    """Song et al. 2021, equations 12 and 16; their alpha is the alpha_bar of others."""
    trajectory = [x_t]
    for i in range(len(alpha) - 1):
        alpha_t, alpha_before = alpha[i], alpha[i + 1]
        predicted_x_0, epsilon = predict(i, x_t)
        if clipped_epsilon:
            epsilon = (x_t - float(alpha_t.sqrt()) * predicted_x_0) / float((1 - alpha_t).sqrt())
        sigma_t = Decimal(eta) * ((1 - alpha_before) / (1 - alpha_t)).sqrt() * (1 - alpha_t / alpha_before).sqrt()
        # The difference is 0 at alpha_t = 0 and eta = 1, give or take the last of 28 digits.
        direction_pointing_to_x_t = float(abs(1 - alpha_before - sigma_t**2).sqrt()) * epsilon
        x_t = float(alpha_before.sqrt()) * predicted_x_0 + direction_pointing_to_x_t
        if sigma_t > 0:
            x_t = x_t + float(sigma_t) * z[i]
        trajectory.append(x_t)
    return trajectory


def euler(t: Floats, x: Tensor, denoiser: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """Karras et al. 2022, algorithm 1 with sigma(t) = t, s(t) = 1 and without lines 6 to 8: x = x_0 + t noise."""
    trajectory = [x]
    for i in range(len(t) - 1):
        d = (x - denoiser(i, x)) / t[i]
        x = x + (t[i + 1] - t[i]) * d
        trajectory.append(x)
    return trajectory


def rectified_flow(t: Floats, z_t: Tensor, velocity: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """Liu et al. 2022, the forward Euler of dZ = v dt; t is the share of the noise and v = noise - data."""
    trajectory = [z_t]
    for i in range(len(t) - 1):
        z_t = z_t + (t[i + 1] - t[i]) * velocity(i, z_t)
        trajectory.append(z_t)
    return trajectory


def _lambda(alpha: Floats, sigma: Floats) -> list[float]:
    return [
        math.inf if s == 0 else -math.inf if a == 0 else math.log(a) - math.log(s)
        for a, s in zip(alpha, sigma, strict=True)
    ]


def dpmpp_2m(alpha: Floats, sigma: Floats, x_T: Tensor, predict: Predict, lower_order_final: bool) -> list[Tensor]:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2. A last step to sigma = 0 is of first order: there r = 0."""
    M = len(alpha) - 1
    lam = _lambda(alpha, sigma)
    h = [math.nan] + [lam[i] - lam[i - 1] for i in range(1, M + 1)]
    x = x_T
    Q = [predict(0, x)[0]]  # the buffer of x_theta(x_{t_i}, t_i)
    x = sigma[1] / sigma[0] * x - alpha[1] * math.expm1(-h[1]) * Q[0]
    trajectory = [x_T, x]
    for i in range(2, M + 1):
        Q.append(predict(i - 1, x)[0])
        D = Q[i - 1]
        if not (math.isinf(h[i]) or (lower_order_final and i == M)):
            r = h[i - 1] / h[i]
            D = (1 + 1 / (2 * r)) * Q[i - 1] - 1 / (2 * r) * Q[i - 2]
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * math.expm1(-h[i]) * D
        trajectory.append(x)
    return trajectory


def _psi(n: int, h: float) -> float:
    """Zhao et al. 2023, appendix: psi_0 = e^-h, psi_{k+1} = (1 / k! - psi_k) / h; in 60 digits, since it cancels."""
    with localcontext() as context:
        context.prec = 60
        exact_h = Decimal(h)
        psi = (-exact_h).exp()
        for k in range(n):
            psi = (1 / Decimal(math.factorial(k)) - psi) / exact_h
        return float(psi)


def _unified(
    i: int, lam: Floats, alpha: Floats, sigma: Floats, x: Tensor, m: Sequence[Tensor], p: int, B: str, corrects: bool
) -> Tensor:
    """Zhao et al. 2023, UniP-p or UniC-p for data prediction: from x at t_{i-1} to t_i, with m = x_theta at t_0, ..."""
    h = lam[i] - lam[i - 1]
    x_i = sigma[i] / sigma[i - 1] * x + alpha[i] * -math.expm1(-h) * m[i - 1]
    others = [i - 1 - k for k in range(1, p)] + ([i] if corrects else [])
    if not others:
        return x_i
    r = [(lam[j] - lam[i - 1]) / h for j in others]
    D = [m[j] - m[i - 1] for j in others]
    B_h = {"bh1": h, "bh2": -math.expm1(-h)}[B]
    if len(r) == 1:  # "a_1 = 1/2 for UniP-2 and UniC-1, independent of B(h)"
        a = [0.5]
    else:
        R = [[(r_m * h) ** (n - 1) for r_m in r] for n in range(1, len(r) + 1)]
        g = [h**n * math.factorial(n) * _psi(n + 1, h) for n in range(1, len(r) + 1)]
        a = (np.linalg.solve(R, g) / B_h).tolist()
    return x_i + alpha[i] * B_h * sum(a_m / r_m * D_m for a_m, r_m, D_m in zip(a, r, D, strict=True))


def unipc(
    alpha: Floats,
    sigma: Floats,
    x_T: Tensor,
    predict: Predict,
    p: int,
    B: str,
    corrector: bool,
    lower_order_final: bool,
) -> list[Tensor]:
    """Zhao et al. 2023, algorithm 1 (multistep, warming up); the samples are those that the model sees.

    Where lambda is infinite there is no node and no corrector: steps from or to there are of first order.
    """
    M = len(alpha) - 1
    lam = _lambda(alpha, sigma)
    first = 1 if math.isinf(lam[0]) else 0  # the first node
    x_c = x_T
    Q = [predict(0, x_T)[0]]
    trajectory = [x_T]
    for i in range(1, M + 1):
        p_i = min(p, i - first, M + 1 - i if lower_order_final else p)
        if math.isinf(lam[i] - lam[i - 1]):
            p_i = 1
        x_i = _unified(i, lam, alpha, sigma, x_c, Q, p_i, B, corrects=False)
        trajectory.append(x_i)
        if i < M:
            Q.append(predict(i, x_i)[0])
            corrected = corrector and i > first
            x_c = _unified(i, lam, alpha, sigma, x_c, Q, p_i, B, corrects=True) if corrected else x_i
    return trajectory
