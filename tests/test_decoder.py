"""The decoder beside transformers on checkpoints of every family, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import pygen
from pygen.files import CheckpointError
from tests.decoder_families import FAMILIES, made, saved
from tests.error_rule import assert_error_rule

PROMPT = torch.randint(1, 199, (2, 37), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@torch.inference_mode()
def greedy(model: Any, prompt: torch.Tensor, count: int) -> torch.Tensor:
    return model.generate(prompt, max_new_tokens=count, do_sample=False, attention_mask=torch.ones_like(prompt))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_transformers(family: str, folder: Path) -> None:
    model, directory = saved(family, folder)
    decoder = pygen.Decoder.from_pretrained(directory, "float32")
    assert torch.equal(decoder.generate(PROMPT, 256), greedy(model, PROMPT, 256))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_by_the_error_rule(family: str, folder: Path) -> None:
    """Of a whole prompt and of steps behind it, in both dtypes."""
    for dtype, weights in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        model, directory = saved(family, folder / weights, dtype)
        decoder = pygen.Decoder.from_pretrained(directory, weights)
        exact = made(family, dtype).double()
        triples = []
        with decoder.prefill(PROMPT[:, :20]) as session, torch.inference_mode():
            for end in range(20, 37):
                if end > 20:
                    session.step(PROMPT[:, end - 1])
                same, truth = (of(PROMPT[:, :end]).logits[:, -1] for of in (model, exact))
                triples.append((session.logits, same, truth))
        assert_error_rule(triples, f"{family}, {weights}")


def test_quantised_logits_are_those_of_the_unpacked_weights(folder: Path) -> None:
    """int8 and int4: transformers on the weights as they are read back."""
    _, directory = saved("llama-2", folder)
    for weights in ("int8", "int4"):
        decoder = pygen.Decoder.from_pretrained(directory, weights)
        exact = made("llama-2").double()
        for layer, packed in zip(exact.model.layers, decoder.model.layers, strict=True):
            q, k, v = packed.qkv.weight.unpack(torch.float64).split(96)
            gate, up = packed.up.weight.unpack(torch.float64).split(160)
            attention, mlp = layer.self_attn, layer.mlp
            parts = [(attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v), (mlp.gate_proj, gate),
                     (mlp.up_proj, up), (attention.o_proj, packed.merge.weight.unpack(torch.float64)),
                     (mlp.down_proj, packed.down.weight.unpack(torch.float64))]  # fmt: skip
            for linear, weight in parts:
                linear.weight.data = weight
        exact.lm_head.weight.data = decoder.model.head.weight.unpack(torch.float64)
        exact.model.embed_tokens.weight.data = decoder.model.embedding.double()
        same = made("llama-2").bfloat16()
        same.load_state_dict(exact.state_dict())
        with decoder.prefill(PROMPT) as session, torch.inference_mode():
            triples = [(session.logits, same(PROMPT).logits[:, -1], exact(PROMPT).logits[:, -1])]
        assert_error_rule(triples, weights)


def test_shards_and_dtypes(folder: Path) -> None:
    model, directory = saved("llama-3", folder)
    expected = greedy(model, PROMPT, 32)
    model.save_pretrained(folder / "shards", max_shard_size="40KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 3
    assert torch.equal(pygen.Decoder.from_pretrained(folder / "shards", "float32").generate(PROMPT, 32), expected)
    half, directory = saved("llama-3", folder / "half", torch.float16)
    assert torch.equal(
        pygen.Decoder.from_pretrained(directory, "float32").generate(PROMPT, 32), greedy(half.float(), PROMPT, 32)
    )


def edited(directory: Path, to: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with another config."""
    to.mkdir(parents=True)
    config = json.loads((directory / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))
    (to / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    return to


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"novel_field": 3}, "field 'novel_field' is not understood"),
        ({"quantization_config": {"bits": 4}}, "field 'quantization_config' is not understood"),
        ({"model_type": "mamba"}, "model_type must be one of llama, "),
        ({"model_type": "absent"}, "missing field 'model_type'"),
        ({"hidden_size": -96}, "hidden_size must be an integer from 1"),
        ({"hidden_size": 96.0}, "hidden_size must be an integer from 1"),
        ({"num_hidden_layers": "absent"}, "missing field 'num_hidden_layers'"),
        ({"num_key_value_heads": 4}, "6 heads do not share 4"),
        ({"hidden_act": "relu"}, "hidden_act must be one of silu, "),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_parameters: .*rope_type must be one of"),
        ({"rope_parameters": 3}, "rope_parameters must be an object"),
        ({"layer_types": ["full_attention"]}, "layer_types must name"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"vocab_size": 200}, r"tensor 'model.embed_tokens.weight' must have shape \(200, 96\), got \(199, 96\)"),
        ({"intermediate_size": 161}, "rows in all, and not"),
        ({"num_hidden_layers": 4}, "missing tensor 'model.layers.3.input_layernorm.weight'"),
        ({"num_hidden_layers": 2}, "unknown tensor 'model.layers.2."),
        ({"attention_bias": True}, "missing tensor 'model.layers.0.self_attn.q_proj.bias'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_config_may_not_say(changes: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    _, directory = saved("llama-2", folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        pygen.Decoder.from_pretrained(edited(directory, tmp_path / "edited", **changes))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_weights_that_are_not_numbers(folder: Path, tmp_path: Path) -> None:
    _, directory = saved("llama-2", folder)
    to = edited(directory, tmp_path / "edited")
    tensors = load_file(to / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(tensors, to / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.down_proj.weight': .* must be finite"):
        pygen.Decoder.from_pretrained(to, "int8")


@pytest.fixture(scope="module")
def decoder(folder: Path) -> pygen.Decoder:
    return pygen.Decoder.from_pretrained(saved("llama-3", folder)[1], "float32", cache_tokens=1024, max_batch=4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ids": []}, ValueError, "ids must hold at least one token"),
        ({"ids": [3, 199]}, ValueError, "ids must hold tokens from 0 to 198, got 199"),
        ({"ids": [-1]}, ValueError, "ids must hold tokens from 0"),
        ({"ids": [1.5]}, ValueError, "ids must hold tokens from 0"),
        ({"ids": torch.ones(2, 3)}, ValueError, "ids must be integers of shape"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a positive integer"),
        ({"max_new_tokens": 512}, ValueError, "max_new_tokens: .* more than the 512 positions"),
        ({"temperature": -1.0}, ValueError, "temperature must lie in"),
        ({"temperature": "warm"}, TypeError, "temperature must be a number"),
        ({"top_k": 2.5}, TypeError, "top_k must be an integer"),
        ({"top_p": 1.5}, ValueError, "top_p must lie in"),
        ({"seed": -1}, ValueError, "seed must lie in"),
        ({"beams": 4}, TypeError, "beams is not a setting of sampling"),
    ],
    ids=str,
)
def test_wrong_requests(
    arguments: dict[str, Any], error: type[Exception], message: str, decoder: pygen.Decoder
) -> None:
    with pytest.raises(error, match=message):
        decoder.submit(**{"ids": [1, 2, 3], "max_new_tokens": 4} | arguments)
    assert not decoder.busy


def test_wrong_weights(folder: Path) -> None:
    with pytest.raises(ValueError, match="weights must be one of float32, bfloat16, int8, int4, got 'int5'"):
        pygen.Decoder.from_pretrained(folder / "llama-2", "int5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group must be"):
        pygen.Decoder.from_pretrained(saved("llama-2", folder)[1], "int4", group=5)


PEAK = """
import sys
from pathlib import Path
import torch
import transformers
import pygen

def status(key):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

directory, weights = sys.argv[1:]
pygen.pack_linear(torch.randn(64, 64), format=weights)  # what the first call loads
Path("/proc/self/clear_refs").write_text("5")  # begins the high-water mark anew
before = status("VmRSS")
model = pygen.Decoder.from_pretrained(directory, weights, cache_tokens=64).model
linears = [linear for layer in model.layers for linear in (layer.qkv, layer.merge, layer.up, layer.down)]
built = model.embedding.nbytes + sum(linear.weight.nbytes for linear in [*linears, model.head])
print(built, status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system tells no peak")
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_loading_takes_little_more_than_it_builds(weights: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.getbasetemp() / "peak"
    if not directory.exists():
        config = transformers.LlamaConfig(
            hidden_size=768, num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=4, intermediate_size=2048
        )
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config).bfloat16()
        model.to_empty(device="cpu").load_state_dict(
            {name: torch.full_like(tensor, 0.01, device="cpu") for name, tensor in model.state_dict().items()}
        )
        model.save_pretrained(directory)
    result = subprocess.run(
        [sys.executable, "-c", PEAK, directory, weights], capture_output=True, text=True, check=True
    )
    built, peak = map(int, result.stdout.split())
    assert built > 50e6
    assert peak < 1.3 * built
