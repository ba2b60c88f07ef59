"""The samplers as their papers print them: one plain loop each, in the paper's names, over tensors of any dtype.

They share nothing with ``pygen.diffusion.solvers``: no coefficients, no merged rows. Each takes the schedule as numbers
at the times of the trajectory, noisy to clean, the sample at the first of them, and ``predict(i, x)``, which returns
the predictions (x_0, clipped where asked; epsilon, as the model has it) at the i-th time. Each returns the samples at
all times.
"""

from __future__ import annotations

import itertools
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


def _phis(h: float) -> tuple[float, float, float]:
    """e^h - 1, (e^h - 1) / h - 1, ((e^h - 1) / h - 1) / h - 1/2; in 60 digits, since it cancels."""
    with localcontext() as context:
        context.prec = 60
        exact_h = Decimal(h)
        phi_1 = exact_h.exp() - 1
        phi_2 = phi_1 / exact_h - 1
        return float(phi_1), float(phi_2), float(phi_2 / exact_h - Decimal("0.5"))


def _dpm_step(
    x: Tensor, D: Sequence[Tensor], z: Tensor, level: Floats, h: float, algorithm_type: str, solver_type: str
) -> Tensor:
    """A step of Lu et al.'s code from (alpha_s, sigma_s) to (alpha_t, sigma_t), given D0, D1 and D2 as far as known."""
    alpha_s, sigma_s, alpha_t, sigma_t = level
    if sigma_t == 0:  # e^-h = 0, and no noise is added to the result
        ratio, weight, z_weight = 0.0, alpha_t, 0.0
        if not algorithm_type.endswith("++"):
            ratio, weight = alpha_t / alpha_s, -sigma_s * alpha_t / alpha_s
        return ratio * x + weight * D[0]
    twice = 2 if algorithm_type.startswith("sde") else 1
    if algorithm_type.endswith("++"):
        z_weight = sigma_t * math.sqrt(-math.expm1(-2 * h)) if twice == 2 else 0.0
        ratio = sigma_t / sigma_s * (math.exp(-h) if twice == 2 else 1.0)
        phi_1, phi_2, phi_3 = _phis(-twice * h) if math.isfinite(h) else (-1.0, math.nan, math.nan)
        weights = [-alpha_t * phi_1, -alpha_t * phi_2, -alpha_t * phi_3]
    else:
        z_weight = sigma_t * math.sqrt(math.expm1(2 * h)) if twice == 2 else 0.0
        ratio = alpha_t / alpha_s
        weights = [-twice * sigma_t * phi for phi in _phis(h)]
    if solver_type == "midpoint" and len(D) == 2:
        weights[1] = weights[0] / 2
    x = ratio * x + sum(weight * d for weight, d in zip(weights, D, strict=False))
    return x + z_weight * z if z_weight else x


def dpm_multistep(
    alpha: Floats,
    sigma: Floats,
    x: Tensor,
    model: Callable[[int, Tensor], Tensor],
    z: Sequence[Tensor],
    orders: Sequence[int],
    algorithm_type: str,
    solver_type: str,
) -> list[Tensor]:
    """Lu et al. 2022 (DPM-Solver++), the multistep updates of their code; ``model`` is of x_0 (++) or epsilon."""
    lam = _lambda(alpha, sigma)
    trajectory, m = [x], []
    for i, order in enumerate(orders):
        m.append(model(i, x))
        h = lam[i + 1] - lam[i]
        D = [m[i]]
        if order > 1:
            r0 = (lam[i] - lam[i - 1]) / h
            D1_0 = (m[i] - m[i - 1]) / r0
            D.append(D1_0)
        if order == 3:
            r1 = (lam[i - 1] - lam[i - 2]) / h
            D1_1 = (m[i - 1] - m[i - 2]) / r1
            D = [m[i], D1_0 + r0 / (r0 + r1) * (D1_0 - D1_1), (D1_0 - D1_1) / (r0 + r1)]
        x = _dpm_step(x, D, z[i], (alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]), h, algorithm_type, solver_type)
        trajectory.append(x)
    return trajectory


def dpm_singlestep(
    alpha: Floats,
    sigma: Floats,
    x: Tensor,
    model: Callable[[int, Tensor], Tensor],
    z: Sequence[Tensor],
    orders: Sequence[int],
    algorithm_type: str,
    solver_type: str,
) -> list[Tensor]:
    """The same, singlestep: at order k the update begins k - 1 times before, at the sample that order 1 has seen."""
    lam = _lambda(alpha, sigma)
    trajectory, m = [x], []
    start = x
    for i, order in enumerate(orders):
        m.append(model(i, x))
        s = i - order + 1
        if order == 1:
            start = x
        h = lam[i + 1] - lam[s]
        D = [m[s]]
        if order == 2:
            D.append((m[i] - m[s]) / ((lam[i] - lam[s]) / h))
        elif order == 3:
            r0, r1 = (lam[i] - lam[s]) / h, (lam[i - 1] - lam[s]) / h
            D1_0, D1_1 = (m[i - 1] - m[s]) / r1, (m[i] - m[s]) / r0
            D = [m[s], (r0 * D1_0 - r1 * D1_1) / (r0 - r1), 2 * (D1_1 - D1_0) / (r0 - r1)]
            if solver_type == "midpoint":
                D = [m[s], D1_1, 0 * D1_1]
        level = (alpha[s], sigma[s], alpha[i + 1], sigma[i + 1])
        x = _dpm_step(start, D, z[i], level, h, algorithm_type, solver_type)
        trajectory.append(x)
    return trajectory


