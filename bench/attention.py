"""The suite `attention`: pygen.attention beside scaled_dot_product_attention, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from statistics import geometric_mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import pygen
from bench.cases import Case, Work
from pygen.ops import SPECS, Example
from tests.error_rule import Triple

if TYPE_CHECKING:
    from bench.run import Result

# (batch, heads, queries, keys, head_dim): of Stable Diffusion 1.5 and XL at 64 x 64, PixArt and a larger transformer.
SHAPES = (
    (2, 8, 4096, 4096, 40), (2, 8, 4096, 77, 40), (2, 10, 1024, 1024, 64), (2, 8, 1024, 1024, 80),
    (2, 8, 256, 256, 160), (2, 20, 1024, 1024, 64), (1, 16, 1024, 1024, 72), (2, 24, 1280, 1280, 128),
)  # fmt: skip
LEARNED = ((2, 8, 4096, 77, 40), (2, 8, 1024, 1024, 80), (1, 16, 1024, 1024, 72))  # with gradients
GOALS = {"bfloat16": 2.5, "float32": 1.3}  # over torch, on processors without tiles
CHECKED = 512  # queries and keys: the truth of all would take longer than the times


def cases(quick: bool) -> list[Case]:
    shapes, learned = (SHAPES[3:5], LEARNED[1:2]) if quick else (SHAPES, LEARNED)
    return [
        *(Case("attention", name_of(shape, dtype), partial(forward, shape, dtype)) for dtype, shape in each(shapes)),
        *(
            Case("attention", f"gradients, {name_of(shape, dtype)}", partial(gradients, shape, dtype))
            for dtype, shape in each(learned)
        ),
    ]


def each(shapes: Iterable[tuple[int, ...]]) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    return [(dtype, shape) for dtype in (torch.bfloat16, torch.float32) for shape in shapes]


def name_of(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    batch, heads, queries, keys, head_dim = shape
    return f"{batch} x {heads}, {queries} over {keys}, {head_dim}, {str(dtype)[6:]}"


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as a projection leaves them, heads behind positions."""
    batch, heads, queries, keys, head_dim = shape
    q, k, v = (torch.randn(batch, n, heads, head_dim).to(dtype).transpose(1, 2) for n in (queries, keys, keys))
    return q, k, v


def forward(shape: tuple[int, ...], dtype: torch.dtype) -> Work:
    q, k, v = drawn(shape, dtype)

    def results() -> Iterator[Triple]:
        few = [tensor[:, :, :CHECKED] for tensor in (q, k, v)]
        wide = [tensor.double() for tensor in few]
        yield pygen.attention(*few), scaled_dot_product_attention(*few), scaled_dot_product_attention(*wide)

    spec, example = SPECS["attention"], Example("", {"q": q, "k": k, "v": v, "out": q})
    calls: dict[str, Callable[[], object]] = {
        "eager": lambda: scaled_dot_product_attention(q, k, v),
        "pygen": lambda: pygen.attention(q, k, v),
    }
    return Work(calls, spec.bytes_moved(example), spec.flops(example), dtype, results)


def gradients(shape: tuple[int, ...], dtype: torch.dtype) -> Work:
    """Of a result that there is."""
    qkv = [tensor.requires_grad_() for tensor in drawn(shape, dtype)]
    grad = torch.randn_like(qkv[0])

    def run(function: Callable[..., Tensor], leaves: list[Tensor], of: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(function(*leaves), leaves, of)

    def results() -> Iterator[Triple]:
        few = [tensor.detach()[:, :, :CHECKED].requires_grad_() for tensor in qkv]
        wide = [tensor.detach().double().requires_grad_() for tensor in few]
        of = grad[:, :, :CHECKED]
        ours, same = run(pygen.attention, few, of), run(scaled_dot_product_attention, few, of)
        yield from zip(ours, same, run(scaled_dot_product_attention, wide, of.double()), strict=True)

    with torch.enable_grad():
        made = {"eager": scaled_dot_product_attention(*qkv), "pygen": pygen.attention(*qkv)}
    calls = {
        column: partial(torch.autograd.grad, result, qkv, grad, retain_graph=True) for column, result in made.items()
    }
    spec = SPECS["attention_backward"]
    example = Example("", dict(zip("qkv", qkv, strict=True)) | {"out": qkv[0]})
    return Work(calls, spec.bytes_moved(example), spec.flops(example), dtype, results)


def verdicts(results: Iterable[Result]) -> Iterator[str]:
    """The speed over torch's, and the share of a matrix product's."""
    timed = [r for r in results if r.suite == "attention" and r.times]
    for dtype, goal in GOALS.items():
        for what, backwards in (("attention", False), ("its gradients", True)):
            these = [r for r in timed if r.dtype == dtype and r.name.startswith("gradients") == backwards]
            over = [(r.best_peer or 0.0) / r.best for r in these]
            if over:
                shares = ", ".join(f"{r.floor / r.best:.2f}" for r in these)
                yield (
                    f"{what}, {dtype}: {geometric_mean(over):.2f} times torch's speed, at the least {min(over):.2f}"
                    + (f", the goal being {goal:g} where a processor has no tiles" if not backwards else "")
                    + f"; {shares} of the product's rate"
                )
