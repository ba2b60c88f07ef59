"""A cache for transformers' models whose steps write the new keys and values only, where transformers' own copies all
that there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

LEAST = 256  # tokens that there is room for


@dataclass
class _Room:
    """Memory of keys and of values, of which so many tokens have been written."""

    parts: list[Tensor]
    written: int


class GrowingLayer(DynamicLayer):
    """A layer's keys and values, (batch, heads, length, head_dim), at the beginning of memory that holds twice as many.

    What has been given is never written again: an update behind fewer tokens than were written (of a cropped cache, of
    a copy) begins with memory of its own, as do those that record gradients or follow what put other tensors in the
    place of ``keys`` and ``values``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._room = _Room([], 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, and give all there are: views of the memory."""
        given = [key_states, value_states]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
            both: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return both
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        present = self.get_seq_length()
        held: list[Any] = [self.keys, self.values]
        length = present + key_states.shape[2]
        room = self._room
        if room.written != present or not room.parts or not all(map(_begins, held, room.parts, (length, length))):
            room = self._room = _Room([_larger(new, max(LEAST, 2 * length)) for new in given], present)
            for part, old in zip(room.parts, held, strict=True):
                if present:
                    part[:, :, :present] = old
        for part, new in zip(room.parts, given, strict=True):
            part[:, :, present:length] = new
        room.written = length
        self.keys, self.values = (part[:, :, :length] for part in room.parts)
        return self.keys, self.values


def _larger(states: Tensor, length: int) -> Tensor:
    return states.new_empty(*states.shape[:2], length, states.shape[3])


def _begins(held: Tensor, room: Tensor, length: int) -> bool:
    """Whether what is held lies at the beginning of a room for so many."""
    return (
        held.dim() == 4
        and held.data_ptr() == room.data_ptr()
        and held.stride() == room.stride()
        and held.shape[:2] == room.shape[:2]
        and length <= room.shape[2]
    )


class GrowingCache(DynamicCache):
    """``DynamicCache``, called as that is, whose full-attention layers are ``GrowingLayer``s; other layers stay.

    For ``model(ids, past_key_values=GrowingCache(config=model.config))`` and for transformers' own ``generate``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[i] = GrowingLayer()
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = GrowingLayer
