"""The cache of keys and values: pages of a pool, handed out to sequences and taken back."""

from __future__ import annotations

import torch
from torch import Tensor

from pygen.models.decoder import DecoderModel, LayerCache

PAGE = 64  # tokens


class OutOfPages(RuntimeError):
    """The pool has no page left."""


class PagePool:
    """Memory for the keys and values of all layers, in pages that several sequences may share.

    A page that more than one sequence holds is never written: see ``Pages.reserve``. Memory that no token has met is
    asked of the system and not touched.

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
        self._free = list(range(self.pages - 1, -1, -1))
        self._holders = [0] * self.pages

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def take(self) -> int:
        if not self._free:
            raise OutOfPages
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, page: int) -> int:
        self._holders[page] += 1
        return page

    def release(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free.append(page)

    def shared(self, page: int) -> bool:
        return self._holders[page] > 1

    def copy(self, page: int) -> int:
        """A page of one's own with what a shared one holds."""
        own = self.take()
        for layer in self.layers:
            for tensor in layer:
                if tensor is not None:
                    tensor[own].copy_(tensor[page])
        self.release(page)
        return own


class Pages:
    """The pages of one sequence, in order."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.list: list[int] = []

    def reserve(self, begin: int, end: int) -> bool:
        """Make positions [begin, end) writable: new pages, and own copies of shared ones. Whether the list changed.

        Raises:
            OutOfPages: nothing was taken that is not kept.
        """
        before = list(self.list)
        for index in range(begin // PAGE, min(-(-end // PAGE), len(self.list))):
            if self.pool.shared(self.list[index]):
                self.list[index] = self.pool.copy(self.list[index])
        while len(self.list) * PAGE < end:
            self.list.append(self.pool.take())
        return self.list != before

    def fork(self) -> Pages:
        """A second sequence that begins as this one, and shares its pages until one of them writes."""
        other = Pages(self.pool)
        other.list = [self.pool.share(page) for page in self.list]
        return other

    def write(self, row: Tensor) -> None:
        """Into a row of a block table."""
        row[: len(self.list)] = torch.tensor(self.list, dtype=torch.int32)

    def release(self) -> None:
        for page in self.list:
            self.pool.release(page)
        self.list.clear()
