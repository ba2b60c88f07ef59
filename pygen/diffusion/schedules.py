"""Noise schedules: x_t = alpha_t x_0 + sigma_t eps, with eps ~ N(0, 1), all in float64 on the host.

A schedule is two functions of time and the three times a sampler needs: ``t_max`` (where sampling starts),
``t_min`` (the cleanest time the model was trained at) and ``t_clean`` (where alpha = 1 and sigma = 0). Discrete
schedules count time in training steps, 0 to T - 1, and are clean at -1; between two training steps alpha_t^2 is
interpolated linearly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
SPACINGS = ("leading", "linspace", "trailing")


@dataclass(frozen=True)
class Schedule:
    """The forward process x_t = alpha(t) x_0 + sigma(t) eps. ``alpha`` and ``sigma`` map arrays to arrays."""

    name: str
    alpha: Callable[[Array], Array]
    sigma: Callable[[Array], Array]
    t_max: float
    t_min: float
    t_clean: float
    num_train_timesteps: int | None = None

    def times(self, steps: int, spacing: str = "trailing") -> Array:
        """``steps + 1`` decreasing times, the last one clean (Lin et al. 2023, table 2, for the names of the spacings).

        leading: multiples of T / steps, from t_min up; linspace: t_max to t_min, both ends visited;
        trailing: equal strides from t_max to the clean end. Discrete schedules visit whole training steps.
        """
        if not isinstance(steps, Integral) or steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
        if self.num_train_timesteps is not None and steps > self.num_train_timesteps:
            raise ValueError(f"steps={steps} exceeds the schedule's {self.num_train_timesteps} training steps")
        count = np.arange(steps, dtype=np.float64)
        if spacing == "leading":
            stride = (self.t_max - self.t_clean) / steps
            if self.num_train_timesteps is not None:
                stride = float(self.num_train_timesteps // steps)
            visited = self.t_min + count[::-1] * stride
        elif spacing == "linspace":  # upwards: halves between two training steps then round as in diffusers
            visited = np.linspace(self.t_min, self.t_max, steps)[::-1] if steps > 1 else np.array([self.t_max])
        elif spacing == "trailing":
            visited = self.t_max - count * ((self.t_max - self.t_clean) / steps)
            if self.num_train_timesteps is not None:  # counted from the clean end, for the same reason
                stride = self.num_train_timesteps / steps
                visited = np.round(np.arange(self.num_train_timesteps, 0, -stride)[:steps]) + self.t_clean
        else:
            raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
        if self.num_train_timesteps is not None:
            visited = np.round(visited)
        return np.append(visited, self.t_clean)

    def time_of(self, rho: float) -> float:
        """The time at which sigma / alpha is ``rho``, by bisection: beyond t_max too, where the schedule goes on."""

        def reached(t: float) -> bool:
            at = np.array(t)
            return bool(self.sigma(at) >= rho * self.alpha(at)) and bool(self.alpha(at) >= 0)

        low, high = self.t_clean, self.t_max
        if not reached(high):
            high = 2 * self.t_max - self.t_clean
            if not reached(high):
                raise ValueError(f"schedule {self.name!r} has no time at which sigma / alpha is {rho:g}")
        while low < (middle := (low + high) / 2) < high:
            low, high = (low, middle) if reached(middle) else (middle, high)
        return high


def _discrete(name: str, betas: Array, zero_terminal_snr: bool = False) -> Schedule:
    """A variance-preserving schedule from the betas of DDPM: alpha_t^2 = prod_{s <= t} (1 - beta_s)."""
    alpha = np.sqrt(np.cumprod(1.0 - betas))
    if zero_terminal_snr:  # Lin et al. 2023, algorithm 1
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    t = np.arange(-1, len(betas))
    alpha_squared = np.concatenate([[1.0], alpha**2])
    return Schedule(
        name,
        alpha=lambda at: np.sqrt(np.interp(at, t, alpha_squared)),
        sigma=lambda at: np.sqrt(1.0 - np.interp(at, t, alpha_squared)),
        t_max=len(betas) - 1.0,
        t_min=0.0,
        t_clean=-1.0,
        num_train_timesteps=len(betas),
    )


def linear(
    num_train_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """Betas equally spaced (Ho et al. 2020, section 4)."""
    return _discrete("linear", np.linspace(beta_start, beta_end, num_train_timesteps), zero_terminal_snr)


def scaled_linear(
    num_train_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """Square roots of the betas equally spaced (Rombach et al. 2022, as Stable Diffusion was trained)."""
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
    return _discrete("scaled_linear", betas, zero_terminal_snr)


def cosine(num_train_timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """alpha^2 follows a squared cosine (Nichol & Dhariwal 2021, equation 17)."""
    t = np.arange(num_train_timesteps + 1) / num_train_timesteps
    alpha_bar = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
    return _discrete("cosine", np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], max_beta))


def sigmoid(num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Betas along a sigmoid from -6 to 6 (Xu et al. 2022, GeoDiff)."""
    ramp = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, num_train_timesteps)))
    return _discrete("sigmoid", ramp * (beta_end - beta_start) + beta_start)


