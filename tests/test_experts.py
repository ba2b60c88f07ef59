"""route_experts, linear_decode with experts and combine_experts: beside transformers' own blocks, row by row, recorded,
and with wrong arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import pygen
from pygen import PackedLinear, pack_experts, pack_linear
from pygen.ops.packed_linear import FORMATS, WeightFormat
from tests.error_rule import assert_error_rule

HIDDEN, INTERMEDIATE = 64, 80


class Block(NamedTuple):
    """A sparse MLP as a decoder's step has it."""

    router: PackedLinear
    up: PackedLinear
    down: PackedLinear
    top_k: int
    normalise: bool

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        logits = pygen.linear_decode(x, self.router, out=x.new_empty(*x.shape[:-1], self.router.outputs))
        experts, weights = pygen.route_experts(logits, self.top_k, normalise=self.normalise)
        return self.after_routing(x, experts, weights, residual)

    def after_routing(self, x: Tensor, experts: Tensor, weights: Tensor, residual: Tensor | None = None) -> Tensor:
        hidden = pygen.linear_decode(x, self.up, activation="silu", experts=experts)
        y = x.new_empty(*experts.shape, HIDDEN, dtype=torch.float32)
        pygen.linear_decode(hidden, self.down, experts=experts, out=y)
        out = x.new_empty(x.shape)
        return pygen.combine_experts(y, weights, residual=residual, out=out)


def their_block(family: str, normalise: bool = True) -> torch.nn.Module:
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "num_experts_per_tok": 2 if family == "mixtral" else 4}
    if family == "mixtral":
        config = MixtralConfig(**sizes, intermediate_size=INTERMEDIATE, num_local_experts=8)
        block: torch.nn.Module = MixtralSparseMoeBlock(config)
    else:
        config = Qwen3MoeConfig(**sizes, moe_intermediate_size=INTERMEDIATE, num_experts=24, norm_topk_prob=normalise)
        block = Qwen3MoeSparseMoeBlock(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return block.requires_grad_(False).eval()


def our_block(theirs: torch.nn.Module, format: WeightFormat) -> Block:
    gate, up = theirs.experts.gate_up_proj.chunk(2, dim=1)
    return Block(
        pack_linear(theirs.gate.weight, format="float32"),
        pack_experts(gate, up, format=format),
        pack_experts(theirs.experts.down_proj, format=format),
        theirs.gate.top_k,
        getattr(theirs.gate, "norm_topk_prob", True),
    )


def tokens(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, count, HIDDEN, generator=torch.Generator().manual_seed(count)).to(dtype)


FAMILIES = pytest.mark.parametrize(
    ("family", "normalise"), [("mixtral", True), ("qwen3_moe", True), ("qwen3_moe", False)]
)


@FAMILIES
@pytest.mark.parametrize("count", [1, 7, 70])
def test_is_transformers_block(family: str, normalise: bool, count: int, isa: str) -> None:
    theirs = their_block(family, normalise)
    ours = our_block(theirs, "float32")
    x = tokens(count)
    result, same, truth = ours(x), theirs(x), their_block(family, normalise).double()(x.double())
    assert_error_rule([(result, same, truth)])
    residual = torch.randn_like(x)
    assert_error_rule([(ours(x, residual), residual + same, residual + truth)])


@FAMILIES
def test_router_is_transformers(family: str, normalise: bool) -> None:
    gate = their_block(family, normalise).gate
    logits, scores, chosen = gate(tokens(200))
    experts, weights = pygen.route_experts(logits, gate.top_k, normalise=normalise)
    assert torch.equal(experts, chosen)
    truth = gate.double()(tokens(200).double())[1]
    assert_error_rule([(weights, scores, truth)])


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_are_transformers_in_halves(family: str, normalise: bool, dtype: torch.dtype) -> None:
    """Their rounding to the dtype of what each expert adds is not ours."""
    theirs = their_block(family, normalise).bfloat16()
    x = tokens(9, dtype)
    _, weights, experts = theirs.double().gate(x.double())
    truth = theirs.experts(x[0].double(), experts, weights)
    same = theirs.to(dtype).experts(x[0], experts, weights.to(dtype))
    result = our_block(theirs, "bfloat16").after_routing(x[0], experts, weights.float())
    assert_error_rule([(result, same, truth)])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_does_not_depend_on_the_others(format: WeightFormat, dtype: torch.dtype, isa: str, threads: int) -> None:
    """Nor on which experts they take: as many rows as meet a panel at once, and more."""
    block = our_block(their_block("mixtral"), format)
    x = tokens(300, dtype)
    whole = block(x)
    for rows in (1, 2, 3, 8, 64):
        assert torch.equal(block(x[:, :rows]), whole[:, :rows]), rows
    for row in range(0, 300, 13):
        assert torch.equal(block(x[:, row : row + 1]), whole[:, row : row + 1]), row


@pytest.mark.parametrize("format", FORMATS)
def test_each_expert_is_the_layer_alone(format: WeightFormat, isa: str) -> None:
    """To the bit, whatever the leading dimensions, and with a row for each choice or one for all."""
    gate, up = torch.randn(2, 6, 40, HIDDEN, generator=torch.Generator().manual_seed(0))
    stack = pack_experts(list(gate), list(up), format=format)
    layers = [pack_linear(gate[i], up[i], format=format).unpack() for i in range(6)]
    assert torch.equal(stack.unpack(), torch.stack(layers))
    x, experts = torch.randn(2, 3, HIDDEN), torch.tensor([[[0, 5], [5, 1], [2, 2]], [[3, 0], [1, 4], [5, 0]]])
    shared = pygen.linear_decode(x, stack, activation="gelu", norm="rms", experts=experts)
    own = pygen.linear_decode(
        x[..., None, :].expand(2, 3, 2, -1), stack, activation="gelu", norm="rms", experts=experts
    )
    assert shared.shape == own.shape == (2, 3, 2, 40)
    assert torch.equal(shared, own)
    for place in ((i, j, k) for i in range(2) for j in range(3) for k in range(2)):
        layer = pack_linear(gate[experts[place]], up[experts[place]], format=format)
        alone = pygen.linear_decode(x[place[:2]][None], layer, activation="gelu", norm="rms")
        assert torch.equal(shared[place], alone[0])


def test_a_recorded_block_routes_at_each_replay(threads: int) -> None:
    block, x = our_block(their_block("qwen3_moe"), "int8"), tokens(5)
    given, residual = x.clone(), torch.randn_like(x)
    program = pygen.record(lambda: block(given, residual))
    for seed in range(20):
        given.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        assert torch.equal(program(), block(given, residual))


@pytest.mark.parametrize("format", FORMATS)
def test_an_expert_that_there_is_not_is_a_layer_of_zeros(format: WeightFormat, isa: str) -> None:
    stack = pack_experts(torch.randn(3, 40, HIDDEN), format=format)
    x, residual = torch.randn(4, HIDDEN), torch.randn(4, 1, 40)
    x[0, 0] = torch.inf
    experts = torch.zeros(4, 1, dtype=torch.int64)
    program = pygen.record(lambda: pygen.linear_decode(x, stack, residual=residual, experts=experts))
    experts.copy_(torch.tensor([[3], [2], [-1], [2**62]]))
    expected = residual.clone()
    expected[1] = pygen.linear_decode(x[1:2], stack, residual=residual[1:2], experts=experts[1:2])
    assert torch.equal(program(), expected)


def test_experts_are_packed_one_by_one() -> None:
    """Each is asked for when its turn comes, and none is kept."""
    asked: list[int] = []

    class Weights:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, i: int) -> Tensor:
            asked.append(i)
            return torch.full((40, 64), float(i))

    stack = pack_experts(Weights(), format="int4")  # type: ignore[arg-type]
    assert asked == list(range(5))
    assert torch.equal(stack.unpack(), torch.arange(5.0)[:, None, None].expand(5, 40, 64))


