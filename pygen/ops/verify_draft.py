"""verify_draft: the verification of speculative sampling (Leviathan et al. 2023; Chen et al. 2023).

A drafted token d, drawn from q, is accepted with probability min(1, p(d) / q(d)), where p is the target's distribution;
the first that is not gives way to one from max(0, p - q), normalised, and behind a draft accepted whole comes one from
p. Each token is then distributed as if it were drawn from the target. No probability is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pygen import _C
from pygen.ops.backend import use_reference
from pygen.ops.spec import Example, OpSpec, index_tensor, tensor_bytes
from pygen.ops.token_confidence import position_words, setting_tensor, uniform_double

_BACKENDS = ("reference", "cpu", "cuda")


def verify_draft(
    draft: Tensor,
    draft_logits: Tensor | None,
    logits: Tensor,
    *,
    lengths: Tensor | None = None,
    temperature: float | Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    token: Tensor | None = None,
    accepted: Tensor | None = None,
    ok: Tensor | None = None,
) -> Tensor:
    """The accepted tokens of each draft, one token more, and -1 behind.

    Both distributions are softmax(logits / temperature). Filters such as top-k and top-p come before: they leave -inf,
    and what the draft was drawn from and what the target draws from are what is left.

    Where the target's row is all -inf, or holds NaN or +inf, the token is 0, ``ok`` False, and the draft ends. A
    draft's row of that kind is not believed: its token is replaced by one from the target. A drafted token of draft
    probability 0, which cannot have been drawn, is accepted unless its target probability is 0.

    Args:
        draft: int64 (batch, n), the drafted tokens. A draft ends before the first that is not a token, such as -1.
        draft_logits: (batch, n, vocabulary), what they were drawn from; None where they were not drawn, as with greedy
            drafts and prompt lookup: d is then accepted with probability p(d), else replaced by another from p.
        logits: (batch, n + 1, vocabulary), the target's for each drafted token and for the one behind; float32,
            bfloat16 or float16, of any strides; up to 2^20 tokens.
        lengths: int64 (batch,), how many tokens each draft has; n where left out.
        temperature: one, or float32 (batch,); 0 accepts the target's most likely token alone, of equal ones the first.
        seed: int64, one element or (batch,): two uniform numbers per position, drawn by Philox with ``step`` (one, or
            (batch,)), which differs from call to call, and ``sample_ids`` ((batch,), else 0, 1, 2, ...). Without it
            every row is taken at temperature 0.
        token: int64 (batch, n + 1), receives the tokens; new where left out.
        accepted: int64 (batch,), receives how many drafted tokens were accepted, where given.
        ok: bool (batch,), receives whether the target's rows were distributions, where given.

    Returns:
        The tokens.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if token is None:
        token = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    settings: dict[str, Any] = {
        "lengths": lengths,
        "temperature": setting_tensor(temperature, torch.float32, logits.device),
        "seed": None if seed is None else index_tensor(seed, logits.device),
        "step": None if step is None else index_tensor(step, logits.device),
        "sample_ids": sample_ids,
    }
    if use_reference("verify_draft", _BACKENDS, logits.device):
        results = verify_draft_reference(draft, draft_logits, logits, **settings)
        for tensor, result in zip((token, accepted, ok), results, strict=True):
            if tensor is not None:
                tensor.copy_(result)
        return token
    _kernel(draft, draft_logits, logits, *settings.values(), token, accepted, ok)
    return token