def karras(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Schedule:
    """x_t = x_0 + sigma_t eps, sigma^(1/rho) linear in t from 0 to 1 (Karras et al. 2022, equation 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    t_clean = -low / (high - low)

    def sigma(t: ArrayLike) -> Array:
        t = np.asarray(t, dtype=np.float64)
        return np.where(t > t_clean, np.maximum(low + t * (high - low), 0.0), 0.0) ** rho  # 0, not nearly 0, at t_clean

    return Schedule(
        "karras",
        alpha=lambda t: np.ones_like(t, dtype=np.float64),
        sigma=sigma,
        t_max=1.0,
        t_min=0.0,
        t_clean=t_clean,
    )


def flow(shift: float = 1.0, t_min: float = 1e-3) -> Schedule:
    """The straight path x_t = (1 - t) x_0 + t eps (Liu et al. 2022; Lipman et al. 2022), t from 1 to 0.

    ``shift`` moves time towards the noise, t -> shift t / (1 + (shift - 1) t) (Esser et al. 2024, equation 23).
    """

    def sigma(t: ArrayLike) -> Array:
        t = np.asarray(t, dtype=np.float64)
        return shift * t / (1.0 + (shift - 1.0) * t)

    return Schedule("flow", alpha=lambda t: 1.0 - sigma(t), sigma=sigma, t_max=1.0, t_min=t_min, t_clean=0.0)


def resampled(times: ArrayLike, length: int = 10, count: int = 10) -> Array:
    """Times that go back up, for each part to be sampled ``count`` times (RePaint: Lugmayr et al. 2022, section 4.2 and
    appendix B).

    ``length``: by how many times they jump up (the authors' jump_length; ``count`` is their jump_n_sample), the first
    time at as many from the end, and one.
    """
    for name, value in {"length": length, "count": count}.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    times = np.asarray(times, dtype=np.float64)
    last = len(times) - 1
    jumps = dict.fromkeys(range(last - 1, length - 1, -length), count - 1)
    i, visited = 0, [0]
    while i < last:
        i += 1
        visited.append(i)
        if jumps.get(i, 0) > 0:
            jumps[i] -= 1
            i -= length
            visited.append(i)
    return times[visited]


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    make.__name__: make for make in (linear, scaled_linear, cosine, sigmoid, karras, flow)
}


def make_schedule(schedule: Schedule | str | dict[str, Any]) -> Schedule:
    """A schedule from itself, its name, or a mapping with ``name`` and the arguments of its function."""
    if isinstance(schedule, Schedule):
        return schedule
    arguments = {"name": schedule} if isinstance(schedule, str) else dict(schedule)
    name = arguments.pop("name", None)
    if name not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    known = inspect.signature(SCHEDULES[name]).parameters
    for argument in arguments:
        if argument not in known:
            raise ValueError(f"schedule {name!r} has no argument {argument!r}; it takes {', '.join(known)}")
    return SCHEDULES[name](**arguments)
