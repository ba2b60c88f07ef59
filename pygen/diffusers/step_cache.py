"""What a model computed in one step of a sampling, used again in the next: an approximation.

Of U-Nets the deep features, for which there is nothing that fits in diffusers (Ma, Fang and Wang 2024, DeepCache:
Accelerating Diffusion Models for Free). Of transformers what all blocks after the first add, by diffusers' own
first-block cache, while what the first block adds stays nearly the same.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, apply_first_block_cache
from diffusers.hooks.first_block_cache import _FBC_BLOCK_HOOK, _FBC_LEADER_BLOCK_HOOK
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownBlock2D,
    AttnUpBlock2D,
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UpBlock2D,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from pygen.models.layers import learning
from pygen.patch import TAKEN, Done, Found, Left, Replacement


def step_cache(model: Any, interval: int = 3, threshold: float = 0.05) -> Found:
    """
    Args:
        interval: of U-Nets: all of it runs every so many steps, and the finest resolution alone between them.
        threshold: of transformers: how much what the first block adds may change, in the mean and relative to itself,
            for what the others add to be used again; ``diffusers.FirstBlockCacheConfig``'s.
    """
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(f"approximations: step_cache's interval must be a positive integer, got {interval!r}")
    if not isinstance(threshold, int | float) or not 0 <= threshold < float("inf"):
        raise ValueError(f"approximations: step_cache's threshold must be finite and not negative, got {threshold!r}")
    name = f"step_cache of {type(model).__name__}"
    forward = vars(model).get("forward")
    run = next((given for given in getattr(forward, "args", ()) if isinstance(given, Run)), None)
    if run is not None:
        if run.settings != (interval, threshold):
            yield Left(name, "it is there with other settings: undo it first")
    elif forward is not None:
        yield Left(name, TAKEN)
    elif isinstance(model, UNet2DConditionModel | UNet2DModel):
        yield from _deep_cache(name, model, Run((interval, threshold)))
    else:
        yield from _first_block_cache(name, model, Run((interval, threshold)))


@dataclass
class Sequence:
    """Calls under the same conditions at falling times, and what is kept from one to the next."""

    conditions: list[Any]
    times: list[float]
    kept: Any = None


@dataclass
class Run:
    """The sequences of one sampling: one, or one of each text where texts have calls of their own.

    A call at no lower time than the last under its conditions begins another run, as does one under other conditions
    at another time: nothing is kept from one run to the next. Copies and pickles hold none.
    """

    settings: tuple[int, float]
    sequences: list[Sequence] = field(default_factory=list)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.settings,)

    def sequence(self, sample: Tensor, timestep: Any, conditions: Any) -> Sequence:
        """That of a call; new, if it goes on with none."""
        times = torch.as_tensor(timestep).flatten().tolist()
        leaves, structure = tree_flatten(conditions)
        now = [sample.shape, sample.dtype, sample.device, len(times), structure, *leaves]
        for found in self.sequences:
            if _same(found.conditions, now):
                if all(time < last for time, last in zip(times, found.times, strict=True)):
                    found.times = times
                    return found
                self.sequences.clear()
        if any(other.times != times for other in self.sequences):
            self.sequences.clear()
        held = [given.detach().clone() if isinstance(given, Tensor) else given for given in now]
        self.sequences.append(Sequence(held, times))
        return self.sequences[-1]


def _same(these: list[Any], those: list[Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)
        return type(a) is type(b) and bool(a == b)

    return len(these) == len(those) and all(map(same, these, those))


def _learns(model: nn.Module, sample: Tensor) -> bool:
    return torch.is_grad_enabled() and learning(sample, *model.parameters())


def _arguments(model: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    given = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
    del given["self"]
    return given


# U-Nets


def _deep_cache(name: str, model: Any, run: Run) -> Found:
    first, last = model.down_blocks[0], model.up_blocks[-1]
    simple = type(first) in _FIRST and type(last) in _LAST and len(last.resnets) == len(first.resnets) + 1
    if not simple or len(model.down_blocks) < 2 or "forward" in vars(first):
        yield Left(name, f"no rule for a U-Net from {type(first).__name__} to {type(last).__name__}")
        return
    what = f"{type(model).__name__} with deep features of earlier steps, an approximation"
    yield Replacement(model, "forward", partial(_by_deep_features, model, run), what)


_FIRST = (DownBlock2D, CrossAttnDownBlock2D, AttnDownBlock2D)
_LAST = (UpBlock2D, CrossAttnUpBlock2D, AttnUpBlock2D)


@dataclass
class Deep:
    """What enters the last block, the sample that it is of, and how many steps have used it."""

    features: Tensor
    sample: Tensor
    steps: int = 1

    def is_of(self, sample: Tensor) -> bool:
        """Whether each sample is nearer to that one than 0 is; unrelated ones are farther by a factor of sqrt(2)."""
        off = (sample - self.sample).flatten(1).norm(dim=1)
        return bool((off < self.sample.flatten(1).norm(dim=1)).all())


def _by_deep_features(model: Any, run: Run, *args: Any, **kwargs: Any) -> Any:
    whole: Callable[..., Any] = type(model).forward
    given = _arguments(model, args, kwargs)
    sample, timestep = given.pop("sample"), given.pop("timestep")
    added = any(value is not None for name, value in given.items() if "additional_residual" in name)  # to deep features
    if added or torch.compiler.is_compiling() or _learns(model, sample):
        run.sequences.clear()
        return whole(model, *args, **kwargs)
    sequence = run.sequence(sample, timestep, given)
    deep: Deep | None = sequence.kept
    if deep is not None and deep.steps < run.settings[0] and deep.is_of(sample):
        deep.steps += 1
        return whole(_shallow(model, deep.features), *args, **kwargs)
    with _entering(model.up_blocks[-1]) as entered:
        y = whole(model, *args, **kwargs)
    sequence.kept = Deep(entered[0], sample.clone())
    return y


def _shallow(model: Any, features: Tensor) -> Any:
    """The model's first and last block, with features between them; they are cloned because FreeU writes to them."""
    first = _with(model.down_blocks[0], downsamplers=None)
    last = model.up_blocks[-1]
    return _with(model, down_blocks=[first], mid_block=lambda *_: features.clone(), up_blocks=[last])


