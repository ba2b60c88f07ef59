"""k-diffusion's samplers as plain loops over x = x_0 + sigma eps; they share nothing with ``pygen.diffusion.solvers``.

Each takes the sigmas of its steps, the sample at the first of them, ``denoise(x, sigma)``, which predicts x_0, and
``noise()``, which draws z, and returns the last sample. Whoever calls keeps what ``denoise`` was shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction

import torch
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]
Floats = Sequence[float]


def _to_d(x: Tensor, sigma: float, denoised: Tensor) -> Tensor:
    return (x - denoised) / sigma


def _ancestral_step(sigma_from: float, sigma_to: float, eta: float) -> tuple[float, float]:
    """In 28 digits, since the squares cancel."""
    of, to = Decimal(sigma_from), Decimal(sigma_to)
    sigma_up = min(to, Decimal(eta) * (to**2 * (of**2 - to**2) / of**2).sqrt())
    return float((to**2 - sigma_up**2).sqrt()), float(sigma_up)


def _churn(
    sigmas: Floats, i: int, x: Tensor, noise: Noise, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> tuple[Tensor, float]:
    gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1) if s_tmin <= sigmas[i] <= s_tmax else 0.0
    sigma_hat = sigmas[i] * (gamma + 1)
    if gamma > 0:
        x = x + noise() * s_noise * math.sqrt(sigma_hat**2 - sigmas[i] ** 2)
    return x, sigma_hat


def euler(sigmas: Floats, x: Tensor, denoise: Denoise, noise: Noise, **churn: float) -> Tensor:
    for i in range(len(sigmas) - 1):
        x, sigma_hat = _churn(sigmas, i, x, noise, **churn)
        d = _to_d(x, sigma_hat, denoise(x, sigma_hat))
        x = x + d * (sigmas[i + 1] - sigma_hat)
    return x


def euler_ancestral(sigmas: Floats, x: Tensor, denoise: Denoise, noise: Noise, eta: float, s_noise: float) -> Tensor:
    for i in range(len(sigmas) - 1):
        sigma_down, sigma_up = _ancestral_step(sigmas[i], sigmas[i + 1], eta)
        d = _to_d(x, sigmas[i], denoise(x, sigmas[i]))
        x = x + d * (sigma_down - sigmas[i])
        if sigma_up > 0:
            x = x + noise() * s_noise * sigma_up
    return x


def heun(sigmas: Floats, x: Tensor, denoise: Denoise, noise: Noise, **churn: float) -> Tensor:
    for i in range(len(sigmas) - 1):
        x, sigma_hat = _churn(sigmas, i, x, noise, **churn)
        d = _to_d(x, sigma_hat, denoise(x, sigma_hat))
        dt = sigmas[i + 1] - sigma_hat
        if sigmas[i + 1] == 0:
            x = x + d * dt
        else:
            x_2 = x + d * dt
            d_2 = _to_d(x_2, sigmas[i + 1], denoise(x_2, sigmas[i + 1]))
            x = x + (d + d_2) / 2 * dt
    return x


def dpm_2(sigmas: Floats, x: Tensor, denoise: Denoise, noise: Noise, **churn: float) -> Tensor:
    for i in range(len(sigmas) - 1):
        x, sigma_hat = _churn(sigmas, i, x, noise, **churn)
        d = _to_d(x, sigma_hat, denoise(x, sigma_hat))
        if sigmas[i + 1] == 0:
            x = x + d * (sigmas[i + 1] - sigma_hat)
        else:
            sigma_mid = math.exp((math.log(sigma_hat) + math.log(sigmas[i + 1])) / 2)
            x_2 = x + d * (sigma_mid - sigma_hat)
            d_2 = _to_d(x_2, sigma_mid, denoise(x_2, sigma_mid))
            x = x + d_2 * (sigmas[i + 1] - sigma_hat)
    return x


def dpm_2_ancestral(sigmas: Floats, x: Tensor, denoise: Denoise, noise: Noise, eta: float, s_noise: float) -> Tensor:
    for i in range(len(sigmas) - 1):
        sigma_down, sigma_up = _ancestral_step(sigmas[i], sigmas[i + 1], eta)
        d = _to_d(x, sigmas[i], denoise(x, sigmas[i]))
        if sigma_down == 0:
            x = x + d * (sigma_down - sigmas[i])
        else:
            sigma_mid = math.exp((math.log(sigmas[i]) + math.log(sigma_down)) / 2)
            x_2 = x + d * (sigma_mid - sigmas[i])
            d_2 = _to_d(x_2, sigma_mid, denoise(x_2, sigma_mid))
            x = x + d_2 * (sigma_down - sigmas[i])
        if sigma_up > 0:
            x = x + noise() * s_noise * sigma_up
    return x


def _linear_multistep_coeff(order: int, t: Floats, i: int, j: int) -> float:
    """The integral of the j-th Lagrange polynomial over a step: of rational numbers, so exact."""
    nodes = [Fraction(t[i - k]) for k in range(order)]
    polynomial = [Fraction(1)]  # from the constant up
    for k in range(order):
        if k != j:
            scale = nodes[j] - nodes[k]
            shifted = [Fraction(0), *polynomial]
            polynomial = [a / scale for a in shifted]
            for power, a in enumerate(shifted[1:]):
                polynomial[power] -= nodes[k] * a / scale
    start, end = Fraction(t[i]), Fraction(t[i + 1])
    return float(sum(a * (end ** (n + 1) - start ** (n + 1)) / (n + 1) for n, a in enumerate(polynomial)))


def lms(sigmas: Floats, x: Tensor, denoise: Denoise, noise: Noise, order: int) -> Tensor:
    ds: list[Tensor] = []
    for i in range(len(sigmas) - 1):
        ds.append(_to_d(x, sigmas[i], denoise(x, sigmas[i])))
        ds = ds[-order:]
        current = min(i + 1, order)
        coefficients = [_linear_multistep_coeff(current, sigmas, i, j) for j in range(current)]
        x = x + sum(c * d for c, d in zip(coefficients, reversed(ds), strict=True))
    return x


def dpmpp_2s_ancestral(sigmas: Floats, x: Tensor, denoise: Denoise, noise: Noise, eta: float, s_noise: float) -> Tensor:
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        sigma_down, sigma_up = _ancestral_step(sigmas[i], sigmas[i + 1], eta)
        if sigma_down == 0:
            x = x + _to_d(x, sigmas[i], denoised) * (sigma_down - sigmas[i])
        else:
            t, t_next = -math.log(sigmas[i]), -math.log(sigma_down)
            h = t_next - t
            s = t + h / 2
            x_2 = (math.exp(-s) / math.exp(-t)) * x - math.expm1(-h / 2) * denoised
            denoised_2 = denoise(x_2, math.exp(-s))
            x = (math.exp(-t_next) / math.exp(-t)) * x - math.expm1(-h) * denoised_2
        if sigmas[i + 1] > 0:
            x = x + noise() * s_noise * sigma_up
    return x


def dpmpp_sde(
    sigmas: Floats, x: Tensor, denoise: Denoise, noise: Noise, eta: float, s_noise: float, r: float
) -> Tensor:
    """The noise of both stages is the increment of one Brownian motion in sigma, over the deviation of that."""
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        if sigmas[i + 1] == 0:
            x = x + _to_d(x, sigmas[i], denoised) * (sigmas[i + 1] - sigmas[i])
            continue
        t, t_next = -math.log(sigmas[i]), -math.log(sigmas[i + 1])
        h = t_next - t
        s = t + h * r
        fac = 1 / (2 * r)
        sigma_s = math.exp(-s)

        sd, su = _ancestral_step(sigmas[i], sigma_s, eta)
        s_ = -math.log(sd)
        x_2 = (sd / sigmas[i]) * x - math.expm1(t - s_) * denoised
        brownian = noise() * math.sqrt(sigmas[i] - sigma_s)
        x_2 = x_2 + brownian / math.sqrt(sigmas[i] - sigma_s) * s_noise * su
        denoised_2 = denoise(x_2, sigma_s)

        sd, su = _ancestral_step(sigmas[i], sigmas[i + 1], eta)
        t_next_ = -math.log(sd)
        denoised_d = (1 - fac) * denoised + fac * denoised_2
        x = (sd / sigmas[i]) * x - math.expm1(t - t_next_) * denoised_d
        brownian = brownian + noise() * math.sqrt(max(sigma_s - sigmas[i + 1], 0.0))
        x = x + brownian / math.sqrt(sigmas[i] - sigmas[i + 1]) * s_noise * su
    return x


def dpmpp_2m_sde(
    sigmas: Floats, x: Tensor, denoise: Denoise, noise: Noise, eta: float, s_noise: float, solver_type: str
) -> Tensor:
    old_denoised, h_last = None, None
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        if sigmas[i + 1] == 0:
            x = denoised
            continue
        h = math.log(sigmas[i]) - math.log(sigmas[i + 1])
        eta_h = eta * h
        x = sigmas[i + 1] / sigmas[i] * math.exp(-eta_h) * x - math.expm1(-h - eta_h) * denoised
        if old_denoised is not None:
            r = h_last / h
            if solver_type == "heun":
                x = x + (-math.expm1(-h - eta_h) / (-h - eta_h) + 1) * (1 / r) * (denoised - old_denoised)
            else:
                x = x + 0.5 * -math.expm1(-h - eta_h) * (1 / r) * (denoised - old_denoised)
        if eta:
            x = x + noise() * sigmas[i + 1] * math.sqrt(-math.expm1(-2 * eta_h)) * s_noise
        old_denoised, h_last = denoised, h
    return x


def dpmpp_3m_sde(sigmas: Floats, x: Tensor, denoise: Denoise, noise: Noise, eta: float, s_noise: float) -> Tensor:
    denoised_1, denoised_2 = None, None
    h_1, h_2 = math.nan, math.nan
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        if sigmas[i + 1] == 0:
            x = denoised
            continue
        h = math.log(sigmas[i]) - math.log(sigmas[i + 1])
        h_eta = h * (eta + 1)
        x = math.exp(-h_eta) * x - math.expm1(-h_eta) * denoised
        phi_2 = math.expm1(-h_eta) / h_eta + 1
        if denoised_2 is not None:
            r0, r1 = h_1 / h, h_2 / h
            d1_0 = (denoised - denoised_1) / r0
            d1_1 = (denoised_1 - denoised_2) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            phi_3 = phi_2 / h_eta - 0.5
            x = x + phi_2 * d1 - phi_3 * d2
        elif denoised_1 is not None:
            x = x + phi_2 * (denoised - denoised_1) / (h_1 / h)
        if eta:
            x = x + noise() * sigmas[i + 1] * math.sqrt(-math.expm1(-2 * h * eta)) * s_noise
        denoised_1, denoised_2 = denoised, denoised_1
        h_1, h_2 = h, h_1
    return x


class _DPMSolver:
    """Lu et al. 2022 (DPM-Solver): DPM-Solver-1, -2 and -3 in t = -log sigma."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise

    def eps(self, x: Tensor, t: float) -> Tensor:
        return (x - self.denoise(x, math.exp(-t))) / math.exp(-t)

    def step_1(self, x: Tensor, t: float, t_next: float, eps: Tensor) -> Tensor:
        return x - math.exp(-t_next) * math.expm1(t_next - t) * eps

    def step_2(self, x: Tensor, t: float, t_next: float, eps: Tensor, r1: float = 1 / 2) -> tuple[Tensor, Tensor]:
        h = t_next - t
        s1 = t + r1 * h
        u1 = x - math.exp(-s1) * math.expm1(r1 * h) * eps
        eps_r1 = self.eps(u1, s1)
        sigma = math.exp(-t_next)
        return x - sigma * math.expm1(h) * eps - sigma / (2 * r1) * math.expm1(h) * (eps_r1 - eps), eps_r1

    def step_3(self, x: Tensor, t: float, t_next: float, eps: Tensor, eps_r1: Tensor | None = None) -> Tensor:
        r1, r2 = 1 / 3, 2 / 3
        h = t_next - t
        s1, s2 = t + r1 * h, t + r2 * h
        if eps_r1 is None:
            eps_r1 = self.eps(x - math.exp(-s1) * math.expm1(r1 * h) * eps, s1)
        slope = math.exp(-s2) * (r2 / r1) * (math.expm1(r2 * h) / (r2 * h) - 1)
        u2 = x - math.exp(-s2) * math.expm1(r2 * h) * eps - slope * (eps_r1 - eps)
        eps_r2 = self.eps(u2, s2)
        sigma = math.exp(-t_next)
        return x - sigma * math.expm1(h) * eps - sigma / r2 * (math.expm1(h) / h - 1) * (eps_r2 - eps)


