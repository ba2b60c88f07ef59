"""timestep_embedding beside diffusers' function, its gradient, and wrong arguments; test_ops runs its kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

import pygen
from tests.error_rule import assert_error_rule


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("cosines_first", [False, True])
@pytest.mark.parametrize("width", [4, 33, 320])
@pytest.mark.parametrize("t", [torch.arange(0, 1000, 37), torch.rand(9) * 1000, torch.rand(5).half()], ids=str)
def test_as_diffusers(t: Tensor, width: int, cosines_first: bool, shift: int) -> None:
    theirs = get_timestep_embedding(t, width, flip_sin_to_cos=cosines_first, downscale_freq_shift=shift)
    settings: dict[str, Any] = {"cosines_first": cosines_first, "shift": float(shift)}
    ours = pygen.timestep_embedding(t, width, **settings)
    with pygen.backend("reference"):
        truth = pygen.timestep_embedding(t.double(), width, dtype=torch.float64, **settings)
    assert_error_rule([(ours, theirs, truth)])
    assert (ours - truth).abs().max() < 2e-7  # theirs are off by 1e-4 at the largest times


@pytest.mark.parametrize("cosines_first", [False, True])
@pytest.mark.parametrize("width", [6, 31])
def test_gradient(width: int, cosines_first: bool) -> None:
    t = (torch.rand(4, dtype=torch.float64) * 10).requires_grad_()

    def function(t: Tensor) -> Tensor:
        return pygen.timestep_embedding(t, width, cosines_first=cosines_first, dtype=torch.float64)

    with pygen.backend("reference"):
        assert torch.autograd.gradcheck(function, (t,))
        (truth,) = torch.autograd.grad(function(t).square()[:, ::2].sum(), t)
    results = []
    for embed in (pygen.timestep_embedding, get_timestep_embedding):
        named = {"cosines_first" if embed is pygen.timestep_embedding else "flip_sin_to_cos": cosines_first}
        shift = {} if embed is pygen.timestep_embedding else {"downscale_freq_shift": 0}
        single = t.detach().float().requires_grad_()
        results += torch.autograd.grad(embed(single, width, **named, **shift).square()[:, ::2].sum(), single)
    assert_error_rule([(*results, truth)])


@pytest.mark.parametrize(
    ("t", "width", "more", "error", "match"),
    [
        (torch.ones(2, 2), 8, {}, ValueError, r"t must have shape \(batch,\), got \[2, 2\]"),
        (torch.ones(2, dtype=torch.complex64), 8, {}, TypeError, "t must be real"),
        (torch.ones(2), 1, {}, ValueError, "width must be at least 2"),
        (torch.ones(2), 2, {"shift": 1.0}, ValueError, "shift below half of it"),
        (torch.ones(2), 8, {"max_period": -1.0}, ValueError, "max_period must be above 0"),
        (torch.ones(2), 8, {"dtype": torch.float64}, TypeError, "out"),
        (torch.ones(2), 8, {"out": torch.ones(3, 8)}, ValueError, r"out must have shape \(2, width\)"),
        (torch.ones(2), 8, {"out": torch.ones(2, 9)}, ValueError, r"out must have width 8, got \[2, 9\]"),
    ],
)
def test_wrong_arguments(t: Tensor, width: int, more: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        pygen.timestep_embedding(t, width, **more)
