"""What is asked of a decoder: a prompt, how its tokens are drawn, and what has been made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pygen.autoregressive.cache import Pages
from pygen.autoregressive.prompt_lookup import PromptLookup
from pygen.autoregressive.text import TextStream

_LARGEST = torch.finfo(torch.float32).max
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, _LARGEST), "top_k": (0, 2**63 - 1), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0), "repetition_penalty": (1e-30, _LARGEST), "presence_penalty": (-_LARGEST, _LARGEST),
    "frequency_penalty": (-_LARGEST, _LARGEST), "seed": (0, 2**64 - 1),
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn; the terms are ``sample_token``'s. Temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            whole = name in ("top_k", "seed")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise TypeError(f"{name} must be {'an integer' if whole else 'a number'}, got {value!r:.100}")
            if not least <= value <= most:
                raise ValueError(f"{name} must lie in [{least:g}, {most:g}], got {value}")

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(eq=False)
class Request:
    """A prompt and what has been made of it.

    tokens: the generated ones so far, the one that ended it included; text: what they say, up to a stop string, of a
    request that names such; ended: None while it runs, then "length", "stop" or "cancelled"; drafted, accepted: how
    many tokens were drafted for it, and how many of them were the next ones.
    """

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int]
    sample: int = 0
    stop: tuple[str, ...] = ()
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    ended: str | None = None
    drafted: int = 0
    accepted: int = 0
    _stream: TextStream | None = None
    _lookup: PromptLookup | None = None
    _pages: Pages | None = None

    def _take(self, token: int) -> None:
        """The next token, which may end it."""
        assert self._pages is not None
        self._pages.tokens += 1
        self.tokens.append(token)
        if self._stream is not None:
            self.text += self._stream.put(token)
            found = [place for place in map(self.text.find, self.stop) if place >= 0]
            if found:
                self.text, self.ended = self.text[: min(found)], "stop"
        if token in self.stop_tokens:
            self.ended = "stop"
        elif self.ended is None and len(self.tokens) == self.max_new_tokens:
            self.ended = "length"

    @property
    def _sequence(self) -> list[int]:
        return self.prompt + self.tokens

    @property
    def _ahead(self) -> list[int]:
        """The tokens that are run before its first step: all of the prompt but the last."""
        return self.prompt[:-1]


def token_rows(ids: Any) -> list[Any]:
    """Several prompts, or one, as a list of prompts."""
    rows = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    return rows if rows and isinstance(rows[0], (list, tuple, Tensor)) else [rows]


def token_list(ids: Sequence[int] | Tensor, vocabulary: int) -> list[int]:
    """Checked."""
    if isinstance(ids, Tensor) and (ids.dim() != 1 or ids.is_floating_point()):
        raise ValueError(f"ids must be integers of shape (length,), got {ids.dtype} of shape {tuple(ids.shape)}")
    tokens = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if not tokens:
        raise ValueError("ids must hold at least one token")
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise ValueError(f"ids must hold tokens from 0 to {vocabulary - 1}, got {token!r:.100}")
    return tokens
