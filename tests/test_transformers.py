"""pygen.accelerate on loaded language models: generate as before, sooner, and put back."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint

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


GATED = {"llama-2", "llama-3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "qwen3-moe"}


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
    left = bool(getattr(model.config, "attn_logit_softcapping", None))
    by_torch = model.config._attn_implementation != "eager" and not left
    norms = sum(type(module).__name__.endswith(("RMSNorm", "LayerNorm")) for module in model.modules())
    assert report.replaced[: 1 + by_torch] == ["generate: method", *["attention"] * by_torch]
    assert any(re.fullmatch(rf"(RMS|Layer)Norm \({norms}\)", what) for what in report.replaced)
    assert any(what.startswith("gated MLP") for what in report.replaced) == (family in GATED)
    assert ("rotary embedding (3)" in report.replaced) == (family != "gpt2")
    assert len(report.left) == 1 - by_torch
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


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_k": 20}, {"repetition_penalty": 1.3}], ids=str)
@pytest.mark.parametrize("draft", ["itself", "itself in int8", "a stranger", "prompt"])
def test_drafts_change_nothing_but_the_steps(
    draft: str, settings: dict[str, Any], accelerated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """assistant_model and prompt_lookup_num_tokens; of several prompts too, which transformers refuses."""
    assistant = made("gpt2" if draft == "a stranger" else "llama-3")
    if draft == "itself in int8":
        pygen.accelerate(assistant, weights="int8")
    drafts: dict[str, Any] = {"prompt_lookup_num_tokens": 4} if draft == "prompt" else {"assistant_model": assistant}
    step, sizes = pygen.Decoder.step, []

    def counted(self: pygen.Decoder) -> Any:
        found = step(self)
        sizes.append(sum(request.drafted for request, _ in found))
        return found

    def run(**more: Any) -> tuple[int, int, torch.Tensor]:
        torch.manual_seed(5)
        sizes.clear()
        found = accelerated.generate(PROMPT[:, :5].repeat(1, 4), max_new_tokens=40, **settings, **more)
        return len(sizes), sum(sizes), found

    monkeypatch.setattr(pygen.Decoder, "step", counted)
    (plain, none, expected), (steps, some, found), (as_many, *_, again) = run(), run(**drafts), run(**drafts)
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
    assert none == 0 < some
    assert as_many == steps <= (plain // 2 if draft.startswith("itself") else plain)


def test_assistants_that_do_not_go_with_the_model_are_said(accelerated: Any) -> None:
    expected = accelerated.generate(PROMPT[:1], max_new_tokens=6)
    with pytest.warns(UserWarning, match="assistant_model .*parameters must be float32 or bfloat16.* is not supported"):
        assert torch.equal(
            accelerated.generate(PROMPT[:1], max_new_tokens=6, assistant_model=made("llama-3").double()), expected
        )
    config = copy.deepcopy(accelerated.config)
    config.max_position_embeddings = 100
    short = type(accelerated)(config).eval()
    with pytest.warns(UserWarning, match="assistant_model .draft has positions 100, and the model 512. is not supp"):
        assert torch.equal(accelerated.generate(PROMPT[:1], max_new_tokens=6, assistant_model=short), expected)


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
    parts = ["generate: method", "attention", "rotary embedding (3)", "gated MLP (3)", "RMSNorm (7)"]
    assert pygen.accelerate(model, weights="int8").replaced == parts


@pytest.mark.parametrize("family", ["llama-3", "gpt2"])
def test_training_drops_weights(family: str) -> None:
    """By torch's generator, and the same ones where the forward is made again for the gradients."""
    model = made(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in model.modules():
        if hasattr(layer, "attention_dropout"):
            layer.attention_dropout = 0.3
        if hasattr(layer, "attn_dropout"):
            layer.attn_dropout.p = 0.3
    assert "attention" in pygen.accelerate(model).replaced
    model.train()

    def loss() -> torch.Tensor:
        found: torch.Tensor = model(PROMPT, labels=PROMPT, use_cache=False).loss
        return found

    def gradients(seed: int, again: bool = False) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        value = checkpoint(loss, use_reentrant=False) if again else loss()
        return list(torch.autograd.grad(value, list(model.parameters())))

    first = gradients(0)
    assert not all(map(torch.equal, gradients(1), first))
    assert all(map(torch.equal, gradients(0, again=True), first))


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
        (made("llama-2").to("meta"), "LlamaForCausalLM: parameters must be on the CPU or a GPU, got meta"),
        (own, "the model has one of its own"),
    ):
        report = pygen.accelerate(target)
        assert "generate: method" not in report.replaced
        assert re.match(f"generate: {reason}", report.left[0]), report.left
    assert pygen.accelerate(half, weights="bfloat16").replaced == ["generate: method"]


