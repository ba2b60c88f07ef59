"""llama.cpp as a peer: llama-cpp-python, where it can be imported, by its C API."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LONGEST = 1024  # tokens of a sequence


@cache
def library() -> Any:
    """The module, its log silenced."""
    module = import_module("llama_cpp")
    module.silent = module.llama_log_callback(lambda level, text, data: None)  # kept: C calls it
    module.llama_log_set(module.silent, ctypes.c_void_p(0))
    module.llama_backend_init()
    return module


class Llama:
    """A GGUF file, one sequence, greedy.

    extra_buffers: whether weights are repacked for kernels of their own (AMX, blocks of several rows).
    """

    def __init__(self, path: Path, threads: int, extra_buffers: bool) -> None:
        self._c = c = library()
        self.extra_buffers = extra_buffers
        how = c.llama_model_default_params()
        how.use_extra_bufts, how.n_gpu_layers = extra_buffers, 0
        self._model = c.llama_model_load_from_file(str(path).encode(), how)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {str(path)!r}")
        how = c.llama_context_default_params()
        how.n_ctx, how.n_threads, how.n_threads_batch = LONGEST, threads, threads
        self._context = c.llama_init_from_model(self._model, how)
        if not self._context:
            raise RuntimeError("llama.cpp has no memory for its context")
        self._sampler = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        c.llama_sampler_chain_add(self._sampler, c.llama_sampler_init_greedy())
        self._token = (c.llama_token * 1)()

    def prefill(self, tokens: Sequence[int]) -> None:
        """Begin a sequence."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        self._run((self._c.llama_token * len(tokens))(*tokens))
        self._token[0] = self._c.llama_sampler_sample(self._sampler, self._context, -1)

    def step(self) -> None:
        """Another token."""
        self._run(self._token)
        self._token[0] = self._c.llama_sampler_sample(self._sampler, self._context, -1)

    def logits(self) -> Tensor:
        """float32 (vocabulary,), of the newest token."""
        size = self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self._model))
        logits = ctypes.cast(self._c.llama_get_logits_ith(self._context, -1), ctypes.POINTER(ctypes.c_float * size))
        return torch.tensor(logits.contents[:])

    def _run(self, tokens: Any) -> None:
        code = self._c.llama_decode(self._context, self._c.llama_batch_get_one(tokens, len(tokens)))
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code}")

    def __del__(self) -> None:
        for free, what in (("sampler_free", "_sampler"), ("free", "_context"), ("model_free", "_model")):
            if getattr(self, what, None):
                getattr(self._c, f"llama_{free}")(getattr(self, what))


def open_llama(path: Path, threads: int) -> tuple[Llama, str]:
    """With extra buffers, unless a child process that tries them dies of them; and a line that says so.

    Builds of ggml are known that choose AMX kernels on a machine where these are illegal instructions.
    """
    command = [sys.executable, "-m", "bench.llama", str(path), str(threads)]
    code = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, check=False).returncode
    if code == 0:
        return Llama(path, threads, extra_buffers=True), "with its extra buffers (repacked weights)"
    died = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return Llama(path, threads, extra_buffers=False), f"without its extra buffers, of which a trial died ({died})"


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    trial = Llama(Path(sys.argv[1]), int(sys.argv[2]), extra_buffers=True)
    trial.prefill([1 + i % 64 for i in range(256)])
    for _ in range(2):
        trial.step()
    os._exit(0)  # what it leaves behind is not the question
