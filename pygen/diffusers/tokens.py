"""Schedulers of tokens: masked and discrete diffusion, on token_confidence, unmask_step, posterior_token, route_token.

With a ``torch.Generator`` the tokens are diffusers': the noise is drawn by the same calls in the same order, and
``torch.multinomial(p, 1)`` is argmax p / E with exponentials E that it draws. Decisions nearer than float32's rounding
may differ, as they do between any two devices. Rows without a distribution (NaN, all -inf) yield token 0 with
probability 0, where diffusers raises after waiting for the device. With a ``PhiloxGenerator`` tokens are drawn from a
number per position, and noise over the vocabulary is neither made nor read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_amused import AmusedSchedulerOutput
from diffusers.schedulers.scheduling_block_refinement import BlockRefinementSchedulerOutput
from diffusers.schedulers.scheduling_discrete_ddim import DiscreteDDIMSchedulerOutput
from diffusers.schedulers.scheduling_entropy_bound import EntropyBoundSchedulerOutput
from diffusers.schedulers.scheduling_vq_diffusion import VQDiffusionSchedulerOutput
from torch import Tensor

from pygen.diffusers.base import FusedScheduler, HostTensor, upload
from pygen.diffusers.noise import PhiloxGenerator
from pygen.ops.posterior_token import COLUMNS, posterior_confidence, posterior_token
from pygen.ops.route_token import route_token
from pygen.ops.token_confidence import token_confidence
from pygen.ops.unmask_step import unmask_step

Generator = torch.Generator | None
Draw = dict[str, Any]


def _exponentials(
    size: Sequence[int], generator: Generator, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What ``torch.multinomial`` draws for probabilities of this size."""
    return torch.empty(tuple(size), dtype=dtype, device=device).exponential_(1, generator=generator)


def _token_draw(logits: Tensor, step: int, generator: Generator) -> Draw:
    """How token_confidence draws a token from every row."""
    if isinstance(generator, PhiloxGenerator):
        return _by_philox(generator, step, logits.device)
    rows = math.prod(logits.shape[:-1])
    return {"noise": _exponentials((rows, logits.shape[-1]), generator, logits.device).view(logits.shape)}


def _by_philox(generator: Any, step: int, device: torch.device) -> Draw:
    return {"seed": generator.key(device), "step": torch.full((1,), step, dtype=torch.int64, device=device)}


def _random_tokens(logits: Tensor, sample: Tensor, generator: Generator) -> Tensor:
    return torch.randint(low=0, high=logits.shape[-1], size=sample.shape, device=sample.device, generator=generator)


def _flags(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=torch.bool, device=like.device)


def _floats(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float32, device=like.device)


class _TokenScheduler(FusedScheduler):
    num_inference_steps: Any

    def _coefficients(self, key: Any, make: Any, device: torch.device) -> Tensor:
        """A float32 table of coefficients on a device, made once per schedule."""
        tables: dict[Any, Any] = self._tables
        if (key, device) not in tables:
            tables[key, device] = upload(torch.tensor(make(), dtype=torch.float64).to(torch.float32), device)
        return tables[key, device]


