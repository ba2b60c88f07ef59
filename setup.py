"""Calls CMake, which describes the build, and places the extension where setuptools wants it."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "cmake"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = ["-DPYGEN_PYTHON=ON", f"-DPython_EXECUTABLE={sys.executable}"]
        subprocess.run(["cmake", "-S", ROOT, "-B", BUILD, *generator, *configure], check=True)
        subprocess.run(["cmake", "--build", BUILD, "--parallel", "--target", "_C"], check=True)
        subprocess.run(["cmake", "--install", BUILD, "--component", "python", "--prefix", destination], check=True)


setup(ext_modules=[Extension("pygen._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
