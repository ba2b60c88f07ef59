"""The digits U-Net by pygen's ops and by plain PyTorch: results, gradients, and a training."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pygen
from pygen.models.checkpoint import load_model
from pygen.models.unet import UNet
from tests.diffusers_models import gradient_triples
from tests.error_rule import assert_error_rule

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "pygen" / "models" / "digits"


def shown(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images with noise, times and classes, the null class too."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 1, 8, 8, generator=generator, dtype=torch.float64).float().double()
    return x, torch.arange(batch) * 999 // max(batch - 1, 1), torch.arange(batch) % 11


def truth_and_peer(model: nn.Module, run: Any) -> tuple[Any, Any]:
    """What ``run`` gives of plain PyTorch, in float64 and in float32."""
    with pygen.backend("reference"):
        return run(copy.deepcopy(model).double(), torch.float64), run(model, torch.float32)


@pytest.mark.parametrize("batch", [1, 2, 7, 42])
def test_results(batch: int) -> None:
    model, _ = load_model(DIGITS)
    x, t, labels = shown(batch)

    @torch.no_grad()
    def run(model: nn.Module, dtype: torch.dtype) -> Tensor:
        y: Tensor = model(x.to(dtype), t, labels)
        return y

    truth, same = truth_and_peer(model, run)
    for _ in range(2):  # the second time on weights that are held
        assert_error_rule([(run(model, torch.float32), same, truth)])


def test_gradients() -> None:
    model, _ = load_model(DIGITS)
    x, t, labels = shown(24)

    def run(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        model.zero_grad()
        model(x.to(dtype), t, labels).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    truth, same = truth_and_peer(model, run)
    assert_error_rule(gradient_triples(run(model, torch.float32), same, truth))


def test_a_training_has_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to plain PyTorch's as those of a plain training from weights that are one unit in the last place off."""
    spec = importlib.util.spec_from_file_location("train_digits", ROOT / "examples" / "train_digits.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    def losses() -> Tensor:
        _, of_steps, of_average = example.train(60, 32, 0)
        return torch.tensor([*of_steps, of_average])

    @torch.no_grad()
    def a_unit_off() -> UNet:
        model = UNet()
        for parameter in model.parameters():
            parameter.copy_(torch.nextafter(parameter, parameter + 1))
        return model

    ours = losses()
    with pygen.backend("reference"):
        plain = losses()
        monkeypatch.setattr(example, "UNet", a_unit_off)
        noise = losses()
    assert plain[0] > 2 * plain[59]
    assert_error_rule([(ours, noise, plain)])
