"""What is timed: cases, each with its columns, the bytes and flops of its floor, and results to be checked first."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from bench.measure import Call
from tests.error_rule import Triple, assert_error_rule

# In the table's order. "reference" is the float64 truth, "pygen..." are ours, all others are peers.
COLUMNS = (
    "reference", "eager", "torch.compile", "diffusers", "OpenVINO", "transformers", "llama.cpp",
    "pygen", "pygen, Philox", "pygen, out=", "pygen, alone",
)  # fmt: skip


@dataclass
class Work:
    """A piece of work, by column, with its tensors in place; ``results`` are what the error rule is asked about."""

    calls: dict[str, Call]
    bytes_moved: int
    flops: int
    dtype: torch.dtype
    results: Callable[[], Iterable[Triple]]
    stream: Call | None = None  # moves as many bytes; a copy at the same working set where left out
    data_in: str = ""  # where a call finds its data; in the caches, by their sizes, where left out
    tokens: int = 0  # that a call makes, where that is what counts
    remark: Callable[[], str] = str  # what is to be said of results that are right

    def red(self) -> str | None:
        """Why no time may be shown, or None."""
        try:
            assert_error_rule(self.results())
        except Exception as error:  # a kernel that raises is as red as one that is wrong
            return " ".join(str(error).split()) or type(error).__name__
        return None

    def compiles(self) -> bool:
        """Whether there is a torch.compile column; compiles it. A reference with a graph break is not a peer."""
        if "torch.compile" not in self.calls:
            return False
        try:
            self.calls["torch.compile"]()
        except torch._dynamo.exc.TorchDynamoException:
            return False
        return True


@dataclass(frozen=True)
class Case:
    """A line of a suite's table; its tensors are made when its turn comes."""

    suite: str
    name: str
    make: Callable[[], Work]
    part: str = ""  # with a table of its own

    def prepare(self) -> Work:
        give_back()
        torch._dynamo.reset()  # one formula at many sizes would run into the limit of recompilations
        torch.manual_seed(0)
        return self.make()

    def __str__(self) -> str:
        return f"{self.suite}: {self.name}"


def give_back() -> None:
    """Give the system the memory of what is no longer in use: models may be most of a machine's."""
    gc.collect()  # patched modules are in cycles
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)  # which glibc keeps of what was freed