def _lagrange(nodes: Floats, j: int, at: float) -> float:
    return math.prod((at - other) / (nodes[j] - other) for k, other in enumerate(nodes) if k != j)


def _integral(f: Callable[[float], float], start: float, end: float) -> float:
    """Gauss-Legendre by 64 points, which for these integrands leaves nothing but rounding."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    middle, half = (start + end) / 2, (end - start) / 2
    return half * math.fsum(w * f(middle + half * node) for node, w in zip(nodes, weights, strict=True))


def deis(
    alpha: Floats, sigma: Floats, x: Tensor, epsilon: Callable[[int, Tensor], Tensor], orders: Sequence[int]
) -> list[Tensor]:
    """Zhang & Chen 2023, equation 15 in x / alpha: the integral over rho of polynomials in log rho."""
    rho = [s / a for a, s in zip(alpha, sigma, strict=True)]
    trajectory, eps = [x], []
    for i, order in enumerate(orders):
        eps.append(epsilon(i, x))
        y = x / alpha[i]
        if order == 1:
            y = y + (rho[i + 1] - rho[i]) * eps[i]
        else:
            nodes = [math.log(rho[i - j]) for j in range(order)]
            for j in range(order):
                # d rho = rho d log rho
                f = lambda u, j=j: math.exp(u) * _lagrange(nodes, j, u)  # noqa: B023, E731
                y = y + _integral(f, math.log(rho[i]), math.log(rho[i + 1])) * eps[i - j]
        x = alpha[i + 1] * y
        trajectory.append(x)
    return trajectory


def _phi(x: Tensor, e: Tensor, start: Floats, end: Floats) -> Tensor:
    """Liu et al. 2022, equation 11, the transfer part, in alpha and sigma."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = start, end
    return alpha_t / alpha_s * x - (alpha_t * sigma_s - alpha_s * sigma_t) / alpha_s * e


Level = Callable[[float], tuple[float, float]]
Epsilon = Callable[[Tensor, float], Tensor]


