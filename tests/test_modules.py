"""diffusers' models, accelerated: the same results and gradients as theirs, put back as they were."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor
from torch import Tensor, nn

import pygen
from pygen.diffusers.modules import _dispatched
from tests.error_rule import Triple, assert_error_rule

Calls = list[dict[str, Any]]


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unet(**config: Any) -> tuple[nn.Module, Calls]:
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1, cross_attention_dim=24,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **config,
    )  # fmt: skip
    mask = (torch.arange(7) < torch.tensor([[7], [4]])).double()
    given = {"sample": drawn(2, 4, 8, 12), "timestep": torch.tensor([5, 300]), "encoder_hidden_states": drawn(2, 7, 24)}
    return model, [given, given | {"encoder_attention_mask": mask}]


def unet_of_linear_projections() -> tuple[nn.Module, Calls]:
    return unet(use_linear_projection=True, resnet_time_scale_shift="scale_shift")


def unconditional() -> tuple[nn.Module, Calls]:
    model = diffusers.UNet2DModel(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, attention_head_dim=4, in_channels=1,
        out_channels=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, [{"sample": drawn(3, 1, 16, 8), "timestep": 10}]


def autoencoder() -> tuple[nn.Module, Calls]:
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    return model, [{"sample": drawn(2, 3, 16, 24)}]


def dit() -> tuple[nn.Module, Calls]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    given = {"timestep": torch.tensor([3, 900]), "class_labels": torch.tensor([1, 7])}
    return model, [given | {"hidden_states": drawn(2, 4, 8, 8)}]


def pixart() -> tuple[nn.Module, Calls]:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=24, caption_channels=10,
    )  # fmt: skip
    given = {"timestep": torch.tensor([3, 900]), "encoder_hidden_states": drawn(2, 5, 10, seed=1)}
    given |= {"encoder_attention_mask": (torch.arange(5) < torch.tensor([[5], [2]])).double()}
    return model, [
        given | {"hidden_states": drawn(2, 4, 8, 8), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    ]


def stable_diffusion_3() -> tuple[nn.Module, Calls]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=3, joint_attention_dim=16, caption_projection_dim=24, pooled_projection_dim=12,
    )  # fmt: skip
    text = {"encoder_hidden_states": drawn(2, 5, 16, seed=1), "pooled_projections": drawn(2, 12, seed=2)}
    return model, [text | {"hidden_states": drawn(2, 4, 8, 8), "timestep": torch.tensor([30, 600])}]


def flux() -> tuple[nn.Module, Calls]:
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=12, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    given = {"encoder_hidden_states": drawn(2, 5, 16, seed=1), "pooled_projections": drawn(2, 12, seed=2)}
    given |= {"hidden_states": drawn(2, 12, 16), "timestep": torch.tensor([0.3, 0.8])}
    return model, [given | {"img_ids": drawn(12, 3).abs().round(), "txt_ids": torch.zeros(5, 3)}]


MODELS = [
    unet, unet_of_linear_projections, unconditional, autoencoder, dit, pixart, stable_diffusion_3, flux,
]  # fmt: skip
BY_MODEL = pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
LACKING = {unconditional: {"LayerNorm"}, autoencoder: {"LayerNorm"}, flux: {"Conv2d"}}


def built(build: Callable[[], tuple[nn.Module, Calls]]) -> tuple[nn.Module, Calls]:
    """In float32, no parameter 0 or 1 by its name alone, so that each has a say."""
    torch.manual_seed(0)
    model, calls = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), calls


def in_dtype(given: Any, dtype: torch.dtype) -> Any:
    if isinstance(given, dict):
        return {name: in_dtype(value, dtype) for name, value in given.items()}
    return given.to(dtype) if isinstance(given, Tensor) and given.dtype == torch.float64 else given


def rounded_to(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What a model of that dtype is given, in float64."""
    floats = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.dtype == torch.float64}
    return given | {name: x.to(dtype).double() for name, x in floats.items()}


def outputs(model: nn.Module, calls: Calls, dtype: torch.dtype) -> list[Tensor]:
    return [model(**in_dtype(call, dtype)).sample for call in calls]


