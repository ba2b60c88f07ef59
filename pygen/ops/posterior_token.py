"""posterior_token: tokens of a discrete diffusion's reverse step, without materialising the posterior.

The weight of class i is (alpha p_i + beta) f_i, with p = softmax(logits + shift [i = current]), f_i = same for the
current class and other for the rest; behind the vocabulary there may be one class more, the mask. That covers the
posteriors of D3PM (Austin et al. 2021) with uniform and absorbing transitions, VQ-Diffusion (Gu et al. 2022), and the
conditionals of Gibbs correctors that leave the current token out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from pygen import _C
from pygen.ops.backend import use_reference
from pygen.ops.spec import Example, OpSpec, index_tensor, tensor_bytes
from pygen.ops.token_confidence import uniform_reference

_BACKENDS = ("reference", "cpu", "cuda")
# The columns of the coefficients; the masked ones hold where the mask is the current token.
COLUMNS = ("alpha", "beta", "shift", "other", "same", "mask", "masked_other", "masked_mask")
Kind = Literal["largest", "current", "margin"]


def posterior_token(
    logits: Tensor,
    current: Tensor,
    coefficients: Tensor,
    *,
    has_mask: bool = False,
    index: Tensor | None = None,
    noise: Tensor | None = None,
    uniform: bool = False,
    seed: int | Tensor | None = None,
    step: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    kind: Kind = "margin",
    token: Tensor | None = None,
    prob: Tensor | None = None,
    confidence: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One token per row from its posterior; without ``noise`` and ``seed`` the most likely one.

    A row that is all -inf, or holds NaN or +inf, yields token 0 with probability 0.

    Args:
        logits: (batch, positions, vocabulary), float32, bfloat16 or float16, of any strides.
        current: int64 (batch, positions), the present tokens; ``vocabulary`` where the mask is.
        coefficients: float32 (8,) or (batch, 8), of ``COLUMNS``; weights need not add up to 1.
        has_mask: whether the mask is a class.
        index: int64 (batch, rows), the positions that rows are for; all, in order, where left out.
        noise: standard exponentials of shape (batch, rows, classes): the token is argmax weight / noise. Or
        seed: as in ``token_confidence``.
        uniform: the noise is uniform numbers, of which minus the logarithms are exponentials.
        token: int64 (batch, rows), receives the tokens; new where left out.
        prob: float32 (batch, rows), receives the tokens' probabilities, where given.
        confidence: float32 (batch, rows), receives how doubtful the present token is, by ``kind``: minus the logarithm
            of the largest mixed probability alpha p_i + beta, of that of the current token, or of the ratio of the
            current one's to the largest other ("margin"), where given.
        out: int64 (batch, positions), receives the tokens at their positions, and nothing elsewhere, where given.

    Returns:
        The tokens.

    Raises:
        ValueError, TypeError, IndexError: naming the argument.
    """
    if token is None:
        token = torch.empty(current.shape if index is None else index.shape, dtype=torch.int64, device=logits.device)
    seed = None if seed is None else index_tensor(seed, logits.device)
    step = None if step is None else index_tensor(step, logits.device)
    if use_reference("posterior_token", _BACKENDS, logits.device):
        tokens, probs, doubts = posterior_token_reference(
            logits, current, coefficients, has_mask=has_mask, index=index, noise=noise, uniform=uniform, seed=seed,
            step=step, sample_ids=sample_ids, kind=kind,
        )  # fmt: skip
        token.copy_(tokens)
        if prob is not None:
            prob.copy_(probs)
        if confidence is not None:
            confidence.copy_(doubts)
        if out is not None:
            out.copy_(tokens) if index is None else out.scatter_(1, index, tokens)
        return token
    _kernel(
        logits, current, coefficients, has_mask, index, noise, uniform, seed, step, sample_ids, kind, token, prob,
        confidence, out,
    )  # fmt: skip
    return token


