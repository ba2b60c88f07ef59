"""route_experts: which experts each row of a mixture goes through, and by what weight (Shazeer et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pygen.ops.backend import use_reference
from pygen.ops.spec import Example, OpSpec, tensor_bytes

_BACKENDS = ("reference", "cpu", "cuda")


def route_experts(
    logits: Tensor,
    top_k: int,
    *,
    normalise: bool = True,
    experts: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The top_k experts of the largest logits, and their shares of the softmax over all, in float32.

    As Mixtral and Qwen3-MoE do it, whose ``norm_topk_prob`` is ``normalise``. NaN counts as the largest logit, and
    makes NaN of a row's weights.

    Args:
        logits: (..., experts), float32, bfloat16 or float16: the router's.
        top_k: how many each row chooses.
        normalise: divide the weights chosen by their sum.
        experts: receives int64 (..., top_k), the largest first; of equal logits the first comes first.
        weights: receives float32 (..., top_k). New where left out.

    Returns:
        ``experts`` and ``weights``, for ``linear_decode`` and ``combine_experts``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    size = (*logits.shape[:-1], top_k)
    experts = logits.new_empty(size, dtype=torch.int64) if experts is None else experts
    weights = logits.new_empty(size, dtype=torch.float32) if weights is None else weights
    if use_reference("route_experts", _BACKENDS, logits.device):
        results = route_experts_reference(logits, top_k, normalise)
        return experts.copy_(results[0]), weights.copy_(results[1])
    rows = logits.shape[:-1].numel()
    _kernel(logits.reshape(rows, logits.shape[-1]), normalise, experts.view(rows, top_k), weights.view(rows, top_k))
    return experts, weights


def route_experts_reference(logits: Tensor, top_k: int, normalise: bool = True) -> tuple[Tensor, Tensor]:
    """The weights in the dtype of their arithmetic."""
    share = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    experts = logits.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    weights = share.gather(-1, experts)
    return experts, weights / weights.sum(-1, keepdim=True) if normalise else weights


_kernel = torch.ops.pygen.route_experts.default


@torch.library.register_fake("pygen::route_experts")
def _fake(*arguments: object) -> None:
    return None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def example(name: str, logits: Tensor, top_k: int, normalise: bool = True, **more: Any) -> Example:
        size = (len(logits), top_k)
        out = {"experts": torch.full(size, -1), "weights": torch.full(size, math.nan)}
        return Example(name, {"logits": logits.to(dtype), "normalise": normalise} | out | more)

    def draw(*size: int) -> Tensor:
        return 3 * torch.randn(size, generator=generator)

    for count in (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 60, 64, 100, 128, 256, 300):
        for top_k in {1, min(2, count), min(8, count)}:
            yield example("every count", draw(3, count), top_k)
            yield example("not normalised", draw(3, count), top_k, normalise=False)
    yield example("latents", draw(1, 128), 8)
    yield example("many rows", draw(400, 16), 2)
    yield example("all of them", draw(5, 40), 40)
    yield example("alike", torch.zeros(2, 40), 5)
    yield example("few values", draw(20, 40).round(), 6)
    yield example("far apart", 100 * draw(20, 40), 6)
    yield example("zeros of both signs", torch.tensor([[-0.0, 0.0, -1.0, 0.0, -0.0]]), 3)
    special = draw(5, 40)
    special[0, 7], special[1, [3, 30]], special[2, 5] = math.nan, math.inf, -math.inf
    special[3], special[4, 9:] = -math.inf, -math.inf
    yield example("NaN and Inf", special, 4)
    strided: dict[str, Any] = {"experts": torch.full((6, 8), -1)[:, ::2], "weights": torch.full((4, 6), math.nan).T}
    yield example("strided", draw(80, 6).T[:, ::2], 4, **strided)
    yield example("no rows", draw(0, 40), 4)


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    for rows in (1, 64):
        out = {"experts": torch.empty(rows, 8, dtype=torch.int64), "weights": torch.empty(rows, 8)}
        yield Example(f"8 of 128, {rows} rows", {"logits": torch.randn(rows, 128).to(dtype), "normalise": True} | out)


def _function(experts: Tensor, **arguments: Any) -> Tensor:
    return route_experts(top_k=experts.shape[-1], experts=experts, **arguments)[0]


def _reference(experts: Tensor, weights: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    experts, shares = route_experts_reference(top_k=experts.shape[-1], **arguments)
    return experts, shares.to(weights.dtype)


ROUTE_EXPERTS = OpSpec(
    name="route_experts",
    function=_function,
    reference=_reference,
    operator=_kernel,
    outputs=("experts", "weights"),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(*(example.arguments[name] for name in ("logits", "experts", "weights"))),
    flops=lambda example: 10 * example.arguments["logits"].numel(),
    benchmarks=_benchmarks,
)
