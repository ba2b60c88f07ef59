"""A pytest plugin: diffusers' scheduler tests on pygen's classes, and a record of each test's outcome.

``pytest -p pygen.testing.diffusers_swap --swap --record FILE tests/schedulers``. With ``--swap``, before anything is
collected, each class of ``pygen.diffusers`` takes the place of diffusers' class of its name wherever a loaded module of
diffusers holds that one: in ``diffusers``, in ``diffusers.schedulers`` and in the class's own module. Modules that
diffusers loads later get the class from there. Without ``--swap`` the same tests run on diffusers' own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import diffusers  # the installed one: a checkout's tests/conftest.py puts its own src first
import pytest

# A test is what the worst of its phases, and of its subtests, is.
SEVERITY = ["passed", "xpassed", "skipped", "xfailed", "failed", "error"]


def swap() -> dict[type, type]:
    """Put every scheduler of ``pygen.diffusers`` in the place of diffusers' own; which came for which."""
    import pygen.diffusers as ours

    replaced: dict[type, type] = {}
    for name in (name for name in ours.__all__ if name.endswith("Scheduler")):
        theirs, new = getattr(diffusers, name), getattr(ours, name)
        getattr(diffusers.schedulers, name)  # a lazy module holds a name once it was asked for
        for module_name, module in list(sys.modules.items()):
            if module_name.partition(".")[0] == "diffusers" and vars(module).get(name) is theirs:
                setattr(module, name, new)
        replaced[theirs] = new
    return replaced


class Recorder:
    """Writes what became of each test, and which of the swapped classes the tests' modules name."""

    def __init__(self, file: Path, replaced: dict[type, type]) -> None:
        self.file = file
        self.replaced = replaced
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.named: set[str] = set()

    def note(self, report: pytest.TestReport | pytest.CollectReport, outcome: str) -> None:
        if SEVERITY.index(outcome) >= SEVERITY.index(self.outcomes.get(report.nodeid, "passed")):
            self.outcomes[report.nodeid] = outcome
        if report.failed:
            self.reasons[report.nodeid] = _last_line(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome: str = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if report.skipped else "xpassed"
        elif report.failed and report.when != "call":
            outcome = "error"
        self.note(report, outcome)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self.note(report, "error" if report.failed else "skipped")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
        held = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
        if missed := {value.__name__ for value in held if value in self.replaced}:
            raise pytest.UsageError(f"tests hold diffusers' own {', '.join(sorted(missed))}: the swap came too late")
        self.named = {value.__name__ for value in held if value in self.replaced.values()}

    def pytest_sessionfinish(self) -> None:
        record = {
            "diffusers": diffusers.__version__,
            "swapped": sorted(new.__name__ for new in self.replaced.values()),
            "named": sorted(self.named),
            "outcomes": self.outcomes,
            "reasons": self.reasons,
        }
        self.file.write_text(json.dumps(record))


def _last_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else report.longreprtext).strip().splitlines()
    return lines[0 if crash else -1] if lines else ""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pygen")
    group.addoption("--swap", action="store_true", help="run on pygen.diffusers' classes")
    group.addoption("--record", type=Path, required=True, help="where the outcomes go, as JSON")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    options = early_config.known_args_namespace
    replaced = swap() if options.swap else {}
    early_config.pluginmanager.register(Recorder(options.record, replaced))
