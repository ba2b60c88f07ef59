"""unmask_step: which positions of a sample take their new token, by confidence; the second half of a token step.

A candidate is accepted if it is among the ``count`` surest of its sample, or surer than ``threshold``, or if those
surer than it spend no more than ``budget``: MaskGIT (Chang et al. 2022), confidence thresholds (Wu et al. 2025) and
entropy-bounded unmasking (Ben-Hamu et al. 2025) are one rule each.
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
from pygen.ops.token_confidence import setting_tensor, uniform_reference

_BACKENDS = ("reference", "cpu", "cuda")


def unmask_step(
    sample: Tensor,
    token: Tensor,
    score: Tensor,
    *,
    mask_token: int | Tensor | None = None,
    fixed: Tensor | None = None,
    count: int | Tensor | None = None,
    remain: int | Tensor | None = None,
    threshold: float | Tensor | None = None,
    budget: float | Tensor | None = None,
    ties: bool = False,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    temperature: float | Tensor | None = None,
    fill: Tensor | None = None,
    edit_threshold: float | Tensor | None = None,
    shielded: Tensor | None = None,
    out: Tensor | None = None,
    accepted: Tensor | None = None,
    edited: Tensor | None = None,
    settled: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Accepted candidates take their token, the others keep what they hold or take ``fill``.

    Tensors over positions are (batch, positions); settings hold one number, or one per sample. Of equal scores the
    first position is the surest; NaN counts as -inf.

    Args:
        sample: int64, what the positions hold.
        token: int64, what they may take.
        score: float32, how sure the model is of it.
        mask_token: candidates are the positions that hold it; all where left out.
        fixed: bool, positions that are no candidates whatever they hold.
        count: so many candidates are accepted, the surest first.
        remain: how many candidates are left for later steps: never fewer than 1 of them unless it is 0, and then never
            so many that fewer than ``count`` are accepted.
        threshold: candidates with a larger score are accepted.
        budget: candidates are accepted, the surest first, while the negated scores of those before add up to no more;
            with score = -entropy, as entropy-bounded unmasking has it.
        ties: candidates as sure as the last that is accepted by its rank are accepted with it.
        noise: uniform numbers u of which score - temperature log(-log u) is ranked. Or
        seed: int64, one element or (batch,): they are drawn by Philox with ``step`` and ``sample_ids``.
        temperature: float32, of that noise; 1 where left out.
        fill: int64, what candidates take that are not accepted: a mask token, random tokens; may be expanded.
        edit_threshold: positions that are no candidates take their token too where its score is larger, but for
        shielded: bool, positions that are never edited.
        out: receives the next sample; may be ``sample``. New where left out.
        accepted, edited, settled: bool, receive where a candidate was accepted, where another position took another
            token, and where nothing is left to accept, where given.
        order: int64, receives the candidates' positions, the surest first, then the other positions, where given.

    Returns:
        the next sample, ``out``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    device = sample.device
    if out is None:
        out = torch.empty_like(sample)
    settings: dict[str, Any] = {
        "mask_token": setting_tensor(mask_token, torch.int64, device),
        "fixed": fixed,
        "count": setting_tensor(count, torch.int64, device),
        "remain": setting_tensor(remain, torch.int64, device),
        "threshold": setting_tensor(threshold, torch.float32, device),
        "budget": setting_tensor(budget, torch.float32, device),
        "ties": ties,
        "noise": noise,
        "seed": None if seed is None else index_tensor(seed, device),
        "step": None if step is None else index_tensor(step, device),
        "sample_ids": sample_ids,
        "temperature": setting_tensor(temperature, torch.float32, device),
        "fill": fill,
        "edit_threshold": setting_tensor(edit_threshold, torch.float32, device),
        "shielded": shielded,
    }
    if use_reference("unmask_step", _BACKENDS, device):
        results = unmask_step_reference(sample, token, score, **settings)
        for tensor, result in zip((out, accepted, edited, settled, order), results, strict=True):
            if tensor is not None:
                tensor.copy_(result)
        return out
    _kernel(sample, token, score, *settings.values(), out, accepted, edited, settled, order)
    return out


def unmask_step_reference(
    sample: Tensor,
    token: Tensor,
    score: Tensor,
    *,
    mask_token: Tensor | None = None,
    fixed: Tensor | None = None,
    count: Tensor | None = None,
    remain: Tensor | None = None,
    threshold: Tensor | None = None,
    budget: Tensor | None = None,
    ties: bool = False,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    sample_ids: Tensor | None = None,
    temperature: Tensor | None = None,
    fill: Tensor | None = None,
    edit_threshold: Tensor | None = None,
    shielded: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    candidate = torch.ones_like(sample, dtype=torch.bool)
    if mask_token is not None:
        candidate = candidate & (sample == mask_token.reshape(-1, 1))
    if fixed is not None:
        candidate = candidate & ~fixed
    candidates = candidate.sum(-1, keepdim=True)

    score = torch.where(score.isnan(), -math.inf, score)
    ranked = score
    if seed is not None:
        noise = uniform_reference(tuple(sample.shape), seed, step, sample_ids, _C.DRAW_UNMASK)
    if noise is not None:
        gumbel = -torch.log((-torch.log(noise.to(score.dtype).clamp(1e-20))).clamp(1e-20))
        scale = torch.ones((1, 1), dtype=score.dtype) if temperature is None else temperature.reshape(-1, 1)
        ranked = torch.where(scale == 0, score, score + scale * gumbel)
    # Stable sorts, the less important key first: of equal candidates the first position comes first.
    by_score = torch.where(candidate, ranked, 0).sort(dim=-1, descending=True, stable=True).indices
    order = by_score.gather(-1, (~candidate).gather(-1, by_score).byte().sort(dim=-1, stable=True).indices)
    rank = order.argsort(-1)

    zero = torch.zeros((1, 1), dtype=torch.int64, device=sample.device)
    limit = zero if count is None else count.reshape(-1, 1)
    if remain is not None:
        left = torch.minimum(remain.reshape(-1, 1), candidates - limit)
        limit = candidates - torch.maximum(left, remain.reshape(-1, 1).clamp(max=1))
    limit = limit.clamp(min=0).minimum(candidates)
    if budget is not None:
        cost = (-score).clamp(min=0).gather(-1, order).double()
        before = torch.cat([torch.zeros_like(cost[:, :1]), cost[:, :-1]], dim=-1).cumsum(-1)
        inside = (before <= budget.reshape(-1, 1)) & cost.isfinite()
        limit = torch.maximum(limit, inside.long().cumprod(-1).sum(-1, keepdim=True).minimum(candidates))

    accepted = rank < limit
    if ties:
        last = ranked.gather(-1, order.gather(-1, (limit - 1).clamp(min=0)))
        accepted = accepted | ((ranked == last) & (limit > 0))
    if threshold is not None:
        accepted = accepted | (score > threshold.reshape(-1, 1))
    accepted = accepted & candidate
    edited = torch.zeros_like(accepted)
    if edit_threshold is not None:
        edited = ~candidate & (token != sample) & (score > edit_threshold.reshape(-1, 1))
        edited = edited if shielded is None else edited & ~shielded
    following = torch.where(accepted | edited, token, sample)
    if fill is not None:
        following = torch.where(candidate & ~accepted, fill, following)
    return following, accepted, edited, ~candidate | accepted, order


_kernel = torch.ops.pygen.unmask_step.default


@torch.library.register_fake("pygen::unmask_step")
def _fake(*arguments: object) -> None:
    return None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def integers(*size: int, high: int = 1000) -> Tensor:
        return torch.randint(high, size, generator=generator)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    def flags(*size: int, share: float = 0.5) -> Tensor:
        return uniform(*size) < share

    def example(name: str, *size: int, **more: Any) -> Example:
        mask = flags(*size, share=more.pop("masked", 0.6))
        arguments = {
            "sample": torch.where(mask, 1000, integers(*size)), "token": integers(*size), "score": uniform(*size).log(),
            "out": torch.full(size, -1), "order": torch.full(size, -1), "mask_token": torch.tensor([1000]),
        }  # fmt: skip
        return Example(
            name, arguments | {n: torch.zeros(size).bool() for n in ("accepted", "edited", "settled")} | more
        )

    for positions in (1, 2, 3, 7, 8, 31, 32, 33, 64, 100, 255, 257, 1000):
        yield example("every count", 2, positions, count=torch.tensor([max(1, positions // 3)]))
    for count in (0, 1, 5, 1000):
        yield example("counts", 3, 20, count=torch.tensor([count]))
    yield example("rows differ", 3, 40, count=torch.tensor([3, 0, 70]), threshold=torch.tensor([-0.1, -0.2, 1.0]))
    for masked in (0.0, 0.05, 0.6, 1.0):
        for remain in (0, 1, 5, 11, 100):
            more = {"remain": torch.tensor([remain]), "count": torch.tensor([1]), "fill": torch.full((4, 20), 1000)}
            yield example("remain", 4, 20, masked=masked, **more)
        yield example("remain, no count", 4, 20, masked=masked, remain=torch.tensor([8]))
        yield example("threshold", 4, 20, masked=masked, threshold=torch.tensor([-0.3]))
        yield example("budget", 4, 20, masked=masked, budget=torch.tensor([1.5]), fill=integers(4, 20))
    for budget in (-1.0, 0.0, 0.1, 1e9):
        yield example("budgets", 2, 50, budget=torch.tensor([budget]), mask_token=None)
    noisy = {"count": torch.tensor([9]), "temperature": torch.tensor([0.7, 0.0])}
    yield example("latents", 2, 64, **noisy, noise=uniform(2, 64))
    yield example("noise in the dtype", 2, 64, **noisy, noise=uniform(2, 64).to(dtype))
    yield example("Philox", 2, 64, **noisy, seed=torch.tensor([7]), step=torch.tensor([3]))
    ids = {"sample_ids": torch.tensor([5, 2**31]), "step": torch.tensor([3, 0])}
    yield example("Philox, ids", 2, 64, count=torch.tensor([9]), seed=torch.tensor([-1]), **ids)
    coarse = (uniform(3, 60) * 6).floor()
    for ties in (False, True):
        yield example("ties", 3, 60, score=coarse, count=torch.tensor([7, 0, 20]), ties=ties)
    yield example("fixed", 2, 30, mask_token=None, fixed=flags(2, 30), remain=torch.tensor([4]), fill=integers(2, 30))
    edits = {"edit_threshold": torch.tensor([-0.5]), "count": torch.tensor([2])}
    yield example("edits", 3, 30, **edits)
    yield example("edits, shielded", 3, 30, **edits, shielded=flags(1, 30).expand(3, 30))
    special = uniform(2, 30)
    special[0, ::3], special[1, ::4], special[1, 1::4] = math.nan, -math.inf, math.inf
    yield example("NaN and Inf", 2, 30, score=special, count=torch.tensor([12]))
    yield example("NaN and Inf, budget", 2, 30, score=-special, budget=torch.tensor([3.0]))
    sample = torch.where(flags(2, 30), 1000, integers(2, 30))
    yield example("in place", 2, 30, sample=sample, out=sample, count=torch.tensor([4]))
    strided = {"out": torch.full((30, 4), -1)[:, ::2].T, "order": torch.full((30, 2), -1).T}
    yield example("strided", 2, 30, **strided, count=torch.tensor([4]), score=uniform(2, 60)[:, ::2])
    yield example("past shared memory", 1, 5000, count=torch.tensor([700]), budget=torch.tensor([9.0]))
    yield example("empty batch", 0, 30, count=torch.tensor([4]))


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    for name, size in {"latents": (2, 256), "a canvas": (4, 4096)}.items():
        sample, token = torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.int64)
        count, out = torch.tensor([size[1] // 8]), torch.empty(size, dtype=torch.int64)
        yield Example(name, {"sample": sample, "token": token, "score": torch.rand(size), "count": count, "out": out})


UNMASK_STEP = OpSpec(
    name="unmask_step",
    function=unmask_step,
    reference=lambda out, accepted=None, edited=None, settled=None, order=None, **arguments: unmask_step_reference(
        **arguments
    ),
    operator=_kernel,
    outputs=("out", "accepted", "edited", "settled", "order"),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(
        *(example.arguments[name] for name in ("sample", "token", "score", "out"))
    ),
    flops=lambda example: 10 * example.arguments["score"].numel(),
    benchmarks=_benchmarks,
)
