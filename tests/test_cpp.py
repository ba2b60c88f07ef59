"""find_package(pygen) for C++ users: the example is built against an installed package and steps as Python does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import pygen
from pygen.ops.affine_step import make_table

ROOT = Path(__file__).resolve().parent.parent
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def cmake(*arguments: object) -> None:
    tool = shutil.which("cmake", path=TOOLS)
    subprocess.run([str(tool), *map(str, arguments)], check=True, capture_output=True, env=os.environ | {"PATH": TOOLS})


def test_example_without_torch_steps_as_python_does(tmp_path: Path) -> None:
    cmake("--install", ROOT / "build" / "cmake", "--component", "cpp", "--prefix", tmp_path / "pygen")
    cmake("-S", ROOT / "examples" / "cpp", "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'pygen'}")
    cmake("--build", tmp_path / "build")
    program = tmp_path / "build" / "step_buffer"
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "torch" not in linked

    x, eps = torch.ones(2, 6), torch.full((2, 6), 0.5)
    table = make_table([{"step": 3, "x0": 0.9, "out0": -0.2, "noise0": 0.1}])
    expected = pygen.affine_step(x, eps, table, torch.tensor(0), seed=torch.tensor([42]))
    assert torch.equal(torch.tensor([float(line) for line in printed.split()]).view(2, 6), expected)
