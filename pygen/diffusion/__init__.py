"""Diffusion: schedules, solvers as tables of coefficients, and the one sampling loop."""

from pygen.diffusion.plan import StepPlan, plan, stack_plans
from pygen.diffusion.sample import StepInfo, Stepper, sample
from pygen.diffusion.schedules import SCHEDULES, Schedule, make_schedule
from pygen.diffusion.solvers import SOLVERS

__all__ = [
    "SCHEDULES",
    "SOLVERS",
    "Schedule",
    "StepInfo",
    "StepPlan",
    "Stepper",
    "make_schedule",
    "plan",
    "sample",
    "stack_plans",
]
