"""The suite `unet`: denoisers of diffusers' own classes, accelerated, beside themselves in channels-last, and beside
OpenVINO where it can be imported. A U-Net may be done before its flops are at the product's rate: pygen's convolutions
have fewer.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pygen
from bench.cases import Case, Work, give_back
from tests.error_rule import Triple

if TYPE_CHECKING:
    from bench.run import Result

SIDE, CHECKED_SIDE, TEXT = 64, 32, 77  # of latents, of those that are compared with float64, and tokens of the prompt
PEERS = {"diffusers": "torch channels-last", "OpenVINO": "OpenVINO", "float32": "torch in float32"}
GOALS = {
    "bfloat16": {"diffusers": 1.35, "OpenVINO": 1.22, "float32": 2.7},
    "float32": {"diffusers": 1.3, "OpenVINO": 1.0},
}  # of the large ones, how many times as fast


def cases(quick: bool) -> list[Case]:
    if find_spec("diffusers") is None:
        return []
    names = ["small"] if quick else ["Stable Diffusion 1.5", "DiT-L/2"]
    return [
        Case("unet", f"{name}, {str(dtype)[6:]}", partial(work, name, dtype))
        for name in names
        for dtype in (torch.bfloat16, torch.float32)
    ]


@lru_cache(1)
def model(name: str) -> nn.Module:
    """With random weights, in float32."""
    torch.manual_seed(0)
    return made(name)


def made(name: str) -> nn.Module:
    import diffusers

    if name == "DiT-L/2":
        return diffusers.DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=24,
            sample_size=SIDE, patch_size=2, num_embeds_ada_norm=1000,
        ).eval()  # fmt: skip
    channels, heads = ((32, 64), 4) if name == "small" else ((320, 640, 1280, 1280), 8)
    levels = len(channels) - 1
    return diffusers.UNet2DConditionModel(
        sample_size=SIDE, block_out_channels=channels, cross_attention_dim=768, attention_head_dim=heads,
        down_block_types=["CrossAttnDownBlock2D"] * levels + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * levels,
    ).eval()  # fmt: skip


def inputs(name: str, dtype: torch.dtype, side: int) -> dict[str, Any]:
    x = torch.randn(2, 4, side, side).to(dtype).to(memory_format=torch.channels_last)
    timestep = torch.tensor([500, 500])
    if name == "DiT-L/2":
        return {"hidden_states": x, "timestep": timestep, "class_labels": torch.tensor([1, 1000])}
    return {"sample": x, "timestep": timestep, "encoder_hidden_states": torch.randn(2, TEXT, 768).to(dtype)}


def flops(name: str, given: dict[str, Any]) -> int:
    """Of a forward, counted where nothing is computed."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        made(name)(**{key: value.float().to("meta") if value.is_floating_point() else value.to("meta")
                      for key, value in given.items()})  # fmt: skip
    total: int = counter.get_total_flops()
    return total


def work(name: str, dtype: torch.dtype) -> Work:
    theirs = model(name)
    if dtype != torch.float32:
        theirs = copy.deepcopy(theirs).to(dtype)
    theirs = theirs.to(memory_format=torch.channels_last)
    ours = copy.deepcopy(theirs, {id(p): p for p in theirs.parameters()})  # on the same parameters
    pygen.accelerate(ours)
    given = inputs(name, dtype, CHECKED_SIDE if name == "small" else SIDE)

    def results() -> Iterator[Triple]:
        side = SIDE if name.startswith("DiT") else CHECKED_SIDE  # whose positions are of one size
        few = inputs(name, dtype, side)
        exact = copy.deepcopy(theirs).double()
        wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in few.items()}
        yield ours(**few).sample, theirs(**few).sample, exact(**wide).sample

    calls: dict[str, Callable[[], object]] = {"diffusers": lambda: theirs(**given), "pygen": lambda: ours(**given)}
    if find_spec("openvino") is not None:
        calls["OpenVINO"] = by_openvino(name, dtype)
    read = sum(p.numel() * p.element_size() for p in theirs.parameters())
    return Work(calls, read, flops(name, given), dtype, results)


class _Sample(nn.Module):
    """A model of what it is given in order, and gives a tensor: what OpenVINO takes."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *given: Tensor) -> Tensor:
        sample: Tensor = self.model(**dict(zip(self.names, given, strict=True))).sample
        return sample


def by_openvino(name: str, dtype: torch.dtype) -> Callable[[], object]:
    """The model on OpenVINO's CPU plug-in, in that precision. It is made at the first call, when the check's float64
    model is gone: both together are more than 24 GiB."""

    @cache
    def made() -> tuple[Any, list[Any]]:
        import openvino

        give_back()
        given = inputs(name, torch.float32, CHECKED_SIDE if name == "small" else SIDE)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of sizes, which stay as they are
            converted = openvino.convert_model(_Sample(model(name), list(given)), example_input=tuple(given.values()))
        hints = {
            "INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY",
        }  # fmt: skip
        request = openvino.Core().compile_model(converted, "CPU", hints).create_infer_request()
        return request, [tensor.numpy() for tensor in given.values()]

    def call() -> object:
        request, arrays = made()
        return request.infer(arrays)

    return call


def verdicts(results: Iterable[Result]) -> Iterator[str]:
    medians = {
        tuple(result.name.split(", ")): {who: spread.median for who, spread in result.times.items()}
        for result in results
        if result.suite == "unet" and result.times
    }
    for (name, dtype), times in medians.items():
        peers = dict(times)
        if dtype != "float32" and (name, "float32") in medians:
            peers["float32"] = medians[name, "float32"]["diffusers"]
        goals = GOALS[dtype] if name != "small" else {}
        said = [
            f"{peers[peer] / times['pygen']:.2f} times {whom}" + (f" (goal: {goals[peer]:g})" if peer in goals else "")
            for peer, whom in PEERS.items()
            if peer in peers
        ]
        yield f"{name}, {dtype}: {'; '.join(said)}"
