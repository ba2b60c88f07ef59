"""pygen.accelerate: the one registry of what pygen puts in the place of other libraries' parts."""

from __future__ import annotations

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Replacement:
    """``owner.name`` is to become ``new``; ``what`` says so in the report."""

    owner: Any
    name: str
    new: Any
    what: str = ""


@dataclass(frozen=True)
class Left:
    """``name`` stays as it is, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Done:
    """What a rule has done besides, which ``undo`` takes back."""

    undo: Callable[[], None]


@dataclass
class Report:
    """What ``accelerate`` replaced in an object, and what it left; ``undo`` puts everything back."""

    replaced: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put back what was replaced, the last first; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        lines = [f"replaced {what}" for what in self.replaced] + [f"left {what}" for what in self.left]
        return "\n".join(lines)


Found = Iterator[Replacement | Left | Done]  # what rules make
Rule = Callable[..., Found]  # of a name and a module, or of the whole object and of options
Approximations = Iterable[str] | Mapping[str, Mapping[str, Any]]  # names, or settings of them by name
TAKEN = "its forward has been replaced already"


def forwards(model: torch.nn.Module, rule_of: Callable[[torch.nn.Module], Rule | None]) -> Found:
    """What rules of a name and a module make of a model's modules, whose forwards are their classes' own."""
    for name, module in model.named_modules():
        rule, forward = rule_of(module), vars(module).get("forward")
        if rule is not None and forward is None:
            yield from rule(name, module)
        elif rule is not None and not is_ours(forward):
            yield Left(name, TAKEN)


def is_ours(forward: Any) -> bool:
    return str(getattr(forward, "func", forward).__module__).startswith("pygen.")


def _schedulers(target: Any) -> Found:
    """The scheduler of a diffusers pipeline, by the drop-in of its name, with its configuration."""
    import pygen.diffusers as ours

    scheduler = getattr(target, "scheduler", None)
    kind = type(scheduler)
    if scheduler is None or kind.__module__.startswith("pygen."):
        return
    new = getattr(ours, kind.__name__, None) if kind.__module__.startswith("diffusers.") else None
    if new is None:
        yield Left("scheduler", f"{kind.__module__}.{kind.__name__} has no drop-in")
    else:
        yield Replacement(target, "scheduler", new.from_config(scheduler.config))


def _models(target: Any, dtype: torch.dtype | None = None, approximations: Approximations = ()) -> Found:
    """The models of a pipeline, or one by itself."""
    from diffusers import DiffusionPipeline, ModelMixin

    from pygen.diffusers.approximations import approximate, settings_of
    from pygen.diffusers.modules import cast, modules

    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    settings = settings_of(approximations)
    pipeline: Any = target
    parts = pipeline.components.values() if isinstance(target, DiffusionPipeline) else [target]
    for part in parts:
        if dtype is not None and isinstance(part, torch.nn.Module):
            yield from cast(part, dtype)
        if isinstance(part, ModelMixin):
            yield from modules(part)
            yield from approximate(part, settings)  # on top of them


def _rules(target: Any) -> Iterator[Rule]:
    """The rules for an object; a library that is not imported cannot have made it."""
    diffusers = sys.modules.get("diffusers")
    if diffusers is not None and isinstance(target, diffusers.DiffusionPipeline):
        yield _schedulers
    if diffusers is not None and isinstance(target, diffusers.DiffusionPipeline | diffusers.ModelMixin):
        yield _models
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is not None and isinstance(target, transformers.PreTrainedModel):
        from pygen.transformers import generation, implementation, modules

        yield generation
        yield implementation
        yield modules


def accelerate(target: Any, **options: Any) -> Report:
    """Put pygen's parts in the place of a pipeline's or a model's, in place.

    Args:
        target: a diffusers pipeline, or one of diffusers' models. The scheduler is replaced by the drop-in of the same
            name and configuration, and still saves as diffusers' own. In models, attention, ResNet blocks, the blocks
            of DiT, PixArt, Stable Diffusion 3 and Flux, GELU, GEGLU, LayerNorm, RMSNorm, convolutions and linear layers
            run by pygen's ops, and by oneDNN on packed weights (which are held a second time, and packed again when
            they have changed); results stay within what rounding makes of them, but for what ``approximations`` names.
            Keys and values of a text are made once for all steps. Training runs too, without packed weights.
            Or a transformers causal language model. Its ``generate`` runs on a ``pygen.Decoder`` of its
            parameters, which are held a second time, packed, and packed again when they have changed; in float32 it
            gives the same greedy tokens, with ``assistant_model`` or ``prompt_lookup_num_tokens`` too. Hooks on its
            modules are not called by it. What it does not do runs as before, with a warning that names it. For who
            calls the model itself or trains it, its attention, norms, gated MLPs and rotary embeddings run by pygen's
            ops, those of other transformers models too.
        options: of a pipeline or its models: ``dtype``, which parameters and buffers become, convolutions'
            channels-last; what they were is held for ``undo``. Of a language model: ``weights`` ("float32", "bfloat16",
            "int8" or "int4"; the parameters' own dtype where left out), ``group`` and ``cache_tokens`` of
            ``pygen.Decoder``.
            And ``approximations`` of diffusers' models, but autoencoders: names, or settings by name, as
            ``{"step_cache": {"interval": 5}}``. With them results are others.

            - "int8": linear layers and convolutions by products of bytes, on a CPU with VNNI or AMX: those of more than
              64 channels in and out, in calls of 64 rows and more (``pygen.models.int8``). It is for float32, and for
              bfloat16 where the CPU has no AMX; where it has, bfloat16 is about as quick.
            - "step_cache": some of what one step of a sampling computed is used again in the next. Of U-Nets the
              features below the finest resolution, made every ``interval`` steps, 3 (DeepCache, Ma et al. 2024). Of
              transformers what the blocks after the first add, while what the first one adds changes by no more than
              ``threshold`` of itself, 0.05 (diffusers' first-block cache). No sampling uses what another one computed.

    Returns:
        What was replaced and what was left; ``.undo()`` takes it back. Accelerating twice replaces nothing more.

    Raises:
        TypeError: for an object that there is no rule for, or an option that its rule does not have.
        ValueError: naming the option.
    """
    rules = list(_rules(target))
    if not rules:
        raise TypeError(
            f"target must be a diffusers pipeline or model, or a transformers model, got {type(target).__name__}"
        )
    known = [inspect.signature(rule).parameters.keys() for rule in rules]
    for name in options:
        if not any(name in names for names in known):
            raise TypeError(f"{name} is not an option of accelerate for {type(target).__name__}")
    report, replaced = Report(), Counter[str]()
    try:
        for rule, names in zip(rules, known, strict=True):
            for found in rule(target, **{name: options[name] for name in options.keys() & names}):
                _apply(found, report, replaced)
    except BaseException:
        report.undo()
        raise
    report.replaced = [what if count == 1 else f"{what} ({count})" for what, count in replaced.items()]
    return report


def _apply(found: Replacement | Left | Done, report: Report, replaced: Counter[str]) -> None:
    if isinstance(found, Left):
        report.left.append(f"{found.name}: {found.reason}")
        return
    if isinstance(found, Done):
        report._undo.append(found.undo)
        return
    old = getattr(found.owner, found.name)
    of_type = getattr(type(found.owner), found.name, None)
    # What only the class has is uncovered again; but a property's value is the owner's.
    covers = of_type is not None and found.name not in vars(found.owner) and not inspect.isdatadescriptor(of_type)
    setattr(found.owner, found.name, found.new)
    at = (found.owner, found.name)
    report._undo.append(functools.partial(delattr, *at) if covers else functools.partial(setattr, *at, old))
    replaced[found.what or f"{found.name}: {type(old).__name__}"] += 1
