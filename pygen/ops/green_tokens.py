"""green_tokens: which tokens of a text a green-list watermark has coloured, and the test for its presence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pygen.ops.backend import use_reference
from pygen.ops.spec import Example, OpSpec, index_tensor, tensor_bytes
from pygen.ops.token_confidence import setting_tensor
from pygen.ops.watermark_logits import green_reference

_BACKENDS = ("reference", "cpu", "cuda")


class WatermarkScore(NamedTuple):
    """Of each text: int64 counts of green and of scored tokens, and the float64 z score and its one-sided p value."""

    green: Tensor
    scored: Tensor
    z: Tensor
    p_value: Tensor


def detect_watermark(
    tokens: Tensor,
    *,
    key: int | Tensor,
    gamma: float | Tensor = 0.25,
    context: int = 1,
    lengths: Tensor | None = None,
    ignore_repeated: bool = False,
) -> WatermarkScore:
    """The one-proportion z test of Kirchenbauer et al. 2023 for the watermark of ``watermark_logits``.

    Without the watermark a scored token is green with probability gamma: z = (green - gamma scored) / sqrt(scored
    gamma (1 - gamma)). NaN where no token is scored.

    Args:
        tokens, key, gamma, context, lengths, ignore_repeated: as in ``green_tokens``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    scored = torch.empty(tokens.shape, dtype=torch.bool, device=tokens.device)
    share = torch.as_tensor(gamma, dtype=torch.float32, device=tokens.device)
    green = green_tokens(
        tokens, key=key, gamma=share, context=context, lengths=lengths, ignore_repeated=ignore_repeated, scored=scored
    )
    hits, count, share = green.sum(-1), scored.sum(-1), share.double()
    z = (hits - share * count) / (count * share * (1 - share)).sqrt()
    return WatermarkScore(hits, count, z, torch.special.erfc(z / math.sqrt(2)) / 2)


def green_tokens(
    tokens: Tensor,
    *,
    key: int | Tensor,
    gamma: float | Tensor = 0.25,
    context: int = 1,
    lengths: Tensor | None = None,
    ignore_repeated: bool = False,
    green: Tensor | None = None,
    scored: Tensor | None = None,
) -> Tensor:
    """Which tokens are green behind the tokens before them.

    Args:
        tokens: int64 (batch, capacity), the texts.
        key, gamma, context: those that ``watermark_logits`` was given.
        lengths: int64 (batch,), how many tokens a text has; ``capacity`` where left out.
        ignore_repeated: scores a token once for each context it has: a text that repeats itself is no more evidence.
        green: bool (batch, capacity), receives the colours; new where left out.
        scored: bool (batch, capacity), receives which tokens have one: those inside the text with ``context`` before
            them, where given.

    Returns:
        ``green``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if green is None:
        green = torch.empty(tokens.shape, dtype=torch.bool, device=tokens.device)
    settings: dict[str, Any] = {
        "key": index_tensor(key, tokens.device),
        "gamma": setting_tensor(gamma, torch.float32, tokens.device),
        "context": context,
        "lengths": lengths,
        "ignore_repeated": ignore_repeated,
    }
    if use_reference("green_tokens", _BACKENDS, tokens.device):
        results = green_tokens_reference(tokens, **settings)
        if scored is not None:
            scored.copy_(results[1])
        return green.copy_(results[0])
    _kernel(tokens, *settings.values(), green, scored)
    return green


def green_tokens_reference(
    tokens: Tensor,
    *,
    key: Tensor,
    gamma: Tensor,
    context: int,
    lengths: Tensor | None = None,
    ignore_repeated: bool = False,
) -> tuple[Tensor, Tensor]:
    place = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    scored = place >= context
    if lengths is not None:
        scored = scored & (place < lengths[:, None])
    if ignore_repeated and tokens.shape[1] > context:
        grams = tokens.unfold(1, context + 1, 1)
        same = (grams[:, :, None] == grams[:, None]).all(-1)
        scored[:, context:] &= ~same.tril(-1).any(-1)
    return scored & green_reference(tokens, tokens, place, key, gamma, context), scored


_kernel = torch.ops.pygen.green_tokens.default


@torch.library.register_fake("pygen::green_tokens")
def _fake(*arguments: object) -> None:
    return None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def example(name: str, *size: int, below: int = 50, **more: Any) -> Example:
        tokens = torch.randint(below, size, generator=generator)
        settings = {"key": key, "gamma": torch.tensor([0.25]), "context": 1, "ignore_repeated": False}
        outputs = {name: torch.zeros(size, dtype=torch.bool) for name in ("green", "scored")}
        return Example(name, {"tokens": tokens} | settings | outputs | more)

    key = torch.tensor([0x0123456789ABCDEF])
    for length in range(1, 20):
        yield example("every length", 2, length, context=length % 4)
        yield example("every length, without repeats", 2, length, below=2, context=length % 4, ignore_repeated=True)
    for gamma in (0.0, 0.5, 1.0):
        yield example("every gamma", 2, 70, gamma=torch.tensor([gamma]))
    yield example("latents", 3, 300)
    for repeats in (False, True):
        differing = {"gamma": torch.tensor([0.5, 0.1, 0.9]), "lengths": torch.tensor([60, 0, 33])}
        yield example("rows differ", 3, 60, below=5, **differing, context=2, ignore_repeated=repeats)
    yield example("strided", 3, 40, tokens=torch.randint(2**40, (40, 3), generator=generator).T)
    yield example("green alone", 3, 40, scored=None)
    yield example("empty batch", 0, 9)


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    for name, size in {"a text": (1, 512), "64 texts": (64, 4096)}.items():
        tokens, green = torch.randint(32000, size), torch.empty(size, dtype=torch.bool)
        settings = {"key": torch.tensor([42]), "gamma": torch.tensor([0.25]), "context": 1, "ignore_repeated": False}
        yield Example(name, {"tokens": tokens, "green": green} | settings)


GREEN_TOKENS = OpSpec(
    name="green_tokens",
    function=green_tokens,
    reference=lambda green, scored=None, **arguments: green_tokens_reference(**arguments),
    operator=_kernel,
    outputs=("green", "scored"),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(example.arguments["tokens"], example.arguments["green"]),
    flops=lambda example: 0,  # integers alone
    benchmarks=_benchmarks,
)
