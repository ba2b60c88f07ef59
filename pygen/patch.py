"""pygen.accelerate: the one registry of what pygen puts in the place of other libraries' parts."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Replacement:
    """``owner.name`` is to become ``new``."""

    owner: Any
    name: str
    new: Any


@dataclass(frozen=True)
class Left:
    """``name`` stays as it is, and why."""

    name: str
    reason: str


@dataclass
class Report:
    """What ``accelerate`` replaced in an object, and what it left; ``undo`` puts everything back."""

    replaced: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put back what was replaced, the last first; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        lines = [f"replaced {what}" for what in self.replaced] + [f"left {what}" for what in self.left]
        return "\n".join(lines)


Rule = Callable[[Any], Iterator[Replacement | Left]]


def _schedulers(target: Any) -> Iterator[Replacement | Left]:
    """The scheduler of a diffusers pipeline, by the drop-in of its name, with its configuration."""
    import pygen.diffusers as ours

    scheduler = getattr(target, "scheduler", None)
    kind = type(scheduler)
    if scheduler is None or kind.__module__.startswith("pygen."):
        return
    new = getattr(ours, kind.__name__, None) if kind.__module__.startswith("diffusers.") else None
    if new is None:
        yield Left("scheduler", f"{kind.__module__}.{kind.__name__} has no drop-in")
    else:
        yield Replacement(target, "scheduler", new.from_config(scheduler.config))


def _rules(target: Any) -> Iterator[Rule]:
    """The rules for an object; a library that is not imported cannot have made it."""
    diffusers = sys.modules.get("diffusers")
    if diffusers is not None and isinstance(target, diffusers.DiffusionPipeline):
        yield _schedulers


def accelerate(target: Any) -> Report:
    """Put pygen's parts in the place of a pipeline's, in place.

    Args:
        target: a diffusers pipeline. Its scheduler is replaced by the drop-in of the same name and configuration, and
            still saves as diffusers' own.

    Returns:
        What was replaced and what was left; ``.undo()`` takes it back. Accelerating twice replaces nothing more.

    Raises:
        TypeError: for an object that there is no rule for.
    """
    rules = list(_rules(target))
    if not rules:
        raise TypeError(f"target must be a diffusers pipeline, got {type(target).__name__}")
    report = Report()
    for rule in rules:
        for found in rule(target):
            if isinstance(found, Left):
                report.left.append(f"{found.name}: {found.reason}")
                continue
            old = getattr(found.owner, found.name)
            setattr(found.owner, found.name, found.new)
            report._undo.append(functools.partial(setattr, found.owner, found.name, old))
            report.replaced.append(f"{found.name}: {type(old).__name__}")
    return report
