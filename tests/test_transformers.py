"""pygen.accelerate on loaded language models: generate as before, sooner, and put back."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

import pygen
from pygen.transformers import Generate
from tests.decoder_families import FAMILIES, made
from tests.error_rule import Triple, assert_error_rule

PROMPT = torch.randint(1, 199, (3, 21), generator=torch.Generator().manual_seed(0))
PADS = (0, 9, 4)  # of each row
PADDED = {
    "input_ids": torch.stack([row.where(torch.arange(21) >= pads, 0) for row, pads in zip(PROMPT, PADS, strict=True)]),
    "attention_mask": torch.stack([(torch.arange(21) >= pads).long() for pads in PADS]),
}


@pytest.fixture(autouse=True)
def only_expected_warnings() -> Iterator[None]:
    """What falls through says so; nothing else may."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="generate runs as transformers' own")
        yield


@pytest.fixture
def model() -> Any:
    return made("llama-3")


@pytest.fixture
def accelerated(model: Any) -> Any:
    assert pygen.accelerate(model).replaced
    return model


class Recorder(transformers.generation.streamers.BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard.append((value.dtype, value.tolist()))

    def end(self) -> None:
        self.heard.append("end")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_before_after_and_undone(family: str) -> None:
    model = made(family)
    calls: list[dict[str, Any]] = [
        {"inputs": PROMPT, "max_new_tokens": 40},
        {**PADDED, "max_new_tokens": 40},
        {**PADDED, "max_length": 44, "eos_token_id": [5, 60, 61, 62, 120, 121], "pad_token_id": 7},
    ]
    before = [model.generate(**call) for call in calls]
    forward, exact = model(PROMPT).logits, copy.deepcopy(model).double()(PROMPT).logits
    report = pygen.accelerate(model)
    by_torch = model.config._attn_implementation != "eager" and not getattr(model.config, "attn_pdrop", 0.0)
    assert report.replaced == ["generate: method", *["attention"] * by_torch]
    assert report.left[0].startswith("forward: ")
    assert len(report.left) == 2 - by_torch
    for call, expected in zip(calls, before, strict=True):
        found = model.generate(**call)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    assert_error_rule([(model(PROMPT).logits, forward, exact)])
    report.undo()
    assert torch.equal(model(PROMPT).logits, forward)
    report.undo()
    assert "generate" not in vars(model)
    assert torch.equal(model.generate(**calls[0]), before[0])


CALLS: dict[str, dict[str, Any]] = {
    "no prompt": {"bos_token_id": 1, "max_new_tokens": 5},
    "default length": {"inputs": PROMPT, "attention_mask": torch.ones_like(PROMPT)},
    "mask by the padding": {"inputs": PADDED["input_ids"], "max_new_tokens": 12, "pad_token_id": 0},
    "repetition": {**PADDED, "max_new_tokens": 30, "repetition_penalty": 1.7},
    "one candidate": {**PADDED, "max_new_tokens": 12, "do_sample": True, "top_k": 1, "top_p": 7.0},
    "small mass": {**PADDED, "max_new_tokens": 12, "do_sample": True, "top_p": 0.0},
    "samples": {
        "inputs": PROMPT, "max_new_tokens": 4, "do_sample": True, "top_k": 1, "num_return_sequences": 3,
    },
    "beams": {**PADDED, "max_new_tokens": 20, "num_beams": 4, "num_return_sequences": 3, "early_stopping": True,
              "eos_token_id": [5, 60, 61, 62, 120, 121], "pad_token_id": 7, "length_penalty": 0.6},
    "beams of a configuration": {
        "inputs": PROMPT,
        "generation_config": transformers.GenerationConfig(
            num_beams=3, max_new_tokens=30, eos_token_id=[5, 60, 61, 62, 120, 121], early_stopping="never"
        ),
    },
    "no padding token": {"inputs": PROMPT, "max_new_tokens": 30, "eos_token_id": [5, 60, 61, 62, 120, 121]},
    "a configuration": {
        "inputs": PROMPT,
        "generation_config": transformers.GenerationConfig(
            max_new_tokens=30, eos_token_id=[5, 60, 61, 62, 120, 121], pad_token_id=3, repetition_penalty=1.2
        ),
    },
    "idle settings": {
        "inputs": PROMPT, "max_new_tokens": 4, "num_beams": 1, "use_cache": True, "logits_processor": [],
        "synced_gpus": False, "custom_generate": None, "stopping_criteria": None, "guidance_scale": 1.0,
        "cache_implementation": "hybrid",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_as_transformers_answers_them(name: str, model: Any) -> None:
    if name == "repetition" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        pytest.skip("this transformers penalises the padding, and keeps doing it")
    calls = []
    for _ in range(2):
        streamer = Recorder()
        if name == "samples" or name.startswith("beams"):
            calls.append((model.generate(**CALLS[name]), []))
        else:
            calls.append((model.generate(**CALLS[name], streamer=streamer), streamer.heard))
        pygen.accelerate(model)
    (before, heard), (after, heard_after) = calls
    assert torch.equal(before, after)
    assert heard == heard_after


def test_settings_of_the_model_itself(model: Any) -> None:
    """model.generation_config: its lengths, stops, padding and sampling."""
    model.generation_config.update(max_length=50, eos_token_id=[5, 60, 61, 62, 120], pad_token_id=9, do_sample=True,
                                   top_k=1, temperature=0.7)  # fmt: skip
    before = model.generate(PROMPT)
    pygen.accelerate(model)
    assert torch.equal(model.generate(PROMPT), before)
    assert (before == 9).any()


def test_draws_by_torchs_seed(accelerated: Any) -> None:
    def drawn(seed: int, **more: Any) -> torch.Tensor:
        torch.manual_seed(seed)
        return accelerated.generate(PROMPT, max_new_tokens=16, do_sample=True, **more)

    first = drawn(1)
    assert torch.equal(drawn(1), first)
    assert not torch.equal(drawn(2), first)
    assert not torch.equal(accelerated.generate(PROMPT, max_new_tokens=16, do_sample=True), drawn(2))
    several = drawn(1, num_return_sequences=4)
    assert several.shape == (12, 37)
    assert len({tuple(row) for row in several.tolist()}) == 12
    assert torch.equal(several[::4, :21], PROMPT)


def test_draws_are_distributed_as_transformers(model: Any) -> None:
    """The first token of many samples against the probabilities that transformers' own warpers leave."""
    settings: dict[str, Any] = {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.95}
    prompt = PROMPT[:1]
    scores = model.generate(prompt, max_new_tokens=1, do_sample=True, return_dict_in_generate=True, output_scores=True,
                            **settings).scores[0][0]  # fmt: skip
    expected = scores.double().softmax(-1)
    pygen.accelerate(model)
    torch.manual_seed(0)
    count = 3000
    tokens = model.generate(prompt, max_new_tokens=1, do_sample=True, num_return_sequences=count, **settings)[:, -1]
    found = torch.bincount(tokens, minlength=199).double()
    kept = expected > 0
    assert 2 < kept.sum() <= 12
    assert found[~kept].sum() == 0
    chi_square = ((found[kept] - count * expected[kept]) ** 2 / (count * expected[kept])).sum()
    assert chi_square < 3 * kept.sum()  # its mean is one less than the number of tokens


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("num_beams with a streamer, do_sample or repetition_penalty", {"num_beams": 2, "repetition_penalty": 1.5}),
        ("return_dict_in_generate", {"return_dict_in_generate": True}),
        ("logits_processor", {"logits_processor": [lambda ids, scores: -scores]}),
        ("stopping_criteria", {"stopping_criteria": [lambda ids, scores: torch.ones(len(ids), dtype=torch.bool)]}),
        ("prefix_allowed_tokens_fn", {"prefix_allowed_tokens_fn": lambda row, ids: [3, 4]}),
        ("min_new_tokens", {"min_new_tokens": 4, "eos_token_id": 5}),
        ("suppress_tokens", {"suppress_tokens": [5]}),
        ("past_key_values", {"past_key_values": transformers.DynamicCache()}),
        ("no_repeat_ngram_size", {"no_repeat_ngram_size": 2}),
        ("attention_mask of anything but padding on the left", {"attention_mask": PADDED["attention_mask"].flip(1)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_falls_through_says_so(name: str, call: dict[str, Any], model: Any) -> None:
    expected = model.generate(PROMPT, **{"max_new_tokens": 6} | copy.deepcopy(call))
    pygen.accelerate(model)
    with pytest.warns(UserWarning, match=f"transformers' own, without pygen: {name} is not supported") as caught:
        found = model.generate(PROMPT, **{"max_new_tokens": 6} | call)
    assert [warning.filename for warning in caught if "without pygen" in str(warning.message)] == [__file__]
    if name == "return_dict_in_generate":
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected)


def test_falls_through_for_long_prompts_and_in_training(accelerated: Any) -> None:
    with pytest.warns(UserWarning, match="a length of more than 512 positions is not supported"):
        assert accelerated.generate(PROMPT[:1].repeat(1, 24), max_new_tokens=9).shape == (1, 513)
    with pytest.warns(UserWarning, match="num_beam is not supported"), pytest.raises(ValueError, match="num_beam"):
        accelerated.generate(PROMPT, num_beam=3)
    accelerated.train()
    with pytest.warns(UserWarning, match=r"a model in training mode \(call model.eval\(\)\) is not supported"):
        accelerated.generate(PROMPT, max_new_tokens=2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"max_new_tokens": -2}, ValueError, "max_new_tokens"),
        ({"do_sample": True, "temperature": -1.0}, ValueError, "temperature"),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences"),
    ],
    ids=str,
)
def test_wrong_arguments_are_transformers_errors(
    call: dict[str, Any], error: type[Exception], message: str, model: Any
) -> None:
    for _ in range(2):
        with pytest.raises(error, match=message):
            model.generate(PROMPT, **call)
        pygen.accelerate(model)


def double_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-2)


