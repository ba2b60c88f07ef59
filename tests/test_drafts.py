"""Drafts change when tokens come, and never which."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pygen
from pygen.autoregressive.cache import PAGE
from pygen.autoregressive.prompt_lookup import SIZES, PromptLookup
from tests.decoder_families import saved
from tests.test_decoding import alone, assert_each_gets, drawn


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama-3", tmp_path_factory.mktemp("drafts"))[1]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> pygen.Decoder:
    """A decoder that agrees with the other by chance alone."""
    return pygen.Decoder.from_pretrained(saved("gpt2", tmp_path_factory.mktemp("drafts"))[1], "bfloat16")


@pytest.mark.parametrize("draft", ["prompt", "itself in int8", "a stranger"])
def test_requests_get_what_they_get_without(directory: Path, stranger: pygen.Decoder, draft: str) -> None:
    """60 of all settings, in a cache of a third of what they need at once, joining at random times."""
    generator = random.Random(1)
    requests = [drawn(generator) for _ in range(60)]
    requests += [([5, 6, 7, 8] * 12, 60, settings) for settings in ({}, {"temperature": 0.3, "frequency_penalty": 0.1})]
    expected = alone(directory, requests)
    most = sorted((-(-(len(prompt) + count) // PAGE) for prompt, count, _ in requests), reverse=True)[:8]
    who: Any = {"prompt": "prompt", "a stranger": stranger}.get(draft)
    decoder = pygen.Decoder.from_pretrained(
        directory, "bfloat16", max_batch=8, cache_tokens=sum(most) // 3 * PAGE,
        draft=who or pygen.Decoder.from_pretrained(directory, "int8"), draft_tokens=generator.choice([2, 3, 5]),
    )  # fmt: skip
    ended = assert_each_gets(decoder, requests, expected, generator)
    drafted, accepted = (sum(getattr(request, name) for request in ended) for name in ("drafted", "accepted"))
    assert drafted > 0
    assert (accepted > 0.3 * drafted) == (draft == "itself in int8")


def steps(decoder: pygen.Decoder, prompt: list[int], count: int, **how: Any) -> tuple[list[int], int]:
    request, made = decoder.submit(prompt, count, **how), 0
    while decoder.busy:
        decoder.step()
        made += 1
    return request.tokens, made


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_whoever_agrees_saves_steps(directory: Path, temperature: float) -> None:
    """A draft by the model itself draws what the model draws, at any temperature."""
    plain = pygen.Decoder.from_pretrained(directory, "float32")
    decoder = pygen.Decoder.from_pretrained(directory, "float32", draft=plain, draft_tokens=3)
    how = {"temperature": temperature, "top_p": 0.95, "seed": 3}
    expected, one_by_one = steps(plain, [1, 2, 3], 60, **how)
    assert steps(decoder, [1, 2, 3], 60, **how) == (expected, 15)
    assert one_by_one == 60


def test_a_prompt_that_repeats_saves_steps() -> None:
    from pygen.cli import TEXT

    plain = pygen.Decoder.from_pretrained(TEXT, "float32")
    decoder = pygen.Decoder.from_pretrained(TEXT, "float32", draft="prompt", draft_tokens=8)
    prompt = plain.text.encode("The for statement is used to iterate. The while statement is used to iterate. The for")
    expected, one_by_one = steps(plain, prompt, 120)
    tokens, made = steps(decoder, prompt, 120)
    assert tokens == expected
    assert made < 0.8 * one_by_one


def test_the_last_positions_are_taken_one_by_one(directory: Path) -> None:
    plain = pygen.Decoder.from_pretrained(directory, "float32")
    decoder = pygen.Decoder.from_pretrained(directory, "float32", draft=plain, draft_tokens=15)
    assert decoder.generate([1] * 400, 112).tolist() == plain.generate([1] * 400, 112).tolist()


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_lookup_is_the_latest_longest_run(sequence: list[int], count: int, first: int) -> None:
    lookup = PromptLookup()
    lookup.draft(sequence[:first], count)  # what is known grows with the sequence
    expected: list[int] = []
    for size in SIZES:
        ends = [i for i in range(size, len(sequence)) if sequence[i - size : i] == sequence[-size:]]
        if ends:
            grown = list(sequence)
            for i in range(count):
                grown.append(grown[ends[-1] + i])
            expected = grown[len(sequence) :]
            break
    assert lookup.draft(sequence, count) == expected


def test_wrong_drafts_are_named(directory: Path, stranger: pygen.Decoder, tmp_path: Path) -> None:
    for count in (0, 16, 1.5, True):
        with pytest.raises(ValueError, match="draft_tokens must be an integer from 1 to 15"):
            pygen.Decoder(stranger.model, draft="prompt", draft_tokens=count)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match='draft must be a Decoder, "prompt" or None'):
        pygen.Decoder(stranger.model, draft="ngram")  # type: ignore[arg-type]
    short = pygen.Decoder.from_pretrained(directory, "bfloat16", max_length=128)
    with pytest.raises(ValueError, match="draft has positions 128, and the model 512"):
        pygen.Decoder.from_pretrained(directory, "bfloat16", draft=short)
    from pygen.cli import TEXT

    with pytest.raises(ValueError, match="draft has vocabulary"):
        pygen.Decoder.from_pretrained(directory, "bfloat16", draft=pygen.Decoder.from_pretrained(TEXT))