class AmusedScheduler(_TokenScheduler, diffusers.AmusedScheduler):
    """MaskGIT's step (Chang et al. 2022), as in aMUSEd. A sample in which nothing is masked stays as it is, where
    diffusers masks one of its tokens before the last step.
    """

    def set_timesteps(
        self,
        num_inference_steps: int,
        temperature: int | tuple[int, int] | list[int] = (2, 0),
        device: str | torch.device | None = None,
    ) -> None:
        super().set_timesteps(num_inference_steps, temperature, device)
        # The share that stays masked after each step, in float32 and on the device that diffusers would ask.
        ratios = ((torch.arange(num_inference_steps, device=device) + 1) / num_inference_steps).split(1)
        cosine = self.config.masking_schedule == "cosine"
        self._mask_ratios = [float(torch.cos(r * math.pi / 2) if cosine else 1 - r) for r in ratios]

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        starting_mask_ratio: float = 1.0,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> Any:
        if self.config.masking_schedule not in ("cosine", "linear"):
            raise ValueError(f"unknown masking schedule {self.config.masking_schedule}")
        time, shape = int(self._time(timestep)), sample.shape
        if sample.ndim == 3 and model_output.ndim == 4:
            sample, model_output = sample.flatten(1), model_output.flatten(2).transpose(1, 2)
        device = model_output.device
        drawn_on = device if generator is None else generator.device
        philox = isinstance(generator, PhiloxGenerator)
        if philox:
            draw = _by_philox(generator, time, device)
        else:
            dtype = torch.float32 if drawn_on.type == "cpu" else model_output.dtype
            rows = (math.prod(sample.shape), model_output.shape[-1])
            draw = {"noise": _exponentials(rows, generator, drawn_on, dtype).to(device).view(model_output.shape)}
        log_prob = _floats(sample)
        token = token_confidence(model_output, log_prob=log_prob, **draw)
        masks: Draw = {"mask_token": self.config.mask_token_id}
        original = unmask_step(sample, token, log_prob, **masks, count=sample.shape[1])
        previous = original
        if time != 0:
            index = self._host("timesteps").index(time)
            ratio = np.float32(starting_mask_ratio) * np.float32(self._mask_ratios[index])
            remain = max(1, math.floor(np.float32(sample.shape[1]) * ratio))
            if not philox:
                uniform = torch.empty(sample.shape, dtype=model_output.dtype, device=drawn_on)
                draw = {"noise": uniform.uniform_(0, 1, generator=generator).to(device)}
            temperature = self.temperatures[index : index + 1]
            masks |= {"count": 1, "remain": remain, "ties": True, "temperature": temperature}
            previous = unmask_step(sample, token, log_prob, **masks, **draw)
        values: Any = (previous.view(shape), original.view(shape))
        return AmusedSchedulerOutput(*values) if return_dict else values


class VQDiffusionScheduler(_TokenScheduler, diffusers.VQDiffusionScheduler):
    """VQ-Diffusion's posterior (Gu et al. 2022), by Gumbel noise over all classes or by Philox."""

    log_at, log_bt, log_ct = HostTensor(), HostTensor(), HostTensor()
    log_cumprod_at, log_cumprod_bt, log_cumprod_ct = HostTensor(), HostTensor(), HostTensor()

    def _table(self) -> list[list[float]]:
        """COLUMNS of every timestep; at 0 the model's own probabilities."""
        at, bt, ct, cum_at, cum_bt, cum_ct = (
            np.array(self._host(name))
            for name in ("log_at", "log_bt", "log_ct", "log_cumprod_at", "log_cumprod_bt", "log_cumprod_ct")
        )
        zero = float(np.log(np.float32(1e-30)))  # diffusers' logarithm of 0
        rows = [[1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]]
        for t in range(1, len(at)):
            # From x_0 to x_t, and from x_{t-1} to x_t: to the same class and to another.
            reached_same, reached_other = np.logaddexp(cum_at[t], cum_bt[t]), np.logaddexp(zero + cum_at[t], cum_bt[t])
            same, other = np.logaddexp(at[t], bt[t]), np.logaddexp(zero + at[t], bt[t])
            mask = cum_ct[t - 1] + zero
            largest = max(same, other, mask)
            logs = {"alpha": cum_at[t - 1], "beta": cum_bt[t - 1], "other": other - largest, "same": same - largest}
            logs |= {"mask": mask - largest, "masked_other": ct[t], "masked_mask": cum_ct[t - 1]}
            row = {name: math.exp(value) for name, value in logs.items()} | {"shift": reached_other - reached_same}
            rows.append([row[name] for name in COLUMNS])
        return rows

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> Any:
        time, device = int(self._time(timestep)), model_output.device
        batch, classes, positions = model_output.shape
        if isinstance(generator, PhiloxGenerator):
            draw = _by_philox(generator, time, device)
        else:
            size = (batch, classes + (time > 0), positions)
            draw = {"noise": torch.rand(size, device=device, generator=generator).transpose(1, 2), "uniform": True}
        table = self._coefficients("posterior", self._table, device)
        logits = model_output.transpose(1, 2)
        previous: Any = posterior_token(logits, sample, table[time], has_mask=time > 0, **draw)
        return VQDiffusionSchedulerOutput(prev_sample=previous) if return_dict else (previous,)


