"""What ``pygen.accelerate`` does to diffusers' models where it is asked for by name, since results are others then."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diffusers import ModelMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import AutoencoderMixin
from torch import nn

from pygen.diffusers.step_cache import step_cache
from pygen.held import Held
from pygen.models.int8 import bytes_are_exact, convolve_int8, project_int8
from pygen.models.layers import convolve, project
from pygen.patch import Approximations, Found, Left, Replacement


def approximate(model: ModelMixin, settings: Mapping[str, Mapping[str, Any]]) -> Found:
    """Of a model, by settings as ``settings_of`` gives them."""
    if settings and isinstance(model, AutoencoderMixin):
        yield Left(type(model).__name__, "stays exact: it runs once an image, and its errors are the image's")
        return
    for name, setting in settings.items():
        yield from _KNOWN[name](model, **setting)


def settings_of(approximations: Approximations) -> Mapping[str, Mapping[str, Any]]:
    """Names, or settings by name, as settings by name, each of which there is."""
    if isinstance(approximations, str):
        approximations = (approximations,)
    settings = approximations if isinstance(approximations, Mapping) else {name: {} for name in approximations}
    for name, setting in settings.items():
        if name not in _KNOWN:
            raise ValueError(f"approximations must be among {', '.join(_KNOWN)}, got {name!r}")
        has = list(inspect.signature(_KNOWN[name]).parameters)[1:]
        for unknown in setting.keys() - has:
            raise ValueError(f"approximations: {name} has no {unknown!r}, its settings are: {', '.join(has) or 'none'}")
    return settings


def _int8(model: Any) -> Found:
    """``Linear`` and ``Conv2d`` of more than 64 channels in and out (so not what reads or writes latents), convolutions
    of one group that pad with zeros, in calls of 64 rows and more (so not what embeds times). But keys and values of a
    text, which are made once for all steps, stay exact."""
    if model.device.type != "cpu":
        yield Left(f"int8 in {type(model).__name__}", "it is for CPUs")
        return
    if not bytes_are_exact():
        yield Left(f"int8 in {type(model).__name__}", "products of bytes saturate on this CPU, which lacks VNNI")
        return
    attentions = [module for module in model.modules() if isinstance(module, Attention) and module.is_cross_attention]
    of_text = {projection for attention in attentions for projection in (attention.to_k, attention.to_v)}
    for module in model.modules():
        exact, in_int8 = _IN_INT8.get(type(module), (None, None))
        forward = vars(module).get("forward")
        if in_int8 is None or module in of_text or not _suits(module):
            continue
        if forward is not None and getattr(forward, "func", None) is not exact:
            continue
        what = f"{type(module).__name__} of 64 rows and more in int8, an approximation"
        yield Replacement(module, "forward", partial(in_int8, module, Held(), Held()), what)


_IN_INT8: dict[type, tuple[Callable[..., Any], Callable[..., Any]]] = {
    nn.Linear: (project, project_int8),
    nn.Conv2d: (convolve, convolve_int8),
}


def _suits(module: Any) -> bool:
    if isinstance(module, nn.Linear):
        return min(module.in_features, module.out_features) > 64
    plain = module.padding_mode == "zeros" and not isinstance(module.padding, str) and module.groups == 1
    return plain and min(module.in_channels, module.out_channels) > 64


_KNOWN: dict[str, Callable[..., Found]] = {"int8": _int8, "step_cache": step_cache}
