"""The demo's second half: text by the model in the package, beside transformers on the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import pygen

PROMPT = "The for statement"
COUNT = 200  # tokens, of a byte each


def run(directory: Path) -> bool:
    """Print what the model says, and tokens per second; whether the tokens are transformers' (True without it)."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    table = Table("tokens per second", "float32", "bfloat16", "int8", "int4", box=SIMPLE_HEAD)
    speeds, tokens = [], {}
    for weights in ("float32", "bfloat16", "int8", "int4"):
        decoder = pygen.Decoder.from_pretrained(directory, weights)
        ids = decoder.text.encode(PROMPT)
        tokens[weights], speed = _timed(partial(_continued, decoder, ids))
        speeds.append(speed)
        if weights == "bfloat16":
            console.print(PROMPT + decoder.text.decode(tokens[weights]), style="italic")
    table.add_row("pygen", *(f"{speed:.0f}" for speed in speeds))
    theirs = _transformers(directory, ids)
    if theirs is not None:
        table.add_row("transformers", f"{theirs[1]:.0f}")
    console.print(table)
    if theirs is None:
        return True
    same = tokens["float32"] == theirs[0]
    console.print(f"{COUNT} tokens in float32: {'the same' if same else 'not the same'} as transformers'")
    return same


def _continued(decoder: pygen.Decoder, ids: list[int]) -> list[int]:
    return list(decoder.stream(ids, COUNT, stop_tokens=()))


def _timed(generate: Callable[[], list[int]]) -> tuple[list[int], float]:
    generate()
    begin = time.perf_counter()
    tokens = generate()
    return tokens, len(tokens) / (time.perf_counter() - begin)


def _transformers(directory: Path, ids: list[int]) -> tuple[list[int], float] | None:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ModuleNotFoundError:
        return None
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([ids])

    def generate() -> list[int]:
        with torch.inference_mode():
            result = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=COUNT, do_sample=False
            )
        return list(result[0, len(ids) :].tolist())

    return _timed(generate)
