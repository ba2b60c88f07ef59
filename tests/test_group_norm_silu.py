"""group_norm_silu beyond its spec: how work is shared, layouts, and what it says of wrong arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pygen
from tests.error_rule import assert_error_rule

X, ONES = torch.ones(2, 8, 4, 4), torch.ones(8)
CHANNELS_LAST = X.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_batch_do_not_matter_to_the_bit(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    x = torch.randn(3, 320, 17, 19).to(dtype).to(memory_format=memory_format)
    weight, bias = torch.randn(2, 320)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(pygen.group_norm_silu(x, weight, bias, 32))
        results.append(torch.cat([pygen.group_norm_silu(sample, weight, bias, 32) for sample in x.split(1)]))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", [(96,), (3, 96)], ids=["of all", "of a sample"])
def test_gradients_err_no_more_than_torchs(
    memory_format: torch.memory_format, dtype: torch.dtype, of: tuple[int, ...]
) -> None:
    x, grad = (drawn.to(dtype).to(memory_format=memory_format) for drawn in torch.randn(2, 3, 96, 9, 11))
    weight, bias = torch.randn(2, *of).to(dtype)

    def gradients(function: Callable[..., Tensor], to: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(to).requires_grad_() for tensor in (x.clone(), weight.clone(), bias.clone())]
        function(leaves[0], *leaves[1:]).backward(grad.to(to).contiguous())
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    def by_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if weight.dim() == 1:
            return torch.nn.functional.silu(torch.nn.functional.group_norm(x, 32, weight, bias))
        y = torch.nn.functional.group_norm(x, 32)
        return torch.nn.functional.silu(y * weight[:, :, None, None] + bias[:, :, None, None])

    ours = gradients(lambda *leaves: pygen.group_norm_silu(*leaves, 32), dtype)
    assert ours[0].is_contiguous(memory_format=memory_format)
    for name, *triple in zip(
        ("x", "weight", "bias"), ours, gradients(by_torch, dtype), gradients(by_torch, torch.float64), strict=True
    ):
        assert_error_rule([tuple(triple)], name)


def test_gradients_are_those_of_the_reference() -> None:
    x, weight, bias = (torch.randn(size, dtype=torch.float64).requires_grad_() for size in ((2, 6, 3, 4), (2, 6), (6,)))
    with pygen.backend("reference"):
        assert torch.autograd.gradcheck(lambda *leaves: pygen.group_norm_silu(*leaves, 3), (x, weight, bias))
        assert torch.autograd.gradcheck(lambda x: pygen.group_norm_silu(x, None, bias.detach(), 2), (x,))


def test_output_has_the_memory_format_of_x() -> None:
    assert pygen.group_norm_silu(CHANNELS_LAST, ONES, ONES, 2).is_contiguous(memory_format=torch.channels_last)
    assert pygen.group_norm_silu(X, ONES, ONES, 2).is_contiguous()


def test_allocates_nothing_with_out() -> None:
    x = torch.randn(2, 320, 16, 16)
    for given in (x, x.to(memory_format=torch.channels_last)):
        with torch.profiler.profile(profile_memory=True) as profile:
            assert pygen.group_norm_silu(given, None, None, 32, out=given) is given
        assert sum(event.self_cpu_memory_usage for event in profile.key_averages()) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(8)}, ValueError, "x must have shape"),
        ({"x": X.double()}, TypeError, "x must be float32, bfloat16 or float16"),
        ({"x": X.transpose(2, 3)}, ValueError, "x's samples must be contiguous or channels-last"),
        ({"x": torch.ones(2, 8, 4, 8)[..., ::2]}, ValueError, "x's samples must be contiguous or channels-last"),
        ({"groups": 3}, ValueError, "groups must divide x's 8 channels, got 3"),
        ({"groups": 0}, ValueError, "groups must divide x's 8 channels, got 0"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(8,\)"),
        ({"bias": torch.ones(8, 1)}, ValueError, r"bias must have shape \(8,\) or \(2, 8\), got \[8, 1\]"),
        ({"weight": torch.ones(3, 8)}, ValueError, r"weight must have shape \(8,\) or \(2, 8\), got \[3, 8\]"),
        ({"bias": ONES.half()}, TypeError, "bias must have x's dtype .* or be float32"),
        ({"out": torch.ones(2, 8, 16)}, ValueError, "out must have x's shape"),
        ({"out": X.half()}, TypeError, "out must have x's dtype"),
        ({"out": CHANNELS_LAST.clone()}, ValueError, "out must have x's memory format"),
        ({"x": X.clone().requires_grad_(), "out": X.clone()}, RuntimeError, "not differentiable, and x requires grad"),
        ({"weight": ONES.clone().requires_grad_(), "out": X.clone()}, RuntimeError, "not differentiable, and weight"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    right = {"x": X, "weight": ONES, "bias": ONES, "groups": 2}
    with pytest.raises(error, match=message):
        pygen.group_norm_silu(**(right | arguments))


def test_overlap_is_refused() -> None:
    memory = torch.zeros(3, 8, 4, 4)
    with pytest.raises(RuntimeError, match="single memory location"):
        pygen.group_norm_silu(memory[:2], None, None, 2, out=memory[1:])
    weight = memory.view(-1)[:8]
    with pytest.raises(RuntimeError, match="single memory location"):
        pygen.group_norm_silu(memory[:2], weight, None, 2, out=memory[:2])