def double_data(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.data.mul_(-2)


def new_parameter(model: Any) -> None:
    linear = model.model.layers[1].mlp.down_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach() * -2)


def load(model: Any) -> None:
    model.load_state_dict({name: -tensor for name, tensor in model.state_dict().items()})


def train(model: Any) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(PROMPT, labels=PROMPT).loss.backward()
    optimiser.step()


@pytest.mark.parametrize("change", [double_in_place, double_data, new_parameter, load, train])
def test_changed_parameters_are_packed_again(change: Any, accelerated: Any) -> None:
    before = accelerated.generate(PROMPT, max_new_tokens=20)
    decoder = accelerated.generate.decoder()
    assert accelerated.generate.decoder() is decoder
    change(accelerated)
    after = accelerated.generate(PROMPT, max_new_tokens=20)
    assert not torch.equal(after, before)
    assert torch.equal(after, type(accelerated).generate(accelerated, PROMPT, max_new_tokens=20))


def test_a_dtype_without_a_decoder_is_said(accelerated: Any) -> None:
    accelerated.to(torch.bfloat16)
    assert accelerated.generate.decoder().model.dtype == torch.bfloat16
    accelerated.half()
    with pytest.raises(ValueError, match=r"must be float32 or bfloat16 without weights=, got torch.float16"):
        accelerated.generate(PROMPT)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_weights(weights: Any, tmp_path: Any) -> None:
    """As the decoder of the saved checkpoint, which its own tests compare."""
    model = made("llama-3", torch.bfloat16)
    model.save_pretrained(tmp_path)
    expected = pygen.Decoder.from_pretrained(tmp_path, weights).generate(PROMPT, 30)
    pygen.accelerate(model, **({"weights": "int8"} if weights == "int8" else {}))
    assert torch.equal(model.generate(PROMPT, max_new_tokens=30), expected)


