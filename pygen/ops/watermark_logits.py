"""watermark_logits: the green-list watermark of Kirchenbauer et al. 2023, "A watermark for large language models".

A secret key and the ``context`` tokens before it colour every token of the vocabulary green with probability gamma, and
delta is added to the logits of the green ones. ``detect_watermark`` counts them. A colour is a word of Philox, a keyed
pseudorandom function of the context's hash and of the token itself, so that no permutation of the vocabulary is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pygen import _C
from pygen.ops.backend import use_reference
from pygen.ops.philox_normal import philox_words
from pygen.ops.spec import Example, OpSpec, index_tensor, tensor_bytes
from pygen.ops.token_confidence import setting_tensor

_BACKENDS = ("reference", "cpu", "cuda")
_WORD = 0xFFFFFFFF


def watermark_logits(
    logits: Tensor,
    tokens: Tensor,
    *,
    key: int | Tensor,
    gamma: float | Tensor = 0.25,
    delta: float | Tensor = 2.0,
    context: int = 1,
    lengths: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Adds delta to the logits of green tokens; where fewer than ``context`` tokens stand before, to none.

    Args:
        logits: (batch, vocabulary), for the token behind those that a text has; or (batch, positions, vocabulary), of
            which the last position is that and those before it are for the text's last tokens. float32, bfloat16 or
            float16, of any strides.
        tokens: int64 (batch, capacity), the texts.
        key: the secret, 64 bits; an int64 tensor of one element is read when the kernel runs.
        gamma: the share of the vocabulary that is green; one, or float32 (batch,).
        delta: one, or float32 (batch,).
        context: how many tokens before it decide a token's colour; 0 fixes one list (Zhao et al. 2023).
        lengths: int64 (batch,), how many tokens a text has; ``capacity`` where left out.
        out: of the logits' shape and dtype; may be ``logits``. New where left out.

    Returns:
        ``out``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if out is None:
        out = torch.empty_like(logits)
    settings: dict[str, Any] = {
        "key": index_tensor(key, logits.device),
        "gamma": setting_tensor(gamma, torch.float32, logits.device),
        "delta": setting_tensor(delta, torch.float32, logits.device),
        "context": context,
        "lengths": lengths,
    }
    if use_reference("watermark_logits", _BACKENDS, logits.device):
        return out.copy_(watermark_logits_reference(logits, tokens, **settings)[0])
    _kernel(logits, tokens, *settings.values(), out)
    return out


def watermark_logits_reference(
    logits: Tensor,
    tokens: Tensor,
    *,
    key: Tensor,
    gamma: Tensor,
    delta: Tensor,
    context: int,
    lengths: Tensor | None = None,
) -> tuple[Tensor]:
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows = x if x.dim() == 3 else x[:, None]
    last = torch.full((len(rows),), tokens.shape[1], device=x.device) if lengths is None else lengths
    known = last[:, None] + torch.arange(1 - rows.shape[1], 1, device=x.device)
    vocabulary = torch.arange(rows.shape[-1], device=x.device)
    green = green_reference(vocabulary.expand(rows.shape), tokens, known, key, gamma, context)
    bias = torch.where(green, delta.to(x.dtype).reshape(-1, 1, 1), 0)
    return ((rows + bias).reshape(x.shape).to(logits.dtype),)


def green_reference(
    candidates: Tensor, tokens: Tensor, known: Tensor, key: Tensor, gamma: Tensor, context: int
) -> Tensor:
    """Whether candidates (batch, positions, ...) are green behind the first ``known`` (batch, positions) of tokens."""
    capacity = tokens.shape[1]
    hashed = (torch.zeros_like(known), torch.zeros_like(known))
    for place in range(-context, 0):
        token = tokens.gather(1, (known + place).clamp(0, capacity - 1))
        words = _words(token, _C.DRAW_WATERMARK | 1, *hashed, key)
        hashed = words[0], words[1]
    shape = (*known.shape, *[1] * (candidates.dim() - 2))
    low, high = (half.reshape(shape) for half in hashed)
    words = _words(candidates // 4, _C.DRAW_WATERMARK, low, high, key)
    word = torch.stack(words, dim=-1).gather(-1, candidates[..., None] % 4)[..., 0]
    threshold = (gamma.double() * 2**32).floor().clamp(0, _WORD).reshape(-1, *[1] * (candidates.dim() - 1))
    return (word < threshold) & ((known >= context) & (known <= capacity)).reshape(shape)


def _words(block: Tensor, draw: int, low: Tensor, high: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    return philox_words(torch.broadcast_tensors(block & _WORD, block >> 32 & 0xFFFF | draw << 16, low, high), key)


_kernel = torch.ops.pygen.watermark_logits.default


@torch.library.register_fake("pygen::watermark_logits")
def _fake(*arguments: object) -> None:
    return None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    def example(name: str, logits: Tensor, capacity: int = 6, **more: Any) -> Example:
        tokens = torch.randint(50, (len(logits), capacity), generator=generator)
        settings = {"key": key, "gamma": torch.tensor([0.25]), "delta": torch.tensor([2.0]), "context": 1}
        arguments = {"logits": logits, "tokens": tokens} | settings | {"out": torch.full_like(logits, math.nan)}
        return Example(name, arguments | more)

    key = torch.tensor([0x0123456789ABCDEF])
    for vocabulary in (1, 2, 3, 4, 7, 8, 9, 31, 63, 64, 65, 255, 257, 1023, 1024, 1025, 2049, 5000):
        yield example("every vocabulary", draw(2, vocabulary))
    for context in range(8):
        yield example("every context", draw(2, 111), context=context)
    for gamma in (0.0, 2.0**-32, 0.5, 0.9999999, 1.0):
        yield example("every gamma", draw(2, 111), gamma=torch.tensor([gamma]))
    yield example("latents", draw(3, 700), context=4)
    yield example("positions", draw(2, 4, 300), lengths=torch.tensor([6, 3]), context=2)
    differing: dict[str, Any] = {"gamma": torch.tensor([0.5, 0.1, 0.9]), "delta": torch.tensor([1.0, -3.0, 0.1])}
    yield example("rows differ", draw(3, 500), **differing, lengths=torch.tensor([4, 0, 6]))
    logits = draw(3, 4, 50)
    yield example("in place", logits, out=logits, lengths=torch.tensor([4, 1, 6]))
    yield example("vocabulary strided", draw(2, 300, 7).transpose(1, 2), out=torch.zeros(2, 7, 300, dtype=dtype))
    yield example("sliced", draw(4, 6, 301)[::2, 1::3, 1::2], out=torch.zeros(2, 2, 300, dtype=dtype)[..., ::2])
    yield example("misaligned", draw(1 + 2 * 129)[1:].view(2, 129))
    tokens = torch.randint(50, (5, 4), generator=generator).T
    yield example("tokens strided", draw(4, 100), tokens=tokens, key=torch.tensor([-1]))
    yield example("large tokens", draw(4, 100), tokens=tokens * 2**40 - 1)
    special = draw(3, 1100)
    special[0, ::3], special[1, ::5], special[2, ::7] = math.nan, math.inf, -math.inf
    yield example("NaN and Inf", special)
    yield example("empty batch", draw(0, 90))


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    """One token of one text, and a token for each of a batch."""
    for name, size in {"one text": (1, 32000), "32 texts": (32, 128256)}.items():
        logits = torch.randn(size).to(dtype)
        settings = {"key": torch.tensor([42]), "gamma": torch.tensor([0.25]), "delta": torch.tensor([2.0])}
        arguments = {"logits": logits, "tokens": torch.randint(size[1], (size[0], 512)), "context": 1}
        yield Example(name, arguments | settings | {"out": torch.empty_like(logits)})


WATERMARK_LOGITS = OpSpec(
    name="watermark_logits",
    function=watermark_logits,
    reference=lambda out, **arguments: watermark_logits_reference(**arguments),
    operator=_kernel,
    outputs=("out",),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(example.arguments["logits"], example.arguments["out"]),
    flops=lambda example: example.arguments["logits"].numel(),  # the rest are integers
    benchmarks=_benchmarks,
)
