"""route_token: a position takes its predicted token, keeps its own, or takes a random one.

The posterior q(x_s | x_t, x_0) of uniform discrete diffusion (Austin et al. 2021), given a token x_0 sampled from the
model, is a choice between these three.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pygen import _C
from pygen.ops.backend import use_reference
from pygen.ops.spec import Example, OpSpec, index_tensor, tensor_bytes
from pygen.ops.token_confidence import position_words, uniform_reference

_BACKENDS = ("reference", "cpu", "cuda")


def route_token(
    sample: Tensor,
    token: Tensor,
    weights: Tensor,
    vocabulary: int,
    *,
    random: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The next token of every position.

    Args:
        sample, token: int64 (batch, positions), what the positions hold and what is predicted for them.
        weights: float32 (4,) or (batch, 4): of the prediction where it differs from the sample, and where it agrees; of
            staying; and of a random token.
        vocabulary: random tokens lie below it.
        random: int64 (batch, positions), the random tokens.
        noise: standard exponentials (batch, positions, 3): the route is argmax weight / noise. Or
        seed: as in ``token_confidence``; draws the random tokens as well where they are left out.
        out: receives the tokens; may be ``sample`` or ``token``. New where left out.

    Returns:
        ``out``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if out is None:
        out = torch.empty_like(sample)
    seed = None if seed is None else index_tensor(seed, sample.device)
    step = None if step is None else index_tensor(step, sample.device)
    arguments: tuple[Any, ...] = (random, noise, seed, step, sample_ids)
    if use_reference("route_token", _BACKENDS, sample.device):
        return out.copy_(route_token_reference(sample, token, weights, vocabulary, *arguments)[0])
    _kernel(sample, token, weights, vocabulary, *arguments, out)
    return out


def route_token_reference(
    sample: Tensor,
    token: Tensor,
    weights: Tensor,
    vocabulary: int,
    random: Tensor | None = None,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor]:
    differs, agrees, stay, anything = weights.reshape(-1, 4, 1).unbind(1)
    predicted = torch.where(sample == token, agrees, differs)
    weight = torch.stack([predicted, stay.expand_as(predicted), anything.expand_as(predicted)], dim=-1)
    if noise is not None:
        route = (weight / noise.to(weight.dtype)).argmax(-1)
    else:
        assert seed is not None
        size = tuple(sample.shape)
        cumulative = weight.double().cumsum(-1)
        u = uniform_reference(size, seed, step, sample_ids, _C.DRAW_ROUTE)
        route = torch.searchsorted(cumulative, u[..., None] * cumulative[..., -1:], right=True)[..., 0]
        if random is None:
            high, low = position_words(size, seed, step, sample_ids, _C.DRAW_ROUTE)[2:]
            random = high * vocabulary + (low * vocabulary >> 32) >> 32
    assert random is not None
    return (torch.where(route == 0, token, torch.where(route == 1, sample, random)),)


_kernel = torch.ops.pygen.route_token.default


@torch.library.register_fake("pygen::route_token")
def _fake(*arguments: object) -> None:
    return None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def integers(*size: int) -> Tensor:
        return torch.randint(50, size, generator=generator)

    def example(name: str, *size: int, **more: Any) -> Example:
        sample = integers(*size)
        token = torch.where(torch.rand(size, generator=generator) < 0.5, sample, integers(*size))
        out = torch.full(size, -1)
        return Example(
            name, {"sample": sample, "token": token, "weights": weights, "vocabulary": 50, "out": out} | more
        )

    def noise(*size: int) -> dict[str, Tensor]:
        exponentials = torch.empty(*size, 3).exponential_(generator=generator).to(dtype)
        return {"random": integers(*size), "noise": exponentials}

    weights, seed = torch.tensor([0.2, 0.9, 0.3, 0.4]), torch.tensor([0x0123456789ABCDEF])
    for positions in (*range(1, 20), 255, 256, 257, 1000):
        yield example("every count", 2, positions, **noise(2, positions))
        yield example("every count, drawn", 2, positions, seed=seed)
    yield example("latents", 2, 64, **noise(2, 64))
    yield example("random tokens given", 2, 64, seed=seed, random=integers(2, 64))
    rows = {"weights": torch.rand(3, 4, generator=generator), "step": torch.tensor([1, 0, 7])}
    yield example("rows differ", 3, 64, **rows, seed=seed, sample_ids=torch.tensor([3, 1, 2**31]))
    yield example("one route", 2, 64, weights=torch.tensor([1.0, 1.0, 0.0, 0.0]), **noise(2, 64))
    yield example("no prediction", 2, 64, weights=torch.tensor([0.0, 0.0, 0.5, 0.5]), seed=seed)
    yield example("large vocabulary", 2, 64, vocabulary=2**31 - 1, seed=seed)
    sample = integers(2, 30)
    yield example("in place", 2, 30, sample=sample, out=sample, seed=seed)
    yield example("strided", 2, 30, sample=integers(30, 2).T, out=torch.full((2, 60), -1)[:, ::2], **noise(2, 30))
    yield example("empty batch", 0, 30, seed=seed)


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    sample, token = torch.randint(1000, (4, 256)), torch.randint(1000, (4, 256))
    arguments = {"sample": sample, "token": token, "vocabulary": 1000, "out": torch.empty_like(sample)}
    yield Example("latents", arguments | {"weights": torch.tensor([0.2, 0.9, 0.3, 0.4]), "seed": torch.tensor([1])})


ROUTE_TOKEN = OpSpec(
    name="route_token",
    function=route_token,
    reference=lambda out, **arguments: route_token_reference(**arguments),
    operator=_kernel,
    outputs=("out",),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(
        *(example.arguments.get(name) for name in ("sample", "token", "random", "noise", "out"))
    ),
    flops=lambda example: 10 * example.arguments["sample"].numel(),
    benchmarks=_benchmarks,
)
