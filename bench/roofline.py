"""The roofline: the bytes per second that each case reaches, over its flops per byte, below the measured ceilings."""

from __future__ import annotations

from statistics import median
from typing import IO, TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from bench.run import Result


def draw(results: list[Result], stream: IO[bytes]) -> None:
    """Write a PNG. Each case has its own floor, the copy at its working set: a line leads from its dot to there."""
    timed = sorted((r for r in results if r.times), key=lambda r: -r.bytes_moved / r.best)
    figure = Figure(figsize=(13, max(5.0, 0.26 * len(timed))), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    left, right = 1 / 16, 4 * max((r.flops / r.bytes_moved for r in timed), default=1.0)
    x = np.geomspace(left, right)

    styles = ("-", ":", "-.", (0, (9, 3)))
    for data_in, style in zip(sorted({result.data_in for result in timed}), styles, strict=False):
        bandwidth = median(r.bytes_moved / r.times["stream"].median for r in timed if r.data_in == data_in) / 1e9
        label = f"copy, {data_in}: {bandwidth:.0f} GB/s"
        axes.axhline(bandwidth, color="gray", linewidth=1, linestyle=style, label=label)
    for dtype, color in zip(sorted({r.dtype for r in timed}), ("tab:blue", "tab:orange", "tab:green"), strict=False):
        mine = [r for r in timed if r.dtype == dtype]
        rates = [r.matmul_rate for r in mine if r.matmul_rate]
        if rates:
            label = f"matrix product, {dtype}: {median(rates) / 1e9:.0f} Gflop/s"
            axes.plot(x, median(rates) / 1e9 / x, "--", color=color, label=label)
        at = [max(left, r.flops / r.bytes_moved) for r in mine]
        reached = [r.bytes_moved / r.best / 1e9 for r in mine]
        axes.vlines(at, reached, [r.bytes_moved / r.floor / 1e9 for r in mine], color=color, alpha=0.3)
        axes.plot(at, reached, "o", color=color, label=dtype)

    for place, result in zip(np.linspace(0.98, 0.02, max(2, len(timed))), timed, strict=False):
        dot = (max(left, result.flops / result.bytes_moved), result.bytes_moved / result.best / 1e9)
        axes.annotate(
            f"{result.suite}: {result.name}, {result.floor / result.best:.2f} of floor",
            dot,
            (1.05, place),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "lightgray", "linewidth": 0.5, "relpos": (0, 0.5)},
        )
    axes.set(xlabel="flops per byte (at the left edge: none)", ylabel="GB/s")
    axes.set_title("pygen's cases: the line above a dot is its way to its floor")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(left / 1.2, right)
    figure.legend(loc="outside lower left", ncols=4)
    figure.savefig(stream, format="png", dpi=120)
