"""diffusers' schedulers in float64: they round to float32 by name, so inside ``in_float64`` that name means float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch


class _Float64:
    """A module in which float32 is another name of float64."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@contextmanager
def in_float64(scheduler: type) -> Iterator[None]:
    """Make, prepare and step a scheduler of this class inside."""
    module = sys.modules[scheduler.__module__]
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        for name in ("torch", "np"):
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, _Float64(getattr(module, name))))
        torch.set_default_dtype(torch.float64)  # some tensors are made without naming a dtype
        try:
            yield
        finally:
            torch.set_default_dtype(default)