def test_copies_and_pickles_generate_by_themselves(accelerated: Any) -> None:
    expected = accelerated.generate(PROMPT, max_new_tokens=8)
    for other in (copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated))):
        assert isinstance(other.generate, Generate)
        double_in_place(other)
        assert not torch.equal(other.generate(PROMPT, max_new_tokens=8), expected)
        assert torch.equal(accelerated.generate(PROMPT, max_new_tokens=8), expected)


def test_a_streamer_that_fails_and_threads(accelerated: Any) -> None:
    class Broken(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.heard) == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        accelerated.generate(PROMPT, max_new_tokens=20, streamer=Broken())
    assert not accelerated.generate.decoder().busy
    expected = [accelerated.generate(row[None], max_new_tokens=20) for row in PROMPT]
    found: list[Any] = [None] * len(PROMPT)

    def run(i: int) -> None:
        found[i] = accelerated.generate(PROMPT[i : i + 1], max_new_tokens=20)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(PROMPT))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_twice_replaces_nothing_more_and_undo_frees(model: Any) -> None:
    report = pygen.accelerate(model)
    assert str(pygen.accelerate(model)) == "left generate: pygen's already"
    report.undo()
    assert pygen.accelerate(model, weights="int8").replaced == ["generate: method", "attention"]


