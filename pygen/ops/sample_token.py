"""sample_token: the next token of every row of logits, in one pass over them.

Penalties and filters of text generation in the order of transformers, without a sort of the vocabulary; one Philox
number per row is inverted through the cumulative probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from pygen import _C
from pygen.ops.backend import use_reference
from pygen.ops.spec import Example, OpSpec, constant, index_tensor, tensor_bytes
from pygen.ops.token_confidence import uniform_reference

_BACKENDS = ("reference", "cpu", "cuda")
_LARGEST = torch.finfo(torch.float32).max


class TokenInfo(NamedTuple):
    """What ``sample_token`` says of its tokens, each of shape (batch,).

    log_prob: float32, the logarithm of the token's probability among those that it was drawn from.
    raw_log_prob: float32, the same under softmax(logits), as the model gave them.
    ok: bool, False where the row is no distribution: then the token is 0 and the logarithms are -inf.
    """

    log_prob: Tensor
    raw_log_prob: Tensor
    ok: Tensor


@overload
def sample_token(logits: Tensor, *, return_info: Literal[False] = False, **settings: Any) -> Tensor: ...
@overload
def sample_token(logits: Tensor, *, return_info: Literal[True], **settings: Any) -> tuple[Tensor, TokenInfo]: ...
def sample_token(  # type: ignore[misc]  # the overloads tell of the result alone
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    typical_p: float | Tensor = 1.0,
    repetition_penalty: float | Tensor = 1.0,
    presence_penalty: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
    previous: Tensor | None = None,
    previous_lengths: Tensor | None = None,
    logit_bias: Tensor | None = None,
    bitmask: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    return_info: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, TokenInfo]:
    """One token per row: by penalties, filters and a draw, or the likeliest.

    A setting is one number, or a tensor with one per row (float32; ``top_k`` int64) that is read when the kernel runs,
    where a value out of range acts as the nearest inside. They apply as in transformers: bias, repetition, frequency
    and presence penalty, mask, temperature, top-k, top-p, min-p, typical-p. A row that is then all -inf, or holds NaN
    or +inf, yields token 0.

    Args:
        logits: (batch, vocabulary), float32, bfloat16 or float16, of any strides; up to 2^20 tokens.
        temperature: 0 takes the largest logit, of equal ones the first, and no filter applies.
        top_k: keeps the k largest logits and those equal to the last; 0 keeps all (Fan et al. 2018).
        top_p: removes the least likely tokens whose mass together does not exceed 1 - p (Holtzman et al. 2020); of
            equal logits the first ones go first. One token stays.
        min_p: keeps what is at least p times as likely as the likeliest (Nguyen et al. 2024).
        typical_p: keeps, nearest to the entropy first, tokens until their mass reaches p (Meister et al. 2023).
        repetition_penalty: divides positive and multiplies other logits of tokens in ``previous`` (Keskar et al. 2019).
        presence_penalty, frequency_penalty: are taken from the logits of tokens in ``previous``, once, and as often as
            the token stands there.
        previous: int64 (batch, n), the tokens that the penalties are about; what lies outside the vocabulary, such as a
            padding of -1, is passed over. Costs some 2 ns a token.
        previous_lengths: int64 (batch,), how many of its columns count; all where left out.
        logit_bias: (vocabulary,) or (batch, vocabulary), added to the logits.
        bitmask: int32, (words,) or (batch, words) of ceil(vocabulary / 32) words: bit i % 32 of word i // 32 allows
            token i, as grammar engines give it.
        seed: of Philox, one, or int64 (batch,). Where left out, torch's default generator of the device makes one at
            each call, so that ``torch.manual_seed`` decides.
        step: a counter, one, or int64 (batch,). Seed, step and id decide what a row draws, in whatever batch.
        sample_ids: int64 (batch,); 0, 1, 2, ... where left out.
        return_info: also says how likely the tokens were. At temperature 0 that is at temperature 1 and unfiltered.
        out: int64 (batch,), receives the tokens.

    Returns:
        The tokens, int64 (batch,); with ``return_info`` also a ``TokenInfo``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    device = logits.device
    greedy = not isinstance(temperature, Tensor) and temperature == 0
    if seed is None and not greedy:
        seed = torch.randint(2**63 - 1, (1,), device=device)
    token = torch.empty(logits.shape[:1], dtype=torch.int64, device=device) if out is None else out
    info = None
    if return_info:
        log_probs = torch.empty((2, token.numel()), dtype=torch.float32, device=device)
        info = TokenInfo(log_probs[0], log_probs[1], torch.empty_like(token, dtype=torch.bool))
    _sample(
        logits,
        temperature=_setting("temperature", temperature, 1.0, 0.0, _LARGEST, device),
        top_k=_setting("top_k", top_k, 0, 0, 2**63 - 1, device, torch.int64),
        top_p=_setting("top_p", top_p, 1.0, 0.0, 1.0, device),
        min_p=_setting("min_p", min_p, 0.0, 0.0, 1.0, device),
        typical_p=_setting("typical_p", typical_p, 1.0, 0.0, 1.0, device),
        repetition_penalty=_setting("repetition_penalty", repetition_penalty, 1.0, 1e-30, _LARGEST, device),
        presence_penalty=_setting("presence_penalty", presence_penalty, 0.0, -_LARGEST, _LARGEST, device),
        frequency_penalty=_setting("frequency_penalty", frequency_penalty, 0.0, -_LARGEST, _LARGEST, device),
        previous=previous,
        previous_lengths=previous_lengths,
        logit_bias=logit_bias,
        bitmask=bitmask,
        seed=None if greedy or seed is None else index_tensor(seed, device),
        step=index_tensor(step, device) if isinstance(step, Tensor) or step != 0 else None,
        sample_ids=sample_ids,
        token=token,
        **({} if info is None else info._asdict()),
    )
    return token if info is None else (token, info)


