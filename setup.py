"""Calls CMake, which describes the build, and places the extension where setuptools wants it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "cmake"
# The cmake and ninja of this Python's environment come before the system's, whether or not it is activated.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def run_cmake(*arguments: object) -> None:
    cmake = shutil.which("cmake", path=PATH)
    if cmake is None:
        sys.exit("pygen's build needs cmake 3.22 or newer: pip install cmake")
    subprocess.run([cmake, *map(str, arguments)], check=True, env=os.environ | {"PATH": PATH})


def cuda_options() -> list[str]:
    """The CUDA kernels are built where this torch has CUDA and nvcc is found."""
    import torch

    if torch.version.cuda is None or shutil.which("nvcc", path=PATH) is None:
        return ["-DPYGEN_CUDA=OFF"]
    architectures = os.environ.get("PYGEN_CUDA_ARCHITECTURES")
    return ["-DPYGEN_CUDA=ON", *([f"-DPYGEN_CUDA_ARCHITECTURES={architectures}"] if architectures else [])]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        generator = ["-G", "Ninja"] if shutil.which("ninja", path=PATH) else []
        quiet = ["--log-level=WARNING"] if self.verbose < 1 else []
        configure = ["-DPYGEN_PYTHON=ON", f"-DPython_EXECUTABLE={sys.executable}", *cuda_options()]
        run_cmake("-S", ROOT, "-B", BUILD, *generator, *quiet, *configure)
        run_cmake("--build", BUILD, "--parallel", os.cpu_count() or 1, "--target", "_C")
        run_cmake("--install", BUILD, "--component", "python", "--prefix", destination)


setup(ext_modules=[Extension("pygen._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
