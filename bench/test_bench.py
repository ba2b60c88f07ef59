"""The cases of `pygen bench` under pytest-benchmark, with its options and its files: pytest bench --benchmark-only"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.cases import COLUMNS, Case, Work
from bench.measure import cache_state, copy_call
from bench.run import SUITES

CASES = [case for suite in SUITES.values() for case in suite(False)]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case_and_work(request: pytest.FixtureRequest) -> Iterator[tuple[Case, Work]]:
    """A case that has been proved right, its tensors alive for its columns only."""
    case: Case = request.param
    with torch.no_grad():
        work = case.prepare()
        reason = work.red()
        if reason is not None:
            pytest.fail(reason)
        if not work.compiles():
            work.calls.pop("torch.compile", None)
        work.calls["stream"] = work.stream or copy_call(work.bytes_moved)
        yield case, work


@pytest.mark.parametrize("column", [*COLUMNS, "stream"])
def test_time(benchmark: Any, case_and_work: tuple[Case, Work], column: str) -> None:
    case, work = case_and_work
    if column not in work.calls:
        pytest.skip("the case has no such column")
    benchmark.group = str(case)
    benchmark.extra_info |= {
        "bytes_moved": work.bytes_moved,
        "flops": work.flops,
        "data_in": cache_state(work.bytes_moved),
    }
    benchmark(work.calls[column])
