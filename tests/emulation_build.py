"""Compiles CUDA sources for the emulation in tests/emulation, and runs what comes of it.

A library is for ctypes. A sanitizer's program is an executable, for a Python that was not started under the sanitizer
cannot load its libraries.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
Sanitizer = Literal["address", "thread", "undefined"]


def build(
    sources: Sequence[Path],
    directory: Path,
    flags: Sequence[str] = (),
    sanitizer: Sanitizer | None = None,
    executable: bool | None = None,
) -> Path:
    """Compiles `sources` into one file in `directory`: an executable under a sanitizer, else a shared library."""
    executable = sanitizer is not None if executable is None else executable
    output = directory / f"{sources[0].stem}-{sanitizer or 'plain'}{'' if executable else '.so'}"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-g", "-ffp-contract=off", "-Wall", "-Wextra"]
    command += ["-DPYGEN_EMULATION", f"-I{ROOT / 'tests' / 'emulation'}", f"-I{ROOT / 'kernels' / 'include'}"]
    # Without -fno-gnu-unique two libraries that hold the same kernel would share its shared memory.
    command += ["-pthread"] if executable else ["-pthread", "-shared", "-fPIC", "-fno-gnu-unique"]
    if sanitizer is not None:
        command += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    command += [*flags, "-x", "c++", *map(str, sources), "-x", "none", "-ldl", "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    return output


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs an executable; a sanitizer's first complaint ends it."""
    command = [str(program), *arguments]
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if "unexpected memory mapping" in result.stderr:
        # Some kernels randomise addresses further than this compiler's ThreadSanitizer can follow.
        command = ["setarch", platform.machine(), "--addr-no-randomize", *command]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    return result
