"""The laws that can be read off the files: who may know whom, and what the compiled objects hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pygen import _C

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / "cmake" / "CMakeFiles"
# Each room may import those before it, and itself.
ROOMS = [
    "pygen._C",
    "pygen.kernels",
    "pygen.files",
    "pygen.held",
    "pygen.ops",
    "pygen.diffusion",
    "pygen.models",
    "pygen.autoregressive",
]


def room_of(module: str) -> int:
    """The place of a module's room in the order; what lies in none (the CLI, the package itself) may know them all."""
    return next((i for i, room in enumerate(ROOMS) if module == room or module.startswith(room + ".")), len(ROOMS))


def imports_of(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name == "pygen" or name.startswith("pygen.")}


@pytest.mark.parametrize("file", sorted((ROOT / "pygen").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_python_imports_flow_one_way(file: Path) -> None:
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for name in imports_of(file):
        assert room_of(name) <= room_of(module), f"{module} imports {name}"


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "pygen").rglob("*.py")}
    kernels = {"pygen.kernels", "pygen.kernels.triton"}
    assert sorted(listed) == sorted({".".join(folder.parts) for folder in folders} | kernels)


def test_a_solver_knows_nothing_of_tensors() -> None:
    for file in (ROOT / "pygen" / "diffusion" / "solvers").glob("*.py"):
        assert "torch" not in file.read_text(), f"{file.name} is coefficients only"


def test_triton_kernels_know_only_triton_and_wait_to_be_asked() -> None:
    for file in (ROOT / "kernels" / "triton").glob("*.py"):
        assert not re.search(r"^\s*(import|from) (torch|pygen)", file.read_text(), re.MULTILINE), file
    script = "import sys, pygen; assert 'triton' not in sys.modules and 'pygen.kernels.triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def includes_of(file: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^">]+)', file.read_text(), re.MULTILINE)


def test_kernels_know_no_torch_and_headers_no_sources() -> None:
    files = [file for file in (ROOT / "kernels").rglob("*") if file.suffix in (".h", ".cpp", ".cu")]
    assert files
    for file in files:
        for include in includes_of(file):
            assert not re.match(r"(torch|ATen|c10|pybind11|csrc)/", include), f"{file} includes {include}"
            if "include" in file.relative_to(ROOT).parts:
                assert include.startswith("pygen/") or "/" not in include, f"{file} includes {include}"


@pytest.mark.parametrize("isa", _C.compiled_isas())
def test_objects_export_only_their_own_strong_symbols(isa: str) -> None:
    """A weak symbol could be chosen by the linker for another instruction set; static data could be shared."""
    objects = sorted((OBJECTS / f"pygen_cpu_{isa}.dir").rglob("*.o"))
    assert {file.stem.removesuffix(".cpp") for file in objects} >= {"affine_step", "group_norm_silu", "philox_normal"}
    for file in objects:
        listing = subprocess.run(["nm", "--demangle", file], capture_output=True, text=True, check=True).stdout
        for kind, name in re.findall(r"^[0-9a-f]+ (\w) (.+)$", listing, re.MULTILINE):
            if kind == "T":
                assert name.startswith(f"pygen::{isa}::"), name
            else:
                assert kind in "rt", f"{file.name}: {name} is of kind {kind}"  # private constants and functions


def instructions_of(file: Path) -> set[str]:
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", file], capture_output=True, text=True, check=True)
    return set(re.findall(r"^\s*[0-9a-f]+:\s+(\S+)", listing.stdout, re.MULTILINE))


def test_the_baseline_path_holds_no_avx_instruction() -> None:
    """Every AVX instruction's name begins with v (and verr, verw, vm* are the kernel's)."""
    kernels = sorted((OBJECTS / "pygen_cpu_baseline.dir").rglob("*.o"))
    glue = [*(OBJECTS / "_C.dir").rglob("*.o"), *(OBJECTS / "pygen_kernels.dir").rglob("*.o")]
    assert len(kernels) >= 2
    assert len(glue) >= 4
    for file in [*kernels, *glue]:
        assert not {name for name in instructions_of(file) if name.startswith("v")}, file.name
    vectors = instructions_of(OBJECTS / "pygen_cpu_avx2.dir/kernels/cpu/affine_step.cpp.o")
    assert "vfmadd213ps" in vectors or "vfmadd231ps" in vectors or "vfmadd132ps" in vectors  # the test can see them


def test_fused_multiply_add_is_never_made_by_contraction() -> None:
    commands = (ROOT / "build" / "cmake" / "compile_commands.json").read_text()
    kernels = [line for line in commands.splitlines() if '"command"' in line and "kernels/cpu/" in line]
    assert all("-ffp-contract=off" in line for line in kernels if "isa.cpp" not in line)


def run_from_empty_folder(folder: Path, path: Path | None) -> str:
    folder.mkdir()
    script = (
        "import pygen, pygen.kernels as k, pygen.kernels.triton; print(pygen.__file__); "
        "assert (k.include_dir() / 'pygen/simd.h').is_file()"
    )
    environment = {"PYTHONPATH": str(path)} if path else {}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_editable_install_imports_from_an_empty_folder(tmp_path: Path) -> None:
    assert run_from_empty_folder(tmp_path / "empty", None) == str(ROOT / "pygen" / "__init__.py")


def test_wheel_imports_from_an_empty_folder(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "wheel", *offline, "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("pygen_kernels-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel], check=True)
    found = run_from_empty_folder(tmp_path / "empty", tmp_path / "site")
    assert found == str(tmp_path / "site" / "pygen" / "__init__.py")
    for name in ("digits", "text"):
        shipped, here = (root / "pygen" / "models" / name for root in (tmp_path / "site", ROOT))
        assert {file.name for file in shipped.iterdir()} == {file.name for file in here.iterdir()}
