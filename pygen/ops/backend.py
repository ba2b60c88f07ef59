"""Which implementation an op runs: the dispatcher's choice by device, or one that the caller asks for by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from pygen import _C

BACKENDS = ("reference", "cpu", "cuda", "triton")
_CPU = torch.device("cpu")
_forced: str | None = None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside by one backend: "reference", "cpu", "cuda" or "triton".

    For comparing: the choice holds for the whole process. The first op that lacks the backend raises RuntimeError;
    nothing falls back silently.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def reference_is_asked_for() -> bool:
    """By ``backend``: then layers run as plain PyTorch too."""
    return _forced == "reference"


def use_reference(op: str, backends: tuple[str, ...], device: torch.device) -> bool:
    """Whether the reference was asked for; raises where the backend asked for cannot run this op here."""
    here = "cpu" if device == _CPU else device.type  # which torch makes anew each time: it costs as much as the rest
    name = here if _forced is None else _forced
    if name == "cuda" and _forced is None and "cuda" not in backends and "triton" in backends:
        name = "triton"
    if name == "reference":
        return True
    if name not in backends:
        raise RuntimeError(
            f"{op} has no backend {name!r}; it has {', '.join(backends)}. Ask for the reference by name: "
            'with pygen.backend("reference")'
        )
    if name != here and name != "triton":  # of which use_triton knows
        raise RuntimeError(f"{op} was asked to run by backend {name!r} on tensors that lie on {device}")
    if name == "cuda" and not _C.CUDA_BUILT:
        raise RuntimeError(
            f"{op} has a CUDA kernel, but this pygen was built without: build it where torch has CUDA and nvcc is found"
        )
    return False


def use_triton(op: str, device: torch.device) -> bool:
    """Whether Triton's interpreter was asked for, on the CPU; elsewhere the dispatcher finds the kernel by device."""
    if _forced != "triton" or device.type == "cuda":
        return False
    triton_kernels(op)
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"{op} was asked to run by backend 'triton' on tensors that lie on {device}: move them to a GPU, or start "
            "Python with TRITON_INTERPRET=1 to have Triton's interpreter run it, slowly"
        )
    return True


@cache
def triton_kernels(op: str) -> Any:
    """The module of an op's Triton kernels. Triton is imported here and nowhere before."""
    if find_spec("triton") is None:
        raise RuntimeError(f"{op} runs on a GPU by Triton, which is not installed: pip install triton")
    return import_module(f"pygen.kernels.triton.{op}")
