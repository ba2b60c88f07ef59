"""What is made of tensors once and held: a weight in a library's own order, or a text's keys and values."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Held(Generic[T]):
    """A value made of tensors, made again when one of them is another or has changed.

    Whoever writes to a parameter's ``data`` hides it from autograd, and so from this; ``load_state_dict``, optimisers
    and whatever else works under ``no_grad`` do not. Tensors of inference mode do not tell either. Copies and pickles
    hold nothing yet.
    """

    def __init__(self) -> None:
        self._of: list[weakref.ref[Tensor]] = []
        self._state: list[tuple[Any, ...]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def get(self, tensors: tuple[Tensor, ...], make: Callable[[], T]) -> T:
        state = [_state(tensor) for tensor in tensors]
        if state != self._state or any(of() is not tensor for of, tensor in zip(self._of, tensors, strict=True)):
            self._value = make()
            self._of, self._state = [weakref.ref(tensor) for tensor in tensors], state
        return self._value


def _state(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version, tensor.dtype
