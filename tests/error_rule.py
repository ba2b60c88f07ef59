"""The error rule of the design, law 5: no hand-tuned tolerance.

With err = max |a - truth|: err(kernel) <= 2 err(same-dtype torch) + one unit in the last place of the output dtype at
max |truth|; NaN and Inf stand in the same places once the truth is cast to the output dtype. Integers and booleans,
which are decisions, equal the truth.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]  # from the kernel, from torch in the same dtype, the float64 truth


def unit_in_the_last_place(value: float, dtype: torch.dtype) -> float:
    at = torch.tensor(value, dtype=torch.float64).to(dtype)
    above = at.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]) + 1
    return above.view(dtype).double().item() - at.double().item()


def assert_error_rule(triples: Iterable[Triple], what: str = "") -> None:
    """Holds over all triples together: they are one population, of which the error is the maximum."""
    kernel_error = torch_error = largest = 0.0
    dtype = torch.float32
    for kernel, same, truth in triples:
        if not kernel.is_floating_point():
            assert torch.equal(kernel, truth), f"{what}: other decisions than the truth's"
            continue
        dtype = kernel.dtype
        cast = truth.to(dtype)
        assert torch.equal(kernel.isnan(), cast.isnan()), f"{what}: NaN in other places than the truth"
        infinite = cast.isinf()
        assert torch.equal(kernel.isinf(), infinite), f"{what}: Inf in other places than the truth"
        assert torch.equal(kernel[infinite], cast[infinite]), f"{what}: Inf of another sign"
        finite = cast.isfinite()
        if finite.any():
            kernel_error = max(kernel_error, (kernel.double() - truth)[finite].abs().max().item())
            torch_error = max(torch_error, (same.double() - truth)[finite].abs().max().item())
            largest = max(largest, truth[finite].abs().max().item())
    bound = 2 * torch_error + unit_in_the_last_place(largest, dtype)
    assert kernel_error <= bound, f"{what}: error {kernel_error:.3g} exceeds {bound:.3g} (torch: {torch_error:.3g})"


def map_tensors(arguments: dict[str, Any], change: Any) -> dict[str, Any]:
    changed = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value = change(name, value)
        elif isinstance(value, list):
            value = [change(name, item) for item in value]
        changed[name] = value
    return changed


def in_double(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments for the truth: every floating-point tensor in float64."""
    return map_tensors(arguments, lambda name, tensor: tensor.double() if tensor.is_floating_point() else tensor)
