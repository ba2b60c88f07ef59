"""The running batch: whatever joins, leaves, waits or is preempted, each request gets what it gets alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import pygen
from pygen.autoregressive.cache import PAGE
from pygen.autoregressive.request import Request
from pygen.autoregressive.step import Step
from tests.decoder_families import saved


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama-3", tmp_path_factory.mktemp("decoding"))[1]


@pytest.fixture(scope="module")
def decoder(directory: Path) -> pygen.Decoder:
    return pygen.Decoder.from_pretrained(directory, "bfloat16")


def drawn(generator: random.Random) -> tuple[list[int], int, dict[str, Any]]:
    """A prompt, a count and settings."""
    prompt = [
        generator.randrange(199) for _ in range(generator.choice([1, 2, 63, 64, 65, generator.randrange(1, 300)]))
    ]
    settings: dict[str, Any] = generator.choice(
        [
            {},
            {"temperature": 1.0},
            {"temperature": 0.7, "top_p": 0.9},
            {"temperature": 1.3, "top_k": 20, "min_p": 0.02},
            {"temperature": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
            {"temperature": 1.0, "stop_tokens": range(0, 199, 17)},
        ]
    )
    return prompt, generator.randrange(1, 80), settings | {"seed": generator.randrange(2**64)}


def alone(directory: Path, requests: list[Any], weights: Any = "bfloat16") -> list[list[int]]:
    results = []
    lonely = pygen.Decoder.from_pretrained(directory, weights, max_batch=1)
    for prompt, count, settings in requests:
        results.append(list(lonely.stream(prompt, count, **settings)))
    return results


def assert_each_gets(
    decoder: pygen.Decoder, requests: list[Any], expected: list[list[int]], generator: random.Random
) -> list[Request]:
    """Requests that join at random times get what is expected, and leave nothing behind."""
    waiting, running = list(zip(requests, expected, strict=True)), []
    while waiting or decoder.busy:
        for _ in range(generator.randrange(4)):
            if waiting:
                (prompt, count, settings), tokens = waiting.pop(0)
                running.append((decoder.submit(prompt, count, **settings), tokens))
        decoder.step()
    for request, tokens in running:
        assert request.tokens == tokens
        assert request.ended in ("length", "stop")
    assert decoder._pool.free == decoder._pool.pages
    return [request for request, _ in running]


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_requests_get_what_they_get_alone(directory: Path, weights: Any) -> None:
    """200 of them, in a cache of a third of what they need at once, joining at random times."""
    generator = random.Random(0)
    requests = [drawn(generator) for _ in range(200 if weights == "bfloat16" else 30)]
    expected = alone(directory, requests, weights)
    most = sorted((-(-(len(prompt) + count) // PAGE) for prompt, count, _ in requests), reverse=True)[:16]
    decoder = pygen.Decoder.from_pretrained(directory, weights, max_batch=16, cache_tokens=sum(most) // 3 * PAGE)
    assert_each_gets(decoder, requests, expected, generator)


def test_a_preempted_request_goes_on(directory: Path) -> None:
    decoder = pygen.Decoder.from_pretrained(directory, "bfloat16", cache_tokens=3 * PAGE)
    requests = [([5 * i + 1] * 30, 100, {"temperature": 1.0, "seed": i}) for i in range(2)]
    expected = alone(directory, requests)
    running = [decoder.submit(prompt, count, **settings) for prompt, count, settings in requests]
    preempted = False
    while decoder.busy:
        decoder.step()
        preempted |= any(request.tokens and request.ended is None and request._pages is None for request in running)
    assert preempted
    assert [request.tokens for request in running] == expected


def test_a_shared_beginning_is_computed_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = pygen.Decoder.from_pretrained(directory, "bfloat16", cache_tokens=12 * PAGE)
    beginning = [(11 * i) % 199 for i in range(3 * PAGE)]
    requests = [([*beginning, 5 + i], 30, {"temperature": 1.0, "seed": i}) for i in range(4)]
    expected = alone(directory, requests)
    computed = []
    run = type(decoder.model).hidden

    def counted(model: Any, tokens: torch.Tensor, *state: Any, prompt: bool = False) -> torch.Tensor:
        computed.append(tokens.shape[1] if prompt else 0)  # the rest are steps
        return run(model, tokens, *state, prompt=prompt)

    monkeypatch.setattr(type(decoder.model), "hidden", counted)
    running = [decoder.submit(prompt, count, **settings) for prompt, count, settings in requests]
    while decoder.busy:
        decoder.step()
    assert [request.tokens for request in running] == expected
    assert sum(computed) == 3 * PAGE
    assert decoder._pool.free == decoder._pool.pages
    assert list(decoder.stream(requests[2][0], 30, temperature=1.0, seed=2)) == expected[2]
    assert sum(computed) == 3 * PAGE  # a page is known as long as its memory is not wanted
    for i in range(12):  # and forgotten then
        decoder.generate([i] * (2 * PAGE), 4)
    assert list(decoder.stream(requests[1][0], 30, temperature=1.0, seed=1)) == expected[1]
    assert sum(computed) > 3 * PAGE


def test_stop_strings_end_a_request() -> None:
    from pygen.cli import TEXT

    decoder = pygen.Decoder.from_pretrained(TEXT, "float32")
    prompt = decoder.text.encode("The for statement")
    whole = decoder.submit(prompt, 80, stop=["\0"])
    while decoder.busy:
        decoder.step()
    assert decoder.text.decode(whole.tokens) == whole.text
    string = whole.text[20:23]
    stopped = decoder.submit(prompt, 80, stop=["never there", string])
    while decoder.busy:
        decoder.step()
    assert stopped.ended == "stop"
    assert stopped.text == whole.text[: whole.text.find(string)]
    assert stopped.tokens == whole.tokens[: len(stopped.tokens)]
    with pytest.raises(ValueError, match="stop must hold strings"):
        decoder.submit(prompt, 4, stop=[""])


def test_a_request_that_never_fits_is_refused(directory: Path) -> None:
    decoder = pygen.Decoder.from_pretrained(directory, "bfloat16", cache_tokens=2 * PAGE)
    with pytest.raises(ValueError, match=f"do not fit in a cache of {2 * PAGE}: give cache_tokens"):
        decoder.submit([1] * 100, 29)
    assert len(list(decoder.stream([1] * 100, 28))) == 28


def test_who_stops_listening_leaves_nothing_behind(decoder: pygen.Decoder) -> None:
    free = decoder._pool.free
    whole = list(decoder.stream([1, 2, 3], 20, temperature=1.0))
    listener = decoder.stream([1, 2, 3], 20, temperature=1.0)
    assert [next(listener) for _ in range(5)] == whole[:5]
    listener.close()
    broken = decoder.stream([1, 2, 3], 20)
    next(broken)
    with pytest.raises(KeyboardInterrupt):
        broken.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert not decoder.busy
    assert decoder._pool.free == free
    assert list(decoder.stream([1, 2, 3], 20, temperature=1.0)) == whole


def test_an_error_in_a_step_leaves_the_decoder_usable(decoder: pygen.Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decoder.generate([1, 2, 3], 20)
    run, calls = Step.run, []

    def interrupted(step: Step) -> list[list[int]]:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return run(step)

    monkeypatch.setattr(Step, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.generate([1, 2, 3], 20)
    assert not decoder.busy
    assert torch.equal(decoder.generate([1, 2, 3], 20), whole)


def test_two_streams_take_turns(decoder: pygen.Decoder) -> None:
    one, other = ([3, 1, 4], {"temperature": 1.0, "seed": 1}), ([1, 5], {"temperature": 0.0})
    expected = [list(decoder.stream(prompt, 30, **settings)) for prompt, settings in (one, other)]
    streams = [decoder.stream(prompt, 30, **settings) for prompt, settings in (one, other)]
    mixed = [list(pair) for pair in zip(*streams, strict=True)]
    assert [list(tokens) for tokens in zip(*mixed, strict=True)] == expected


def test_samples_of_one_prompt_differ_and_repeat(decoder: pygen.Decoder) -> None:
    settings = {"temperature": 1.0, "seed": 5}
    requests = [decoder.submit([7, 8, 9], 24, sample=i, **settings) for i in range(4)]
    while decoder.busy:
        decoder.step()
    tokens = [request.tokens for request in requests]
    assert len({tuple(one) for one in tokens}) == 4
    assert list(decoder.stream([7, 8, 9], 24, sample=2, **settings)) == tokens[2]


def test_generate_pads_what_ends_sooner(decoder: pygen.Decoder) -> None:
    first = list(decoder.stream([1, 2, 3], 12))
    ids = decoder.generate([[1, 2, 3], [4, 5]], 12, stop_tokens=[first[3]])
    assert ids[0].tolist()[: 3 + 4] == [1, 2, 3, *first[:4]]
    assert set(ids[0].tolist()[first.index(first[3]) + 4 :]) <= {first[3]}
    assert ids.shape[0] == 2


def test_a_session_is_a_generation(decoder: pygen.Decoder) -> None:
    expected = decoder.generate([[1, 2, 3], [9, 8, 7]], 70)
    with decoder.prefill([[1, 2, 3], [9, 8, 7]]) as session:
        for i in range(3, 73):
            assert torch.equal(session.logits.float().argmax(-1), expected[:, i])
            session.step(expected[:, i])
    with pytest.raises(ValueError, match="positions"):
        session.step(expected[:, 0])
    with pytest.raises(ValueError, match="ids must be of one length"):
        decoder.prefill([[1, 2], [3]])


def test_an_int8_cache_is_close(directory: Path) -> None:
    full = pygen.Decoder.from_pretrained(directory, "bfloat16")
    eighth = pygen.Decoder.from_pretrained(directory, "bfloat16", cache_dtype=torch.int8)
    prompt = [[(7 * i) % 199 for i in range(90)]]
    with full.prefill(prompt) as one, eighth.prefill(prompt) as other:
        reference = one.logits.float().log_softmax(-1)
        assert (other.logits.float().log_softmax(-1) - reference).abs().mean() < 0.1 * reference.std()
