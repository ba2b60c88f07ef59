"""Runs suites and tells: a table, a JSON, a comparison with an older one, a roofline. `pygen bench` is its command."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

import pygen
from bench import attention, decode, decoder, drop_ins, ops, steps, unet
from bench.cases import COLUMNS, Case
from bench.measure import Spread, cache_state, copy_call, interleaved, matmul_rate
from pygen import _C

SUITES: dict[str, Callable[[bool], list[Case]]] = {
    "steps": lambda quick: [*steps.cases(quick), *drop_ins.cases(quick)],
    "decode": decode.cases,
    "decoder": decoder.cases,
    "attention": attention.cases,
    "unet": unet.cases,
    "ops": ops.cases,
}
NOTES = """\
Microseconds, the median of calls that took turns, ± half the distance of the quartiles. Data in: the smallest cache
that holds what is moved. Reference: the truth, in float64. Eager: in the suite ops the reference in the op's dtype,
which can do any row; in the suite steps the formula written out; in the suites decode and attention torch's own
call, or the usual few. torch.compile: of eager, blank where that has a graph
break; beside a drop-in, of what its row draws and computes in the middle of a run (scheduler.step itself is not
compiled: its state breaks the graph). Drop-ins: scheduler.step alone, in the order of a run. Floor: a copy of as many
bytes at the same working set (in the suite decode, where weights and caches are streamed, a sum over as many), or the
flops at the rate of a matrix product, if that takes longer. The suite decoder shows tokens per second: of transformers
its model's forward and argmax, of llama.cpp llama_decode and its greedy sampler; "alone" is one sequence that makes
what a batch makes."""


@dataclass(frozen=True)
class Result:
    """A case as it was measured; seconds. Without times where it is red."""

    suite: str
    part: str
    name: str
    data_in: str
    dtype: str
    bytes_moved: int
    flops: int
    red: str | None
    matmul_rate: float  # flop/s in this dtype, where there are flops
    floor: float
    times: dict[str, Spread]
    tokens: int = 0
    remark: str = ""

    @property
    def best(self) -> float:
        return min(spread.median for column, spread in self.times.items() if column.startswith("pygen"))

    @property
    def best_peer(self) -> float | None:
        peers = [t.median for column, t in self.times.items() if column in COLUMNS[1:] and "pygen" not in column]
        return min(peers, default=None)


@torch.no_grad()
def measure(cases: Iterable[Case], quick: bool) -> list[Result]:
    """The correct ones of the cases, timed; quick spends a tenth of the time and compiles nothing."""
    seconds = 0.1 if quick else 1.0
    rate = cache(lambda dtype: matmul_rate(dtype, seconds))
    return [_measured(case, rate, seconds, quick) for case in cases]


def _measured(case: Case, rate: Callable[[torch.dtype], float], seconds: float, quick: bool) -> Result:
    work = case.prepare()
    red, times, floor, remark = work.red(), {}, 0.0, ""
    product = rate(work.dtype) if work.flops else 0.0
    if red is None:
        calls = work.calls | {"stream": work.stream or copy_call(work.bytes_moved)}
        if quick or not work.compiles():
            calls.pop("torch.compile", None)
        remark, times = work.remark(), interleaved(calls, seconds)
        floor = max(times["stream"].median, work.flops / product if product else 0.0)
    facts = (work.data_in or cache_state(work.bytes_moved), str(work.dtype)[6:], work.bytes_moved, work.flops)
    rest = (red, product, floor, times, work.tokens, remark)
    return Result(case.suite, case.part, case.name, *facts, *rest)


def environment(quick: bool) -> dict[str, Any]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": models[0].partition(": ")[2] if models else platform.machine(),
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pygen": pygen.__version__,
        "quick": quick,
    }


def line_of(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in about.items() if name != "cases")


def table(title: str, results: list[Result], old: Old | None) -> Table:
    columns = [column for column in COLUMNS if any(column in result.times for result in results)]
    lines = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    lines.add_column("work", no_wrap=True)
    lines.add_column("data in", no_wrap=True)
    for heading in (*columns, "floor", "share\nof floor", "beside the\nbest peer", *(["old / new"] if old else [])):
        lines.add_column(heading, justify="right")
    for result in results:
        if result.red is not None:
            lines.add_row(result.name, f"[red]wrong: {escape(result.red)}")
            continue
        peer, best = result.best_peer, result.best
        before = old.medians.get((result.suite, result.name)) if old else None
        lines.add_row(
            result.name,
            result.data_in,
            *(_shown(result.times[column], result.tokens) if column in result.times else "" for column in columns),
            f"{result.tokens / result.floor:.1f}" if result.tokens else f"{result.floor * 1e6:.1f}",
            f"{result.floor / best:.2f}",
            f"{peer / best:.1f}x" if peer else "",
            *([f"{before / best:.2f}"] if before else []),
        )
    return lines


def _shown(spread: Spread, tokens: int) -> str:
    """Tokens per second where there are tokens, else microseconds."""
    if tokens:
        median, half = tokens / spread.median, (tokens / spread.low - tokens / spread.high) / 2
    else:
        median, half = spread.median * 1e6, (spread.high - spread.low) / 2 * 1e6
    return f"{median:.1f} ±{half:.1f}" if median < 100 else f"{median:.0f} ±{half:.0f}"


@dataclass(frozen=True)
class Old:
    """A run to compare with: our best median of each case, and where it was measured."""

    about: str
    medians: dict[tuple[str, str], float]


def read_old(path: Path) -> Old:
    """A file that ``--json`` wrote; ValueError says in a line why it is none."""
    try:
        report = json.loads(path.read_text())
        medians = {
            (case["suite"], case["name"]): min(float(t["median"]) for c, t in case["times"].items() if "pygen" in c)
            for case in report["cases"]
            if case["red"] is None
        }
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{str(path)!r} was not written by pygen bench --json") from None
    if not all(math.isfinite(median) and median > 0 for median in medians.values()):
        raise ValueError(f"{str(path)!r} holds a time that is not a positive number")
    return Old(line_of(report), medians)


def main(
    suites: Iterable[str],
    quick: bool = False,
    old: Old | None = None,
    fail_slower: float | None = None,
    json_to: IO[bytes] | None = None,
    plot_to: IO[bytes] | None = None,
) -> int:
    """Measure and print; 1 where a case is red, or slower than the old one by more than ``fail_slower``."""
    about = environment(quick)
    console = Console(width=170, highlight=False)
    console.print(line_of(about), markup=False)
    if old is not None:
        console.print(f"old: {old.about}", markup=False)
    results: list[Result] = []
    for suite in suites:
        cases = SUITES[suite](quick)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            mine = measure(progress.track(cases, description=suite), quick)
        for part, these in groupby(mine, key=lambda result: result.part):
            console.print(table(f"{suite}: {part}" if part else suite, list(these), old))
        for verdicts in (drop_ins.verdicts, decode.verdicts, decoder.verdicts, attention.verdicts, unet.verdicts):
            for line in verdicts(mine):
                console.print(line, markup=False)
        results += mine
    console.print(NOTES + ("\nquick: a tenth of the time, few cases, torch.compile left out." if quick else ""))

    if json_to is not None:
        report = about | {"cases": [asdict(result) for result in results]}
        json_to.write((json.dumps(report, indent=2) + "\n").encode())
    if plot_to is not None:
        from bench.roofline import draw

        draw(results, plot_to)
    failed = any(result.red is not None for result in results)
    if old is not None and fail_slower is not None:
        for result in results:
            before = old.medians.get((result.suite, result.name))
            if before is not None and result.red is None and result.best > fail_slower * before:
                line = f"{result.suite}: {result.name} takes {result.best / before:.2f} times the old time"
                console.print(f"[red]{escape(line)}")
                failed = True
    return int(failed)
