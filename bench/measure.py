"""Timing on a noisy machine: warm, interleaved, medians. Only ratios within one run mean anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

Call = Callable[[], object]


def interleaved(calls: Mapping[str, Call], seconds: float = 1.0) -> dict[str, float]:
    """The median time of one call of each, in seconds; the calls take turns, so that drift meets all of them alike."""
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        begin = time.perf_counter()
        call()
        repeats[name] = max(1, int(0.002 / max(time.perf_counter() - begin, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - begin) / repeats[name])
    return {name: median(values) for name, values in times.items()}


def copy_call(total_bytes: int) -> Call:
    """A copy that moves so many bytes, half read and half written."""
    source = torch.ones(max(1, total_bytes // 8), dtype=torch.float32)
    target = torch.empty_like(source).fill_(0.0)
    return lambda: target.copy_(source)
