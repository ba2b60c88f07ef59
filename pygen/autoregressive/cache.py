"""The cache of keys and values: pages of a pool, handed out to sequences and taken back."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from pygen.models.decoder import DecoderModel, LayerCache

PAGE = 64  # tokens
Key = tuple[int, tuple[int, ...]]  # the serial number of the page before, and a page's tokens


class OutOfPages(RuntimeError):
    """The pool has no page left."""


class PagePool:
    """Memory for the keys and values of all layers, in pages that sequences with the same beginning share.

    A page that is full is known by what it holds: its tokens, and the page before it. Who comes with the same tokens
    gets it, and it is kept, as long as its memory is not wanted, when nobody holds it any more; of those pages the one
    left longest goes first. Memory that no token has met is asked of the system and not touched.

    Args:
        model: what is cached for.
        tokens: that it holds at the least, all sequences together.
        dtype: of what is stored: the model's where left out, or torch.int8, with a scale per token and head.
    """

    def __init__(self, model: DecoderModel, tokens: int, dtype: torch.dtype | None = None) -> None:
        config, device = model.config, model.embedding.device
        self.pages = -(-tokens // PAGE)
        shape = (len(model.layers), 2, self.pages, config.kv_heads, PAGE, config.head_dim)
        dtype = dtype or model.dtype
        data = torch.empty(shape, dtype=dtype, device=device)
        scales = torch.empty(shape[:-1], device=device) if dtype == torch.int8 else None
        self.layers = [
            LayerCache(*data[i], *(scales[i] if scales is not None else (None, None))) for i in range(len(model.layers))
        ]
        self._empty = list(range(self.pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # full pages that nobody holds
        self._holders = [0] * self.pages
        self._serial = 0  # of the last page that became full
        self._serials = [0] * self.pages  # 0 for pages that are not full
        self._keys: dict[int, Key] = {}
        self._known: dict[Key, int] = {}

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
        """Begin with the full pages that are known of a sequence, but for its last token."""
        while (end := self.tokens + PAGE) < len(sequence):
            page = self.pool.find(self.list[-1] if self.list else None, tuple(sequence[self.tokens : end]))
            if page is None:
                return
            self.list.append(page)
            self.tokens = end

    def reserve(self, tokens: int) -> bool:
        """Room for so many tokens; whether the list has grown.

        Raises:
            OutOfPages: what was taken is kept.
        """
        before = len(self.list)
        while len(self.list) * PAGE < tokens:
            self.list.append(self.pool.take())
        return len(self.list) > before

    def fill(self, sequence: list[int], tokens: int) -> None:
        """So many tokens of a sequence are in the pages now: those that are full may be shared."""
        for i in range(self.tokens // PAGE, tokens // PAGE):
            before = self.list[i - 1] if i > 0 else None
            self.pool.know(before, tuple(sequence[i * PAGE : (i + 1) * PAGE]), self.list[i])
        self.tokens = tokens

    def write(self, row: Tensor) -> None:
        """Into a row of a block table."""
        row[: len(self.list)] = torch.tensor(self.list, dtype=torch.int32)

    def release(self) -> None:
        for page in reversed(self.list):  # the last is the first to go
            self.pool.release(page)
        self.list.clear()
        self.tokens = 0