def dpm_fast(sigmas: Floats, x: Tensor, denoise: Denoise, noise: Noise, eta: float, s_noise: float) -> Tensor:
    """Of the sigmas only the ends and the number matter; a last step to 0 is Euler's."""
    to_zero = sigmas[-1] == 0
    nfe = len(sigmas) - 1 - to_zero
    t_start, t_end = -math.log(sigmas[0]), -math.log(sigmas[nfe])
    m = nfe // 3 + 1
    orders = [3] * (m - 2) + [2, 1] if nfe % 3 == 0 else [3] * (m - 1) + [nfe % 3]
    ts = [*(t_start + (t_end - t_start) * k / m for k in range(m)), t_end]
    solver = _DPMSolver(denoise)
    for i, order in enumerate(orders):
        t, t_next = ts[i], ts[i + 1]
        sd, su = _ancestral_step(math.exp(-t), math.exp(-t_next), eta)
        t_next_ = min(t_end, -math.log(sd)) if eta else t_next
        su = math.sqrt(max(math.exp(-t_next) ** 2 - math.exp(-t_next_) ** 2, 0.0))
        eps = solver.eps(x, t)
        if order == 1:
            x = solver.step_1(x, t, t_next_, eps)
        elif order == 2:
            x = solver.step_2(x, t, t_next_, eps)[0]
        else:
            x = solver.step_3(x, t, t_next_, eps)
        if eta:
            x = x + su * s_noise * noise()
    if to_zero:
        x = denoise(x, sigmas[nfe])
    return x


