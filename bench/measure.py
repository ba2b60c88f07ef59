"""Timing on a noisy machine: warm, interleaved, medians. Only ratios within one run mean anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

import torch

Call = Callable[[], object]
CPU = torch.device("cpu")
LEAST_ROUNDS = 5
BURST = 0.002  # seconds that short calls are repeated for, so that the clock's own cost does not count
SPIN = 0.02  # seconds that OpenMP's threads stay awake behind a call, in the way of whoever has threads of its own


@dataclass(frozen=True)
class Spread:
    """The seconds that one call took: the median of all rounds between its quartiles."""

    low: float
    median: float
    high: float


def interleaved(calls: Mapping[str, Call], seconds: float = 1.0, device: torch.device = CPU) -> dict[str, Spread]:
    """The time of one call of each, over some ``seconds`` each; the calls take turns, so that drift meets all alike."""
    clock = stopwatch(device)
    repeats = {}
    for name, call in calls.items():
        clock(call, 1)  # makes whatever is made once
        once = min(clock(call, 1) for _ in range(3))
        repeats[name] = max(1, int(BURST / max(once, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    rounds = 0
    while time.perf_counter() < end or rounds < LEAST_ROUNDS:
        for name, call in calls.items():
            if repeats[name] == 1:
                time.sleep(SPIN)
            times[name].append(clock(call, repeats[name]))
        rounds += 1
    return {name: Spread(*quantiles(values, n=4, method="inclusive")) for name, values in times.items()}


def stopwatch(device: torch.device) -> Callable[[Call, int], float]:
    """What measures the seconds of one of several calls: on the host warm, on a GPU by events behind a flushed L2."""
    if device.type != "cuda":

        def on_the_host(call: Call, repeats: int) -> float:
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - begin) / repeats

        return on_the_host

    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(12 * cache, dtype=torch.uint8, device=device)

    def on_the_gpu(call: Call, repeats: int) -> float:
        events = []
        for _ in range(repeats):
            flush.zero_()  # and while the GPU is at it, the host runs ahead, so that a launch is not timed as work
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize(device)
        return sum(begin.elapsed_time(end) for begin, end in events) / 1e3 / repeats

    return on_the_gpu


def copy_call(total_bytes: int, device: torch.device = CPU) -> Call:
    """A copy that moves so many bytes, half read and half written."""
    source = torch.ones(max(1, total_bytes // 8), dtype=torch.float32, device=device)
    target = torch.empty_like(source).fill_(0.0)
    return lambda: target.copy_(source)


def matmul_rate(dtype: torch.dtype, seconds: float = 0.5, device: torch.device = CPU) -> float:
    """The flop/s of a matrix product large enough to be bound by arithmetic."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / interleaved({"product": lambda: torch.mm(a, b, out=out)}, seconds, device)["product"].median


def cache_state(working_set: int, device: torch.device = CPU) -> str:
    """Where a call finds its data: in the smallest cache that holds what it moves, since the call before was alike."""
    if device.type == "cuda":
        return "L2 flushed"
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        cores = torch.get_num_threads() if int(level) < 3 else 1  # the lower caches are each core's own
        if kind != "Instruction" and working_set <= int(size.removesuffix("K")) * 1024 * cores:
            return f"warm, L{level}"
    return "warm, DRAM"
