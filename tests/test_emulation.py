"""The emulation of CUDA itself: its features on small kernels, and planted mistakes that it must catch."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from .emulation_build import Sanitizer, build, run

HERE = Path(__file__).resolve().parent / "emulation"
SANITIZERS = [None, "address", "thread", "undefined"]
ADDRESS, THREAD = "ERROR: AddressSanitizer: ", "WARNING: ThreadSanitizer: data race"
STOPPED = r"^pygen emulation: .*"

# Planted mistakes: who catches each, and what it says.
BUGS: list[tuple[str, Sanitizer | None, str]] = [
    ("global_store", "address", ADDRESS + "heap-buffer-overflow"),
    ("static_shared_store", "address", ADDRESS + "use-after-poison"),
    ("dynamic_shared_store", "address", ADDRESS + "heap-buffer-overflow"),
    ("missing_barrier", "thread", THREAD),
    ("missing_barrier_between_uses", "thread", THREAD),
    ("shuffle_for_barrier", "thread", THREAD),
    ("missing_grid_sync", "thread", THREAD),
    ("missing_atomic", "thread", THREAD),
    ("missing_fence", "thread", THREAD),
    ("misaligned", "undefined", "misaligned address .* requires 16 byte alignment"),
    ("uninitialised_static", None, "wrong result"),
    ("uninitialised_dynamic", None, "wrong result"),
    ("exited_lane", None, STOPPED + r"waits at __ballot_sync .* for thread \(20, 0, 0\) .* which has exited$"),
    ("lane_elsewhere", None, STOPPED + r"waits at __shfl_xor_sync .*thread \(16, 0, 0\) .* waits at __syncwarp"),
    ("caller_not_in_mask", None, STOPPED + "calls __any_sync with mask 0x0000ffff .* does not name its lane 16$"),
    ("source_not_in_mask", None, STOPPED + "reads lane 16, which takes no part, at __shfl_sync"),
    ("source_beyond_block", None, STOPPED + "reads lane 23, which takes no part, at __shfl_xor_sync"),
    ("exit_before_barrier", None, STOPPED + r"waits at __syncthreads .* \(50, 0, 0\) .* which has exited$"),
    ("barriers_apart", None, STOPPED + "waits at __syncthreads .*, which waits at __syncthreads"),
    ("block_misses_grid_sync", None, STOPPED + "waits at grid_sync .*, and another block has ended$"),
    ("grid_sync_without_a_grid", None, STOPPED + "in a launch that is not cooperative$"),
    ("grid_too_large", None, STOPPED + "a cooperative grid may have 256 blocks and 16384 threads here$"),
]

Programs = Callable[[str, Sanitizer | None], Path]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    directory = tmp_path_factory.mktemp("emulation")

    @cache
    def program(source: str, sanitizer: Sanitizer | None) -> Path:
        return build([HERE / source], directory, sanitizer=sanitizer, executable=True)

    return program


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("source", ["self_test.cu", "bugs/all.cu"])
def test_right_kernels_give_right_results_and_no_complaints(
    programs: Programs, source: str, sanitizer: Sanitizer | None
) -> None:
    result = run(programs(source, sanitizer), "fixed")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(("bug", "sanitizer", "message"), BUGS, ids=[bug for bug, _, _ in BUGS])
def test_planted_bug_is_caught(programs: Programs, bug: str, sanitizer: Sanitizer | None, message: str) -> None:
    result = run(programs("bugs/all.cu", sanitizer), bug, "planted")
    assert result.returncode != 0
    assert re.search(message, result.stderr, re.MULTILINE), result.stderr
    if message.startswith(STOPPED):
        assert result.stderr.count("\n") == 1, "more than one line for one mistake"


def test_every_bug_has_its_catcher() -> None:
    planted = {name for file in HERE.glob("bugs/*.cu") for name in re.findall(r"PYGEN_BUG\((\w+)\)", file.read_text())}
    assert planted == {bug for bug, _, _ in BUGS}


class AxpyArgs(ctypes.Structure):
    _fields_ = (("a", ctypes.c_float), ("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("n", ctypes.c_int64))


def test_library_runs_inside_python(tmp_path: Path) -> None:
    first = build([HERE / "self_test.cu"], tmp_path)
    second = shutil.copy(first, tmp_path / "copy.so")
    for path in (first, second):  # both stay loaded, and each has shared memory of its own
        library = ctypes.CDLL(str(path))
        assert library.self_test() == 0
        x = np.arange(1000, dtype=np.float32)
        y = np.ones_like(x)
        library.axpy(ctypes.byref(AxpyArgs(3.0, x.ctypes.data, y.ctypes.data, x.size)))
        np.testing.assert_array_equal(y, 3 * x + 1)


def test_the_emulated_dialect_is_cuda(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc here")
    command = [nvcc, "-arch=sm_90a", "-std=c++20", "-c", HERE / "self_test.cu", "-o", tmp_path / "self_test.o"]
    subprocess.run(command, check=True)
