"""Our models with the weights of diffusers' own: read from what those save, with the same results and gradients."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pygen
from pygen.files import CheckpointError
from pygen.models import latent_digits
from pygen.models.autoencoder_kl import AutoencoderKL
from pygen.models.pretrained import from_pretrained, save_pretrained
from tests.diffusers_models import (
    Calls,
    autoencoder,
    built,
    dit,
    drawn,
    flux,
    gradient_triples,
    in_dtype,
    outputs,
    pixart,
    rounded,
    rounded_to,
    stable_diffusion_3,
    stable_diffusion_3_5,
    unet,
    wide_autoencoder,
)
from tests.error_rule import assert_error_rule


def sdxl() -> tuple[nn.Module, Calls]:
    """Depths and heads by resolution, linear projections, a pooled text and sizes; and a side that is no power of 2."""
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16, 32), norm_num_groups=4, layers_per_block=2, cross_attention_dim=12,
        attention_head_dim=(1, 2, 4), transformer_layers_per_block=(1, 2, 3), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=6, projection_class_embeddings_input_dim=6 * 6 + 10,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), freq_shift=1,
    )  # fmt: skip
    added = {"text_embeds": drawn(2, 10, seed=3), "time_ids": drawn(2, 6, seed=4).abs() * 100}
    call = {"sample": drawn(2, 4, 10, 6), "timestep": 7, "encoder_hidden_states": drawn(2, 5, 12)}
    return model, [call | {"added_cond_kwargs": added}]


def pixart_of_sizes() -> tuple[nn.Module, Calls]:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=128,
        patch_size=2, cross_attention_dim=24, caption_channels=10,
    )  # fmt: skip
    sizes = {"resolution": torch.tensor([[64.0, 96.0]] * 2), "aspect_ratio": torch.tensor([[0.7], [1.2]])}
    call = {"timestep": torch.tensor([3, 900]), "encoder_hidden_states": drawn(2, 5, 10, seed=1)}
    return model, [call | {"hidden_states": drawn(2, 4, 8, 12), "added_cond_kwargs": sizes}]


def flux_dev() -> tuple[nn.Module, Calls]:
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    call = {"encoder_hidden_states": drawn(2, 5, 16, seed=1), "pooled_projections": drawn(2, 12, seed=2)}
    call |= {"hidden_states": drawn(2, 12, 16), "timestep": torch.tensor([0.3, 0.8])}
    call |= {"img_ids": drawn(12, 3).abs().round(), "txt_ids": torch.zeros(5, 3)}
    return model, [call | {"guidance": torch.tensor([3.5, 1.0])}]


OURS = {
    "sample": "x", "hidden_states": "x", "timestep": "t", "encoder_hidden_states": "text",
    "encoder_attention_mask": "text_mask", "class_labels": "class_labels", "pooled_projections": "pooled_text",
    "img_ids": "image_ids", "txt_ids": "text_ids", "guidance": "guidance", "text_embeds": "pooled_text",
    "time_ids": "sizes", "resolution": "resolution", "aspect_ratio": "aspect_ratio",
}  # fmt: skip
MODELS = [
    unet, sdxl, dit, pixart, pixart_of_sizes, stable_diffusion_3, stable_diffusion_3_5, flux, flux_dev, autoencoder,
    wide_autoencoder,
]  # fmt: skip
BY_MODEL = pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)


def call_ours(model: Any, call: dict[str, Any], dtype: torch.dtype) -> Tensor:
    call = in_dtype(call, dtype)
    if isinstance(model, AutoencoderKL):
        out: Tensor = model.decode(model.encode(call["sample"])[0])
        return out
    call |= call.pop("added_cond_kwargs", {})
    given = {OURS[name]: value for name, value in call.items() if value is not None}
    given["t"] = torch.as_tensor(given["t"])
    out = model(**given)
    return out


@BY_MODEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_diffusers(build: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model, calls = built(build)
    model.save_pretrained(tmp_path, max_shard_size="40KB" if build is unet else "5GB")
    ours = from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    theirs, exact = rounded(model, dtype)
    calls = [rounded_to(call, dtype) for call in calls]
    with torch.no_grad():
        same, truth = outputs(theirs, calls, dtype), outputs(exact, calls, torch.float64)
        for _ in range(2):  # the second time, with what was held
            found = [call_ours(ours, call, dtype) for call in calls]
            assert_error_rule(list(zip(found, same, truth, strict=True)))
        others = [
            call | {name: 2 * call[name] for name in ("encoder_hidden_states",) if name in call} for call in calls
        ]
        found, same = [call_ours(ours, call, dtype) for call in others], outputs(theirs, others, dtype)
        assert_error_rule(list(zip(found, same, outputs(exact, others, torch.float64), strict=True)))


@BY_MODEL
def test_gradients_are_diffusers(build: Any, tmp_path: Path) -> None:
    model, calls = built(build)
    model.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    theirs, exact = rounded(model, torch.float32)

    def gradients(model: nn.Module, run: Callable[[dict[str, Any]], Tensor]) -> dict[str, Tensor]:
        sum((run(call).square().mean() for call in calls), torch.zeros(())).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found = gradients(ours, lambda call: call_ours(ours, call, torch.float32))
    same = gradients(theirs, lambda call: outputs(theirs, [call], torch.float32)[0])
    truth = gradients(exact, lambda call: outputs(exact, [call], torch.float64)[0])
    assert found.keys() == same.keys()
    assert_error_rule(gradient_triples(found, same, truth))


@pytest.mark.parametrize("build", [unet, pixart], ids=lambda build: build.__name__)
def test_keys_and_values_of_a_text_are_made_once(build: Any, tmp_path: Path) -> None:
    model, (call, *_) = built(build)
    model.save_pretrained(tmp_path)
    ours, call = from_pretrained(tmp_path), in_dtype(call, torch.float32)
    made = []
    for name, module in ours.named_modules():
        if name.endswith("attn2.to_k"):
            module.register_forward_hook(lambda *_: made.append(1))
    with torch.no_grad():
        first, second = (call_ours(ours, call, torch.float32) for _ in range(2))
        once = len(made)
        call_ours(ours, call | {"encoder_hidden_states": call["encoder_hidden_states"].clone()}, torch.float32)
    assert torch.equal(first, second)
    assert len(made) == 2 * once > 0


def test_an_autoencoders_parts_and_tiles(tmp_path: Path) -> None:
    model, (call,) = built(autoencoder)
    model.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    image = in_dtype(call, torch.float32)["sample"]
    with torch.no_grad():
        mean, log_variance = ours.encode(image)
        posterior = model.encode(image).latent_dist
        torch.testing.assert_close(mean, posterior.mean)
        torch.testing.assert_close(log_variance, posterior.logvar)
        torch.testing.assert_close(ours.unscaled(ours.scaled(mean)), mean)
        model.enable_tiling()
        for tile, height, width in ((8, 21, 14), (8, 6, 30), (16, 8, 9)):
            z = drawn(2, 4, height, width).float()
            model.tile_latent_min_size, model.tile_sample_min_size = tile, 2 * tile
            torch.testing.assert_close(ours.tiled_decode(z, tile=tile), model.tiled_decode(z).sample)
        z = drawn(1, 4, 7, 9).float()
        torch.testing.assert_close(ours.tiled_decode(z, tile=9), ours.decode(z))
        assert ours.tiled_decode(z, tile=5, overlap=0.3).shape == (1, 3, 14, 18)
        assert ours.tiled_decode(z, tile=4, overlap=0.0).shape == (1, 3, 14, 18)
    for wrong, message in (
        ({"tile": 0}, "tile must be a positive integer"),
        ({"overlap": 1.0}, "overlap must be from"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.tiled_decode(z, **wrong)


def test_the_names_of_old_autoencoders(tmp_path: Path) -> None:
    model, (call,) = built(autoencoder)
    model.save_pretrained(tmp_path)
    expected = call_ours(from_pretrained(tmp_path), call, torch.float32)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(weights).items():
        for new, older in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{older}.")
        tensors[name] = tensor.half()
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    weights.unlink()
    found = call_ours(from_pretrained(tmp_path, variant="fp16", dtype=torch.float32), call, torch.float32)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    with pytest.raises(CheckpointError, match=r"holds neither diffusion_pytorch_model.safetensors nor"):
        from_pretrained(tmp_path)


def test_it_samples(tmp_path: Path) -> None:
    model, (call, _) = built(unet)
    model.save_pretrained(tmp_path)
    ours, text = from_pretrained(tmp_path), in_dtype(call, torch.float32)["encoder_hidden_states"]
    schedule = {"name": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

    def run(model: Callable[..., Tensor]) -> Tensor:
        return pygen.sample(model, (2, 4, 8, 8), schedule=schedule, steps=4, seed=1)

    found = run(lambda x, t, **_: ours(x, t, text))
    expected = run(lambda x, t, **_: model(x, t, text).sample)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_what_a_model_lacks_is_said(tmp_path: Path) -> None:
    model, calls = built(sdxl)
    model.save_pretrained(tmp_path)
    ours, call = from_pretrained(tmp_path), in_dtype(calls[0], torch.float32)
    with pytest.raises(ValueError, match="pooled_text and sizes must be given"):
        ours(call["sample"], torch.tensor(3), call["encoder_hidden_states"])
    model, calls = built(stable_diffusion_3_5)
    model.save_pretrained(tmp_path / "sd3")
    with pytest.raises(ValueError, match="x may have 12 patches a side, got 13 x 2"):
        call_ours(from_pretrained(tmp_path / "sd3"), calls[0] | {"hidden_states": drawn(2, 4, 26, 4)}, torch.float32)
    model, calls = built(flux_dev)
    model.save_pretrained(tmp_path / "flux")
    with pytest.raises(ValueError, match="guidance must be given to a model of guidance_embeds"):
        call_ours(from_pretrained(tmp_path / "flux"), calls[0] | {"guidance": None}, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "_class_name must be one of UNet2DConditionModel, .*, got 'UNet2DModel'"),
        ({"_class_name": ["x"]}, r"_class_name must be one of .*, got \['x'\]"),
        ({"dropout": 0.1}, "dropout must be 0, got 0.1"),
        ({"center_input_sample": 0}, "center_input_sample must be False, got 0"),
        ({"num_class_embeds": 3}, "num_class_embeds must be None, got 3"),
        ({"a_new_field": 1}, "unknown field 'a_new_field'"),
        ({"layers_per_block": [1, 2]}, r"layers_per_block must be an integer from 0 to 1000000, got \[1, 2\]"),
        ({"layers_per_block": 10**7}, "layers_per_block must be an integer from 0 to 1000000, got 10000000"),
        ({"layers_per_block": 2}, "missing tensor 'down_blocks.0.resnets.1.norm1.weight'"),
        ({"in_channels": 5}, r"'conv_in.weight' must have shape \[16, 5, 3, 3\], got \[16, 4, 3, 3\]"),
        ({"attention_head_dim": 0}, "config.json: .*zero"),
        ({"attention_head_dim": [2, 2, 2]}, r"attention_head_dim must be one number or 2, got \[2, 2, 2\]"),
        ({"block_out_channels": [16, 33]}, "attention_head_dim and norm_num_groups must divide block_out_channels, 33"),
        ({"block_out_channels": []}, "config.json: "),
        ({"down_block_types": ["DownBlock2D"]}, r"down_block_types must be 2 of .*, got \['DownBlock2D'\]"),
        (
            {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]},
            "up_block_types must be 2 of UpBlock2D, CrossAttnUpBlock2D",
        ),
        ({"addition_embed_type": "text"}, "addition_embed_type must be text_time or None, got 'text'"),
        ({"use_linear_projection": 1}, "use_linear_projection must be true or false, got 1"),
    ],
    ids=str,
)
def test_wrong_configurations_are_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, _ = built(unet)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    model, _ = built(unet)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    for changed, message in (
        (tensors | {"another": torch.zeros(1)}, "unknown tensor 'another'"),
        (tensors | {"conv_in.bias": torch.zeros(16, dtype=torch.int64)}, "'conv_in.bias' must be of floating point"),
    ):
        save_file(changed, weights)
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(tmp_path)
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors: "):
        from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="directory must be a path, got 3"):
        from_pretrained(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device must be one of torch's, as 'cpu' or 'cuda:0', got 'nowhere'"):
        from_pretrained(tmp_path, device="nowhere")
    with pytest.raises(TypeError, match="dtype must be a floating-point"):
        from_pretrained(tmp_path, dtype=torch.int8)


def test_saves_as_diffusers_does(tmp_path: Path) -> None:
    """And what is saved is what was there."""
    model, (call,) = built(dit)
    model.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    save_pretrained(tmp_path / "ours", ours, config)
    with torch.no_grad():
        loaded = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "ours")
        assert torch.equal(outputs(loaded, [call], torch.float32)[0], outputs(model, [call], torch.float32)[0])
    with pytest.raises(CheckpointError, match=r"config\.json: the tensors that it says are not the model's"):
        save_pretrained(tmp_path / "other", ours, config | {"num_layers": 1})
    assert not (tmp_path / "other").exists()


def test_the_shipped_latent_digits_are_diffusers_too() -> None:
    digits = latent_digits.load()
    dit_of_theirs = diffusers.DiTTransformer2DModel.from_pretrained(
        latent_digits.LATENT_DIGITS / "transformer", torch_dtype=torch.float32
    )
    autoencoder_of_theirs = diffusers.AutoencoderKL.from_pretrained(
        latent_digits.LATENT_DIGITS / "vae", torch_dtype=torch.float32
    )
    x, t, labels = drawn(3, 4, 4, 4).float(), torch.tensor([1.0, 0.4, 0.1]), torch.tensor([0, 7, 10])
    with torch.no_grad():
        theirs = dit_of_theirs(x, timestep=t * 1000, class_labels=labels).sample
        torch.testing.assert_close(digits.denoiser(x, t, labels), theirs, rtol=1e-4, atol=1e-4)
        latents = x / autoencoder_of_theirs.config.scaling_factor
        torch.testing.assert_close(digits.decode(x), autoencoder_of_theirs.decode(latents).sample, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="not a directory"):
        latent_digits.load("nowhere")


def test_the_latent_digits_are_trained_by_the_example(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "examples" / "train_dit_digits.py"
    few = ["--steps", "2", "--autoencoder-steps", "2", "--batch-size", "4"]
    run = subprocess.run(
        [sys.executable, str(script), *few, "--out", str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert f"wrote {tmp_path}" in run.stdout
    assert latent_digits.load(tmp_path).description == latent_digits.load().description


def test_a_copy_holds_nothing_of_the_first(tmp_path: Path) -> None:
    model, (call, _) = built(unet)
    model.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    with torch.no_grad():
        expected = call_ours(ours, call, torch.float32)
        other = copy.deepcopy(ours)
        for parameter in ours.parameters():
            parameter.zero_()
        assert torch.equal(call_ours(other, call, torch.float32), expected)
        assert not torch.equal(call_ours(ours, call, torch.float32), expected)
