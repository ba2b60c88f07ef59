"""Diffusion: schedules, solvers as tables of coefficients, and the one sampling loop."""

from pygen.diffusion.continuous_batch import ContinuousBatch, Request
from pygen.diffusion.fractional import FractionalProcess, sample_fractional
from pygen.diffusion.guidance import APG, PerpNeg, Rescale
from pygen.diffusion.plan import StepPlan, stack_plans
from pygen.diffusion.sample import Known, StepInfo, Stepper
from pygen.diffusion.schedules import SCHEDULES, Schedule, make_schedule, resampled
from pygen.diffusion.solvers import SOLVERS
from pygen.diffusion.training import Noising, edm, min_snr

__all__ = [
    "APG",
    "SCHEDULES",
    "SOLVERS",
    "ContinuousBatch",
    "FractionalProcess",
    "Known",
    "Noising",
    "PerpNeg",
    "Request",
    "Rescale",
    "Schedule",
    "StepInfo",
    "StepPlan",
    "Stepper",
    "edm",
    "make_schedule",
    "min_snr",
    "resampled",
    "sample_fractional",
    "stack_plans",
]
