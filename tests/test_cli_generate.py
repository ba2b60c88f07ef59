"""pygen generate: the decoder's own tokens, as text and as JSON, and one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pygen
from pygen.cli import TEXT, main
from tests.decoder_families import saved

PROMPT = "The for statement"


@pytest.fixture(scope="module")
def decoder() -> pygen.Decoder:
    return pygen.Decoder.from_pretrained(TEXT)


def test_text_as_it_comes(decoder: pygen.Decoder, capsys: Any) -> None:
    assert main(["generate", "--prompt", PROMPT, "--max-new-tokens", "50"]) == 0
    captured = capsys.readouterr()
    tokens = list(decoder.stream(decoder.text.encode(PROMPT), 50))
    assert captured.out == PROMPT + decoder.text.decode(tokens) + "\n"
    assert captured.err == ""


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_json(weights: Any, capsys: Any) -> None:
    options = ["--temperature", "0.8", "--top-p", "0.9", "--seed", "7", "--weights", weights]
    assert main(["generate", "--prompt", PROMPT, "--max-new-tokens", "30", "--json", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    decoder = pygen.Decoder.from_pretrained(TEXT, weights)
    ids = decoder.text.encode(PROMPT)
    tokens = list(decoder.stream(ids, 30, temperature=0.8, top_p=0.9, seed=7))
    assert (result["prompt_ids"], result["ids"], result["text"]) == (ids, tokens, decoder.text.decode(tokens))
    assert result["ended"] == "length"
    assert result["tokens_per_second"] == pytest.approx(30 / result["seconds"])


def test_a_stop_string_is_not_shown(decoder: pygen.Decoder, capsys: Any) -> None:
    text = decoder.text.decode(list(decoder.stream(decoder.text.encode(PROMPT), 80)))
    stop = text[20:24]
    assert main(["generate", "--prompt", PROMPT, "--max-new-tokens", "80", "--stop", stop]) == 0
    assert capsys.readouterr().out == PROMPT + text[: text.find(stop)] + "\n"


def test_tokens_of_a_model_without_a_tokenizer(tmp_path: Path, capsys: Any) -> None:
    model, directory = saved("qwen2", tmp_path)
    arguments = ["generate", "--model", str(directory), "--weights", "float32", "--prompt-ids", "5,7-9"]
    assert main([*arguments, "--max-new-tokens", "6"]) == 0
    prompt = torch.tensor([[5, 7, 8, 9]])
    expected = model.generate(
        prompt, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(prompt)
    )  # fmt: skip
    assert [int(word) for word in capsys.readouterr().out.split()] == expected[0, 4:].tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["give --prompt or --prompt-ids"]),
        (["--prompt", "a", "--prompt-ids", "1"], ["give --prompt or --prompt-ids"]),
        (["--prompt-ids", "1,257"], ["ids", "257"]),
        (["--prompt-ids", "one"], ["--prompt-ids", "one"]),
        (["--prompt", ""], ["ids must hold at least one token"]),
        (["--prompt", "a", "--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["--prompt", "a", "--max-new-tokens", "5000"], ["max_new_tokens", "1024 positions"]),
        (["--prompt", "a", "--temperature", "-1"], ["temperature"]),
        (["--prompt", "a", "--top-p", "2"], ["top_p"]),
        (["--prompt", "a", "--weights", "int5"], ["--weights", "int5"]),
        (["--prompt", "a", "--stop", ""], ["stop"]),
        (["--prompt", "a", "--model", "/nowhere"], ["/nowhere", "No such file"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_input(options: list[str], words: list[str], capsys: Any) -> None:
    assert main(["generate", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pygen: error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