def _setting(
    name: str,
    value: float | Tensor,
    neutral: float,
    least: float,
    most: float,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if value == neutral:
        return None
    if not isinstance(value, int if dtype == torch.int64 else int | float):
        raise TypeError(f"sample_token: {name} must be a number or a tensor of {dtype}, got {value!r}")
    if not least <= value <= most:
        raise ValueError(f"sample_token: {name} must lie in [{least:g}, {most:g}], got {value}")
    return constant(value, dtype, device)


def _sample(
    logits: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    typical_p: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    previous: Tensor | None = None,
    previous_lengths: Tensor | None = None,
    logit_bias: Tensor | None = None,
    bitmask: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    sample_ids: Tensor | None = None,
    token: Tensor,
    log_prob: Tensor | None = None,
    raw_log_prob: Tensor | None = None,
    ok: Tensor | None = None,
) -> Tensor:
    """The op, of tensors alone; without a seed every row takes its largest logit."""
    settings = (
        temperature, top_k, top_p, min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty, previous,
        previous_lengths, logit_bias, bitmask, seed, step, sample_ids,
    )  # fmt: skip
    if use_reference("sample_token", _BACKENDS, logits.device):
        results = sample_token_reference(logits, *settings)
        for tensor, result in zip((token, log_prob, raw_log_prob, ok), results, strict=True):
            if tensor is not None:
                tensor.copy_(result)
        return token
    _kernel(logits, *settings, token, log_prob, raw_log_prob, ok)
    return token


def sample_token_reference(
    logits: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    typical_p: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    previous: Tensor | None = None,
    previous_lengths: Tensor | None = None,
    logit_bias: Tensor | None = None,
    bitmask: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raw = logits.to(torch.promote_types(logits.dtype, torch.float32))
    x = _processed(raw, repetition_penalty, presence_penalty, frequency_penalty, previous, previous_lengths,
                   logit_bias, bitmask)  # fmt: skip
    ok = ~x.isnan().any(-1) & x.amax(-1).isfinite()
    x = torch.where(ok[:, None], x, 0)  # whatever is there: overwritten below

    def column(setting: Tensor | None, neutral: float) -> Tensor:
        return torch.full((1, 1), neutral, dtype=raw.dtype) if setting is None else setting.reshape(-1, 1)

    drawn = column(temperature, 1.0) > 0 if seed is not None else torch.zeros(1, 1, dtype=torch.bool)
    filtered = _filtered(
        x / column(temperature, 1.0).where(drawn, 1.0),
        *(column(s, neutral) for s, neutral in ((top_k, 0), (top_p, 1.0), (min_p, 0.0), (typical_p, 1.0))),
    )
    scores = torch.where(drawn, filtered, x)
    token = x.argmax(-1)
    if seed is not None:
        u = uniform_reference((len(raw), 1), seed, step, sample_ids, _C.DRAW_SAMPLE)
        cumulative = scores.double().softmax(-1).cumsum(-1)
        inverted = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0]
        token = torch.where(drawn[:, 0], inverted, token)
    log_prob = scores.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    raw_ok = ok & ~raw.isnan().any(-1) & raw.amax(-1).isfinite()
    raw_log_prob = raw.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    return (
        torch.where(ok, token, 0),
        torch.where(ok, log_prob, -math.inf),
        torch.where(raw_ok, raw_log_prob, -math.inf),
        ok,
    )


def _processed(
    x: Tensor,
    repetition: Tensor | None,
    presence: Tensor | None,
    frequency: Tensor | None,
    previous: Tensor | None,
    previous_lengths: Tensor | None,
    bias: Tensor | None,
    bitmask: Tensor | None,
) -> Tensor:
    batch, vocabulary = x.shape
    if bias is not None:
        x = x + bias.to(x.dtype)
    if previous is not None:
        met = (previous >= 0) & (previous < vocabulary)
        if previous_lengths is not None:
            met &= torch.arange(previous.shape[1]) < previous_lengths.reshape(-1, 1)
        counts = torch.zeros(batch, vocabulary, dtype=x.dtype).scatter_add(1, previous.where(met, 0), met.to(x.dtype))
        penalised = x
        if repetition is not None:
            penalty = repetition.reshape(-1, 1)
            penalised = torch.where(x < 0, x * penalty, x / penalty)
        if frequency is not None:
            penalised = penalised - frequency.reshape(-1, 1) * counts
        if presence is not None:
            penalised = penalised - presence.reshape(-1, 1)
        x = torch.where(counts > 0, penalised, x)
    if bitmask is not None:
        allowed = (bitmask[..., None] >> torch.arange(32) & 1).bool().flatten(-2)[..., :vocabulary]
        x = torch.where(allowed, x, -math.inf)
    return x


def _filtered(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, typical_p: Tensor) -> Tensor:
    """The warpers of transformers; -inf is what they remove."""
    k = top_k.to(torch.int64).clamp(max=scores.shape[-1]).expand(len(scores), 1)
    least = scores.sort(dim=-1, descending=True).values.gather(-1, (k - 1).clamp(min=0))
    scores = scores.masked_fill((k > 0) & (scores < least), -math.inf)

    ascending, order = scores.sort(dim=-1, stable=True)
    removed = (ascending.softmax(-1).cumsum(-1) <= 1 - top_p) & (top_p < 1)
    removed[:, -1] = False
    scores = scores.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -math.inf)

    p = scores.softmax(-1)
    scores = scores.masked_fill(p < min_p.clamp(max=1) * p.amax(-1, keepdim=True), -math.inf)

    log_p = scores.log_softmax(-1)
    entropy = -(log_p * log_p.exp()).nansum(-1, keepdim=True)
    distance, order = (-log_p - entropy).abs().sort(dim=-1, stable=True)
    cumulative = scores.gather(-1, order).softmax(-1).cumsum(-1)
    last = (cumulative < typical_p).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    removed = (distance > distance.gather(-1, last)) & (typical_p < 1)
    return scores.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -math.inf)


