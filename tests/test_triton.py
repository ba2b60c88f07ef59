"""Every Triton kernel of the specs, without a GPU: by Triton's interpreter, and compiled for three GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

import pygen
from pygen.ops import SPECS, OpSpec
from pygen.ops.backend import triton_kernels

OPS = pytest.mark.parametrize(
    "spec",
    [s for s in SPECS.values() if "triton" in s.backends],
    ids=[n for n, s in SPECS.items() if "triton" in s.backends],
)
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed; it exists for Linux only"
)
ROOT = Path(__file__).resolve().parent.parent
MAX_ELEMENTS = 12000  # the interpreter is slow
SPILLED = {90: 16, 100: 16}  # bytes of a thread that attention may spill: what ptxas leaves of addresses

# The interpreter is chosen when triton is imported, for a whole process.
INTERPRET = f"""
import copy, sys, torch, pygen
from collections import defaultdict
from pygen.ops import SPECS
from tests.error_rule import assert_error_rule
from tests.test_ops import DTYPES, in_double, run, tensors_of

spec, cases = SPECS[sys.argv[1]], 0
for dtype in DTYPES:
    families, seen = defaultdict(list), defaultdict(int)
    for example in spec.examples(dtype):
        elements = max(t.numel() for value in example.arguments.values() for t in tensors_of(value))
        seen[example.name] += 1
        if elements > {MAX_ELEMENTS} or seen[example.name] % 4 != 1:
            continue
        truth = spec.reference(**in_double(copy.deepcopy(example.arguments)))
        same = spec.reference(**copy.deepcopy(example.arguments))
        with pygen.backend("triton"):
            results = run(spec, example)
        for name, result in results.items():
            place = spec.outputs.index(name)
            families[example.name, name].append((result, same[place], truth[place]))
        cases += 1
    for (name, output), triples in families.items():
        assert_error_rule(triples, f"{{spec.name}} by triton, {{name}}, {{output}}, {{dtype}}")
assert cases
print(cases)
"""


@needs_triton
@OPS
def test_interpreted_against_reference(spec: OpSpec, record_property: Any) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", INTERPRET, spec.name],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    record_property(f"cases of {spec.name}'s Triton kernel by its interpreter", int(result.stdout))


@needs_triton
@OPS
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiles_for_gpus(spec: OpSpec, dtype: str, architecture: int, tmp_path: Path) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas

    sources = triton_kernels(spec.name).sources
    of_table = (
        {"architecture": "warpgroup"} if architecture >= 90 and "architecture" in signature(sources).parameters else {}
    )
    for source, options in sources(dtype, **of_table):
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        assert compiled.asm["cubin"].startswith(b"\x7fELF")
        (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
        target = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)[1]
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={target}", "kernel.ptx", "-o", "kernel.cubin"]
        report = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
        spilled = [int(count) for count in re.findall(r"(\d+) bytes spill", report)]
        assert spilled
        assert max(spilled) <= (SPILLED.get(architecture, 0) if "attention" in spec.name else 0), report


@OPS
def test_a_missing_triton_is_named(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pygen.ops.backend.find_spec", lambda name: None)
    triton_kernels.cache_clear()
    example = next(iter(spec.examples(torch.float32)))
    with pygen.backend("triton"), pytest.raises(RuntimeError, match="Triton, which is not installed: pip install"):
        spec.function(**example.arguments)


@needs_triton
@OPS
def test_the_interpreter_is_asked_for(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    example = next(iter(spec.examples(torch.float32)))
    with pygen.backend("triton"), pytest.raises(RuntimeError, match="start Python with TRITON_INTERPRET=1"):
        spec.function(**example.arguments)
