"""Drop-in schedulers: diffusers' class names, configurations and steps, on one fused call each."""

from pygen.diffusers.ddpm import DDIMScheduler
from pygen.diffusers.karras import EulerDiscreteScheduler
from pygen.diffusers.noise import PhiloxGenerator

__all__ = ["DDIMScheduler", "EulerDiscreteScheduler", "PhiloxGenerator"]