Module = TypeVar("Module", bound=nn.Module)


def _with(module: Module, **parts: Any) -> Module:
    """The same module, on the same parameters, but for some parts."""
    other = copy.copy(module)
    vars(other).update(parts)
    return other


@contextmanager
def _entering(block: nn.Module) -> Iterator[list[Tensor]]:
    entered: list[Tensor] = []

    def keep(block: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).clone())

    hook = block.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield entered
    finally:
        hook.remove()


# Transformers


def _first_block_cache(name: str, model: Any, run: Run) -> Found:
    """By diffusers' hooks, in models that it knows them to work in, and in those made of its basic block."""
    basic = {type(block) for block in getattr(model, "transformer_blocks", ())} == {BasicTransformerBlock}
    known = inspect.signature(type(model).forward).parameters.keys() >= {"hidden_states", "timestep"}
    if not known or not (isinstance(model, CacheMixin) or basic):
        yield Left(name, "diffusers has no cache for it")
        return
    if getattr(model, "_cache_config", None) is not None:
        yield Left(name, "diffusers' own cache is enabled")
        return
    try:
        apply_first_block_cache(model, FirstBlockCacheConfig(threshold=run.settings[1]))
    except (IndexError, ValueError) as error:  # of one block; of blocks that diffusers does not know
        _without_first_block_cache(model)
        yield Left(name, f"diffusers' first-block cache refuses it: {error}")
        return
    HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()
    what = f"{type(model).__name__} with diffusers' first-block cache, an approximation"
    yield Done(partial(_without_first_block_cache, model))
    yield Replacement(model, "forward", partial(_by_first_block, model, run), what)


def _without_first_block_cache(model: nn.Module) -> None:
    registry = HookRegistry.check_if_exists_or_initialize(model)
    for hook in (_FBC_LEADER_BLOCK_HOOK, _FBC_BLOCK_HOOK):
        registry.remove_hook(hook, recurse=True)
    registry.invalidate_child_registries_cache()
    for module in model.modules():  # of which diffusers leaves empty registries, and forwards that are the class's own
        if not getattr(vars(module).get("_diffusers_hook"), "hooks", True):
            del module._diffusers_hook
        if vars(module).get("forward") == MethodType(type(module).forward, module):
            del module.forward


def _by_first_block(model: Any, run: Run, *args: Any, **kwargs: Any) -> Any:
    """Each sequence in a context of its own, in the place of the one that some pipelines name, and others do not."""
    given = _arguments(model, args, kwargs)
    sample, timestep = given.pop("hidden_states"), given.pop("timestep", None)
    if timestep is None or _learns(model, sample):
        run.sequences.clear()
    sequence = run.sequence(sample, 0.0 if timestep is None else timestep, given)
    if len(run.sequences) == 1 and sequence.kept is None:
        HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks(recurse=True)
    sequence.kept = sequence.kept or f"sequence {len(run.sequences)}"
    with CacheMixin.cache_context(model, sequence.kept):
        return type(model).forward(model, *args, **kwargs)
