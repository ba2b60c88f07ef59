"""Beam search beside transformers', and the copies of pages that it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pygen
from pygen.autoregressive.cache import PAGE, PagePool, Pages
from tests.decoder_families import saved

PROMPT = torch.randint(1, 199, (61,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("beams")


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 1},
        {"num_beams": 4, "num_return_sequences": 4},
        {"num_beams": 5, "num_return_sequences": 2, "stop_tokens": range(3, 40)},
        {"num_beams": 3, "stop_tokens": range(40), "early_stopping": True, "length_penalty": 0.5},
        {"num_beams": 4, "stop_tokens": range(10), "early_stopping": "never", "length_penalty": 2.0},
        {"num_beams": 4, "stop_tokens": [7, 9], "early_stopping": "never", "length_penalty": -1.0},
    ],
)
@pytest.mark.parametrize("family", ["llama-3", "mistral", "gpt2"])
def test_beams_are_transformers(family: str, how: dict[str, Any], folder: Path) -> None:
    model, directory = saved(family, folder)
    decoder = pygen.Decoder.from_pretrained(directory, "float32", cache_tokens=1024)
    stops = how.get("stop_tokens")
    theirs: Any = model.generate(
        PROMPT[None], max_new_tokens=40, do_sample=False, attention_mask=torch.ones_like(PROMPT[None]),
        return_dict_in_generate=True, output_scores=True, pad_token_id=min(stops, default=0) if stops else 0,
        eos_token_id=list(stops) if stops else None, **{k: v for k, v in how.items() if k != "stop_tokens"},
    )  # fmt: skip
    ids, scores = decoder.beam_search(PROMPT, 40, **how)
    assert torch.equal(ids, theirs.sequences)
    if how["num_beams"] > 1:
        torch.testing.assert_close(scores, theirs.sequences_scores, rtol=1e-4, atol=1e-5)
    assert decoder._pool.free == decoder._pool.pages


def test_sequences_of_a_session_are_selected(folder: Path) -> None:
    """Each goes on as the one that it continues, whatever the others write."""
    decoder = pygen.Decoder.from_pretrained(saved("llama-3", folder)[1], "bfloat16")
    rows, drawn = [[1, 2, 3] * 21, [4, 5, 6] * 21], torch.Generator().manual_seed(1)
    with decoder.prefill(rows) as session:
        for chosen in ([0, 0, 1], [2, 1, 0], [1, 1], [0, 1, 0, 1, 1]):
            session.select(chosen)
            new = torch.randint(199, (len(chosen),), generator=drawn).tolist()
            session.step(new)
            rows = [[*rows[row], token] for row, token in zip(chosen, new, strict=True)]
            for logits, row in zip(session.logits, rows, strict=True):
                with decoder.prefill(row[:63]) as alone:
                    for token in row[63:]:
                        alone.step([token])
                    assert torch.equal(logits, alone.logits[0])
        for wrong in ([], [5], [-1], [True], ["0"]):
            with pytest.raises(ValueError, match="rows must name some of 5 sequences"):
                session.select(wrong)  # type: ignore[arg-type]
    assert decoder._pool.free == decoder._pool.pages


def test_a_shared_page_is_copied_by_who_writes(folder: Path) -> None:
    decoder = pygen.Decoder.from_pretrained(saved("gpt2", folder)[1], "bfloat16", cache_dtype=torch.int8)
    pool: PagePool = decoder._pool
    free = pool.free
    one = Pages(pool)
    one.reserve(PAGE + 5)
    one.tokens = PAGE + 5
    for layer in pool.layers[0]:
        for tensor in layer:
            assert tensor is not None
            tensor[one.list[1]].fill_(3)
    other = one.fork()
    assert other.list == one.list
    assert other.reserve(PAGE + 6)
    assert other.list[0] == one.list[0]
    assert other.list[1] != one.list[1]
    assert all((tensor[other.list[1]] == 3).all() for layer in pool.layers[0] for tensor in layer if tensor is not None)
    assert not one.reserve(PAGE + 6)  # nobody else has it any more
    one.release()
    other.release()
    assert pool.free == free


def test_wrong_beams_are_named(folder: Path) -> None:
    decoder = pygen.Decoder.from_pretrained(saved("gpt2", folder)[1], "bfloat16", cache_tokens=128)
    for name, value in (
        ("num_beams", 0), ("num_beams", 200), ("num_beams", 2.0), ("num_return_sequences", 3), ("early_stopping", "yes")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must be"):
            decoder.beam_search([1, 2], 4, **{"num_beams": 2, name: value})
    with pytest.raises(ValueError, match="max_new_tokens"):
        decoder.beam_search([1, 2], 0, num_beams=2)
    with pytest.raises(RuntimeError, match="cache of 128 tokens is full: give cache_tokens"):
        decoder.beam_search([1] * 60, 60, num_beams=4)
    assert decoder._pool.free == decoder._pool.pages