class BlockRefinementScheduler(_TokenScheduler, diffusers.BlockRefinementScheduler):
    """Block-wise refinement by confidence, with a mask token (LLaDA2) or by uniform corruption (DiffusionGemma)."""

    _transfer_schedule = HostTensor()
    _committed: Any

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        mask_token_id: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        minimal_topk: int | None = None,
        prompt_mask: Tensor | None = None,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> Any:
        threshold = float(self.config.threshold if threshold is None else threshold)
        edits = self.config.editing_threshold if editing_threshold is None else editing_threshold
        if temperature < 0:
            raise ValueError(f"`temperature` must be >= 0, got {temperature}.")
        index = int(self._time(timestep))
        how: Draw = {}
        if temperature != 0.0 and sampling_method in ("multinomial", "auto"):
            if top_p is not None and top_p < 1.0:
                if top_p <= 0.0:
                    raise ValueError(f"`top_p` must be in (0, 1], got {top_p}.")
                how["top_p"] = top_p
            if top_k is not None and 0 < top_k < model_output.shape[-1]:
                how["top_k"] = top_k
            how |= _token_draw(model_output, index, generator) | {"temperature": temperature}
        probs, transferred, edited = _floats(sample), _flags(sample), _flags(sample)
        tokens = token_confidence(model_output, prob=probs, **how)

        results: Draw = {"accepted": transferred, "edited": edited}
        rule: Draw = {"threshold": threshold}
        if mask_token_id is None:
            if index == 0 or self._committed is None or self._committed.shape != sample.shape:
                self._committed = torch.zeros(sample.shape, dtype=torch.bool, device=sample.device)
            length, steps = sample.shape[1], self.num_inference_steps
            target = ((index + 1) * length + steps - 1) // steps
            rule |= {"fixed": self._committed, "remain": max(0, length - target), "edit_threshold": edits}
            rule["fill"] = _random_tokens(model_output, sample, generator)
            results["settled"] = self._committed = _flags(sample)
        else:
            rule["mask_token"] = mask_token_id
            if self._transfer_schedule is None:
                del rule["threshold"]
            else:
                schedule = self._host("_transfer_schedule")
                rule["count"] = schedule[min(index, len(schedule) - 1)]
            if edits is not None and edits > 0.0:
                rule["edit_threshold"] = edits
                rule["shielded"] = None if prompt_mask is None else prompt_mask.expand(sample.shape)
        previous = unmask_step(sample, tokens, probs, **rule, **results)
        values: Any = (previous, transferred, edited, tokens, probs, model_output)
        return BlockRefinementSchedulerOutput(*values) if return_dict else values


