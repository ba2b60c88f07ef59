"""winograd_conv2d beyond its spec: beside conv2d on the weight itself, invariance, and wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

import pygen
from pygen import _C
from pygen.models.layers import Conv2d
from pygen.ops.winograd_conv2d import learning_winograd_conv2d
from tests.error_rule import assert_error_rule


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


W, B = drawn(24, 20, 3, 3, seed=1), drawn(24, seed=2)
X, PACKED = channels_last(drawn(2, 20, 9, 7)), pygen.winograd_weight(W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("channels", "side", "outputs"), [(320, 32, 320), (1280, 8, 640), (256, 33, 70), (64, 65, 96)])
def test_errs_no_more_than_a_direct_convolution(channels: int, side: int, outputs: int, dtype: torch.dtype) -> None:
    x = channels_last(drawn(2, channels, side, side).to(dtype))
    w, b = (drawn(outputs, channels, 3, 3, seed=1) / (9 * channels) ** 0.5).to(dtype), drawn(outputs, seed=2).to(dtype)
    found = pygen.winograd_conv2d(x, pygen.winograd_weight(w), b, out_channels=outputs)
    assert found.is_contiguous(memory_format=torch.channels_last)
    truth = conv2d(x.double(), w.double(), b.double(), padding=1)
    assert_error_rule([(found, conv2d(x, w, b, padding=1), truth)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_computes_by_it(dtype: torch.dtype) -> None:
    layer = Conv2d(270, 96, 3, padding=1).to(dtype).requires_grad_(False)
    x = channels_last(drawn(2, 270, 20, 24).to(dtype))
    packed = pygen.winograd_weight(layer.weight)
    layer(x[:, :, :3, :3])
    if _C.isa().startswith("avx512") and not (dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()):
        assert torch.equal(layer(x), pygen.winograd_conv2d(x, packed, layer.bias, out_channels=96))
    few = x[:, :, :5, :5].contiguous(memory_format=torch.channels_last)  # of another way, whichever was the first
    wide = layer.weight.double(), layer.bias.double()
    truth = conv2d(few.double(), *wide, padding=1)
    assert_error_rule([(layer(few), conv2d(few, layer.weight, layer.bias, padding=1), truth)])
    alone = x[0].contiguous()
    assert torch.equal(layer(alone), conv2d(alone, layer.weight, layer.bias, padding=1))


@pytest.mark.parametrize("channels", [64, 260])
@pytest.mark.parametrize("frozen", [(), ("x",), ("weight", "bias")], ids=lambda names: "and".join(names) or "none")
def test_learns_as_a_direct_convolution_does(frozen: tuple[str, ...], channels: int) -> None:
    layer = Conv2d(channels, 130, 3, padding=1)
    given = {"x": channels_last(drawn(4, channels, 30, 18)), **dict(layer.named_parameters())}
    of = [name for name in given if name not in frozen]
    given["x"].requires_grad_()
    grad = drawn(4, 130, 30, 18, seed=5)

    def direct(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv2d(x, weight, bias, padding=1)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = {n: t.detach().to(dtype).requires_grad_(n in of) for n, t in given.items()}
        y = function(**leaves)
        return [y.detach(), *torch.autograd.grad(y, [leaves[name] for name in of], grad.to(dtype))]

    ours, same, truth = (run(f, t) for f, t in ((learning_winograd_conv2d, torch.float32), (direct, torch.float32),
                                                (direct, torch.float64)))  # fmt: skip
    assert_error_rule(list(zip(ours, same, truth, strict=True)))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in of)
    y = layer(given["x"].detach().requires_grad_("x" in of))
    assert type(y.grad_fn).__name__.startswith("_Learning") == _C.isa().startswith("avx512")
    with torch.no_grad():
        assert_error_rule([(layer(given["x"]), same[0], truth[0])])


@pytest.mark.parametrize("channels", [40, 280])
def test_the_same_bits_on_any_number_of_threads_and_in_any_batch(channels: int) -> None:
    x = channels_last(drawn(3, channels, 46, 38))
    packed = pygen.winograd_weight(drawn(200, channels, 3, 3, seed=1))
    whole = pygen.winograd_conv2d(x, packed, out_channels=200)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(pygen.winograd_conv2d(x, packed, out_channels=200), whole)
            assert torch.equal(pygen.winograd_conv2d(x[1:2], packed, out_channels=200), whole[1:2])
    finally:
        torch.set_num_threads(threads)


def test_records_and_writes_in_place() -> None:
    x = X.clone(memory_format=torch.channels_last)
    program = pygen.record(lambda: pygen.winograd_conv2d(x, PACKED, B, out_channels=24))
    x.copy_(drawn(2, 20, 9, 7, seed=3))
    assert torch.equal(program(), pygen.winograd_conv2d(x, PACKED, B, out_channels=24))
    out = torch.empty(2, 9, 7, 30).permute(0, 3, 1, 2)[:, 3:27]
    assert pygen.winograd_conv2d(x, PACKED, B, out_channels=24, out=out) is out
    assert torch.equal(out, pygen.winograd_conv2d(x, PACKED, B, out_channels=24))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X[0]}, ValueError, "x must have shape (batch, channels, height, width), got torch.Size([20, 9, 7])"),
        ({"x": X.contiguous()}, ValueError, "x must be channels-last"),
        ({"x": X.double()}, TypeError, "x must be float32, bfloat16 or float16"),
        ({"x": X[:, :8]}, ValueError, "weight must be contiguous, of shape [1, 8, 9, 64]"),
        ({"weight": PACKED.half()}, TypeError, "weight must have x's dtype Float, got Half"),
        ({"weight": W}, ValueError, "weight must be contiguous, of shape [1, 20, 9, 64]"),
        ({"x": X[:, :0]}, ValueError, "x must have channels"),
        ({"out_channels": 65}, ValueError, "weight must be contiguous, of shape [2, 20, 9, 64]"),
        ({"out_channels": 0}, ValueError, "out_channels must be positive, got 0"),
        ({"out_channels": -3}, ValueError, "out_channels must be positive, got -3"),
        ({"bias": B[:8]}, ValueError, "bias must be contiguous, of shape 24, got [8]"),
        ({"bias": B.half()}, TypeError, "bias must have x's dtype Float, got Half"),
        (
            {"out": channels_last(torch.empty(2, 24, 9, 8))},
            ValueError,
            "out must have shape [2, 24, 9, 7], got [2, 24, 9",
        ),
        ({"out": torch.empty(2, 24, 9, 7)}, ValueError, "out must be channels-last"),
        ({"out": channels_last(torch.empty(2, 24, 9, 7).half())}, TypeError, "out must have x's dtype Float"),
        ({"x": X.clone().requires_grad_()}, RuntimeError, "winograd_conv2d is not differentiable, and x"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error) as caught:
        pygen.winograd_conv2d(**({"x": X, "weight": PACKED, "bias": B, "out_channels": 24} | arguments))
    assert message in str(caught.value)


def test_wrong_weights_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight must have shape \(out_channels, channels, 3, 3\)"):
        pygen.winograd_weight(torch.ones(4, 4, 1, 1))
    with pytest.raises(TypeError, match=r"weight must be float32, bfloat16 or float16, got torch.float64"):
        pygen.winograd_weight(torch.ones(4, 4, 3, 3, dtype=torch.float64))