def posterior_confidence(logits: Tensor, current: Tensor, coefficients: Tensor, kind: Kind) -> Tensor:
    """The ``confidence`` of ``posterior_token`` alone: one pass over the logits, and no token."""
    confidence = torch.empty(current.shape, dtype=torch.float32, device=logits.device)
    if use_reference("posterior_token", _BACKENDS, logits.device):
        return confidence.copy_(posterior_token_reference(logits, current, coefficients, kind=kind)[2])
    nothing = (None, None, False, None, None, None)
    _kernel(logits, current, coefficients, False, *nothing, kind, None, None, confidence, None)
    return confidence


def posterior_token_reference(
    logits: Tensor,
    current: Tensor,
    coefficients: Tensor,
    *,
    has_mask: bool = False,
    index: Tensor | None = None,
    noise: Tensor | None = None,
    uniform: bool = False,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    sample_ids: Tensor | None = None,
    kind: Kind = "margin",
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(logits.dtype, torch.float32)
    x, vocabulary = logits.to(compute), logits.shape[-1]
    column = dict(zip(COLUMNS, coefficients.to(compute).reshape(-1, len(COLUMNS), 1, 1).unbind(1), strict=True))
    chosen = torch.arange(logits.shape[1]).expand(current.shape) if index is None else index
    x = x.gather(1, chosen[..., None].expand(-1, -1, vocabulary))
    current = current.gather(1, chosen)[..., None]
    ok = ~x.isnan().any(-1) & x.amax(-1).isfinite()
    x = torch.where(ok[..., None], x, 0)

    here = torch.arange(vocabulary) == current
    masked = current == vocabulary
    log_p = torch.where(here, x + column["shift"], x).log_softmax(-1)
    factor = torch.where(masked, column["masked_other"], torch.where(here, column["same"], column["other"]))

    def mixed(log_p: Tensor) -> Tensor:
        alpha, beta = column["alpha"][..., 0], column["beta"][..., 0]
        return torch.where(beta == 0, alpha.log() + log_p, (alpha * log_p.exp() + beta).log())

    own, others = (mixed(torch.where(mask, log_p, -math.inf).amax(-1)) for mask in (here, ~here))
    confidence = {"largest": -torch.maximum(own, others), "current": -own, "margin": others - own}[kind]

    weight = (column["alpha"] * log_p.exp() + column["beta"]) * factor
    if has_mask:
        weight = torch.cat([weight, torch.where(masked, column["masked_mask"], column["mask"])], dim=-1)
    race = weight
    if noise is not None:
        noise = noise.to(compute)
        race = weight / (1e-30 - (noise + 1e-30).log() if uniform else noise)
    token = race.argmax(-1)
    if seed is not None:
        u = uniform_reference(tuple(logits.shape[:2]), seed, step, sample_ids, _C.DRAW_POSTERIOR).gather(1, chosen)
        cumulative = weight.double().cumsum(-1)
        token = torch.searchsorted(cumulative, u[..., None] * cumulative[..., -1:], right=True)[..., 0]
    prob = weight.gather(-1, token[..., None])[..., 0] / weight.sum(-1)
    return torch.where(ok, token, 0), torch.where(ok, prob, 0), torch.where(ok, confidence, -math.inf)


_kernel = torch.ops.pygen.posterior_token.default


@torch.library.register_fake("pygen::posterior_token")
def _fake(*arguments: object) -> None:
    return None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def example(name: str, batch: int, positions: int, vocabulary: int, **more: Any) -> Example:
        logits = (3 * torch.randn(batch, positions, vocabulary, generator=generator)).to(dtype)
        current = torch.randint(vocabulary + more.get("has_mask", False), (batch, positions), generator=generator)
        size = more["index"].shape if "index" in more else (batch, positions)
        arguments = {
            "logits": logits, "current": current, "coefficients": mixture, "token": torch.full(size, -1),
            "prob": torch.full(size, math.nan), "confidence": torch.full(size, math.nan), "kind": "margin",
        }  # fmt: skip
        return Example(name, arguments | more)

    def exponentials(*size: int, like: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size).exponential_(generator=generator).to(like)

    def uniforms(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    mixture = torch.tensor([0.7, 0.003, -2.5, 1.0, 1.0, 0.0, 1.0, 0.0])
    absorbing = torch.tensor([0.6, 1e-4, -3.0, 1e-3, 0.9, 1e-3, 1.0, 0.8])
    seed = torch.tensor([0x0123456789ABCDEF])
    for vocabulary in (1, 2, 7, 8, 33, 255, 257, 1023, 1024, 1025, 3000):
        yield example("every vocabulary", 1, 3, vocabulary)
        yield example("every vocabulary, raced", 1, 3, vocabulary, noise=exponentials(1, 3, vocabulary))
        masked = {"has_mask": True, "coefficients": absorbing}
        noise = uniforms(1, 3, vocabulary + 1)
        yield example("every vocabulary, mask", 1, 3, vocabulary, **masked, noise=noise, uniform=True)
        yield example("every vocabulary, drawn", 1, 3, vocabulary, **masked, seed=seed)
    some = torch.tensor([[4, 0, 2], [1, 5, 3]])
    yield example("latents", 2, 6, 300, noise=exponentials(2, 6, 300), out=torch.full((2, 6), -1))
    for kind in ("largest", "current"):
        yield example(f"the {kind}", 2, 6, 300, kind=kind)
    yield example("some rows", 2, 6, 300, index=some, noise=exponentials(2, 3, 300))
    yield example("some rows, drawn", 2, 6, 300, index=some, seed=seed, step=torch.tensor([3]))
    rows = {"coefficients": torch.stack([mixture, absorbing]), "step": torch.tensor([3, 0]), "seed": seed}
    yield example("rows differ", 2, 6, 300, **rows, sample_ids=torch.tensor([5, 2]))
    pure = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    yield example("softmax alone", 2, 6, 300, coefficients=pure, noise=uniforms(2, 6, 300), uniform=True)
    for like in (torch.bfloat16, torch.float16):
        yield example(f"noise in {like}", 2, 6, 300, noise=exponentials(2, 6, 300, like=like))
    by_channel = torch.randn(2, 300, 6, generator=generator).to(dtype).transpose(1, 2)
    noise = uniforms(2, 301, 6).transpose(1, 2)
    yield example("vocabulary strided", 2, 6, 300, logits=by_channel, **masked, noise=noise, uniform=True)
    special = torch.randn(4, 2, 1100, generator=generator).to(dtype)
    special[0, :, 5], special[1, :, 1050], special[2], special[3, :, 9] = math.nan, math.inf, -math.inf, -math.inf
    for how, more in {"raced": {"noise": exponentials(4, 2, 1100)}, "drawn": {"seed": seed}}.items():
        yield example(f"NaN and Inf, {how}", 4, 2, 1100, logits=special, **more)
    yield example("empty batch", 0, 3, 90, seed=seed)


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    """VQ-Diffusion's step: the vocabulary is the channels."""
    logits = torch.randn(2, 2886, 1024).to(dtype).transpose(1, 2)
    noise = torch.rand(2, 2887, 1024).transpose(1, 2)
    current = torch.randint(2887, (2, 1024))
    coefficients = torch.tensor([0.6, 1e-4, -3.0, 1e-3, 0.9, 1e-3, 1.0, 0.8])
    arguments = {"logits": logits, "current": current, "coefficients": coefficients, "has_mask": True}
    arguments |= {"kind": "margin", "noise": noise, "uniform": True}
    yield Example("latents", arguments | {"token": torch.empty_like(current)})


POSTERIOR_TOKEN = OpSpec(
    name="posterior_token",
    function=posterior_token,
    reference=lambda token, prob=None, confidence=None, out=None, **arguments: (
        *(results := posterior_token_reference(**arguments)),
        results[0],
    ),
    operator=_kernel,
    outputs=("token", "prob", "confidence", "out"),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(
        *(example.arguments.get(name) for name in ("logits", "noise", "current", "token"))
    ),
    flops=lambda example: 25 * example.arguments["logits"].numel(),
    benchmarks=_benchmarks,
)