def verify_draft_reference(
    draft: Tensor,
    draft_logits: Tensor | None,
    logits: Tensor,
    *,
    lengths: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, drafted = draft.shape
    vocabulary, device = logits.shape[-1], logits.device
    place = torch.arange(drafted + 1, device=device)

    def distribution(logits: Tensor) -> tuple[Tensor, Tensor]:
        x = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ok = ~x.isnan().any(-1) & x.amax(-1).isfinite()
        x = torch.where(ok[..., None], x, 0)
        if temperature is not None:
            x = x / torch.where(temperature == 0, 1, temperature).to(x.dtype).reshape(-1, 1, 1)
        return x.softmax(-1), ok

    p, ok = distribution(logits)
    tokens = torch.cat([draft, draft.new_full((batch, 1), -1)], dim=1)
    within = (tokens >= 0) & (tokens < vocabulary)
    if lengths is not None:
        within = within & (place < lengths[:, None])
    token = torch.where(within, tokens, 0)[..., None]
    q, believed = torch.zeros_like(p).scatter(-1, token, 1), within
    if draft_logits is not None:
        q_drawn, q_ok = distribution(draft_logits)
        q = torch.cat([q_drawn, p[:, -1:]], dim=1)
        believed = within & torch.cat([q_ok, within[:, -1:]], dim=1)

    # What each position would give: the drafted token, or another.
    most_likely = torch.where(ok[..., None], logits, 0).argmax(-1)
    accepts, other = within & (tokens == most_likely), most_likely
    if seed is not None:
        words = position_words((batch, drafted + 1), seed, step, sample_ids, _C.DRAW_VERIFY)
        u, v = uniform_double(*words[:2]), uniform_double(*words[2:])
        own = p.gather(-1, token)[..., 0]
        drawn_accepts = believed & (own > 0) & (u * q.gather(-1, token)[..., 0] <= own)
        weight = torch.where(believed[..., None], (p - q).clamp(min=0), p)
        weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, p)
        cumulative = weight.double().cumsum(-1)
        drawn = torch.searchsorted(cumulative, v[..., None] * cumulative[..., -1:], right=True)[..., 0]
        greedy = torch.zeros_like(ok) if temperature is None else temperature.reshape(-1, 1) == 0
        accepts, other = torch.where(greedy, accepts, drawn_accepts), torch.where(greedy, other, drawn)

    accepted = (accepts & ok).long().cumprod(1).sum(1)
    last = place == accepted[:, None]
    result = torch.where(last, torch.where(ok, other, 0), torch.where(place < accepted[:, None], tokens, -1))
    return result, accepted, (ok | ~last).all(1)


_kernel = torch.ops.pygen.verify_draft.default


