"""The cache of keys and values: pages of a pool, handed out to sequences and taken back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from pygen.models.decoder import DecoderModel, LayerCache

PAGE = 64  # tokens
Key = tuple[int, tuple[int, ...]]  # the serial number of the page before, and a page's tokens


class OutOfPages(RuntimeError):
    """The pool has no page left."""


class PagePool:
    """Memory for the keys and values of all layers, in pages that sequences with the same beginning share.

    Of several models that run over the same tokens, a page holds all theirs.

    A page that is full is known by what it holds: its tokens, and the page before it. Who comes with the same tokens
    gets it, and it is kept, as long as its memory is not wanted, when nobody holds it any more; of those pages the one
    left longest goes first. Memory that no token has met is asked of the system and not touched.

    Args:
        models: what is cached for; ``layers`` holds the caches of each.
        tokens: that it holds at the least, all sequences together.
        dtype: of what is stored: the model's where left out, or torch.int8, with a scale per token and head.
    """

    def __init__(self, models: Sequence[DecoderModel], tokens: int, dtype: torch.dtype | None = None) -> None:
        self.pages = -(-tokens // PAGE)
        self._data: list[Tensor] = []  # (layers, 2, pages, ...) each
        self.layers = [self._make(model, dtype or model.dtype) for model in models]
        self._empty = list(range(self.pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # full pages that nobody holds
        self._holders = [0] * self.pages
        self._serial = 0  # of the last page that became full
        self._serials = [0] * self.pages  # 0 for pages that are not full
        self._keys: dict[int, Key] = {}
        self._known: dict[Key, int] = {}

    def _make(self, model: DecoderModel, dtype: torch.dtype) -> list[LayerCache]:
        config, device = model.config, model.embedding.device
        shape = (len(model.layers), 2, self.pages, config.kv_heads, PAGE, config.head_dim)
        data = [torch.empty(shape, dtype=dtype, device=device)]
        if dtype == torch.int8:
            data.append(torch.empty(shape[:-1], device=device))
        self._data += data
        return [LayerCache(*(tensor for pair in layer for tensor in pair)) for layer in zip(*data, strict=True)]

    def pages_of(self, model: DecoderModel) -> int:
        """How many a sequence may have."""
        return min(-(-model.config.positions // PAGE), self.pages)

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._empty) + len(self._idle)

    def take(self) -> int:
        if self._empty:
            page = self._empty.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._known[self._keys.pop(page)]
            self._serials[page] = 0
        else:
            raise OutOfPages
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """For one holder more."""
        self._holders[page] += 1

    def own(self, page: int) -> int:
        """A page that holds the same and may be written: itself, or a copy in its place if others hold it too."""
        if self._holders[page] == 1:
            return page
        copy = self.take()
        for data in self._data:
            data[:, :, copy] = data[:, :, page]
        self.release(page)
        return copy

    def release(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page] > 0:
            return
        if page in self._keys:
            self._idle[page] = None
        else:
            self._serials[page] = 0
            self._empty.append(page)

    def know(self, before: int | None, tokens: tuple[int, ...], page: int) -> None:
        """A page is full, behind another one of its sequence."""
        self._serial += 1
        self._serials[page] = self._serial
        key = (0 if before is None else self._serials[before], tokens)
        if key not in self._known:
            self._known[key] = page
            self._keys[page] = key

    def find(self, before: int | None, tokens: tuple[int, ...]) -> int | None:
        """The page that holds these tokens behind another page, for one holder more."""
        page = self._known.get((0 if before is None else self._serials[before], tokens))
        if page is not None:
            self._holders[page] += 1
            self._idle.pop(page, None)
        return page


class Pages:
    """The pages of one sequence, in order, and how many of its tokens are in them."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.list: list[int] = []
        self.tokens = 0

    def find(self, sequence: list[int]) -> None:
        """Begin with the full pages that are known of a sequence."""
        while (end := self.tokens + PAGE) <= len(sequence):
            page = self.pool.find(self.list[-1] if self.list else None, tuple(sequence[self.tokens : end]))
            if page is None:
                return
            self.list.append(page)
            self.tokens = end

    def reserve(self, tokens: int) -> bool:
        """Room for so many tokens, in pages that nobody else holds; whether the list has changed.

        Raises:
            OutOfPages: what was taken is kept.
        """
        changed = len(self.list) * PAGE < tokens
        if self.tokens % PAGE:
            page = self.list[self.tokens // PAGE]
            owned = self.list[self.tokens // PAGE] = self.pool.own(page)
            changed |= owned != page
        while len(self.list) * PAGE < tokens:
            self.list.append(self.pool.take())
        return changed

    def fork(self) -> Pages:
        """Another sequence of the same tokens, in the same pages until one of the two writes."""
        other = Pages(self.pool)
        other.list, other.tokens = self.list[: -(-self.tokens // PAGE)], self.tokens
        for page in other.list:
            self.pool.hold(page)
        return other

    def fill(self, sequence: list[int], tokens: int) -> None:
        """So many tokens are in the pages now; those that are full of a sequence's may be shared."""
        for i in range(self.tokens // PAGE, min(tokens, len(sequence)) // PAGE):
            before = self.list[i - 1] if i > 0 else None
            self.pool.know(before, tuple(sequence[i * PAGE : (i + 1) * PAGE]), self.list[i])
        self.tokens = tokens

    def write(self, row: Tensor) -> None:
        """Into a row of a block table."""
        row[: len(self.list)] = torch.tensor(self.list, dtype=torch.int32)
        row[len(self.list) :] = -1

    def release(self) -> None:
        for page in reversed(self.list):  # the last is the first to go
            self.pool.release(page)
        self.list.clear()
        self.tokens = 0
