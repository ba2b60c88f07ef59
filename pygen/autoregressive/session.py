"""A session: sequences that the caller drives, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pygen.autoregressive.cache import PAGE, OutOfPages, PagePool, Pages
from pygen.autoregressive.request import token_list, token_rows
from pygen.models.decoder import DecoderModel
from pygen.ops.record import Program, record

CHUNK = 256  # tokens of a prompt that are run at once


class Session:
    """Sequences whose every token the caller chooses. ``logits``: (batch, vocabulary), of the next one.

    Args:
        model: that runs over them.
        pool: of its keys and values.
        prompts: of one length.
    """

    def __init__(self, model: DecoderModel, pool: PagePool, prompts: list[list[int]]) -> None:
        self._model, self._pool = model, pool
        self._device = model.embedding.device
        self._pages = [Pages(pool) for _ in prompts]
        self._length = 0
        self._prepare()
        tokens = torch.tensor(prompts, device=self._device)
        ahead = tokens.shape[1] - 1  # the last token is the first step's
        try:
            for begin in range(0, ahead, CHUNK):
                self._run_ahead(tokens[:, begin : min(begin + CHUNK, ahead)])
            self.logits = self._run(tokens[:, ahead:], recorded=False)  # of which there may be no second
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        """What the step of so many sequences reads, and is recorded with when it is first wanted."""
        rows = len(self._pages)
        with self._device:
            self._tokens = torch.zeros(rows, 1, dtype=torch.int64)
            self._first = torch.zeros(rows, 1, dtype=torch.int64)
            self._lengths = torch.zeros(rows, dtype=torch.int64)
            self._table = torch.full((rows, self._pool.pages_of(self._model)), -1, dtype=torch.int32)
        self._program: Program[Tensor] | None = None

    def _hidden(self, tokens: Tensor, prompt: bool) -> Tensor:
        layers = self._pool.layers[0]
        return self._model.hidden(tokens, self._first, self._lengths, self._table, layers, prompt=prompt)

    @torch.inference_mode()
    def _run_ahead(self, tokens: Tensor) -> None:
        self._extend(tokens.shape[1])
        self._hidden(tokens, prompt=True)

    @torch.inference_mode()
    def _run(self, tokens: Tensor, recorded: bool = True) -> Tensor:
        """Logits behind one token of each."""
        self._extend(1)
        self._tokens.copy_(tokens)
        if not recorded:
            return self._logits()
        if self._program is None:
            self._program = record(self._logits, self._device)
        return self._program().clone()

    def _logits(self) -> Tensor:
        return self._model.project(self._hidden(self._tokens, prompt=False))

    def _extend(self, count: int) -> None:
        """Room for so many tokens of each, which are run next."""
        length = self._length + count
        if length > self._model.config.positions:
            raise ValueError(f"tokens: the model has {self._model.config.positions} positions, and they are full")
        for pages, row in zip(self._pages, self._table, strict=True):
            try:
                if pages.reserve(length):
                    pages.write(row)
            except OutOfPages:
                size = self._pool.pages * PAGE
                raise RuntimeError(f"the cache of {size} tokens is full: give cache_tokens") from None
        self._first.fill_(self._length)
        self._lengths.fill_(length)
        self._length = length
        for pages in self._pages:
            pages.tokens = length

    def step(self, tokens: Tensor | Sequence[int]) -> Tensor:
        """Append a token to each sequence, (batch,); the logits of what may follow, which are the caller's to keep."""
        rows = token_rows(tokens)[0]
        if len(rows) != len(self._pages):
            raise ValueError(f"tokens must be one for each of {len(self._pages)} sequences, got {len(rows)}")
        self.logits = self._run(torch.tensor(token_list(rows, self._model.config.vocabulary))[:, None])
        return self.logits

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these of the sequences, in this order.

        One that is named several times goes on as several, which share memory until they differ; one that is not named
        is over.
        """
        if not rows or not all(type(row) is int and 0 <= row < len(self._pages) for row in rows):
            raise ValueError(f"rows must name some of {len(self._pages)} sequences, got {rows!r:.100}")
        before, self._pages = self._pages, [self._pages[row].fork() for row in rows]
        for pages in before:
            pages.release()
        self.logits = self.logits[list(rows)]
        if len(rows) != len(before):
            self._prepare()
        for pages, row in zip(self._pages, self._table, strict=True):
            pages.write(row)

    def close(self) -> None:
        """Give the pages back; the session is over."""
        for pages in self._pages:
            pages.release()
        self._length = self._model.config.positions

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *about: object) -> None:
        self.close()
