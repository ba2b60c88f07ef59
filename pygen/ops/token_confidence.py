"""token_confidence: a token from every row of logits, its probability and the row's entropy, in one pass over memory.

What the samplers of masked and discrete diffusion share: MaskGIT (Chang et al. 2022), masked diffusion language models
(Nie et al. 2025), block diffusion and entropy-bounded unmasking (Ben-Hamu et al. 2025) all begin a step with it.
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
from pygen.ops.spec import Example, OpSpec, constant, index_tensor, tensor_bytes

_BACKENDS = ("reference", "cpu", "cuda")
_WORD = 0xFFFFFFFF


def token_confidence(
    logits: Tensor,
    *,
    temperature: float | Tensor | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    untempered: bool = False,
    token: Tensor | None = None,
    prob: Tensor | None = None,
    log_prob: Tensor | None = None,
    neg_entropy: Tensor | None = None,
    scaled: Tensor | None = None,
) -> Tensor:
    """One token per position from softmax(logits / temperature), and how sure the model is of it.

    Without ``noise`` and ``seed`` the token is the most likely one. Of equal logits the first counts as the largest. A
    row that is all -inf, or holds NaN or +inf, yields token 0 with probability 0, the logarithm and neg_entropy -inf.

    Args:
        logits: (batch, positions, vocabulary), float32, bfloat16 or float16, of any strides; up to 2^20 tokens.
        temperature: one, or float32 (batch,); 0 takes the most likely token at temperature 1.
        top_k: keeps the k largest logits and those equal to the last; one, or int64 (batch,); 0 keeps all.
        top_p: keeps, of what top_k left, the smallest set of largest probability whose mass exceeds p (Holtzman et al.
            2020), of equal logits the first ones; one, or float32 (batch,).
        noise: standard exponentials E of the logits' shape: the token is argmax p / E, as torch.multinomial's. Or
        seed: int64, one element or (batch,): a uniform number per position, drawn by Philox with ``step`` (one, or
            (batch,)) and ``sample_ids`` ((batch,), else 0, 1, 2, ...) and inverted through the cumulative sums.
        untempered: prob and log_prob are those at temperature 1.
        token: int64 (batch, positions), receives the tokens; new where left out.
        prob, log_prob, neg_entropy: float32 (batch, positions), receive the token's probability after the filters, its
            logarithm, and minus the entropy of the row in nats, where given: three measures of confidence.
        scaled: receives logits / temperature, unfiltered, where given.

    Returns:
        The tokens.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if token is None:
        token = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    settings: dict[str, Any] = {
        "temperature": setting_tensor(temperature, torch.float32, logits.device),
        "top_k": setting_tensor(top_k, torch.int64, logits.device),
        "top_p": setting_tensor(top_p, torch.float32, logits.device),
        "noise": noise,
        "seed": None if seed is None else index_tensor(seed, logits.device),
        "step": None if step is None else index_tensor(step, logits.device),
        "sample_ids": sample_ids,
        "untempered": untempered,
    }
    if use_reference("token_confidence", _BACKENDS, logits.device):
        results = token_confidence_reference(logits, **settings)
        for tensor, result in zip((token, prob, log_prob, neg_entropy, scaled), results, strict=True):
            if tensor is not None:
                tensor.copy_(result)
        return token
    _kernel(logits, *settings.values(), token, prob, log_prob, neg_entropy, scaled)
    return token