class DiscreteDDIMScheduler(_TokenScheduler, diffusers.DiscreteDDIMScheduler):
    """The posterior of uniform discrete diffusion (Austin et al. 2021), with a Gibbs corrector that leaves the current
    token out. ``sampled_probs`` of the corrector are float32; at alpha = 1, where diffusers raises, it draws from the
    model's own distribution.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        temperature: float = 0.0,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> Any:
        if temperature < 0:
            raise ValueError(f"`temperature` must be >= 0, got {temperature}.")
        index, device, classes = int(self._time(timestep)), model_output.device, model_output.shape[-1]
        how: Draw = {}
        if temperature != 0.0:
            how = _token_draw(model_output, index, generator) | {"temperature": temperature, "untempered": True}
        probs = _floats(sample)
        tokens = token_confidence(model_output, prob=probs, **how)
        steps = self.num_inference_steps

        def routes() -> list[list[float]]:
            rows = []
            for step in range(steps):
                before, after = step / steps, (step + 1) / steps
                survival = before / after
                clean = after * (1 - survival) / classes
                stay, anything = survival * (1 - after) / classes, (1 - survival) * (1 - after) / classes
                rows.append([clean, clean + survival * after, stay, anything])
            return rows

        weights = self._coefficients(("routes", steps, classes), routes, device)[index]
        if isinstance(generator, PhiloxGenerator):
            draw = _by_philox(generator, index, device)
        else:
            draw = {"noise": _exponentials((sample.numel(), 3), generator, device).view(*sample.shape, 3)}
            draw["random"] = _random_tokens(model_output, sample, generator)
        previous = route_token(sample, tokens, weights, classes, **draw)
        values: Any = (previous, tokens, probs, model_output)
        return DiscreteDDIMSchedulerOutput(*values) if return_dict else values

    def step_correct(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> Any:
        index, device, classes = int(self._time(timestep)), model_output.device, model_output.shape[-1]
        steps, length = self.num_inference_steps, sample.shape[1]

        def conditionals() -> list[list[float]]:
            rows = []
            for step in range(steps):
                alpha = (step + 1) / steps
                shift = -math.log1p(classes * alpha / (1 - alpha)) if alpha < 1 else 0.0
                rows.append([alpha, (1 - alpha) / classes, shift, 1.0, 1.0, 0.0, 1.0, 0.0])
            return rows

        coefficients = self._coefficients(("conditionals", steps, classes), conditionals, device)[index]
        philox = isinstance(generator, PhiloxGenerator)
        draw = _by_philox(generator, index, device) if philox else {}
        count = min(max(1, int(self.config.corrector_k)), length)
        selection, order = self.config.corrector_selection, torch.empty_like(sample)
        kinds: dict[str, Any] = {
            "lowest_maxprob": "largest", "lowest_current_prob": "current", "lowest_log_margin": "margin"
        }  # fmt: skip
        if selection != "random" and selection not in kinds:
            raise ValueError(f"Unknown `corrector_selection`: {selection!r}.")
        how: Draw = draw
        if selection == "random":
            score = torch.zeros(sample.shape, device=device)  # with which Philox's noise decides alone
            if not philox:
                score = torch.rand(sample.shape, device=device, generator=generator)
        else:
            score = posterior_confidence(model_output, sample, coefficients, kinds[selection])
            how = how | {"temperature": float(self.config.corrector_selection_tau)}
            if not philox:
                how["noise"] = torch.rand(sample.shape, device=device, generator=generator)
        previous = unmask_step(sample, sample, score, order=order, **how)
        chosen = order[:, :count]
        if not philox:
            # multinomial's draw for float64; the op reads float32.
            noise = _exponentials((chosen.numel(), classes), generator, device, torch.float64)
            draw = {"noise": noise.to(torch.float32).view(*chosen.shape, classes)}
        probs = _floats(chosen)
        resampled = posterior_token(model_output, sample, coefficients, index=chosen, prob=probs, out=previous, **draw)
        values: Any = (previous, resampled, probs, model_output)
        return DiscreteDDIMSchedulerOutput(*values) if return_dict else values


class EntropyBoundScheduler(_TokenScheduler, diffusers.EntropyBoundScheduler):
    """Entropy-bounded unmasking (Ben-Hamu et al. 2025) for uniform corruption; one pass over the logits makes the
    tokens, the entropies and ``pred_logits``.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        entropy_bound: float | None = None,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> Any:
        bound = float(self.config.entropy_bound if entropy_bound is None else entropy_bound)
        index = int(self._time(timestep))
        fraction = (self.num_inference_steps - index) / self.num_inference_steps
        temperature = self.config.t_min + (self.config.t_max - self.config.t_min) * fraction
        probs, neg_entropy, accepted = _floats(sample), _floats(sample), _flags(sample)
        scaled = torch.empty_like(model_output)
        draw = _token_draw(model_output, index, generator)
        tokens = token_confidence(
            model_output, temperature=temperature, prob=probs, neg_entropy=neg_entropy, scaled=scaled, **draw
        )
        random = _random_tokens(model_output, sample, generator)
        previous = unmask_step(sample, tokens, neg_entropy, budget=bound, fill=random, accepted=accepted)
        values: Any = (previous, accepted, tokens, probs, scaled)
        return EntropyBoundSchedulerOutput(*values) if return_dict else values
