"""The text model that ships with pygen, and how well a model predicts a text."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pygen.ops.packed_linear import pack_linear

Model = TypeVar("Model", bound=nn.Module)
TEXT_MODEL = Path(__file__).parent / "text"  # made by examples/train_text.py; transformers loads it too


def bits_per_token(logits_of: Callable[[Tensor], Tensor], tokens: Tensor, context: int) -> float:
    """The mean of -log2 p(token | those before it), over all tokens but the first. 2 to its power is the perplexity.

    Read in windows of ``context`` tokens that overlap by half, so that all but the first of them are predicted from
    at least half as many. Of a byte-level model this is the bits per byte.

    Args:
        logits_of: (1, length) int64 -> (1, length, vocabulary), with length <= context.
        tokens: (count,) int64.
    """
    bits, scored = 0.0, 1
    for start in range(0, max(len(tokens) - 1 - context // 2, 1), context // 2):
        window = tokens[start : start + context + 1]
        new = start + len(window) - scored  # what no window before this one predicted
        logits = logits_of(window[None, :-1])[0, -new:]
        bits += nn.functional.cross_entropy(logits.double(), window[-new:], reduction="sum").item() / math.log(2)
        scored += new
    return bits / (len(tokens) - 1)


@torch.no_grad()
def with_packed_weights(model: Model, **packing: Any) -> Model:
    """A float32 copy whose linear layers have the values that ``pack_linear(weight, **packing)`` stores.

    A head that shares its weight with the embedding no longer does.
    """
    model = copy.deepcopy(model).float()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(pack_linear(layer.weight, **packing).unpack())
    return model