STACK = pack_experts(torch.ones(3, 40, 64))
LAYER = pack_linear(torch.ones(40, 64))
CHOSEN = torch.tensor([[0, 2], [1, 0]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"experts": CHOSEN + 1}, IndexError, "expert 3 is none of the weight's 3"),
        ({"experts": CHOSEN - 1}, IndexError, "expert -1 is none of the weight's 3"),
        ({"experts": CHOSEN.int()}, TypeError, "experts must be Long, got Int"),
        ({"experts": CHOSEN.T}, ValueError, r"experts must have shape \(..., choices\) and be contiguous"),
        ({"experts": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, "does not fit experts of shape"),
        ({"experts": None}, ValueError, "experts and a weight of pack_experts go together"),
        ({"weight": LAYER}, ValueError, "experts and a weight of pack_experts go together"),
        ({"weight": STACK._replace(data=STACK.data[:, :1])}, ValueError, "weight must hold 2 panels"),
        ({"weight": STACK._replace(data=STACK.data[:0])}, ValueError, "weight must hold an expert"),
        ({"bias": torch.ones(40)}, ValueError, "bias is for a layer without experts"),
        ({"out": torch.empty(2, 2, 41)}, ValueError, r"out must have shape \(4, 40\)"),
        ({"out": torch.empty(2, 2, 40).half()}, TypeError, "out must have x's dtype Float or be float32, got Half"),
        ({"residual": torch.ones(2, 40)}, ValueError, r"residual must have shape \(4, 40\)"),
    ],
)
def test_wrong_arguments_of_experts(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pygen.linear_decode(**({"x": torch.ones(2, 64), "weight": STACK, "experts": CHOSEN} | arguments))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack_experts([]), ValueError, "weights must be one or more"),
        (lambda: pack_experts(torch.ones(2, 8, 8), torch.ones(3, 8, 8)), ValueError, "and ups as many, got 2 and 3"),
        (lambda: pack_experts([torch.ones(8, 8), torch.ones(8, 9)]), ValueError, "one shape, got .* as number 1"),
        (lambda: pygen.route_experts(torch.ones(2, 4), 5), ValueError, "top_k must be 1 to 4, got 5"),
        (lambda: pygen.route_experts(torch.ones(2, 4), 0), ValueError, "top_k must be 1 to 4, got 0"),
        (lambda: pygen.route_experts(torch.ones(2, 4).double(), 2), TypeError, "logits must be float32"),
        (
            lambda: pygen.route_experts(torch.ones(2, 4), 2, weights=torch.empty(2, 2).half()),
            TypeError,
            "weights must be Float, got Half",
        ),
        (lambda: pygen.combine_experts(torch.ones(40), torch.ones(1)), ValueError, "x must have shape"),
        (
            lambda: pygen.combine_experts(torch.ones(2, 3, 40), torch.ones(2, 2)),
            ValueError,
            r"weights must have shape \[2, 3\]",
        ),
        (
            lambda: pygen.combine_experts(torch.ones(2, 3, 40), torch.ones(2, 3).bfloat16()),
            TypeError,
            "weights must be Float",
        ),
        (
            lambda: pygen.combine_experts(torch.ones(2, 3, 40), torch.ones(2, 3), residual=torch.ones(2, 41)),
            ValueError,
            r"residual must have shape \[2, 40\]",
        ),
        (
            lambda: pygen.combine_experts(torch.ones(2, 40, 3).mT, torch.ones(2, 3)),
            ValueError,
            "x must have shape .* contiguous in width",
        ),
    ],
)
def test_wrong_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