@pytest.mark.parametrize("family", ["llama-3", "mistral", "qwen3", "gemma3", "phi3", "pythia"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_forward_and_its_gradients(family: str, dtype: torch.dtype) -> None:
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


def test_the_forward_compiles_whole_and_travels(accelerated: Any) -> None:
    expected = accelerated(PROMPT).logits
    compiled = torch.compile(accelerated, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(PROMPT).logits, expected)
    other = pickle.loads(pickle.dumps(accelerated))
    assert torch.equal(other(PROMPT).logits, expected)
    assert not str(pygen.accelerate(other)).count("replaced")


def test_norms_and_mlps_of_their_own_are_left() -> None:
    """What is called like a norm or an MLP and computes something else; dtypes that pygen does not have."""
    model = made("llama-2")
    norm, mlp = model.model.norm, model.model.layers[0].mlp

    class OddRMSNorm(type(norm)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    OddRMSNorm.__module__ = "transformers.models.odd"
    attention = model.model.layers[2].self_attn
    namespace = {"apply_rotary_pos_emb": lambda q, k, cos, sin: (q * cos, k * cos)}
    odd = types.FunctionType(
        type(attention).forward.__code__, vars(sys.modules[type(attention).__module__]) | namespace
    )
    attention.__class__ = type(
        "OddAttention", (type(attention),), {"forward": odd, "__module__": "transformers.models.odd"}
    )
    norm.__class__, mlp.act_fn = OddRMSNorm, torch.nn.Tanh()
    report = pygen.accelerate(model)
    assert "model.norm: OddRMSNorm is not the norm that pygen has" in report.left
    assert "model.layers.0.mlp: Tanh is not an activation that pygen has a gated unit of" in report.left
    left = "model.layers.2.self_attn: apply_rotary_pos_emb of transformers.models.odd is not the one that pygen has"
    assert left in report.left
    assert {"gated MLP (2)", "rotary embedding (2)"} <= set(report.replaced)
    x = torch.randn(2, 5, model.config.hidden_size, dtype=torch.float64)
    wide = copy.deepcopy(model).double().model.layers[1]
    report.undo()
    plain = copy.deepcopy(model).double().model.layers[1]
    assert torch.equal(wide.mlp(wide.input_layernorm(x)), plain.mlp(plain.input_layernorm(x)))


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


@pytest.mark.parametrize("family", ["llama-3", "gemma3", "mistral"])
def test_the_growing_cache_is_the_dynamic_one(family: str) -> None:
    """Through every method that a cache has, with the same bits; without copying what is there."""
    from transformers import DynamicCache

    from pygen.transformers.cache import GrowingCache, GrowingLayer

    model = made(family)
    generator = torch.Generator().manual_seed(0)

    def through(cache: Any) -> list[torch.Tensor]:
        found = []

        def run(ids: torch.Tensor) -> None:
            found.append(model(ids, past_key_values=cache, use_cache=True).logits)

        generator.manual_seed(0)
        with torch.no_grad():
            run(torch.randint(3, 199, (2, 250), generator=generator))
            for _ in range(10):  # over the first memory's end
                run(torch.randint(3, 199, (2, 1), generator=generator))
            if all(layer.is_croppable for layer in cache.layers) and family == "llama-3":
                cache.crop(-7)
                run(torch.randint(3, 199, (2, 3), generator=generator))
            cache.reorder_cache(torch.tensor([1, 0]))
            run(torch.randint(3, 199, (2, 2), generator=generator))
            cache.batch_repeat_interleave(2)
            run(torch.randint(3, 199, (4, 1), generator=generator))
            cache.batch_select_indices(torch.tensor([3, 1]))
            other, alias = copy.deepcopy(cache), copy.copy(cache)
            alias.layers = [copy.copy(layer) for layer in cache.layers]
            run(torch.randint(3, 199, (2, 1), generator=generator))
            model(torch.randint(3, 199, (2, 1), generator=generator), past_key_values=alias, use_cache=True)
            found += [layer.keys for of in (other, cache, alias) for layer in of.layers]
            assert cache.get_seq_length() == other.get_seq_length() + 1
            cache.reset()
            run(torch.randint(3, 199, (1, 5), generator=generator))
        cache.reset()
        whole = model(PROMPT, past_key_values=cache, use_cache=True).logits
        model.zero_grad()
        (whole.sum() + model(PROMPT[:, :1], past_key_values=cache).logits.sum()).backward()
        found += [p.grad for p in model.parameters() if p.grad is not None]
        return found

    for ours, theirs in zip(
        through(GrowingCache(config=model.config)), through(DynamicCache(config=model.config)), strict=True
    ):
        assert torch.equal(ours, theirs)
    growing = GrowingCache(config=model.config)
    with torch.no_grad():
        model(PROMPT, past_key_values=growing)
        full = next(layer for layer in growing.layers if type(layer) is GrowingLayer) if family != "mistral" else None
        if full is not None:
            at = full.keys.data_ptr()
            model(PROMPT[:, :1], past_key_values=growing)
            assert full.keys.data_ptr() == at
    greedy = {"max_new_tokens": 20, "do_sample": False}
    given = model.generate(PROMPT, past_key_values=GrowingCache(config=model.config), **greedy)
    assert torch.equal(given, model.generate(PROMPT, **greedy))
