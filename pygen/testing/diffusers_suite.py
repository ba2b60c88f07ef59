"""Runs the scheduler tests of a diffusers checkout twice, on diffusers' own classes and on pygen's, and compares.

``python -m pygen.testing.diffusers_suite PATH``, where PATH is a checkout of huggingface/diffusers near the installed
release: the tests are the checkout's, the library is the installed one. The exit status is 0 only where every test has
the same outcome in both runs, and 2 where a run did not come about.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import pygen

Record = dict[str, Any]
OUTCOMES = ["passed", "failed", "error", "skipped", "xfailed", "xpassed"]
RUNS = {"diffusers": False, "pygen": True}  # whose classes, and whether they are swapped in


class NoOutcome(click.ClickException):
    exit_code = 2


def run(checkout: Path, keyword: str | None, swap: bool) -> Record:
    """What ``pygen.testing.diffusers_swap`` records of one run, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"]
        command += ["-p", "pygen.testing.diffusers_swap", "--record", str(file)]
        command += ["--continue-on-collection-errors", "tests/schedulers"]
        command += ["--swap"] if swap else []
        command += ["-k", keyword] if keyword else []
        paths = [str(Path(pygen.__file__).parent.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "HF_HUB_OFFLINE": "1",  # what needs a download fails at once, in both runs
        }
        begin = time.perf_counter()
        result = subprocess.run(
            command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if result.returncode not in (0, 1) or not file.is_file():
            tail = "\n".join(result.stdout.splitlines()[-20:])
            raise NoOutcome(f"pytest ended with {result.returncode}:\n{tail}")
        return {**json.loads(file.read_text()), "seconds": time.perf_counter() - begin}


def differences(first: Record, second: Record) -> dict[str, tuple[str, str]]:
    """The tests whose outcome is not the same in both, with both outcomes."""
    names = sorted({*first["outcomes"], *second["outcomes"]})
    outcomes = {name: (first["outcomes"].get(name, "absent"), second["outcomes"].get(name, "absent")) for name in names}
    return {name: both for name, both in outcomes.items() if both[0] != both[1]}


def show(console: Console, records: dict[str, Record], changed: dict[str, tuple[str, str]]) -> None:
    table = Table()
    table.add_column("classes of")
    counts = {name: Counter(record["outcomes"].values()) for name, record in records.items()}
    columns = [outcome for outcome in OUTCOMES if any(count[outcome] for count in counts.values())]
    for column in [*columns, "seconds"]:
        table.add_column(column, justify="right")
    for name, record in records.items():
        table.add_row(name, *(str(counts[name][column]) for column in columns), f"{record['seconds']:.1f}")
    console.print(table)
    ours = records["pygen"]
    console.print(f"{len(ours['swapped'])} classes swapped into diffusers {ours['diffusers']}; ", end="")
    console.print(f"the tests name {len(ours['named'])} of them")
    for test, (before, after) in changed.items():
        console.print(f"{test}: {before} -> {after}", markup=False, highlight=False, soft_wrap=True)
        if reason := ours["reasons"].get(test):
            console.print(f"    {reason}", markup=False, highlight=False, soft_wrap=True)
    if not changed:
        console.print("every test has the same outcome")


@click.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-k", "keyword", metavar="EXPRESSION", help="Only the tests that match, as pytest's -k.")
@click.option("--json", "json_out", type=click.File("w"), metavar="FILE", help="Where both records go.")
def main(path: Path, keyword: str | None, json_out: Any) -> None:
    """Run the scheduler tests of the diffusers checkout at PATH on diffusers' classes and on pygen's, and compare."""
    if not (path / "tests" / "schedulers").is_dir():
        raise click.BadParameter(f"{str(path)!r} has no tests/schedulers", param_hint="'PATH'")
    console = Console()
    records = {}
    for name, swap in RUNS.items():
        with console.status(f"tests/schedulers on the classes of {name}"):
            records[name] = run(path, keyword, swap)
    changed = differences(records["diffusers"], records["pygen"])
    show(console, records, changed)
    if json_out:
        json.dump({**records, "differences": changed}, json_out, indent=1)
    sys.exit(1 if changed else 0)


if __name__ == "__main__":
    main()
