"""Drop-in schedulers: diffusers' class names, configurations and steps, on one fused call each."""

from pygen.diffusers.ddpm import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMInverseScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    RePaintScheduler,
    UnCLIPScheduler,
)
from pygen.diffusers.dpm import (
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from pygen.diffusers.karras import EulerDiscreteScheduler
from pygen.diffusers.noise import PhiloxGenerator

__all__ = [
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DDPMWuerstchenScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "PhiloxGenerator",
    "RePaintScheduler",
    "SASolverScheduler",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
]
