"""What accelerate's approximations compute is what they say; nothing leaks between samplings; and all is put back."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

import pygen
import pygen.diffusers
from pygen.diffusers import approximations
from pygen.held import Held
from pygen.models.int8 import FEWEST_ROWS, bytes_are_exact, convolve_int8, project_int8, quantised
from pygen.models.layers import project
from tests.diffusers_models import Calls, built, dit, drawn, flux, in_dtype, pixart, stable_diffusion_3, unet
from tests.error_rule import Triple, assert_error_rule
from tests.test_pipelines import CALLS, images
from tests.test_pipelines import flux as flux_pipeline
from tests.test_pipelines import stable_diffusion as stable_diffusion_pipeline

needs_exact_bytes = pytest.mark.skipif(not bytes_are_exact(), reason="products of bytes saturate on this CPU")
BY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def wide_unet() -> tuple[nn.Module, Calls]:
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(72, 80), norm_num_groups=8, layers_per_block=1, cross_attention_dim=72,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    given = {"sample": drawn(2, 4, 12, 16), "timestep": torch.tensor([5, 300])}
    return model, [given | {"encoder_hidden_states": drawn(2, 40, 72)}]


def wide_dit() -> tuple[nn.Module, Calls]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    given = {"timestep": torch.tensor([3, 900]), "class_labels": torch.tensor([1, 7])}
    return model, [given | {"hidden_states": drawn(2, 4, 16, 16)}]


BY_WIDE_MODEL = pytest.mark.parametrize("build", [wide_unet, wide_dit], ids=lambda build: build.__name__)


def in_int8(model: nn.Module) -> dict[str, nn.Module]:
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    kinds = (project_int8, convolve_int8)
    return {name: model.get_submodule(name) for name, f in forwards.items() if getattr(f, "func", None) in kinds}


# int8


@pytest.mark.parametrize("of", [(-3.0, 5.0), (0.0, 1.0), (-1e-20, 0.0), (2.0, 3.0), (-127.5, 126.5)], ids=str)
@BY_DTYPE
def test_bytes_are_within_half_a_scale_and_0_is_one(of: tuple[float, float], dtype: torch.dtype) -> None:
    low, high = of
    x = torch.cat([torch.linspace(low, high, 300_001), torch.tensor([low, high])]).to(dtype)
    found = quantised(x)
    assert found is not None
    assert found.scale == pytest.approx((max(x.max().item(), 0) - min(x.min().item(), 0)) / 254)
    off = (found.scale * (found.values.double() - found.zero) - x.double()).abs().max().item()
    assert off <= found.scale * (0.5 + HALF_ABOVE)


HALF_ABOVE = 254 * 2.0**-23  # x / scale + zero + 1/2 is rounded twice in float32


def weights_of(module: Any) -> tuple[Tensor, Tensor]:
    """Rounded weights in float64, in units of the scale of each output channel, which is in float32."""
    weight = module.weight.detach().float()
    scales = weight.flatten(1).abs().amax(1) / 127
    return (weight / scales.view(-1, *[1] * (weight.dim() - 1))).round().double(), scales


def through(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(module, nn.Linear):
        return linear(x, weight, bias)
    return conv2d(x, weight, bias, module.stride, module.padding, module.dilation)


@needs_exact_bytes
@BY_WIDE_MODEL
@BY_DTYPE
def test_each_layer_is_the_product_of_what_is_rounded(build: Any, dtype: torch.dtype) -> None:
    """Of the rounded numbers, by the error rule; off from the exact product by what their rounding explains."""
    model, (call,) = built(build)
    model = model.to(dtype)
    report = pygen.accelerate(model, approximations=["int8"])
    layers = in_int8(model)
    kinds = {type(module).__name__ for module in layers.values()}
    assert kinds == ({"Linear", "Conv2d"} if build is wide_unet else {"Linear"})
    for kind in kinds:
        count = sum(type(module).__name__ == kind for module in layers.values())
        assert f"{kind} of 64 rows and more in int8, an approximation ({count})" in report.replaced
    assert report.left == []
    seen: list[tuple[Any, Tensor, Tensor]] = []
    for layer in layers.values():
        layer.register_forward_hook(lambda module, given, y: seen.append((module, given[0].clone(), y)))
    with torch.no_grad():
        model(**in_dtype(call, dtype))
    if build is wide_unet:  # which has its doubled image then
        assert any(module is model.up_blocks[0].upsamplers[0].conv for module, *_ in seen)
    triples: list[Triple] = []
    for module, x, y in seen:
        assert y.dtype == dtype
        bias = None if module.bias is None else module.bias.detach()
        exact = through(module, x.double(), module.weight.detach().double(), None if bias is None else bias.double())
        if x.numel() < FEWEST_ROWS * module.weight.shape[1]:
            with torch.no_grad():
                assert torch.equal(y, project(module, Held(), x))
            continue
        order = (0, 2, 3, 1) if x.dim() == 4 else range(x.dim())
        flat = x.permute(*order).contiguous()
        q = quantised(flat.view(-1))
        assert q is not None
        levels = (q.values.double() - q.zero).view(flat.shape)
        levels = levels.permute(0, 3, 1, 2) if x.dim() == 4 else levels
        weight, scales = weights_of(module)
        scales = scales.view(-1, 1, 1) if x.dim() == 4 else scales
        sums = through(module, levels, weight, None)
        offset = torch.zeros(1) if bias is None else bias.float().view(scales.shape)
        truth = sums * (q.scale * scales.double()) + offset.double()
        triples.append((y, (sums.float() * (q.scale * scales) + offset).to(dtype), truth))
        of_x = q.scale * (0.5 + HALF_ABOVE) * scales * through(module, torch.ones_like(levels), weight.abs(), None)
        of_weight = scales / 2 * (1 + HALF_ABOVE) * through(module, x.double().abs(), torch.ones_like(weight), None)
        assert ((truth - exact).abs() <= of_x + of_weight).all()
        assert_error_rule([triples[-1]])
    assert len(layers) / 2 < len(triples) < len(layers)


@needs_exact_bytes
def test_what_reads_or_writes_latents_and_what_embeds_times_stays_exact() -> None:
    model, (call,) = built(wide_unet)
    exact = copy.deepcopy(model)
    pygen.accelerate(exact)
    pygen.accelerate(model, approximations=["int8"])
    outputs: dict[str, list[Tensor]] = {}
    names = ["conv_in", "time_embedding", "down_blocks.0.resnets.0.time_emb_proj"]
    for name in names:
        for of in (model, exact):
            of.get_submodule(name).register_forward_hook(lambda _, __, y, n=name: outputs.setdefault(n, []).append(y))
    with torch.no_grad():
        ours, theirs = (of(**in_dtype(call, torch.float32)).sample for of in (model, exact))
    assert not torch.equal(ours, theirs)
    assert all(torch.equal(*outputs[name]) for name in names)
    assert not {"conv_in", "conv_out"} & in_int8(model).keys()


@needs_exact_bytes
def test_changed_weights_are_quantised_again() -> None:
    model, (call,) = built(wide_unet)
    call, plain = in_dtype(call, torch.float32), copy.deepcopy(model)
    pygen.accelerate(model, approximations=["int8"])
    with torch.no_grad():
        before = model(**call).sample
        for of in (model, plain):
            of.mid_block.resnets[0].conv1.weight.mul_(-2)
            of.mid_block.attentions[0].transformer_blocks[0].ff.net[2].weight.mul_(3)
            of.mid_block.attentions[0].transformer_blocks[0].ff.net[2].bias.add_(1)
        pygen.accelerate(plain, approximations=["int8"])
        after = model(**call).sample
        assert torch.equal(after, plain(**call).sample)
        assert not torch.equal(after, before)
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        model.mid_block.resnets[0].conv1.weight.zero_()
        assert torch.equal(copied(**call).sample, after)


@needs_exact_bytes
@BY_WIDE_MODEL
def test_gradients_are_those_without_approximations(build: Any) -> None:
    model, (call,) = built(build)
    exact = copy.deepcopy(model)
    pygen.accelerate(exact)
    pygen.accelerate(model, approximations=["int8", "step_cache"])
    for of in (model, exact):
        for _ in range(2):
            of.zero_grad()
            of(**in_dtype(call, torch.float32)).sample.square().mean().backward()
    gradients = [[p.grad for p in of.parameters() if p.grad is not None] for of in (model, exact)]
    assert len(gradients[0]) == len(gradients[1]) > 40
    assert all(map(torch.equal, *gradients))


@needs_exact_bytes
@pytest.mark.parametrize(
    "layer", [nn.Linear(70, 80), nn.Conv2d(70, 80, 3, padding=1)], ids=lambda of: type(of).__name__
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e-35])
def test_what_has_no_scale_is_exact(layer: Any, value: float) -> None:
    x = torch.full((2, 70, 9, 8), value) if isinstance(layer, nn.Conv2d) else torch.full((144, 70), value)
    in_int8 = convolve_int8 if isinstance(layer, nn.Conv2d) else project_int8
    with torch.no_grad():
        torch.testing.assert_close(in_int8(layer, Held(), Held(), x), layer(x), equal_nan=True)


@needs_exact_bytes
def test_in_any_order_with_a_plain_one_and_back() -> None:
    model, (call,) = built(wide_unet)
    call = in_dtype(call, torch.float32)

    def result() -> Tensor:
        return model(**call).sample

    with torch.no_grad():
        theirs = result()
        first = pygen.accelerate(model)
        exact = result()
        second = pygen.accelerate(model, approximations=["int8", "step_cache"])
        assert all(what.partition(" (")[0].endswith("an approximation") for what in second.replaced)
        assert second.left == []
        approximate = result()
        assert not torch.equal(approximate, exact)
        assert pygen.accelerate(model, approximations=["int8", "step_cache"]).replaced == []
        assert pygen.accelerate(model).replaced == []
        second.undo()
        assert torch.equal(result(), exact)
        first.undo()
        assert torch.equal(result(), theirs)
        assert all("forward" not in vars(module) for module in model.modules())
        whole = pygen.accelerate(model, approximations=["int8"])
        assert pygen.accelerate(model).replaced == []
        assert torch.equal(result(), approximate)
        whole.undo()
        assert torch.equal(result(), theirs)


def test_a_cpu_whose_products_of_bytes_saturate_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximations, "bytes_are_exact", lambda: False)
    model, _ = built(wide_unet)
    report = pygen.accelerate(model, approximations=["int8"])
    assert in_int8(model) == {}
    assert report.left == ["int8 in UNet2DConditionModel: products of bytes saturate on this CPU, which lacks VNNI"]


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="no AVX2 to be limited to")
def test_saturation_is_found_out() -> None:
    code = "from pygen.models.int8 import bytes_are_exact; print(bytes_are_exact())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


# What is asked for


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["int4"], "approximations must be among int8, step_cache, got 'int4'"),
        ("int4", "approximations must be among int8, step_cache, got 'int4'"),
        ({"int8": {"bits": 7}}, "approximations: int8 has no 'bits', its settings are: none"),
        ({"step_cache": {"steps": 7}}, "step_cache has no 'steps', its settings are: interval, threshold"),
        ({"step_cache": {"interval": 0}}, "step_cache's interval must be a positive integer, got 0"),
        ({"step_cache": {"threshold": -1.0}}, "step_cache's threshold must be finite and not negative, got -1.0"),
    ],
)
def test_what_there_is_not_is_named_and_nothing_is_replaced(asked: Any, message: str) -> None:
    pipe = stable_diffusion_pipeline(diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match=message):
        pygen.accelerate(pipe, approximations=asked)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    assert all("forward" not in vars(module) for module in pipe.unet.modules())


# step_cache


class Counted:
    """How often modules are called."""

    def __init__(self, **modules: nn.Module) -> None:
        self.calls = dict.fromkeys(modules, 0)
        for name, module in modules.items():
            module.register_forward_hook(functools.partial(self._count, name))

    def _count(self, name: str, *of: Any) -> None:
        self.calls[name] += 1

    def during(self, function: Any) -> dict[str, int]:
        before = dict(self.calls)
        function()
        return {name: self.calls[name] - count for name, count in before.items()}


def cached_unet(**settings: Any) -> tuple[Any, Any, dict[str, Any], Counted]:
    """A U-Net, one without, what they are given, and how often the model runs its deep and its shallow parts."""
    model, (call, _) = built(unet)
    plain = copy.deepcopy(model)
    call = in_dtype(call, torch.float32) | {"timestep": torch.tensor(900.0, dtype=torch.float64)}
    counted = Counted(deep=model.mid_block, shallow=model.down_blocks[0].resnets[0], last=model.up_blocks[-1])
    for of in (model, plain):
        pygen.accelerate(of)
    report = pygen.accelerate(model, approximations={"step_cache": settings})
    assert report.replaced == ["UNet2DConditionModel with deep features of earlier steps, an approximation"]
    return model, plain, call, counted


def deep_calls(model: Any, counted: Counted, calls: Iterable[dict[str, Any]]) -> list[int]:
    found = []
    with torch.no_grad():
        for call in calls:
            count = counted.during(lambda call=call: model(**call))
            assert count["shallow"] == count["last"] == 1
            found.append(count["deep"])
    return found


def at(call: dict[str, Any], *times: float) -> list[dict[str, Any]]:
    return [call | {"timestep": torch.tensor(time, dtype=torch.float64)} for time in times]


def test_deep_blocks_run_once_an_interval() -> None:
    model, _, call, counted = cached_unet()
    assert deep_calls(model, counted, at(call, *range(900, 200, -100))) == [1, 0, 0, 1, 0, 0, 1]
    model, _, call, counted = cached_unet(interval=2)
    assert deep_calls(model, counted, at(call, *range(900, 200, -100))) == [1, 0, 1, 0, 1, 0, 1]
    model, _, call, counted = cached_unet(interval=1)
    assert deep_calls(model, counted, at(call, *range(900, 200, -100))) == [1] * 7


@pytest.mark.parametrize("freeu", [False, True])
def test_a_shallow_step_is_the_whole_one_where_the_deep_features_are_the_same(freeu: bool) -> None:
    """As they are at times that differ only where their embedding, in float32, does not."""
    model, plain, call, counted = cached_unet()
    if freeu:
        for of in (model, plain):
            of.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with torch.no_grad():
        theirs = plain(**call).sample
        for step in range(3):
            (nearly,) = at(call, 900.0 - step * 1e-9)
            count = counted.during(lambda nearly=nearly: torch.testing.assert_close(model(**nearly).sample, theirs))
            assert count["deep"] == (step == 0)


def test_deep_features_are_not_used_for_what_they_are_not_of() -> None:
    model, plain, call, counted = cached_unet()
    text = call["encoder_hidden_states"]
    wider = {"sample": drawn(2, 4, 8, 16).float()}
    for other in ({"encoder_hidden_states": -text}, wider, {"sample": -call["sample"]}, {"timestep": 900.0}):
        (later,) = at(call, 800.0)
        calls = [call, later | other]
        assert deep_calls(model, counted, calls) == [1, 1], other
        with torch.no_grad():
            model(**call)
            assert torch.equal(model(**calls[1]).sample, plain(**calls[1]).sample)
    near = {"encoder_hidden_states": text.clone(), "sample": 1.2 * call["sample"]}
    assert deep_calls(model, counted, [call, later | near]) == [1, 0]


def test_texts_with_calls_of_their_own_have_features_of_their_own() -> None:
    model, _, call, counted = cached_unet()
    other = call | {"encoder_hidden_states": -call["encoder_hidden_states"]}
    with torch.no_grad():
        alone = [[model(**given).sample for given in at(of, 900.0, 800.0)][1] for of in (call, other)]
        for given in at(call, 900.0):
            model(**given), model(**given | {"encoder_hidden_states": other["encoder_hidden_states"]})
        count = counted.during(lambda: None)
        together = [model(**given).sample for of in (call, other) for given in at(of, 800.0)]
    assert count["deep"] == 0
    assert all(map(torch.equal, together, alone))


def test_what_is_added_to_deep_features_and_what_learns_runs_whole() -> None:
    model, plain, call, counted = cached_unet()
    shapes = [(2, 16, 8, 12), (2, 16, 8, 12), (2, 16, 4, 6), (2, 32, 4, 6)]
    control = {"down_block_additional_residuals": tuple(drawn(*shape).float() for shape in shapes)}
    control |= {"mid_block_additional_residual": drawn(2, 32, 4, 6).float()}
    for given in at(call | control, 900.0, 800.0):
        assert deep_calls(model, counted, [given]) == [1]
        with torch.no_grad():
            assert torch.equal(model(**given).sample, plain(**given).sample)
    for given in at(call, 700.0, 600.0):
        count = counted.during(lambda given=given: model(**given).sample.mean().backward())
        assert count["deep"] == 1


def test_copies_keep_nothing_of_the_original() -> None:
    model, plain, call, _ = cached_unet()
    (later,) = at(call, 800.0)
    with torch.no_grad():
        model(**call)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(**later).sample, plain(**later).sample)


TRANSFORMERS = pytest.mark.parametrize("build", [dit, pixart, flux], ids=lambda build: build.__name__)


@TRANSFORMERS
def test_first_block_cache_skips_blocks_and_forgets(build: Any) -> None:
    model, (call, *_) = built(build)
    call, plain = in_dtype(call, torch.float32), copy.deepcopy(model)
    blocks = list(model.transformer_blocks) + list(getattr(model, "single_transformer_blocks", []))
    counted = Counted(**{place: block.attn if build is flux else block.attn1 for place, block in
                         (("first", blocks[0]), ("last", blocks[-1]))})  # fmt: skip
    pygen.accelerate(plain)
    pygen.accelerate(model)
    forwards = [vars(block).get("forward") for block in blocks]
    what = f"{type(model).__name__} with diffusers' first-block cache, an approximation"
    times = [call | {"timestep": call["timestep"] * factor} for factor in (1.0, 0.99, 0.98)]
    with torch.no_grad():
        exact = [plain(**given).sample for given in times]
        never = pygen.accelerate(model, approximations={"step_cache": {"threshold": 0}})
        assert never.replaced == [what]
        assert all(map(torch.equal, (model(**given).sample for given in times), exact))
        never.undo()
        assert pygen.accelerate(model).replaced == []
        always = pygen.accelerate(model, approximations={"step_cache": {"threshold": 1e9}})
        runs = []
        for _ in range(2):
            for step, given in enumerate(times):
                count = counted.during(lambda given=given: runs.append(model(**given).sample))
                assert count == {"first": 1, "last": int(step == 0)}
        assert all(map(torch.equal, runs[:3], runs[3:]))
        assert torch.equal(runs[0], exact[0])
        assert not torch.equal(runs[2], exact[2])
        if build is dit:  # of another shape
            one = {name: x[:1] for name, x in times[1].items()}
            assert torch.equal(model(**one).sample, plain(**one).sample)
        always.undo()
        assert all(map(torch.equal, (model(**given).sample for given in times), exact))
    assert not any("_diffusers_hook" in vars(module) for module in model.modules())
    assert [vars(block).get("forward") for block in blocks] == forwards


def test_models_without_a_cache_say_so() -> None:
    for model, reason in (
        (built(stable_diffusion_3)[0], "diffusers has no cache for it"),
        (diffusers.DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1), "refuses it"),
        (diffusers.UNet2DModel(block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
                               up_block_types=("UpBlock2D",)), "no rule for a U-Net"),
    ):  # fmt: skip
        report = pygen.accelerate(model, approximations=["step_cache"])
        assert [reason in line for line in report.left] == [True], report.left
        report.undo()
        assert not any({"forward", "_diffusers_hook"} & vars(module).keys() for module in model.modules())
    autoencoder = stable_diffusion_pipeline(diffusers.DDIMScheduler()).vae
    assert pygen.accelerate(autoencoder, approximations=["int8", "step_cache"]).left == [
        "AutoencoderKL: stays exact: it runs once an image, and its errors are the image's"
    ]
    model, _ = built(flux)
    model.enable_cache(diffusers.FirstBlockCacheConfig())
    report = pygen.accelerate(model, approximations=["step_cache"])
    assert report.left[-1] == "step_cache of FluxTransformer2DModel: diffusers' own cache is enabled"


PIPELINES = [
    (stable_diffusion_pipeline, lambda: diffusers.DDIMScheduler(clip_sample=False), "unet"),
    (flux_pipeline, lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "transformer"),
]


@pytest.mark.parametrize(("build", "scheduler", "part"), PIPELINES, ids=["stable_diffusion", "flux"])
def test_a_pipeline_s_images_do_not_depend_on_those_before(build: Any, scheduler: Any, part: str) -> None:
    def others() -> dict[str, Any]:
        call = CALLS[build]()
        return call | {name: -call[name] for name in ("prompt_embeds", "latents")}

    def accelerated() -> Any:
        pipe = build(scheduler())
        exact = images(pipe, CALLS[build], torch.float32)
        report = pygen.accelerate(pipe, approximations={"step_cache": {"threshold": 1.0}})
        assert sum("an approximation" in what for what in report.replaced) == 1
        assert report.left == ["AutoencoderKL: stays exact: it runs once an image, and its errors are the image's"]
        return pipe, exact, report

    pipe, exact, report = accelerated()
    first, second = (images(pipe, CALLS[build], torch.float32) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, exact)
    third = images(pipe, others, torch.float32)
    assert torch.equal(third, images(accelerated()[0], others, torch.float32))
    report.undo()
    assert torch.equal(images(pipe, CALLS[build], torch.float32), exact)
