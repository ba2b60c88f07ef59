"""embedding beyond its spec: transformers' own, tokens of every shape, tokens outside, and wrong arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding

import pygen

BY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
TOKENS, WEIGHT, POSITIONS = torch.tensor([[1, 2, 0], [4, 4, 3]]), torch.randn(5, 24), torch.randn(9, 24)


@BY_DTYPE
def test_is_gemmas_scaled_embedding_to_the_bit(dtype: torch.dtype, isa: str) -> None:
    theirs = Gemma2TextScaledWordEmbedding(50, 72, 0, embed_scale=math.sqrt(72)).to(dtype).requires_grad_(False)
    scale = torch.tensor(math.sqrt(72)).to(dtype).item()
    tokens = torch.arange(50).view(2, 25)
    assert torch.equal(pygen.embedding(tokens, theirs.weight, scale=scale), theirs(tokens))


@BY_DTYPE
def test_is_gpt2s_sum_of_embeddings_to_the_bit(dtype: torch.dtype, isa: str) -> None:
    """Both round once, to the weight's dtype."""
    weight, learned, positions = WEIGHT.to(dtype), POSITIONS.to(dtype), torch.tensor([[3, 4, 5], [0, 1, 2]])
    theirs = torch.nn.functional.embedding(TOKENS, weight) + torch.nn.functional.embedding(positions, learned)
    assert torch.equal(pygen.embedding(TOKENS, weight, positions=positions, position_weight=learned), theirs)
    first = positions[:, :1].contiguous()
    assert torch.equal(pygen.embedding(TOKENS, weight, positions=first, position_weight=learned), theirs)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(), (6,), (0,), (2, 3), (3, 1, 2), (0, 2, 3), (1, 2, 1, 3)])
def test_tokens_of_every_shape(shape: tuple[int, ...], backend: str) -> None:
    tokens = torch.arange(math.prod(shape)).view(shape) % 5
    added = POSITIONS[3 : 3 + shape[-1]] if shape else POSITIONS[3]
    with pygen.backend(backend):
        assert torch.equal(pygen.embedding(tokens, WEIGHT), WEIGHT[tokens])
        learned = pygen.embedding(tokens, WEIGHT, positions=torch.tensor(3), position_weight=POSITIONS)
    assert torch.equal(learned, WEIGHT[tokens] + added)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokens": torch.tensor([0, 5])}, IndexError, "token 5 lies outside the vocabulary, which holds 5"),
        ({"tokens": torch.tensor([0, -1])}, IndexError, "token -1 lies outside the vocabulary"),
        ({"tokens": TOKENS.int()}, TypeError, "tokens must be Long, got Int"),
        ({"weight": WEIGHT.double()}, TypeError, "weight must be float32, bfloat16 or float16"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must have shape \(rows, width\)"),
        ({"weight": WEIGHT.T}, ValueError, "weight must have shape .* contiguous in width"),
        ({"weight": WEIGHT.clone().requires_grad_()}, RuntimeError, "not differentiable, and weight requires grad"),
        ({"positions": torch.tensor(0)}, ValueError, "give positions and position_weight together"),
        ({"position_weight": POSITIONS}, ValueError, "give positions and position_weight together"),
        ({"positions": torch.tensor(7), "position_weight": POSITIONS}, IndexError, "position 9 lies outside"),
        ({"positions": torch.arange(4), "position_weight": POSITIONS}, ValueError, "positions must have shape"),
        ({"positions": torch.tensor(0), "position_weight": POSITIONS[:, :8]}, ValueError, "position_weight must have"),
        ({"positions": torch.tensor(0), "position_weight": POSITIONS.half()}, TypeError, "position_weight must have"),
        ({"out": torch.empty(2, 3, 23)}, ValueError, r"out must have tokens' shape .*\[2, 3, 24\]"),
        ({"out": torch.empty(2, 3, 24).int()}, TypeError, "out must be float32, bfloat16 or float16"),
        ({"out": torch.empty(3, 24).expand(2, 3, 24)}, RuntimeError, "single memory location"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pygen.embedding(**({"tokens": TOKENS, "weight": WEIGHT} | arguments))


@BY_DTYPE
def test_rows_that_there_are_not_are_zeros_in_a_replay(dtype: torch.dtype, isa: str) -> None:
    tokens, positions = torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    weight, learned = WEIGHT.to(dtype), POSITIONS.to(dtype)
    program = pygen.record(lambda: pygen.embedding(tokens, weight, positions=positions, position_weight=learned))
    tokens.copy_(torch.tensor([5, -1, 2**62, 1, 4]))
    positions.copy_(torch.tensor([0, 0, 0, 9, 8]))
    assert not program()[:4].any()
    assert torch.equal(program()[4], weight[4] + learned[8])


def test_overlap_is_refused() -> None:
    weight = torch.zeros(8, 24)
    with pytest.raises(RuntimeError, match="single memory location"):
        pygen.embedding(torch.tensor([1, 2]), weight, out=weight[:2])
