"""pygen: fast generative sampling for PyTorch."""

import torch as _torch  # noqa: F401  (its libraries must be loaded before the extension)

from pygen.diffusion import StepPlan, plan, sample
from pygen.ops import affine_step, backend, philox_normal

__version__ = "0.1.0"
__all__ = ["StepPlan", "affine_step", "backend", "philox_normal", "plan", "sample"]
