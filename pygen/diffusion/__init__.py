"""Diffusion: schedules, solvers as tables of coefficients, and the one sampling loop."""

from pygen.diffusion.fractional import FractionalProcess, sample_fractional
from pygen.diffusion.guidance import APG, PerpNeg, Rescale
from pygen.diffusion.plan import StepPlan, stack_plans
from pygen.diffusion.sample import StepInfo, Stepper
from pygen.diffusion.schedules import SCHEDULES, Schedule, make_schedule
from pygen.diffusion.solvers import SOLVERS
from pygen.diffusion.training import Noising, edm, min_snr

__all__ = [
    "APG",
    "SCHEDULES",
    "SOLVERS",
    "FractionalProcess",
    "Noising",
    "PerpNeg",
    "Rescale",
    "Schedule",
    "StepInfo",
    "StepPlan",
    "Stepper",
    "edm",
    "make_schedule",
    "min_snr",
    "sample_fractional",
    "stack_plans",
]
