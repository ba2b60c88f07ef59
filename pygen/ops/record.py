"""Recording: what a function of pygen's ops launches, replayed without Python.

On a CPU each launch, its arguments as plain data, goes into a program that C++ replays with threads that stay warm; on
a GPU the program is a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pygen import _C

Result = TypeVar("Result")
_aten = torch.ops.aten
# What only makes memory, and, of `full`, numbers that nothing changes: done once, when the function is recorded.
_MAKES = {
    _aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default,
    _aten.new_empty_strided.default, _aten.full.default,
}  # fmt: skip


class Program(Generic[Result]):
    """What ``record`` makes; calling it runs all launches again and gives the function's result, the same tensors."""

    def __init__(self, function: Callable[[], Result], device: torch.device) -> None:
        self._kept: list[Tensor] = []
        self._replay: Callable[[], None]
        with torch.no_grad():
            self._launches, self._replay, self.result = (
                self._record(function) if device.type == "cpu" else self._capture(function)
            )

    def _record(self, function: Callable[[], Result]) -> tuple[int, Callable[[], None], Result]:
        program = _C.Program()
        with _Recording(program, self._kept):
            result = function()
        return len(program), program.replay, result

    def _capture(self, function: Callable[[], Result]) -> tuple[int, Callable[[], None], Result]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), _Watching(self._kept):
            result = function()
        return 1, graph.replay, result

    def __len__(self) -> int:
        """The number of launches; a CUDA graph counts as one."""
        return self._launches

    def __call__(self) -> Result:
        self._replay()
        return self.result


def record(function: Callable[[], Result], device: str | torch.device = "cpu") -> Program[Result]:
    """Record what a function of pygen's ops launches, to be replayed without Python.

    The function is called once and nothing is computed by that: its tensors hold values only after the first replay.
    All that varies from replay to replay (positions, lengths, seeds) is read from tensors that the caller writes into
    between replays; the memory of every tensor that the function met stays as it is and is kept. Checks of what tensors
    hold are not made at a replay: a kernel passes over what it must not read. Views, and tensors that are made but not
    computed, are part of the recording; ``torch.full`` is done once.

    Args:
        function: takes nothing; calls pygen's ops on tensors of one device.
        device: "cpu", or the CUDA device whose stream is captured. On CUDA the function must have run once before.

    Returns:
        A ``Program``: call it for the function's result.

    Raises:
        RuntimeError: naming the op, where the function meets one that is not pygen's.
    """
    return Program(function, torch.device(device))


class _Watching(TorchDispatchMode):
    """Lets pygen's ops and what computes nothing pass, and keeps all tensors that they meet."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "pygen":
            self._kept += [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            return self._run(func, args, kwargs)
        if func.is_view or func in _MAKES:
            return func(*args, **kwargs)
        raise RuntimeError(f"record: {func} is not an op of pygen, and is not recorded")

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


class _Recording(_Watching):
    def __init__(self, program: _C.Program, kept: list[Tensor]) -> None:
        super().__init__(kept)
        self._program = program

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._program.start()
        try:
            return func(*args, **kwargs)
        finally:
            self._program.stop()
