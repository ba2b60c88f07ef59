"""diffusers' pipelines, put together from small random parts: the same images with our schedulers as with theirs."""

import json
import sys

import diffusers
import pytest
import torch
import transformers

import pygen
import pygen.diffusers
from tests.diffusers_float64 import in_float64
from tests.error_rule import assert_error_rule


def vae(channels):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, in_channels=3, out_channels=3, latent_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, sample_size=32,
        shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def stable_diffusion(scheduler):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=16, cross_attention_dim=16,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    text = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    return diffusers.StableDiffusionPipeline(
        vae(4), transformers.CLIPTextModel(text), None, unet, scheduler, None, None, requires_safety_checker=False
    )


def dit(scheduler):
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=16,
        patch_size=4, num_embeds_ada_norm=1000, norm_elementwise_affine=False, norm_type="ada_norm_zero",
    )  # fmt: skip
    return diffusers.DiTPipeline(transformer.eval(), vae(4), scheduler)


def flux(scheduler):
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    return diffusers.FluxPipeline(scheduler, vae(4), None, None, None, None, transformer)


def embeddings(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


CALLS = {
    stable_diffusion: lambda: {
        "prompt_embeds": embeddings(1, 7, 16), "negative_prompt_embeds": -embeddings(1, 7, 16), "height": 32,
        "width": 32, "guidance_scale": 3.0, "latents": embeddings(1, 4, 16, 16),
        "generator": torch.Generator().manual_seed(0),
    },
    dit: lambda: {"class_labels": [3, 5], "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(0)},
    flux: lambda: {
        "prompt_embeds": embeddings(1, 5, 16), "pooled_prompt_embeds": embeddings(1, 16), "height": 32, "width": 32,
        "latents": embeddings(1, 64, 16),
    },
}  # fmt: skip
CASES = [
    (stable_diffusion, "DDIMScheduler", {"clip_sample": False}),
    (stable_diffusion, "EulerDiscreteScheduler", {}),
    (stable_diffusion, "DDPMScheduler", {"clip_sample": False}),
    (stable_diffusion, "PNDMScheduler", {"skip_prk_steps": True}),
    (stable_diffusion, "UniPCMultistepScheduler", {}),
    (stable_diffusion, "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    (stable_diffusion, "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    (dit, "DDIMScheduler", {"clip_sample": False}),
    (flux, "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
]


def images(pipe, call, dtype):
    """Of the pipeline in a dtype; what it is given is the same in all, and rounded to float32."""
    pipe.set_progress_bar_config(disable=True)
    pipe.to(dtype=dtype)
    arguments = {name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in call().items()}
    return torch.from_numpy(pipe(**arguments, num_inference_steps=6, output_type="np").images)


def draw_float32(monkeypatch, *modules):
    """Noise of whatever dtype is drawn in float32, so that the truth's is the same."""
    for module in (module for module in modules if hasattr(module, "randn_tensor")):
        draw = module.randn_tensor

        def drawn(*shape, dtype, draw=draw, **how):
            return draw(*shape, dtype=torch.float32, **how).to(dtype)

        monkeypatch.setattr(module, "randn_tensor", drawn)


@pytest.mark.parametrize(("build", "name", "config"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_the_same_images(build, name, config, monkeypatch):
    kind, call = getattr(diffusers, name), CALLS[build]
    exact = build(kind(**config))
    draw_float32(monkeypatch, sys.modules[kind.__module__], sys.modules[type(exact).__module__], pygen.diffusers.noise)
    with in_float64(kind):
        exact.scheduler = kind(**config)
        truth = images(exact, call, torch.float64)
    theirs = images(build(kind(**config)), call, torch.float32)
    pipe = build(kind(**config))
    report = pygen.accelerate(pipe)
    assert report.replaced[0] == f"scheduler: {name}"
    assert {"Conv2d", "Linear", "attention"} <= {what.partition(" (")[0] for what in report.replaced}
    assert report.left == []
    assert type(pipe.scheduler) is getattr(pygen.diffusers, name)
    ours = images(pipe, call, torch.float32)
    assert_error_rule([(ours, theirs, truth)], name)


def test_saves_as_diffusers_own_and_comes_back(tmp_path):
    pipe = dit(diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    report = pygen.accelerate(pipe)
    assert pygen.accelerate(pipe).replaced == []
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.DDIMScheduler
    assert pygen.accelerate(loaded).replaced[0] == "scheduler: DDIMScheduler"
    assert type(loaded.scheduler) is pygen.diffusers.DDIMScheduler
    assert loaded.scheduler.config.timestep_spacing == "trailing"
    report.undo()
    report.undo()
    assert type(pipe.scheduler) is diffusers.DDIMScheduler


def test_what_is_left_is_said():
    class Own(diffusers.DDIMScheduler):
        pass

    report = pygen.accelerate(dit(Own()))
    assert not any(what.startswith("scheduler") for what in report.replaced)
    assert report.left == [f"scheduler: {__name__}.Own has no drop-in"]
    with pytest.raises(
        TypeError, match="target must be a diffusers pipeline or model, or a transformers model, got Linear"
    ):
        pygen.accelerate(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="weights is not an option of accelerate for DiTPipeline"):
        pygen.accelerate(dit(Own()), weights="int8")


def test_a_whole_pipeline_in_bfloat16_and_back():
    call = CALLS[stable_diffusion]
    pipe = stable_diffusion(diffusers.DDIMScheduler(clip_sample=False))
    theirs = images(pipe, call, torch.float32)
    report = pygen.accelerate(pipe, dtype=torch.bfloat16)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}
    arguments = {n: x.bfloat16() if isinstance(x, torch.Tensor) else x for n, x in call().items()}
    ours = torch.from_numpy(pipe(**arguments, num_inference_steps=6, output_type="np").images)
    assert (ours - theirs).abs().mean() < 0.05
    report.undo()
    assert pipe.unet.dtype == torch.float32
    assert torch.equal(images(pipe, call, torch.float32), theirs)
