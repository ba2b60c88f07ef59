"""``pygen.testing.diffusers_suite`` on a checkout of four tests: it swaps, and it sees what differs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TESTS = """
import diffusers
import pytest
from diffusers import DDIMScheduler
from diffusers.schedulers import DDIMScheduler as second
from diffusers.schedulers.scheduling_ddim import DDIMScheduler as third

def test_one_class():
    assert DDIMScheduler is second is third is diffusers.DDIMScheduler

def test_theirs():
    assert DDIMScheduler.__module__ == "diffusers.schedulers.scheduling_ddim"

def test_broken():
    raise OSError("no network")

@pytest.mark.skip
def test_skipped():
    pass
"""


def test_the_classes_are_swapped_and_differences_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "schedulers"
    folder.mkdir(parents=True)
    (folder / "test_ddim.py").write_text(TESTS)
    library = tmp_path / "src" / "diffusers"  # what the checkout holds of the library must not be imported
    library.mkdir(parents=True)
    (library / "__init__.py").write_text("raise ImportError\n")
    (tmp_path / "tests" / "__init__.py").touch()
    (tmp_path / "tests" / "conftest.py").write_text(f"import sys\nsys.path.insert(0, {str(tmp_path / 'src')!r})\n")

    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "pygen.testing.diffusers_suite", str(tmp_path), "--json", str(record)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    test = "tests/schedulers/test_ddim.py::test_"
    written = json.loads(record.read_text())
    assert written["differences"] == {f"{test}theirs": ["passed", "failed"]}
    same = {f"{test}one_class": "passed", f"{test}broken": "failed", f"{test}skipped": "skipped"}
    assert written["diffusers"]["outcomes"] == {**same, f"{test}theirs": "passed"}
    assert written["pygen"]["outcomes"] == {**same, f"{test}theirs": "failed"}
    assert written["pygen"]["named"] == ["DDIMScheduler"]
    assert "theirs: passed -> failed" in result.stdout

    result = subprocess.run([*command, "-k", "absent"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "deselected" in result.stderr