_kernel = torch.ops.pygen.sample_token.default


@torch.library.register_fake("pygen::sample_token")
def _fake(*arguments: object) -> None:
    return None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)
    seed = torch.tensor([0x0123456789ABCDEF])

    def draw(*size: int, spread: float = 3.0) -> Tensor:
        return (spread * torch.randn(size, generator=generator)).to(dtype)

    def tokens(*size: int, below: int) -> Tensor:
        return torch.randint(below, size, generator=generator)

    def words(*size: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, size, generator=generator).to(torch.int32)

    def one(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.int64 if isinstance(value, int) else torch.float32)

    def example(name: str, logits: Tensor, **more: Any) -> Example:
        rows = logits.shape[0]
        outputs: dict[str, Any] = {name: torch.full((rows,), math.nan) for name in ("log_prob", "raw_log_prob")}
        outputs |= {"token": torch.full((rows,), -1), "ok": torch.zeros(rows, dtype=torch.bool)}
        return Example(name, {"logits": logits} | outputs | more)

    drawn: dict[str, Any] = {"seed": seed, "temperature": one(0.8)}
    sizes = (1, 2, 3, 7, 8, 9, 31, 64, 65, 111, 255, 256, 257, 1023, 1024, 1025, 2047, 2049, 5000)
    for vocabulary in sizes:
        yield example("every vocabulary, greedy", draw(3, vocabulary))
        yield example("every vocabulary, drawn", draw(3, vocabulary), **drawn)
        yield example("every vocabulary, top-p", draw(3, vocabulary), **drawn, top_p=one(0.9))
    for vocabulary in (34 * 1024 + 5, 128256):
        yield example("many blocks", draw(1, vocabulary), **drawn)
        yield example("many blocks, top-k", draw(1, vocabulary), **drawn, top_k=one(50))
        yield example("many blocks, top-p", draw(1, vocabulary), **drawn, top_p=one(0.9))
        yield example("many blocks, top-p, flat", draw(1, vocabulary, spread=1.0), **drawn, top_p=one(0.9))
    yield example("latents", draw(4, 300), **drawn, top_k=one(40), top_p=one(0.95))
    yield example("token alone", draw(4, 300), **drawn, top_p=one(0.95), log_prob=None, raw_log_prob=None, ok=None)
    for k in (1, 2, 50, 2600, 6999, 7000, 9000, 0):
        yield example("top-k", draw(3, 7000), **drawn, top_k=one(k))
    for p in (0.0, 0.3, 0.9, 0.999, 1.0):
        yield example("top-p", draw(4, 3500), **drawn, top_p=one(p))
    for p in (0.0, 1e-6, 0.05, 0.5, 1.0):
        yield example("min-p", draw(4, 3500), **drawn, min_p=one(p))
    for p in (0.01, 0.2, 0.5, 0.95, 1.0):
        yield example("typical-p", draw(4, 3500), **drawn, typical_p=one(p))
    every = {
        "temperature": torch.tensor([0.5, 0.0, 2.0, 1.0]),
        "top_k": torch.tensor([7, 50, 0, 100]),
        "top_p": torch.tensor([0.8, 0.7, 1.0, 0.95]),
        "min_p": torch.tensor([0.0, 0.1, 0.02, 0.001]),
        "typical_p": torch.tensor([1.0, 0.5, 0.9, 0.8]),
        "seed": torch.tensor([4, 2**62, -1, 9]),
        "step": torch.tensor([4, 0, 9, 2**32 - 1]),
        "sample_ids": torch.tensor([8, 2**32 - 1, 0, 1]),
    }
    yield example("rows differ", draw(4, 700), **every)
    penalties = {
        "repetition_penalty": torch.tensor([1.3, 1.0, 0.8, 1.1]),
        "presence_penalty": torch.tensor([0.0, 0.4, -0.2, 0.6]),
        "frequency_penalty": torch.tensor([0.0, 0.25, 0.3, -0.1]),
    }
    for vocabulary in (5, 111, 3000):
        past = tokens(4, 40, below=vocabulary)
        yield example("penalties", draw(4, vocabulary), **drawn, previous=past, **penalties)
        past[0, 3::2], past[1], past[2, 5] = -1, vocabulary, 2**40
        lengths = torch.tensor([40, 7, 0, 33])
        processed: dict[str, Any] = {
            "previous": past,
            "previous_lengths": lengths,
            "logit_bias": draw(4, vocabulary, spread=0.5),
            "bitmask": words(4, (vocabulary + 31) // 32),
        }
        processed["bitmask"][:, 0] |= 1  # no row without a token
        yield example("history padded", draw(4, vocabulary), **drawn, previous=past, previous_lengths=lengths,
                      **penalties)  # fmt: skip
        yield example("everything", draw(4, vocabulary), **every, **penalties, **processed)
        yield example("everything, greedy", draw(4, vocabulary), **penalties, **processed)
        yield example("mask", draw(4, vocabulary), **drawn, bitmask=processed["bitmask"])
        yield example("mask for all", draw(4, vocabulary), **drawn, bitmask=processed["bitmask"][0], top_p=one(0.9))
        yield example("bias for all", draw(4, vocabulary), **drawn, logit_bias=draw(vocabulary).float())
    ties = draw(4, 1500).round()
    yield example("ties, greedy", ties)
    yield example("ties", ties, **drawn, top_k=one(9))
    yield example("ties, all filters", ties, **every)
    for p in (0.4104, 0.05):
        yield example("constant", torch.zeros(3, 2500, dtype=dtype), **drawn, top_p=one(p))
    yield example("constant, typical", torch.zeros(3, 2500, dtype=dtype), **drawn, typical_p=one(0.3))
    wide = draw(8, 2 * 1500 + 1)
    yield example("sliced", wide[::2, 1:3001], **drawn, top_p=one(0.9))
    yield example("vocabulary strided", wide[:, 1::2], **drawn, top_k=one(20))
    yield example("transposed", draw(1300, 3).T, **drawn, top_p=one(0.7))
    yield example("misaligned", draw(1 + 3 * 1129).flatten()[1:].view(3, 1129), **drawn, min_p=one(0.01))
    strided = {name: torch.full((5, 2), math.nan)[:, 0] for name in ("log_prob", "raw_log_prob")}
    yield example("outputs strided", draw(5, 60), **drawn, **strided, token=torch.full((5, 4), -1)[:, 1])
    special = draw(8, 1100)
    special[0, 5], special[1, 1050], special[2], special[3, 9] = math.nan, math.inf, -math.inf, -math.inf
    special[4, :1050], special[5, 3:], special[6, ::3], special[7, :1099] = -math.inf, -math.inf, math.nan, -math.inf
    filters = {"top_k": one(7), "top_p": one(0.9), "min_p": one(0.01), "typical_p": one(0.9)}
    yield example("NaN and Inf, greedy", special)
    yield example("NaN and Inf", special, **drawn)
    for name, value in filters.items():
        yield example("NaN and Inf, filtered", special, **drawn, **{name: value})
    yield example("NaN and Inf, filtered", special, **drawn, **filters)
    allowed = torch.zeros(8, 35, dtype=torch.int32)
    allowed[:, 0] = 0b1000011000
    yield example("NaN and Inf, masked", special, **drawn, bitmask=allowed)
    yield example("large logits", draw(3, 90, spread=1000.0), **drawn, top_p=one(0.9))
    yield example("extreme temperatures", draw(4, 90), seed=seed, temperature=torch.tensor([1e-30, 1e30, 1e-3, 50.0]),
                  top_p=one(0.9))  # fmt: skip
    yield example("empty batch", draw(0, 90), **drawn)


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    """The rows that decoding meets: one request, and a batch of them."""
    for name, size in {"small": (1, 32000), "one row": (1, 128256), "batch": (32, 128256)}.items():
        logits, token = (3 * torch.randn(size)).to(dtype), torch.empty(size[0], dtype=torch.int64)
        settings = {"temperature": torch.tensor([0.8]), "seed": torch.tensor([42]), "token": token}
        yield Example(f"{name}, greedy", {"logits": logits, "token": token})
        yield Example(f"{name}, drawn", {"logits": logits} | settings)
        yield Example(f"{name}, top-k 50", {"logits": logits, "top_k": torch.tensor([50])} | settings)
        yield Example(f"{name}, top-p 0.9", {"logits": logits, "top_p": torch.tensor([0.9])} | settings)


SAMPLE_TOKEN = OpSpec(
    name="sample_token",
    function=_sample,
    reference=lambda token, log_prob=None, raw_log_prob=None, ok=None, **arguments: sample_token_reference(**arguments),
    operator=_kernel,
    outputs=("token", "log_prob", "raw_log_prob", "ok"),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(
        *(example.arguments.get(name) for name in ("logits", "logit_bias", "bitmask", "previous", "token"))
    ),
    flops=lambda example: 20 * example.arguments["logits"].numel(),
    benchmarks=_benchmarks,
)