def rounded(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The model in a dtype, and what it rounds to in float64."""
    model = copy.deepcopy(model).to(dtype)
    return model, copy.deepcopy(model).double()


@BY_MODEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_results_and_back(build: Any, dtype: torch.dtype) -> None:
    model, calls = built(build)
    calls = [rounded_to(call, dtype) for call in calls]
    model, exact = rounded(model, dtype)
    with torch.no_grad():
        theirs, truth = outputs(model, calls, dtype), outputs(exact, calls, torch.float64)
        report = pygen.accelerate(model)
        found = {what.partition(" (")[0] for what in report.replaced}
        assert found >= {"Conv2d", "Linear", "LayerNorm", "attention"} - LACKING.get(build, set())
        assert report.left == []
        assert pygen.accelerate(model).replaced == []
        for _ in range(2):  # the second time, with what was kept
            assert_error_rule(list(zip(outputs(model, calls, dtype), theirs, truth, strict=True)))
        report.undo()
        assert all("forward" not in vars(module) for module in model.modules())
        assert all(map(torch.equal, outputs(model, calls, dtype), theirs))


@BY_MODEL
def test_the_same_gradients(build: Any) -> None:
    model, calls = built(build)
    model, exact = rounded(model, torch.float32)

    def gradients(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        model.zero_grad()
        sum(y.square().mean() for y in outputs(model, calls, dtype)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    theirs, truth = gradients(model, torch.float32), gradients(exact, torch.float64)
    pygen.accelerate(model)
    ours = gradients(model, torch.float32)
    assert ours.keys() == theirs.keys()
    triples: list[Triple] = []
    for name, true in truth.items():
        scale = true.abs().max().clamp_min(1e-30)  # all parameters are one population
        triples.append((ours[name] / scale, theirs[name] / scale, true / scale))
    assert_error_rule(triples)


def test_the_dispatchers_masks_are_torchs() -> None:
    q, k = drawn(2, 5, 3, 8).float(), drawn(2, 7, 3, 8, seed=1).float()
    native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
    for mask in (drawn(5, 7), drawn(2, 7), drawn(2, 1, 5, 7), drawn(2, 7) > 0, None):
        given = mask.float() if mask is not None and mask.dtype != torch.bool else mask
        torch.testing.assert_close(_dispatched(q, k, k, given), native(q, k, k, given))
    with pytest.raises(ValueError, match="has four dimensions and no dropout"):
        _dispatched(q, k, k, dropout_p=0.1)


def attn2(model: Any) -> Any:
    return model.mid_block.attentions[0].transformer_blocks[0].attn2


def test_what_was_kept_of_weights_and_texts_is_made_again_when_they_change() -> None:
    model, (call, _) = built(unet)
    call = in_dtype(call, torch.float32)
    plain = copy.deepcopy(model)
    pygen.accelerate(model)
    text = call["encoder_hidden_states"]
    changes: tuple[Callable[[], Any], ...] = (
        lambda: text.mul_(-1),
        lambda: [m.conv_in.weight.mul_(2) for m in (model, plain)],
        lambda: [attn2(m).to_k.weight.mul_(3) for m in (model, plain)],
        lambda: [m.time_embedding.linear_1.weight.mul_(-1) for m in (model, plain)],
    )
    for change in changes:
        with torch.no_grad():
            model(**call)
            change()
            torch.testing.assert_close(model(**call).sample, plain(**call).sample)
            call |= {"encoder_hidden_states": text.clone()}  # another tensor with the same values
            torch.testing.assert_close(model(**call).sample, plain(**call).sample)
            call |= {"encoder_hidden_states": text}


def test_inference_mode_autocast_and_wrong_dtypes_are_as_before() -> None:
    model, (call, _) = built(unet)
    call, plain = in_dtype(call, torch.float32), copy.deepcopy(model)
    pygen.accelerate(model)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(model(**call).sample, plain(**call).sample)
            call |= {"encoder_hidden_states": 2 * call["encoder_hidden_states"]}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(**call).sample, plain(**call).sample
        assert ours.dtype == theirs.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"dtype|type"):
        model(**in_dtype(call, torch.float32) | {"sample": call["sample"].half()})


@pytest.mark.parametrize("build", [unet, stable_diffusion_3], ids=lambda build: build.__name__)
def test_a_copy_has_parameters_of_its_own(build: Any) -> None:
    model, (call, *_) = built(build)
    call = in_dtype(call, torch.float32)
    with torch.no_grad():
        plain = copy.deepcopy(model)
        pygen.accelerate(model)
        model(**call)
        copied = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(copied(**call).sample, plain(**call).sample)
        loaded = pickle.loads(pickle.dumps(copied))
        torch.testing.assert_close(loaded(**call).sample, plain(**call).sample)


def test_becomes_another_dtype_and_back() -> None:
    model, (call, _) = built(unet)
    before = [p.clone() for p in model.parameters()]
    report = pygen.accelerate(model, dtype=torch.bfloat16)
    assert f"tensor, now bfloat16 ({len(before)})" in report.replaced
    assert {p.dtype for p in model.parameters()} == {model.dtype} == {torch.bfloat16}
    assert model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert model(**in_dtype(call, torch.bfloat16)).sample.dtype == torch.bfloat16
    report.undo()
    assert all(map(torch.equal, model.parameters(), before))
    with pytest.raises(ValueError, match=r"dtype must be a floating-point torch\.dtype, got 'bfloat16'"):
        pygen.accelerate(model, dtype="bfloat16")
    with pytest.raises(TypeError, match="weights is not an option of accelerate for UNet2DConditionModel"):
        pygen.accelerate(model, weights="int8")


def test_what_is_left_is_said() -> None:
    model, (call, _) = built(unet)
    model.conv_out.padding_mode = "circular"
    model.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(SlicedAttnProcessor(1))
    hooked = model.conv_in.forward
    model.conv_in.forward = lambda *given: hooked(*given)
    with torch.no_grad():
        theirs = model(**in_dtype(call, torch.float32)).sample
        report = pygen.accelerate(model)
        assert sorted(line.partition(":")[0] for line in report.left) == [
            "conv_in", "conv_out", "mid_block.attentions.0.transformer_blocks.0.attn1",
        ]  # fmt: skip
        assert "conv_in: its forward has been replaced already" in report.left
        torch.testing.assert_close(model(**in_dtype(call, torch.float32)).sample, theirs)
    report.undo()
    assert isinstance(model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor, AttnProcessor2_0)