def _linear_multistep(ets: Sequence[Tensor], order: int = 4) -> Tensor:
    """Liu et al. 2022, equation 12, and the lower orders; the newest comes last."""
    e = list(ets)[-order:][::-1]
    if len(e) == 1:
        return e[0]
    if len(e) == 2:
        return (3 * e[0] - e[1]) / 2
    if len(e) == 3:
        return (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
    return (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24


def pndm(times: Floats, level: Level, x: Tensor, epsilon: Epsilon) -> Tensor:
    """Liu et al. 2022, algorithm 2 (F-PNDM); ``level(t)`` is (alpha, sigma), ``epsilon(x, t)`` the model."""
    ets: list[Tensor] = []
    for i in range(len(times) - 1):
        t, t_next = times[i], times[i + 1]
        ets.append(epsilon(x, t))
        if i < 3:
            middle = (t + t_next) / 2
            e_1 = ets[-1]
            e_2 = epsilon(_phi(x, e_1, level(t), level(middle)), middle)
            e_3 = epsilon(_phi(x, e_2, level(t), level(middle)), middle)
            e_4 = epsilon(_phi(x, e_3, level(t), level(t_next)), t_next)
            e = (e_1 + 2 * e_2 + 2 * e_3 + e_4) / 6
        else:
            e = _linear_multistep(ets)
        x = _phi(x, e, level(t), level(t_next))
    return x


def plms(times: Floats, level: Level, x: Tensor, epsilon: Epsilon) -> Tensor:
    """The sampler of latent diffusion (Rombach et al. 2022): pseudo improved Euler, then linear multistep."""
    ets: list[Tensor] = []
    for i in range(len(times) - 1):
        t, t_next = times[i], times[i + 1]
        ets.append(epsilon(x, t))
        if i == 0:
            e = (ets[0] + epsilon(_phi(x, ets[0], level(t), level(t_next)), t_next)) / 2
        else:
            e = _linear_multistep(ets)
        x = _phi(x, e, level(t), level(t_next))
    return x


def ipndm(times: Floats, level: Level, x: Tensor, epsilon: Epsilon, order: int) -> Tensor:
    """The same without a beginning of its own (Zhang & Chen 2023)."""
    ets: list[Tensor] = []
    for t, t_next in itertools.pairwise(times):
        ets.append(epsilon(x, t))
        x = _phi(x, _linear_multistep(ets, order), level(t), level(t_next))
    return x


def sa_solver(
    alpha: Floats,
    sigma: Floats,
    x_T: Tensor,
    predict: Predict,
    z: Sequence[Tensor],
    tau: Callable[[float], float],
    orders: Sequence[tuple[int, int]],
    few_steps: bool,
) -> list[Tensor]:
    """Xue et al. 2023, algorithm 1 in data prediction; ``orders``: of the predictor and the corrector of each step."""
    lam = _lambda(alpha, sigma)
    trajectory, m, x = [x_T], [predict(0, x_T)[0]], x_T
    for i, (p, q) in enumerate(orders):
        h = lam[i + 1] - lam[i]
        t = tau(sigma[i] / alpha[i])

        def adams(nodes: Sequence[int], x: Tensor, i: int = i, t: float = t, h: float = h) -> Tensor:
            if sigma[i + 1] == 0:
                return alpha[i + 1] * m[nodes[0]]
            b = []
            for j in range(len(nodes)):
                places = [lam[n] for n in nodes]
                f = lambda u, j=j: math.exp(-(1 + t**2) * (lam[i + 1] - u)) * _lagrange(places, j, u)  # noqa: B023, E731
                b.append((1 + t**2) * alpha[i + 1] * _integral(f, lam[i], lam[i + 1]))
            if len(nodes) == 2 and few_steps:
                H = (1 + t**2) * h
                change = (1 + t**2) * alpha[i + 1] * (h**2 / 2 - (H - 1 + math.exp(-H)) / (1 + t**2) ** 2)
                b[0] += change / (lam[nodes[0]] - lam[nodes[1]])
                b[1] -= change / (lam[nodes[0]] - lam[nodes[1]])
            x = math.exp(-(t**2) * h) * sigma[i + 1] / sigma[i] * x
            x = x + sum(b_j * m[n] for b_j, n in zip(b, nodes, strict=True))
            return x + sigma[i + 1] * math.sqrt(-math.expm1(-2 * t**2 * h)) * z[i]

        predicted = adams(range(i, i - p, -1), x)
        trajectory.append(predicted)
        if i + 1 < len(orders):
            m.append(predict(i + 1, predicted)[0])
            x = adams(range(i + 1, i + 1 - q, -1), x) if q else predicted
    return trajectory


def consistency(
    sigma: Floats, x: Tensor, f: Callable[[int, Tensor], Tensor], z: Sequence[Tensor], eps: float
) -> list[Tensor]:
    """Song et al. 2023, algorithm 1: x is x_0 + sigma noise."""
    trajectory = [x]
    for i in range(len(sigma) - 1):
        x = f(i, x)
        if sigma[i + 1] > 0:
            x = x + math.sqrt(max(sigma[i + 1] ** 2 - eps**2, 0)) * z[i]
        trajectory.append(x)
    return trajectory


def lcm(
    times: Floats, alpha: Floats, sigma: Floats, x: Tensor, predict: Predict, z: Sequence[Tensor], scaling: float,
    sigma_data: float,
) -> list[Tensor]:  # fmt: skip
    """Luo et al. 2023, algorithm 3, with the skip connection of their code."""
    trajectory = [x]
    for i in range(len(alpha) - 1):
        t = times[i] * scaling
        c_skip, c_out = sigma_data**2 / (t**2 + sigma_data**2), t / (t**2 + sigma_data**2) ** 0.5
        denoised = c_skip * x + c_out * predict(i, x)[0]
        x = alpha[i + 1] * denoised
        if sigma[i + 1] > 0:
            x = x + sigma[i + 1] * z[i]
        trajectory.append(x)
    return trajectory


def tcd(
    times: Floats, level: Level, x: Tensor, predict: Predict, z: Sequence[Tensor], gamma: float, clean: float
) -> list[Tensor]:
    """Zheng et al. 2024, algorithm 4 (strategic stochastic sampling); epsilon is what x and x_0 leave."""
    trajectory = [x]
    for i in range(len(times) - 1):
        (alpha_t, sigma_t), (alpha_n, sigma_n) = level(times[i]), level(times[i + 1])
        x_0 = predict(i, x)[0]
        epsilon = (x - alpha_t * x_0) / sigma_t
        if sigma_n > 0:
            alpha_s, sigma_s = level(clean + (1 - gamma) * (times[i + 1] - clean))
            x = alpha_n / alpha_s * (alpha_s * x_0 + sigma_s * epsilon)
            x = x + math.sqrt(max(sigma_n**2 - (alpha_n / alpha_s * sigma_s) ** 2, 0.0)) * z[i]
        else:
            x = alpha_n * x_0
        trajectory.append(x)
    return trajectory


def flow_heun(t: Floats, x: Tensor, velocity: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Heun's method for dx = v dt on the straight path; a step to t = 0 is Euler's."""
    for i in range(len(t) - 1):
        v = velocity(x, t[i])
        if t[i + 1] > 0:
            v = (v + velocity(x + (t[i + 1] - t[i]) * v, t[i + 1])) / 2
        x = x + (t[i + 1] - t[i]) * v
    return x
