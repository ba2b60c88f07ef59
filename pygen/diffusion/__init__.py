"""Diffusion: schedules, solvers as tables of coefficients, and the one sampling loop."""

from pygen.diffusion.plan import StepPlan, stack_plans
from pygen.diffusion.sample import StepInfo, Stepper
from pygen.diffusion.schedules import SCHEDULES, Schedule, make_schedule
from pygen.diffusion.solvers import SOLVERS

__all__ = ["SCHEDULES", "SOLVERS", "Schedule", "StepInfo", "StepPlan", "Stepper", "make_schedule", "stack_plans"]
