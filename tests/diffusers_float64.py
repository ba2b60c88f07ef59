"""diffusers' schedulers in float64: they round to float32 by name, so inside ``in_float64`` that name means float64.

A scheduler draws other noise in another dtype, so a run in float64 that is to be compared repeats the draws of the run
that it is compared with: ``Draws``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class _Float64:
    """A module in which float32 is another name of float64."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


class _FloatIsDouble(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (Tensor.double if function is Tensor.float else function)(*args, **(kwargs or {}))


@contextmanager
def in_float64(scheduler: type) -> Iterator[None]:
    """Make, prepare and step a scheduler of this class inside."""
    # They build on each other's classes and functions.
    family = [module for name, module in sys.modules.items() if name.startswith("diffusers.schedulers.scheduling_")]
    rebound = {
        (module, name): vars(module)[name]
        for module in {sys.modules[scheduler.__module__], *family}
        for name in ("torch", "np")
        if name in vars(module)
    }
    default = torch.get_default_dtype()
    try:
        for (module, name), library in rebound.items():
            setattr(module, name, _Float64(library))
        torch.set_default_dtype(torch.float64)  # some tensors are made without naming a dtype
        with _FloatIsDouble():
            yield
    finally:
        torch.set_default_dtype(default)
        for (module, name), library in rebound.items():
            setattr(module, name, library)


class OnlyFloat64(TorchDispatchMode):
    """Raises where an operation reads or makes floating-point numbers of fewer digits."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                assert leaf.dtype == torch.float64, f"{function} has {leaf.dtype}"
        return result


class Draws(TorchFunctionMode):
    """Keeps what is drawn inside; ``repeated`` gives a mode in which the same is drawn again, in float64."""

    DRAWING = (torch.randn, torch.rand, torch.randint, torch.multinomial, Tensor.uniform_)

    def __init__(self, kept: list[Tensor] | None = None) -> None:
        super().__init__()
        self.kept: list[Tensor] = kept if kept is not None else []
        self.repeats = kept is not None
        self.next = 0

    def repeated(self) -> Draws:
        return Draws(self.kept)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in self.DRAWING:
            return function(*args, **(kwargs or {}))
        value = self.draw(lambda: function(*args, **(kwargs or {})))
        return args[0].copy_(value) if function is Tensor.uniform_ else value

    def draw(self, function: Any) -> Any:
        if self.repeats:
            value = self.kept[self.next]
            self.next += 1
            with _disable_current_modes():
                return value.double() if value.is_floating_point() else value.clone()
        mark = len(self.kept)
        value = function()
        self.kept[mark:] = [value.clone()]  # and not what the draw was made of
        return value

    def __enter__(self) -> Draws:
        # The increments of torchsde's Brownian tree are drawn, and then interpolated in the dtype of the sample.
        from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

        increment = BrownianTreeNoiseSampler.__call__
        self.patch = mock.patch.object(
            BrownianTreeNoiseSampler, "__call__", lambda *args: self.draw(lambda: increment(*args))
        )
        self.patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.stop()
        if self.repeats and error[0] is None:
            assert self.next == len(self.kept), f"{self.next} draws, of {len(self.kept)}"