def test_what_is_left_is_said(model: Any) -> None:
    class Own(type(model)):  # type: ignore[misc]
        pass

    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=20, hidden_size=8, state_size=4, num_hidden_layers=1)
    )
    half = made("llama-2").half()
    untied = made("llama-3")
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    own = made("llama-2")
    own.generate = lambda *args: None
    for target, reason in (
        (Own(model.config), f"{__name__}.Own is no causal language model of transformers'"),
        (model.model, "transformers.models.llama.modeling_llama.LlamaModel is no causal language model"),
        (mamba, "MambaForCausalLM: config: model_type must be one of llama, .*, got 'mamba'"),
        (half, "LlamaForCausalLM: parameters must be float32 or bfloat16 without weights=, got torch.float16"),
        (untied, "LlamaForCausalLM: config: tie_word_embeddings is true, and the head has weights of its own"),
        (made("llama-2").to("meta"), "LlamaForCausalLM: parameters must be on the CPU, got meta"),
        (own, "the model has one of its own"),
    ):
        report = pygen.accelerate(target)
        assert "generate: method" not in report.replaced
        assert re.match(f"generate: {reason}", report.left[0]), report.left
    assert pygen.accelerate(half, weights="bfloat16").replaced == ["generate: method"]


@pytest.mark.parametrize("family", ["llama-3", "mistral", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_of_the_forward(family: str, dtype: torch.dtype) -> None:
    """Logits, of padded prompts too, steps over transformers' own cache, and gradients."""
    model = made(family).to(dtype)
    exact = copy.deepcopy(model).double()

    def results(model: Any) -> list[torch.Tensor]:
        model.zero_grad()
        whole = model(PROMPT, labels=PROMPT)
        whole.loss.backward()
        with torch.no_grad():
            padded = model(PADDED["input_ids"], attention_mask=PADDED["attention_mask"]).logits
            begun = model(PROMPT[:, :-2], use_cache=True)
            steps = [
                model(PROMPT[:, i : i + 1], past_key_values=begun.past_key_values).logits
                for i in range(PROMPT.shape[1] - 2, PROMPT.shape[1])
            ]
        live = PADDED["attention_mask"].bool()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [whole.logits.detach(), padded[live], *steps, *gradients]

    theirs, truth = results(model), results(exact)
    pygen.accelerate(model, weights="float32")
    assert model.config._attn_implementation == "pygen"
    triples: list[Triple] = []
    for ours, same, true in zip(results(model), theirs, truth, strict=True):
        size = true.abs().max().clamp_min(1e-30)
        triples.append((ours / size, same / size, true / size))
    assert_error_rule(triples)


def test_wrong_options(model: Any) -> None:
    with pytest.raises(TypeError, match="dtype is not an option of accelerate for LlamaForCausalLM"):
        pygen.accelerate(model, dtype="int8")
    with pytest.raises(ValueError, match="weights must be one of float32, bfloat16, int8, int4, got 'int5'"):
        pygen.accelerate(model, weights="int5")
    with pytest.raises(ValueError, match="group must be 0, 32, 64 or 128, of int8 or int4, got 5"):
        pygen.accelerate(model, weights="int4", group=5)
    with pytest.raises(ValueError, match="cache_tokens must be a positive integer, got 0"):
        pygen.accelerate(model, cache_tokens=0)
    with pytest.raises(TypeError, match=r"target must be a diffusers pipeline or model, or .* model, got Linear"):
        pygen.accelerate(torch.nn.Linear(1, 1))
    assert "generate" not in vars(model)


def test_transformers_is_not_imported_unasked() -> None:
    script = "import sys, pygen, pygen.transformers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
