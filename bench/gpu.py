"""`make gpu`: every spec on the GPU, the sanitizers, then times; one JSON, whatever fails: python -m bench.gpu

A stage that fails says so in the file and leaves the others' results. Written to bench/results/<device>-<commit>.json.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import pygen
from bench.measure import Call, copy_call, interleaved
from bench.steps import ROW, formula
from pygen import _C
from pygen.files import replacing
from pygen.ops.affine_step import make_table
from tests.error_rule import assert_error_rule

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def output_of(*command: object, timeout: float = 200.0) -> tuple[int, str]:
    """Exit code and the end of what a command printed."""
    process = subprocess.run(
        [str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    return process.returncode, (process.stdout + process.stderr)[-4000:]


def machine() -> dict[str, Any]:
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    smi = output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv")[1] if shutil.which("nvidia-smi") else ""
    return {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "nvidia_smi": smi.strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "pygen": pygen.__version__,
        "pygen_cuda": _C.CUDA_BUILT,
        "python": platform.python_version(),
    }


def specs() -> dict[str, Any]:
    """Every spec's examples, against the reference and the CPU's bits."""
    code, text = output_of(sys.executable, "-m", "pytest", "tests/test_gpu.py", "-x")
    if code != 0 or "skipped" in text:
        raise RuntimeError(text)
    return {"summary": text.strip().splitlines()[-1]}


def sanitizers() -> dict[str, Any]:
    """memcheck and racecheck over the small examples, after each has found a bug planted for it."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not installed"}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        planted = Path(folder) / "planted"
        code, text = output_of("nvcc", "-arch=native", "-lineinfo", ROOT / "bench" / "planted_bugs.cu", "-o", planted)
        if code != 0:
            raise RuntimeError(text)
        for name in ("memcheck", "racecheck"):
            check = (tool, "--tool", name, "--error-exitcode", "9")
            code, text = output_of(*check, planted, name)
            if code != 9:
                raise RuntimeError(f"{name} did not find the bug planted for it: {text}")
            code, text = output_of(
                *check, sys.executable, "-m", "pytest", "tests/test_gpu.py", "-k", "float32 or graph"
            )
            results[name] = "clean" if code == 0 else text
    return results


def graphed(call: Call) -> Call:
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def times_of(calls: dict[str, Call]) -> dict[str, Any]:
    """Microseconds: medians between their quartiles, the L2 cache flushed before each call, the calls taking turns."""
    spreads = interleaved(calls, device=torch.device("cuda"))
    return {name: {key: 1e6 * seconds for key, seconds in asdict(s).items()} for name, s in spreads.items()}


def steps() -> dict[str, Any]:
    """The guided step beside torch and beside a copy of as many bytes; launch-bound sizes as CUDA graphs too."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((2, 4, 64, 64), (8, 4, 128, 128), (16, 1 << 20), (64, 1 << 20)):
            x, cond, uncond = (torch.randn(shape, device="cuda").to(dtype) for _ in range(3))
            table, row, out = make_table([ROW]).cuda(), torch.tensor(0, device="cuda"), torch.empty_like(x)
            compiled = torch.compile(formula, fullgraph=True, dynamic=False)
            calls: dict[str, Call] = {
                "pygen": lambda: pygen.affine_step(x, cond, table, row, uncond=uncond, out=out),  # noqa: B023
                "eager": lambda: formula(x, cond, uncond),  # noqa: B023
                "torch.compile": lambda: compiled(x, cond, uncond),  # noqa: B023
            }
            moved = 4 * x.numel() * x.element_size()
            same, truth = formula(x, cond, uncond), formula(x.double(), cond.double(), uncond.double())
            calls["pygen"]()
            assert_error_rule([(out, same, truth)], f"{shape}, {dtype}")
            if x.numel() < 1 << 20:
                calls |= {f"{name}, graph": graphed(call) for name, call in calls.items()}
            calls["stream"] = copy_call(moved, torch.device("cuda"))
            times = times_of(calls)
            share = times["stream"]["median"] / times["pygen"]["median"]
            results[f"guided step {shape} {str(dtype)[6:]}"] = {"us": times, "bytes": moved, "share_of_copy": share}
    seed, step, out = (torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(3))
    out = torch.empty(16, 1 << 20, device="cuda")
    times = times_of({"pygen": lambda: pygen.philox_normal(seed=seed, step=step, out=out), "eager": out.normal_})
    results["16M normals"] = {"us": times, "bytes": out.numel() * 4}
    return results


STAGES = {"machine": machine, "specs": specs, "sanitizers": sanitizers, "steps": steps}


def main() -> int:
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    failed = []
    for name, stage in STAGES.items():
        begin = time.monotonic()
        try:
            report[name] = stage()
        except Exception as error:  # a stage must not take the others' results with it
            failed.append(name)
            report[name] = {"error": "".join(traceback.format_exception_only(error)).strip()}
        seconds = round(time.monotonic() - begin, 1)
        report[name]["seconds"] = seconds
        print(f"{name}: {'failed' if name in failed else 'ok'} in {seconds} s", flush=True)
        commit = output_of("git", "rev-parse", "--short", "HEAD")[1].strip() or "unknown"
        device = re.sub(r"\W+", "-", str(report["machine"].get("device", "no-gpu"))).strip("-").lower()
        RESULTS.mkdir(exist_ok=True)
        out = RESULTS / f"{device}-{commit}.json"
        with replacing(out) as stream:
            stream.write((json.dumps(report, indent=2, default=str) + "\n").encode())
    print(f"{out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