@torch.library.register_fake("pygen::verify_draft")
def _fake(*arguments: object) -> None:
    return None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    def example(name: str, batch: int, drafted: int, vocabulary: int, how: str = "drawn", **more: Any) -> Example:
        logits = draw(batch, drafted + 1, vocabulary)
        q = (logits[:, :-1] + draw(batch, drafted, vocabulary) / 2).to(dtype)
        noise = torch.empty(q.shape).exponential_(generator=generator)
        arguments: dict[str, Any] = {
            "draft": (q.float().exp() / noise).argmax(-1) if vocabulary else q,
            "draft_logits": q,
        }
        if how != "drawn":
            arguments = {"draft": logits[:, :-1].argmax(-1), "draft_logits": None}
            logits = (logits + 3 * torch.nn.functional.one_hot(logits.argmax(-1), vocabulary)).to(dtype)
            arguments["draft"][:, 2::3] = 0
        arguments |= {"logits": logits, "seed": None if how == "greedy" else seed}
        outputs = {"token": torch.full((batch, drafted + 1), -2), "accepted": torch.full((batch,), -2)}
        return Example(name, arguments | outputs | {"ok": torch.zeros(batch, dtype=torch.bool)} | more)

    seed = torch.tensor([0x0123456789ABCDEF])
    for how in ("drawn", "certain", "greedy"):
        for vocabulary in (1, 2, 7, 8, 33, 255, 257, 1023, 1024, 1025, 3000):
            yield example(f"every vocabulary, {how}", 2, 3, vocabulary, how)
        for drafted in (0, 1, 2, 5, 8):
            yield example(f"every length, {how}", 3, drafted, 60, how)
        differing: dict[str, Any] = {
            "lengths": torch.tensor([4, 0, 2, 4]),
            "temperature": torch.tensor([0.7, 1.3, 0.0, 0.1]),
        }
        ids = {"step": torch.tensor([4, 0, 9, 2**40]), "sample_ids": torch.tensor([8, 2**32 - 1, 0, 3])}
        yield example(f"rows differ, {how}", 4, 4, 300, how, **differing, **ids)
        logits = draw(6, 4, 1100)
        logits[0, 0, 5], logits[1, 1, 1050], logits[2, 2] = math.nan, math.inf, -math.inf
        logits[3, :, 9], logits[4, :, 3:], logits[5, 3, 1099] = -math.inf, -math.inf, math.nan
        special: dict[str, Any] = {"logits": logits, "draft": logits[:, :-1].nan_to_num().argmax(-1)}
        yield example(f"NaN and Inf, {how}", 6, 3, 1100, how, **special)
        draft = torch.tensor([[1, -1, 3], [60, 0, 0], [-(2**62), 1, 1], [5, 2**40, 5]])
        yield example(f"no tokens, {how}", 4, 3, 60, how, draft=draft)
    yield example("rows differ", 4, 4, 300, **differing)
    logits = draw(3, 6, 500)
    yield example("the target itself", 3, 5, 500, logits=logits, draft_logits=logits[:, :-1])
    apart = draw(2, 4, 1500)
    yield example("apart", 2, 3, 1500, logits=torch.where(torch.arange(1500) % 2 == 0, apart, -math.inf),
                  draft_logits=torch.where(torch.arange(1500) % 2 == 1, apart, -math.inf)[:, :-1],
                  draft=torch.tensor([[3, 5, 7], [4, 5, 7]]))  # fmt: skip
    bad = draw(4, 3, 40)
    bad[0, 0, 5], bad[1], bad[2, :, 7], bad[3, :, 3] = math.nan, -math.inf, -math.inf, math.inf
    yield example("bad drafts", 4, 3, 40, draft_logits=bad, draft=torch.full((4, 3), 7))
    yield example("vocabulary strided", 2, 6, 300, logits=draw(2, 300, 7).transpose(1, 2))
    yield example("misaligned", 2, 2, 129, logits=draw(1 + 2 * 3 * 129)[1:].view(2, 3, 129))
    strided: dict[str, Any] = {"token": torch.full((4, 6), -2)[:, ::2].T, "accepted": torch.full((6,), -2)[::2]}
    yield example("outputs strided", 3, 3, 60, **strided)
    yield example("drafted by another dtype", 3, 4, 300, draft_logits=torch.randn(3, 4, 300, generator=generator))
    yield example("constant", 2, 4, 1500, logits=torch.zeros(2, 5, 1500, dtype=dtype))
    yield example("tokens alone", 2, 4, 90, accepted=None, ok=None)
    yield example("empty batch", 0, 3, 90)


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    """A draft of five that is accepted whole, so that every row is read: drawn, and by prompt lookup."""
    for name, size in {"one text": (1, 6, 32000), "8 texts": (8, 6, 128256)}.items():
        logits = (3 * torch.randn(size)).to(dtype)
        logits[..., 7] = 100.0
        draft, token = torch.full((size[0], 5), 7), torch.empty(size[:2], dtype=torch.int64)
        arguments = {"draft": draft, "logits": logits, "seed": torch.tensor([42]), "token": token}
        yield Example(f"{name}, drawn", arguments | {"draft_logits": logits[:, :-1].clone()})
        yield Example(f"{name}, looked up", arguments | {"draft_logits": None})


VERIFY_DRAFT = OpSpec(
    name="verify_draft",
    function=verify_draft,
    reference=lambda token, accepted=None, ok=None, **arguments: verify_draft_reference(**arguments),
    operator=_kernel,
    outputs=("token", "accepted", "ok"),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(
        *(example.arguments.get(name) for name in ("logits", "draft_logits", "draft", "token"))
    ),
    flops=lambda example: (
        20 * sum(t.numel() for name in ("logits", "draft_logits") if (t := example.arguments[name]) is not None)
    ),
    benchmarks=_benchmarks,
)
