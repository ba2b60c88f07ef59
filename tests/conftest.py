from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from pygen import _C


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor has."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many cases of the GPU kernels were run, on whatever stood in for a GPU."""
    cases: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name.startswith("cases of"):
                cases[name] += value
    for name, count in cases.items():
        terminalreporter.write_line(f"{count} {name}")
