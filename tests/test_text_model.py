"""The text model that ships with pygen: a checkpoint as transformers reads it, that predicts what it says."""

import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from pygen.models.text import TEXT_MODEL, bits_per_token, with_packed_weights

ABOUT = json.loads((TEXT_MODEL / "training.json").read_text())
END_OF_TEXT = 256


@pytest.fixture(scope="module")
def model():
    model, report = AutoModelForCausalLM.from_pretrained(TEXT_MODEL, output_loading_info=True)
    assert not any(report.values())  # no key missing, unexpected, or of another shape
    return model


def test_size_and_widths(model) -> None:
    assert sum(file.stat().st_size for file in TEXT_MODEL.iterdir()) <= 5_000_000
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    config = model.config
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.num_key_value_heads < config.num_attention_heads
    for width in (config.hidden_size, config.intermediate_size, config.head_dim):
        assert width % 32 == 0


@pytest.mark.parametrize(("name", "loss"), [("bfloat16", 1.0), ("int8", 1.01), ("int4", 1.04)])
def test_it_predicts_what_it_says(model, name: str, loss: float) -> None:
    text = torch.tensor([END_OF_TEXT, *(TEXT_MODEL / "held_out.txt").read_bytes()])
    quantised = with_packed_weights(model, **ABOUT["packings"][name])
    with torch.inference_mode():
        bits = bits_per_token(lambda window: quantised(window).logits, text, 512)
    said = ABOUT["bits_per_byte"]
    assert bits == pytest.approx(said[name], abs=1e-4)
    assert 2 ** (said[name] - said["bfloat16"]) <= loss  # in perplexity


def test_bits_per_token_counts_every_token_once() -> None:
    """A model of fixed odds, and one that tells how much it was shown."""
    odds = torch.tensor([0.5, 0.25, 0.25])
    for count in (2, 5, 8, 9, 10, 12, 13, 50):
        tokens = torch.arange(count) % 3
        shown = []

        def logits_of(window: torch.Tensor, shown: list[int] = shown) -> torch.Tensor:
            shown.append(window.shape[1])
            return odds.log().expand(1, window.shape[1], 3)

        assert bits_per_token(logits_of, tokens, 8) == pytest.approx(-odds[tokens[1:]].log2().mean().item())
        assert max(shown) <= 8
        assert len(shown) == max(1, -(-(count - 1 - 4) // 4))


TOKENIZER = Tokenizer.from_file(str(TEXT_MODEL / "tokenizer.json"))
HUGGING_FACE = AutoTokenizer.from_pretrained(TEXT_MODEL)


@given(st.text())
@example(bytes(range(256)).decode("latin-1") + " a  b\n\n\tč 漢 🙂 don 't , .")
def test_a_token_is_a_byte(text: str) -> None:
    assert TOKENIZER.encode(text).ids == HUGGING_FACE.encode(text) == list(text.encode())
    assert TOKENIZER.decode(list(text.encode())) == HUGGING_FACE.decode(list(text.encode())) == text


@given(st.binary())
def test_any_bytes_are_decoded(data: bytes) -> None:
    assert TOKENIZER.decode(list(data)) == data.decode(errors="replace")


def test_the_end_of_a_text_is_a_token_of_its_own() -> None:
    assert HUGGING_FACE.bos_token_id == HUGGING_FACE.eos_token_id == END_OF_TEXT
    assert len(HUGGING_FACE) == 257
    for tokenizer in (TOKENIZER, HUGGING_FACE):
        assert tokenizer.decode([97, END_OF_TEXT], skip_special_tokens=True) == "a"
        assert tokenizer.decode([97, END_OF_TEXT], skip_special_tokens=False) == "a<|endoftext|>"
    assert HUGGING_FACE.encode("a<|endoftext|>") == [97, END_OF_TEXT]
