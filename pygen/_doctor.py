"""pygen.doctor(): what is installed, what this machine can do, and which ops have which backend."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import pygen
from pygen import _C
from pygen.ops import SPECS
from pygen.ops.backend import BACKENDS


def doctor() -> None:
    """Print versions, the instruction set in use, whether CUDA is built and usable, and every op x backend."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    facts = Table.grid(padding=(0, 3))
    for name, value in _facts():
        facts.add_row(name, value)
    ops = Table("op", *BACKENDS, box=SIMPLE_HEAD)
    for spec in SPECS.values():
        ops.add_row(spec.name, *(_status(backend, spec.backends) for backend in BACKENDS))
    console = Console(highlight=False, markup=False)
    console.print(facts)
    console.print(ops)


def _status(backend: str, backends: tuple[str, ...]) -> str:
    if backend not in backends:
        return "-"
    return "not built" if backend == "cuda" and not _C.CUDA_BUILT else "yes"


def _facts() -> list[tuple[str, str]]:
    facts = [("pygen", pygen.__version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    for package in ("numpy", "triton", "diffusers", "transformers"):
        try:
            facts.append((package, version(package)))
        except PackageNotFoundError:
            facts.append((package, "not installed"))
    facts += [
        ("CPU instructions", f"{_C.isa()} in use"),
        ("  compiled in", ", ".join(_C.compiled_isas())),
        ("  supported here", ", ".join(_C.supported_isas())),
    ]
    if "PYGEN_CPU_ISA" in os.environ:
        facts.append(("  PYGEN_CPU_ISA", os.environ["PYGEN_CPU_ISA"]))
    facts.append(("threads", str(torch.get_num_threads())))
    usable = torch.cuda.is_available()
    facts += [
        ("CUDA in torch", torch.version.cuda or "not built"),
        ("CUDA in pygen", "built" if _C.CUDA_BUILT else "not built"),
        ("GPU", torch.cuda.get_device_name() if usable else "none usable"),
    ]
    return facts
