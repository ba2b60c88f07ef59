"""`make gpu`: every spec on the GPU, the sanitizers, then times; one JSON, whatever fails: python -m bench.gpu

A stage that fails says so in the file and leaves the others' results. Written to bench/results/<device>-<commit>.json.
"""

from __future__ import annotations

import json
import math
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import pygen
from bench.attention import SHAPES, drawn
from bench.decode import FORMATS
from bench.decoder import Checkpoint, Ours, Transformers, linears, turns
from bench.measure import Call, copy_call, interleaved, matmul_rate
from bench.steps import ROW, formula
from pygen import _C
from pygen.files import replacing
from pygen.ops import SPECS
from pygen.ops.affine_step import make_table
from tests.error_rule import assert_error_rule
from tests.test_gpu import to_gpu

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
    workers = ("-n", "12") if find_spec("xdist") else ()
    code, text = output_of(sys.executable, "-m", "pytest", "tests/test_gpu.py", *workers, timeout=400.0)
    if code != 0 or "passed" not in text.strip().splitlines()[-1]:
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


def times_of(calls: dict[str, Call], seconds: float = 0.3) -> dict[str, Any]:
    """Microseconds: medians between their quartiles, the L2 cache flushed before each call, the calls taking turns."""
    spreads = interleaved(calls, seconds, torch.device("cuda"))
    return {name: {key: 1e6 * seconds for key, seconds in asdict(s).items()} for name, s in spreads.items()}


def steps() -> dict[str, Any]:
    """The guided step beside torch and beside a copy of as many bytes; launch-bound sizes as CUDA graphs too."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((2, 4, 64, 64), (8, 4, 128, 128), (16, 1 << 20)):
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


def ops() -> dict[str, Any]:
    """Every op in bfloat16, at the sizes that its spec finds worth timing, beside its reference and its floor."""
    results: dict[str, Any] = {}
    rate = matmul_rate(torch.bfloat16, 0.2, torch.device("cuda"))
    for spec in SPECS.values():
        if not {"cuda", "triton"} & set(spec.backends):
            continue
        for example in spec.benchmarks(torch.bfloat16):
            arguments = to_gpu(example.arguments)
            calls: dict[str, Call] = {
                "pygen": partial(spec.function, **arguments),
                "eager": partial(spec.reference, **arguments),
                "stream": copy_call(spec.bytes_moved(example), torch.device("cuda")),
            }
            name = f"{spec.name}, {example.name}"
            try:
                us = {column: spread["median"] for column, spread in times_of(calls, 0.02).items()}
            except Exception as error:  # the others go on
                results[name] = {"error": repr(error)[:500]}
                continue
            floor = max(us["stream"], 1e6 * spec.flops(example) / rate)
            results[name] = {"us": us, "share_of_floor": floor / us["pygen"]}
    return results


LONG = ((4, 16, 4096, 4096, 64), (2, 16, 4096, 4096, 128))
ATTENTION = (*SHAPES, *LONG)


def attention() -> dict[str, Any]:
    """Forwards and backwards beside torch's kernels and flex_attention, on q, k and v as a projection leaves them."""
    flex = torch.compile(flex_attention, dynamic=False)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    results = {}
    rate = matmul_rate(torch.bfloat16, 0.3, torch.device("cuda"))

    def by(backend: SDPBackend, function: Any) -> Any:
        def call(*qkv: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                result: Tensor = function(*qkv)
                return result

        return call

    peers = {
        "pygen": pygen.attention,
        "flash": by(SDPBackend.FLASH_ATTENTION, sdpa),
        "cudnn": by(SDPBackend.CUDNN_ATTENTION, sdpa),
        "efficient": by(SDPBackend.EFFICIENT_ATTENTION, sdpa),
        "flex": flex,
    }
    for shape in ATTENTION:
        leaves = [tensor.cuda() for tensor in drawn(shape, torch.bfloat16)]
        for learned in (False, True):
            q, k, v = (leaf.detach().requires_grad_(learned) for leaf in leaves)
            calls: dict[str, Call] = {}
            refused = {}
            for name, function in peers.items():
                if name == "flex" and shape not in LONG:  # it compiles for every shape
                    continue
                try:
                    call: Call = partial(function, q, k, v)
                    if learned:
                        result = call()
                        call = partial(torch.autograd.grad, result, (q, k, v), torch.ones_like(q), retain_graph=True)
                    call()
                    torch.cuda.synchronize()
                    calls[name] = call
                except Exception as error:
                    refused[name] = repr(error)[:200]
            flops = (10 if learned else 4) * q.numel() * k.shape[2]
            times = {name: spread["median"] for name, spread in times_of(calls, 0.05).items()}
            best = min((us for name, us in times.items() if name != "pygen"), default=math.nan)
            results[f"{shape}{', gradients' if learned else ''}"] = {
                "us": times,
                "refused": refused,
                "tflops": flops / times["pygen"] / 1e6,
                "product_tflops": rate / 1e12,
                "over_best": best / times["pygen"],
            }
    return results


def decoder() -> dict[str, Any]:
    """A random Llama by CUDA graphs, beside transformers' forward and what reading its weights takes."""
    results: dict[str, Any] = {}
    for size in ("125M", "1.1B"):
        files = Checkpoint(size)
        for name in ("bfloat16", "int8", "int4 by 32"):
            weights, group = FORMATS[name]["format"], FORMATS[name].get("group")
            made = pygen.Decoder.from_pretrained(files.directory, weights, group=group, device="cuda")
            model, tokens = made.model, 32
            weight_bytes = sum(linear.weight.nbytes for layer in model.layers for linear in linears(layer).values())
            weight_bytes += model.head.weight.nbytes
            entry: dict[str, Any] = {"weight_bytes": weight_bytes}
            stream = times_of({"stream": copy_call(weight_bytes, torch.device("cuda"))}, 0.05)["stream"]["median"]
            for batch in (1, 8, 64):
                call = turns(Ours(model, batch), tokens)
                call()
                us = 1e6 * min(timed(call) for _ in range(3)) / tokens
                entry[f"batch {batch}"] = {"us_per_step": us, "tokens_per_s": 1e6 * batch / us, "floor_us": stream}
            prompt = list(range(3, 3 + 256))
            entry["prefill of 256, us"] = 1e6 * min(timed(lambda: made.prefill(prompt).close()) for _ in range(4))  # noqa: B023
            results[f"{size}, {name}"] = entry
        theirs = Transformers(files.directory, "cuda")
        call = turns(theirs, 8)
        call()
        results[f"{size}, transformers, bfloat16"] = {"us_per_step": 1e6 * min(timed(call) for _ in range(3)) / 8}
    return results


def timed(call: Call) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


STAGES = {
    "machine": machine, "specs": specs, "sanitizers": sanitizers, "steps": steps, "ops": ops, "attention": attention,
    "decoder": decoder,
}  # fmt: skip


def main(names: Sequence[str] = ()) -> int:
    """The stages of these names, or all."""
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    failed = []
    for name, stage in STAGES.items():
        if names and name not in ("machine", *names):
            continue
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
    sys.exit(main(sys.argv[1:]))