def dpm_adaptive(
    sigma_max: float,
    sigma_min: float,
    x: Tensor,
    denoise: Denoise,
    noise: Noise,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Ends with Euler's step from sigma_min to 0."""
    solver = _DPMSolver(denoise)
    s, t_end, h = -math.log(sigma_max), -math.log(sigma_min), h_init
    of_control = 1.5 if eta else order
    b1, b2, b3 = (pcoeff + icoeff + dcoeff) / of_control, -(pcoeff + 2 * dcoeff) / of_control, dcoeff / of_control
    errs: list[float] = []
    x_prev = x
    while s < t_end - 1e-5:
        t = min(t_end, s + h)
        sd, su = _ancestral_step(math.exp(-s), math.exp(-t), eta)
        t_ = min(t_end, -math.log(sd))
        eps = solver.eps(x, s)
        if order == 2:
            x_low = solver.step_1(x, s, t_, eps)
            x_high, _ = solver.step_2(x, s, t_, eps)
        else:
            x_low, eps_r1 = solver.step_2(x, s, t_, eps, r1=1 / 3)
            x_high = solver.step_3(x, s, t_, eps, eps_r1)
        delta = torch.clamp(rtol * torch.maximum(x_low.abs(), x_prev.abs()), min=atol)
        error = float(torch.linalg.norm((x_low - x_high) / delta)) / math.sqrt(x.numel())
        inv_error = 1 / (error + 1e-8)
        errs = errs or [inv_error] * 3
        errs[0] = inv_error
        factor = 1 + math.atan(errs[0] ** b1 * errs[1] ** b2 * errs[2] ** b3 - 1)
        if factor >= accept_safety:
            errs[2], errs[1] = errs[1], errs[0]
            x_prev = x_low
            x = x_high + (su * s_noise * noise() if eta else 0)
            s = t
        h *= factor
    return denoise(x, math.exp(-s))