def setting_tensor(value: float | Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A setting that kernels read through a pointer."""
    return value if value is None or isinstance(value, Tensor) else constant(value, dtype, device)


def token_confidence_reference(
    logits: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    sample_ids: Tensor | None = None,
    untempered: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    compute = torch.promote_types(logits.dtype, torch.float32)
    x, dtype = logits.to(compute), logits.dtype
    ok = ~x.isnan().any(-1) & x.amax(-1).isfinite()
    logits = torch.where(ok[..., None], x, 0)  # whatever is there: overwritten below
    greedy = torch.zeros(1, 1, 1, dtype=torch.bool, device=x.device)
    divisor = torch.ones(1, 1, 1, dtype=compute, device=x.device)
    if temperature is not None:
        greedy = temperature.reshape(-1, 1, 1) == 0
        divisor = torch.where(greedy, 1, temperature.reshape(-1, 1, 1).to(compute))
    scaled = x / divisor

    kept = torch.ones_like(logits, dtype=torch.bool)
    if top_k is not None:
        k = top_k.reshape(-1, 1, 1).clamp(max=logits.shape[-1]).expand(*logits.shape[:2], 1)
        least = logits.sort(dim=-1, descending=True).values.gather(-1, (k - 1).clamp(min=0))
        kept = (k <= 0) | (logits >= least)
    if top_p is not None:
        masked = torch.where(kept, logits / divisor, -math.inf)
        order = masked.sort(dim=-1, descending=True, stable=True).indices
        p = masked.softmax(-1).gather(-1, order)
        inside = p.cumsum(-1) - p <= top_p.reshape(-1, 1, 1).to(compute)
        kept = kept & ((top_p.reshape(-1, 1, 1) >= 1) | torch.zeros_like(kept).scatter(-1, order, inside))

    logits = torch.where(kept, logits, -math.inf)
    p = (logits / divisor).softmax(-1)
    token = logits.argmax(-1)
    if noise is not None:
        token = torch.where(greedy[..., 0], token, (p / noise.to(compute)).argmax(-1))
    elif seed is not None:
        u = uniform_reference(logits.shape[:2], seed, step, sample_ids, _C.DRAW_TOKEN)
        cumulative = p.double().cumsum(-1)
        drawn = torch.searchsorted(cumulative, u[..., None] * cumulative[..., -1:], right=True)[..., 0]
        token = torch.where(greedy[..., 0], token, drawn)
    neg_entropy = -torch.special.entr(p).sum(-1)
    log_prob = (logits if untempered else logits / divisor).log_softmax(-1).gather(-1, token[..., None])[..., 0]
    return (
        torch.where(ok, token, 0),
        torch.where(ok, log_prob.exp(), 0),
        torch.where(ok, log_prob, -math.inf),
        torch.where(ok, neg_entropy, -math.inf),
        scaled.to(dtype),
    )


def position_words(
    size: torch.Size | tuple[int, ...], seed: Tensor, step: Tensor | None, sample_ids: Tensor | None, draw: int
) -> tuple[Tensor, ...]:
    """The four words of Philox that belong to each position of (batch, positions)."""
    batch, positions = size
    block = torch.arange(positions, device=seed.device)[None]
    ids = torch.arange(batch, device=seed.device) if sample_ids is None else sample_ids
    steps = torch.zeros_like(seed) if step is None else step
    counter = (block & _WORD, block >> 32 & 0xFFFF | draw << 16, steps.reshape(-1, 1) & _WORD, ids[:, None] & _WORD)
    return philox_words(torch.broadcast_tensors(*counter), seed.reshape(-1, 1))


def uniform_reference(
    size: torch.Size | tuple[int, ...], seed: Tensor, step: Tensor | None, sample_ids: Tensor | None, draw: int
) -> Tensor:
    """A uniform number for each position of (batch, positions)."""
    return uniform_double(*position_words(size, seed, step, sample_ids, draw)[:2])


def uniform_double(high: Tensor, low: Tensor) -> Tensor:
    """A uniform number of 53 bits in (0, 1), float64, from two words."""
    return ((high << 21 | low >> 11).double() + 0.5) * 2.0**-53


_kernel = torch.ops.pygen.token_confidence.default


@torch.library.register_fake("pygen::token_confidence")
def _fake(*arguments: object) -> None:
    return None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, spread: float = 3.0) -> Tensor:
        return (spread * torch.randn(size, generator=generator)).to(dtype)

    def exponentials(*size: int, like: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size).exponential_(generator=generator).to(like)

    def example(name: str, logits: Tensor, **more: Any) -> Example:
        size = logits.shape[:2]
        outputs: dict[str, Any] = {name: torch.full(size, math.nan) for name in ("prob", "log_prob", "neg_entropy")}
        return Example(name, {"logits": logits, "token": torch.full(size, -1)} | outputs | more)

    one, seed = torch.tensor([0.7]), torch.tensor([0x0123456789ABCDEF])
    for vocabulary in (1, 2, 3, 7, 8, 9, 31, 64, 65, 111, 255, 256, 257, 1023, 1024, 1025, 2047, 2049, 5000):
        yield example("every vocabulary, greedy", draw(1, 3, vocabulary))
        yield example("every vocabulary, raced", draw(1, 3, vocabulary), noise=exponentials(1, 3, vocabulary))
        yield example("every vocabulary, drawn", draw(1, 3, vocabulary), seed=seed)
    yield example("many blocks", draw(1, 1, 34 * 1024 + 5), seed=seed, temperature=one)
    yield example("latents", draw(2, 5, 300), temperature=one, noise=exponentials(2, 5, 300))
    scaled = torch.full((2, 5, 300), math.nan, dtype=dtype)
    yield example("scaled", draw(2, 5, 300), temperature=one, noise=exponentials(2, 5, 300), scaled=scaled)
    yield example("untempered", draw(2, 5, 1300), temperature=one, seed=seed, untempered=True)
    per_sample = {"temperature": torch.tensor([0.5, 0.0, 2.0]), "step": torch.tensor([4, 0, 9]), "seed": seed}
    yield example("rows differ", draw(3, 4, 700), **per_sample, sample_ids=torch.tensor([8, 2**32 - 1, 0]))
    yield example("temperature 0, raced", draw(2, 4, 70), temperature=torch.zeros(1), noise=exponentials(2, 4, 70))
    for k in (1, 2, 50, 299, 300, 1000, 0):
        yield example("top-k", draw(2, 5, 300), top_k=torch.tensor([k]), noise=exponentials(2, 5, 300))
    for p in (0.0, 0.3, 0.9, 0.999, 1.0):
        yield example("top-p", draw(2, 5, 1500), top_p=torch.tensor([p]), seed=seed)
    filters = {"top_k": torch.tensor([7, 0, 100]), "top_p": torch.tensor([0.8, 0.7, 1.0])}
    yield example("both filters", draw(3, 5, 500), **filters, temperature=one, noise=exponentials(3, 5, 500))
    ties = draw(2, 6, 400).round()
    yield example("ties", ties)
    yield example("ties, both filters", ties, top_k=torch.tensor([9]), top_p=torch.tensor([0.61]), seed=seed)
    yield example("constant", torch.zeros(2, 3, 1500, dtype=dtype))
    yield example("constant, top-p", torch.zeros(2, 3, 1500, dtype=dtype), top_p=torch.tensor([0.4104]), seed=seed)
    for like in (torch.float32, torch.bfloat16, torch.float16):
        yield example(f"noise in {like}", draw(2, 5, 300), noise=exponentials(2, 5, 300, like=like))
    by_channel = draw(2, 300, 7).transpose(1, 2)
    yield example("vocabulary strided", by_channel, noise=exponentials(2, 300, 7).transpose(1, 2))
    yield example("vocabulary strided, scaled", by_channel, temperature=one, scaled=torch.zeros_like(by_channel))
    wide = draw(3, 10, 2 * 150 + 1)
    yield example("sliced", wide[::2, 1:8:3, 1::2], seed=seed)
    yield example("misaligned", draw(1 + 2 * 3 * 129).flatten()[1:].view(2, 3, 129), noise=exponentials(2, 3, 129))
    strided = {name: torch.full((5, 2), math.nan).T for name in ("prob", "log_prob", "neg_entropy")}
    yield example("outputs strided", draw(2, 5, 60), **strided, token=torch.full((5, 4), -1)[:, ::2].T)
    special = draw(7, 2, 1100)
    special[0, :, 5], special[1, :, 1050], special[2], special[3, :, 9] = math.nan, math.inf, -math.inf, -math.inf
    special[4, 0, :1050], special[5, :, 3:], special[6, 0, ::3] = -math.inf, -math.inf, math.nan
    for name, more in {"greedy": {}, "raced": {"noise": exponentials(7, 2, 1100)}, "drawn": {"seed": seed}}.items():
        yield example(f"NaN and Inf, {name}", special, **more)
        yield example(f"NaN and Inf, {name}, filtered", special, **more, **filters | {"top_k": torch.tensor([7])}
                      | {"top_p": torch.tensor([0.9])})  # fmt: skip
    yield example("large logits", draw(2, 3, 90, spread=1000.0), noise=exponentials(2, 3, 90))
    yield example("empty batch", draw(0, 3, 90), seed=seed)


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    """A masked image, and a block of a language model: greedy, by the caller's noise, and by Philox."""
    for name, size in {"latents": (2, 64, 8192), "a block of text": (1, 32, 128256)}.items():
        logits = (3 * torch.randn(size)).to(dtype)
        outputs = {"token": torch.empty(size[:2], dtype=torch.int64), "prob": torch.empty(size[:2])}
        yield Example(f"{name}, greedy", {"logits": logits, **outputs})
        noise = torch.empty(size).exponential_()
        yield Example(f"{name}, noise", {"logits": logits, "noise": noise, **outputs})
        drawn = {"temperature": torch.tensor([0.8]), "seed": torch.tensor([42])}
        yield Example(f"{name}, Philox", {"logits": logits, **drawn, **outputs})


TOKEN_CONFIDENCE = OpSpec(
    name="token_confidence",
    function=token_confidence,
    reference=lambda token, prob=None, log_prob=None, neg_entropy=None, scaled=None, **arguments: (
        token_confidence_reference(**arguments)
    ),
    operator=_kernel,
    outputs=("token", "prob", "log_prob", "neg_entropy", "scaled"),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(
        *(example.arguments.get(name) for name in ("logits", "noise", "scaled", "token", "prob"))
    ),
    flops=lambda example: 20 * example.arguments["logits"].numel(),
    benchmarks=_benchmarks,
)
