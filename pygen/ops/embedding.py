"""embedding: the rows of a vocabulary that tokens name, and learned positions if the model has them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pygen.ops.backend import use_reference
from pygen.ops.rope import token_positions
from pygen.ops.spec import Example, OpSpec, tensor_bytes

_BACKENDS = ("reference", "cpu", "cuda")


def embedding(
    tokens: Tensor,
    weight: Tensor,
    *,
    scale: float = 1.0,
    positions: Tensor | None = None,
    position_weight: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """scale * weight[token] + position_weight[position], in float32 and rounded once.

    Args:
        tokens: int64 (), (length,) or (..., length). On a GPU, and in a program that is replayed, one outside the
            vocabulary makes a row of zeros, as does a position outside its table.
        weight: (vocabulary, width), float32, bfloat16 or float16, contiguous in width.
        scale: of a model that has one. Gemma's is rounded to the weight's dtype by transformers, and so by its caller.
        positions: int64, read through a pointer, as ``rope`` takes them for tokens of shape (batch, length): (length,)
            or (batch, length); or one, or (batch, 1): the position of the first token, from which the others count on.
            Further dimensions of the tokens count as one batch.
        position_weight: (positions, width), in weight's dtype, contiguous in width.
        out: (..., width), float32, bfloat16 or float16, contiguous in width; new, in weight's dtype, where left out.

    Returns:
        ``out``.

    Raises:
        ValueError, TypeError: naming the argument.
        IndexError: where the host can read them, on a token outside the vocabulary or a position outside its table.
    """
    if out is None:
        out = weight.new_empty(*tokens.shape, weight.shape[-1])
    if use_reference("embedding", _BACKENDS, weight.device):
        return out.copy_(embedding_reference(tokens, weight, scale, positions, position_weight))
    rows = tokens.view(1, -1) if tokens.dim() < 2 else tokens.flatten(0, -2)
    _kernel(rows, weight, scale, positions, position_weight, out.view(*rows.shape, out.shape[-1]))
    return out


def embedding_reference(
    tokens: Tensor,
    weight: Tensor,
    scale: float = 1.0,
    positions: Tensor | None = None,
    position_weight: Tensor | None = None,
) -> Tensor:
    """In the dtype of its arithmetic."""
    compute = torch.promote_types(weight.dtype, torch.float32)
    rows = weight[tokens].to(compute) * scale
    if positions is None or position_weight is None:
        return rows
    shape = tokens.view(1, -1).shape if tokens.dim() < 2 else tokens.flatten(0, -2).shape
    return rows + position_weight[token_positions(positions, *shape)].view_as(rows).to(compute)


_kernel = torch.ops.pygen.embedding.default


@torch.library.register_fake("pygen::embedding")
def _fake(*arguments: object) -> None:
    return None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def table(*size: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(to)

    def example(name: str, tokens: Any, weight: Tensor, **more: Any) -> Example:
        tokens = torch.as_tensor(tokens)
        out = torch.full((*tokens.shape, weight.shape[1]), math.nan, dtype=more.pop("to", weight.dtype))
        arguments = {"tokens": tokens, "weight": weight, "scale": 1.0, "positions": None, "position_weight": None}
        return Example(name, arguments | {"out": out} | more)

    for width in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 64, 100, 333, 2048):
        tokens = [[0, 4, 2], [2, 2, 1]]
        yield example("every width", tokens, table(5, width))
        yield example(
            "every width, all of it", tokens, table(5, width), scale=22.625,
            positions=torch.tensor([[3], [0]]), position_weight=table(6, width),
        )  # fmt: skip
    for name, other in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        positions = {"positions": torch.tensor(2), "position_weight": table(6, 40)}
        yield example(f"into {name}", [[3, 1, 4]], table(5, 40), scale=0.3, to=other, **positions)
    learned = {"position_weight": table(20, 24)}
    yield example("latents", [[1, 2, 3, 4]], table(5, 24))
    yield example("rows differ", [[1], [2], [4]], table(5, 24), positions=torch.tensor([[7], [0], [19]]), **learned)
    yield example(
        "positions given", [[1, 2], [2, 4]], table(5, 24), positions=torch.tensor([[7, 3], [0, 0]]), **learned
    )
    yield example("positions for all", [[1, 2], [2, 4]], table(5, 24), positions=torch.tensor([19, 3]), **learned)
    columns, out = torch.tensor([[0, 9, 1], [9, 4, 9]]).T, torch.full((2, 3, 50), math.nan, dtype=dtype)
    wide = {"positions": torch.arange(6)[::3], "position_weight": table(30, 24)[::5]}
    yield example("strided", columns, table(10, 64)[:, 13:37], out=out.transpose(0, 1)[..., 3:27], **wide)
    yield example("misaligned", [[3, 1]], table(1 + 5 * 40)[1:].view(5, 40))
    special = table(4, 40)
    special[0, 3], special[1, 39], special[2, 7], special[3] = math.nan, math.inf, -math.inf, -0.0
    yield example("NaN and Inf", [[0, 1, 2, 3]], special)
    yield example("large numbers", [[0, 1]], 30000 * table(2, 40), scale=2.0, to=torch.float16)
    yield example("many tokens", torch.arange(700).view(2, 350) % 5, table(5, 24))
    yield example("no tokens", torch.zeros(0, 3, dtype=torch.int64), table(5, 24))


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    """A token, one of each of a batch, and a prompt."""
    weight = torch.randn(32000, 2048).to(dtype)
    for name, batch, length in (("a token", 1, 1), ("a token, batch 64", 64, 1), ("a prompt", 1, 4096)):
        tokens = torch.randint(32000, (batch, length))
        out = torch.empty(batch, length, 2048, dtype=dtype)
        yield Example(name, {"tokens": tokens, "weight": weight, "out": out})


def _bytes_moved(example: Example) -> int:
    """out, and every token's row of each table."""
    tables = (example.arguments["weight"], example.arguments.get("position_weight"))
    row = sum(tensor_bytes(table[0]) for table in tables if table is not None)
    return tensor_bytes(example.arguments["out"]) + example.arguments["tokens"].numel() * row


EMBEDDING = OpSpec(
    name="embedding",
    function=embedding,
    reference=lambda out, **arguments: (embedding_reference(**arguments).to(out.dtype),),
    operator=_kernel,
    outputs=("out",),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=_bytes_moved,
    flops=lambda example: 2 * example.arguments["out"].numel(),
    benchmarks=_benchmarks,
)
