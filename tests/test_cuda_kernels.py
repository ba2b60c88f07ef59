"""Every CUDA kernel in the tree: run on the host by every spec, to the bit, and compiled for every architecture."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import ninja
import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

from pygen.ops import SPECS, OpSpec
from pygen.ops.packed_linear import FORMATS, WeightFormat, pack_linear
from tests import emulation_build
from tests.error_rule import assert_error_rule, in_double
from tests.test_ops import BY_DTYPE, outputs_of, run, tensors_of

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cmake"
KERNELS = sorted((ROOT / "kernels" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120")
LARGEST = 20_000  # elements of an example that the emulation is given


@pytest.fixture(scope="module")
def emulation() -> Any:
    """torch.ops.pygen_emulation: the ops of csrc on CPU tensors, launching the CUDA kernels on the host."""
    cmake = shutil.which("cmake") or str(ROOT / ".venv" / "bin" / "cmake")
    subprocess.run([cmake, "--build", BUILD, "--target", "pygen_emulation"], check=True, capture_output=True)
    torch.ops.load_library(BUILD / "libpygen_emulation.so")
    return torch.ops.pygen_emulation


def op_table() -> dict[str, list[str]]:
    """The rows of docs/ops.md: description, backends, and registers by architecture."""
    rows = [line.strip("| \n").split(" | ") for line in (ROOT / "docs" / "ops.md").read_text().splitlines()]
    return {row[0]: row[1:] for row in rows if row[0] in SPECS}


def test_the_op_table_is_that_of_the_specs() -> None:
    assert {name: row[1] for name, row in op_table().items()} == {
        name: ", ".join(spec.backends) for name, spec in SPECS.items()
    }


def test_every_kernel_is_an_op() -> None:
    assert {file.stem for file in KERNELS} == {spec.name for spec in SPECS.values() if "cuda" in spec.backends}


@pytest.mark.parametrize(
    "spec", [spec for spec in SPECS.values() if "cuda" in spec.backends], ids=lambda spec: spec.name
)
@BY_DTYPE
def test_emulated_kernel_against_the_cpus(
    spec: OpSpec, dtype: torch.dtype, emulation: Any, record_property: Any
) -> None:
    """To the bit, or by the error rule where the spec says that sums have another order."""
    operator = getattr(emulation, spec.name).default
    schema = operator._schema.arguments
    families = defaultdict(list)
    cases = 0
    for example in spec.examples(dtype):
        if max(tensor.numel() for tensor in tensors_of([*example.arguments.values()])) > LARGEST:
            continue
        arguments = copy.deepcopy(example.arguments)
        outputs = {name: arguments[name] for name in outputs_of(spec, example)}
        positional = [arguments.pop(argument.name, None) for argument in schema if not argument.kwarg_only]
        operator(*positional, **arguments)
        if spec.bits_on_gpu:
            for name, result in run(spec, example).items():
                ours = outputs[name]
                assert torch.equal(ours.isnan(), result.isnan()), (example.name, name)
                assert torch.equal(ours.nan_to_num(3.0), result.nan_to_num(3.0)), (example.name, name)
        else:
            truth = spec.reference(**in_double(copy.deepcopy(example.arguments)))
            same = spec.reference(**copy.deepcopy(example.arguments))
            for name, place in outputs_of(spec, example).items():
                families[example.name, name].append((outputs[name], same[place], truth[place]))
        cases += 1
    for (name, output), triples in families.items():
        assert_error_rule(triples, f"{spec.name}, {name}, {output}")
    assert cases > 30
    record_property(f"cases of {spec.name}'s CUDA kernel on the host", cases)


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_of_linear_decode_does_not_depend_on_the_others(format: WeightFormat, emulation: Any) -> None:
    """Of a sum long enough that all warps of a block have a part in it, and for as many rows as two blocks take."""
    weight = 0.02 * torch.randn(40, 2100, generator=torch.Generator().manual_seed(0))
    packed = pack_linear(weight, format=format)
    x = torch.randn(9, 2100, generator=torch.Generator().manual_seed(1)) + 1

    def run(x: Tensor) -> Tensor:
        out = x.new_empty(len(x), 40)
        nothing = (None, None, "none", "none", None, None, 0.0, None, None, False)
        emulation.linear_decode(x, *packed, *nothing, out)
        return out

    whole = run(x)
    truth = torch.nn.functional.linear(x.double(), packed.unpack(torch.float64))
    assert_error_rule([(whole, torch.nn.functional.linear(x, packed.unpack()), truth)], format)
    for rows in (1, 2, 3, 5, 8):
        assert torch.equal(run(x[-rows:]), whole[-rows:]), rows


@pytest.mark.parametrize("sanitizer", ["address", "thread", "undefined"])
def test_step_kernels_under_a_sanitizer(sanitizer: emulation_build.Sanitizer, tmp_path: Path) -> None:
    sources = [ROOT / "tests" / "emulation" / "step_kernels.cpp", *KERNELS]
    program = emulation_build.build(sources, tmp_path, sanitizer=sanitizer)
    result = emulation_build.run(program)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "222 launches\n"
    assert not result.stderr


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the object of all that the tests will ask about, and with what nvcc said of it.

    By one run of ninja: nvcc takes one processor, and a process as large as this one should not fork often.
    """
    folder, name = tmp_path_factory.mktemp("nvcc"), "test_compiles_without_spilling"
    flags = f"-std=c++20 -O3 --fmad=false --expt-relaxed-constexpr -Xptxas=-v -I{ROOT / 'kernels' / 'include'}"
    rules = [f"rule nvcc\n  command = nvcc {flags} -arch=$architecture -c $in -o $out > $out.log 2>&1\n"]
    for item in request.session.items:
        if getattr(item, "originalname", "") == name:
            kernel, architecture = (item.callspec.params[key] for key in ("kernel", "architecture"))
            rules.append(f"build {kernel.stem}.{architecture}.o: nvcc {kernel}\n  architecture = {architecture}\n")
    (folder / "build.ninja").write_text("".join(rules))
    subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-k0", "-C", folder], check=False, capture_output=True)
    return folder


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on this machine")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda file: file.stem)
def test_compiles_without_spilling(kernel: Path, architecture: str, compiled: Path) -> None:
    compiler_said = (compiled / f"{kernel.stem}.{architecture}.o.log").read_text()
    assert (compiled / f"{kernel.stem}.{architecture}.o").exists(), compiler_said
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiler_said)
    assert used
    assert all(frame == stores == loads == "0" for frame, stores, loads in used), compiler_said
    registers = max(int(count) for count in re.findall(r"Used (\d+) registers", compiler_said))
    assert registers <= int(op_table()[kernel.stem][2 + ARCHITECTURES.index(architecture)]), (
        "more than docs/ops.md says"
    )


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on this machine")
@pytest.mark.parametrize("glue", sorted((ROOT / "csrc").glob("[!m]*.cpp")), ids=lambda file: file.stem)
def test_cuda_glue_is_well_formed(glue: Path, tmp_path: Path) -> None:
    """csrc as it is compiled where torch has CUDA: torch's CPU wheel has the headers, but for one that CMake writes."""
    macros = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True)
    macros.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    headers = [tmp_path, ROOT / "kernels" / "include", *cpp_extension.include_paths()]
    command = ["nvcc", "-std=c++20", "-DPYGEN_CUDA", "-Xcompiler=-fsyntax-only", *(f"-I{path}" for path in headers)]
    command += ["-c", glue, "-o", tmp_path / "o"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
