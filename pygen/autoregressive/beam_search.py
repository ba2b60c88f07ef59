"""Beam search, as transformers does it: the likeliest continuations, of which so many are kept at each length."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

from pygen.autoregressive.session import Session

EarlyStopping = bool | Literal["never"]


class Beam(NamedTuple):
    """A continuation. score: the sum of its tokens' log-probabilities; of an ended one, over length^length_penalty."""

    score: float
    tokens: list[int]


def beam_search(
    session: Session,
    new: int,
    beams: int,
    stop_tokens: Collection[int],
    length_penalty: float,
    early_stopping: EarlyStopping,
) -> list[Beam]:
    """The ``beams`` best ends of a session's one sequence, the best first; at least one has ``new`` tokens or a stop.

    early_stopping: True ends as soon as so many have ended; False as soon as none that runs is better than the worst of
    them at its present length; "never" as soon as none can become so.
    """
    running, ended = [Beam(0.0, [])], list[Beam]()
    candidates = beams * max(2, 1 + len(stop_tokens))  # so that enough of them go on
    for length in range(1, new + 1):
        scores = session.logits.float().log_softmax(-1)
        scores += scores.new_tensor([beam.score for beam in running])[:, None]
        best = scores.flatten().topk(min(candidates, scores.numel()))
        kept: list[tuple[int, Beam]] = []
        for place, (score, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, token = divmod(index, scores.shape[1])
            tokens = [*running[parent].tokens, token]
            if length < new and token not in stop_tokens:
                kept.append((parent, Beam(score, tokens)))
            elif place < beams:
                ended.append(Beam(score / length**length_penalty, tokens))
        ended = sorted(ended, key=lambda beam: -beam.score)[:beams]
        kept = kept[:beams]
        if not kept:
            break
        if len(ended) == beams:
            at = new if early_stopping == "never" and length_penalty > 0 else length
            if early_stopping is True or kept[0][1].score / at**length_penalty <= ended[-1].score:
                break
        running = [beam for _, beam in kept]
        session.select([parent for parent, _ in kept])
        session.step([beam.tokens[-1] for beam in running])
    return ended
