"""diffusers' models, accelerated: the same results and gradients as theirs, put back as they were."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor
from torch import Tensor, nn

import pygen
from pygen.diffusers.attention import _dispatched
from tests.diffusers_models import (
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
    unconditional,
    unet,
    unet_of_linear_projections,
    wide_autoencoder,
)
from tests.error_rule import assert_error_rule

MODELS = [
    unet, unet_of_linear_projections, unconditional, autoencoder, wide_autoencoder, dit, pixart, stable_diffusion_3,
    stable_diffusion_3_5, flux,
]  # fmt: skip
BY_MODEL = pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
BLOCKS = {
    dit: {"BasicTransformerBlock", "AdaLayerNormZero"},
    pixart: {"BasicTransformerBlock"},
    stable_diffusion_3: {"JointTransformerBlock", "AdaLayerNormZero", "AdaLayerNormContinuous"},
    stable_diffusion_3_5: {"JointTransformerBlock", "SD35AdaLayerNormZeroX", "RMSNorm"},
    flux: {"FluxTransformerBlock", "FluxSingleTransformerBlock", "AdaLayerNormZeroSingle", "RMSNorm"},
}
LACKING = {of: {"LayerNorm"} for of in (unconditional, autoencoder, wide_autoencoder)} | {flux: {"Conv2d"}}


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
        assert build not in BLOCKS or found >= BLOCKS[build] | {"GELU"}
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
    assert_error_rule(gradient_triples(ours, theirs, truth))


def test_the_dispatchers_masks_are_torchs() -> None:
    q, k = drawn(2, 5, 3, 8).float(), drawn(2, 7, 3, 8, seed=1).float()
    native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
    for mask in (drawn(5, 7), drawn(2, 7), drawn(2, 1, 5, 7), drawn(2, 7) > 0, None):
        given = mask.float() if mask is not None and mask.dtype != torch.bool else mask
        torch.testing.assert_close(_dispatched(q, k, k, given), native(q, k, k, given))
    torch.manual_seed(0)
    dropped = _dispatched(q, k, k, dropout_p=0.5)
    torch.manual_seed(0)
    parts = (tensor.transpose(1, 2) for tensor in (q, k, k))
    assert torch.equal(dropped, pygen.attention(*parts, dropout_p=0.5).transpose(1, 2))
    with pytest.raises(ValueError, match="has four dimensions, got 5"):
        _dispatched(*(tensor[None] for tensor in (q, k, k)))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_packed_for_one_size_of_image_do_for_another(dtype: torch.dtype) -> None:
    model, (call, _) = built(unet)
    model, exact = rounded(model, dtype)
    sizes = [rounded_to(call | {"sample": drawn(2, 4, side, side)}, dtype) for side in (2, 16, 8)]
    with torch.no_grad():
        theirs, truth = outputs(model, sizes, dtype), outputs(exact, sizes, torch.float64)
        pygen.accelerate(model)
        assert_error_rule(list(zip(outputs(model, sizes, dtype), theirs, truth, strict=True)))


def test_a_block_that_is_called_otherwise_runs_as_before() -> None:
    model, (call, *_) = built(pixart)
    given = in_dtype(call, torch.float32)
    plain = copy.deepcopy(model)
    pygen.accelerate(model)
    for of in (model, plain):
        of.transformer_blocks[0].set_chunk_feed_forward(2, dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(**given).sample, plain(**given).sample)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("change", ["fused projections", "another backend", "norms of other dtypes"])
def test_joint_attention_that_is_changed_later(change: str) -> None:
    model, (call, *_) = built(flux)
    given = in_dtype(call, torch.float32)
    plain = copy.deepcopy(model)
    pygen.accelerate(model)
    for of in (model, plain):
        if change == "fused projections":
            for block in (*of.transformer_blocks, *of.single_transformer_blocks):
                block.attn.fuse_projections()
        elif change == "another backend":
            of.set_attention_backend("_native_math")
        else:
            for block in of.transformer_blocks:
                block.attn.norm_added_q.bfloat16()
                block.attn.norm_q.double()
    with torch.no_grad():
        torch.testing.assert_close(model(**given).sample, plain(**given).sample)


def test_inference_mode_autocast_and_wrong_dtypes_are_as_before() -> None:
    model, (call, _) = built(unet)
    plain, exact = rounded(copy.deepcopy(model), torch.float32)
    with torch.no_grad():
        (truth,) = outputs(exact, [rounded_to(call, torch.float32)], torch.float64)
    call = in_dtype(call, torch.float32)
    pygen.accelerate(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(**call).sample, plain(**call).sample
        assert ours.dtype == theirs.dtype == torch.bfloat16
    assert_error_rule([(ours, theirs, truth)])
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(model(**call).sample, plain(**call).sample)
            call |= {"encoder_hidden_states": 2 * call["encoder_hidden_states"]}
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"dtype|type"):
        model(**in_dtype(call, torch.float32) | {"sample": call["sample"].half()})


@pytest.mark.parametrize("build", [unet, stable_diffusion_3, flux], ids=lambda build: build.__name__)
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
