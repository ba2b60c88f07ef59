"""Continuous batching: requests join and leave a running batch, each at its own step of its own plan.

    batch = ContinuousBatch(torch.empty(capacity, 4, 64, 64, device=device))
    request = batch.join(plan, seed=7)
    while batch.requests:
        x, t, guided = batch.x, batch.timesteps(), batch.guided
        output = model(torch.cat([x[:guided], x]), torch.cat([t[:guided], t]), ...)  # without and with the condition
        for finished in batch.step(output[guided:], output[: len(x)]):
            respond(finished, finished.result)

The requests are packed: the model sees no gaps, and those with guidance come first, so that only they are evaluated
twice. One call of ``affine_step`` makes a step of all, each with its row of one table; what a request gets is bit-equal
to what it gets alone, provided that the model's outputs are. Nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pygen.diffusion.plan import StepPlan, widen
from pygen.diffusion.sample import noised
from pygen.ops.affine_step import HISTORY_COLUMN, MAX_HISTORY, affine_step, make_table
from pygen.ops.dynamic_threshold import dynamic_threshold
from pygen.ops.philox_normal import philox_normal


@dataclass(eq=False)
class Request:
    """One sample on its way: how many steps of its plan are done, and the result once all are."""

    plan: StepPlan
    step: int = 0
    result: Tensor | None = None


class ContinuousBatch:
    """Up to ``capacity`` samples at once, in the memory of ``x``.

    Joining allocates where a plan needs more history than any before it, or more rows than the table has left: a server
    lets each of its plans join once before it compiles ``advance``.

    Args:
        x: (capacity, ...), float32, bfloat16 or float16, of any strides: it may be a part of the model's input.

    Attributes:
        requests: those that run, in the order of the batch.
        guided: how many of them, the first ones, read an unconditional output.
    """

    def __init__(self, x: Tensor) -> None:
        self.requests: list[Request] = []
        self.guided = 0
        self._x = x
        # Previous predictions and second results, latest first; they take turns for all samples at once. One that has
        # just joined finds another's there, or nothing, but its rows do not read that far back.
        self._predictions: list[Tensor] = []
        self._carried: list[Tensor] = []
        # Of each slot: the row that comes next, and whose noise it gets.
        self._rows, self._seeds, self._sample_ids = torch.zeros(3, len(x), dtype=torch.int64, device=x.device)
        self._begins: dict[StepPlan, int] = {}
        self._noisy = False
        self._thresholding: tuple[float, float] | None = None
        self._build_table(rows=256)

    @property
    def x(self) -> Tensor:
        """The samples that the model is to see, in the order of ``requests``."""
        return self._x[: len(self.requests)]

    def timesteps(self, slots: int | None = None) -> Tensor:
        """What the model is told with each sample, float32; for so many slots where the batch is padded."""
        return self._timesteps[self._rows[: len(self.requests) if slots is None else slots]]

    def join(
        self,
        plan: StepPlan,
        *,
        seed: int | None = None,
        sample_id: int = 0,
        init: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Request:
        """A new request, whose result is that of ``pygen.sample`` with these arguments and ``sample_ids=[sample_id]``.

        Args:
            plan: on the host, so that nothing waits. Its rows are uploaded once, for as long as anyone needs them.
            seed, sample_id: of all noise. A plan that adds none needs no seed if x is given.
            init: an image to start from, noised to the plan's first time; broadcasts to a sample. Or
            x: the sample at the plan's first time.

        Raises:
            ValueError: where the batch is full, the noise has no seed, the plan has another ``thresholding`` than those
                that run, or it needs more history than ``affine_step`` has room for beside what others have needed.
        """
        slot = len(self.requests)
        if slot == len(self._x):
            raise ValueError(f"the batch is full: all {slot} slots are taken")
        if seed is None and (x is None or any(plan.noisy)):
            raise ValueError("seed must be given: of the first sample, and of each step that adds noise")
        if x is not None and init is not None:
            raise ValueError("give init or x, not both")
        if plan.thresholding is not None:
            others = {request.plan.thresholding for request in self.requests} - {None, plan.thresholding}
            if others:
                raise ValueError(f"plans of one batch share thresholding, got {plan.thresholding} beside {others}")
            self._thresholding = plan.thresholding
        begin = self._begin_of(plan)
        request = Request(plan)
        self.requests.append(request)
        if plan.guided:
            self._move(self.guided, slot)
            slot = self.guided
            self.requests[slot] = request
            self.guided += 1
        for state, value in ((self._rows, begin), (self._seeds, seed or 0), (self._sample_ids, sample_id)):
            state[slot].fill_((value + 2**63) % 2**64 - 2**63)  # 64 bits, signed or not

        sample = self._x[slot : slot + 1]
        if x is not None:
            sample.copy_(x)
            return request
        noise = sample if init is None else torch.empty_like(sample)
        philox_normal(seed=self._seeds[slot], sample_ids=self._sample_ids[slot : slot + 1], out=noise)
        if init is not None:
            noised(plan, init, noise, out=sample)
        elif plan.initial_scale != 1.0:
            sample.mul_(plan.initial_scale)
        return request

    def leave(self, request: Request) -> None:
        """Withdraws a request; the last ones of the batch take its place."""
        slot, last = self.requests.index(request), len(self.requests) - 1
        if slot < self.guided:
            self.guided -= 1
            self._move(self.guided, slot)
            slot = self.guided
        self._move(last, slot)
        self.requests.pop()
        self._rows[last].zero_()

    def step(self, model_output: Tensor, uncond: Tensor | None = None, negative: Tensor | None = None) -> list[Request]:
        """Takes every request one evaluation of the model further.

        Args:
            model_output: (n, ...), of the requests in their order; n may exceed their number where the batch is padded.
            uncond: the unconditional outputs, (n, ...). It is read for the first ``guided`` alone: the rest may be
                anything, as of a tensor that goes on with something else.
            negative: third outputs, (n, ...), read where a plan has a factor for them.

        Returns:
            The requests that are done, with their results; they have left the batch.
        """
        if not len(self.requests) <= len(model_output) <= len(self._x):
            raise ValueError(
                f"model_output must be of {len(self.requests)} samples, or padded up to {len(self._x)}, "
                f"got {len(model_output)}"
            )
        if uncond is None and self.guided:
            raise ValueError(f"uncond must be given: {self.guided} requests are guided")
        self.advance(model_output, uncond, negative)
        finished = []
        for request in self.requests:
            request.step += 1
            if request.step == request.plan.steps:
                finished.append(request)
        for request in finished:
            request.result = self._x[self.requests.index(request)].clone()
            self.leave(request)
        return finished

    @torch.no_grad()
    def advance(self, model_output: Tensor, uncond: Tensor | None = None, negative: Tensor | None = None) -> None:
        """What the device does in ``step``. By ``torch.compile(fullgraph=True)`` it is one graph, whoever joins and
        leaves, if the batch is always padded to one size."""
        slots = len(model_output)
        x, rows = self._x[:slots], self._rows[:slots]
        predictions, carried = ([kept[:slots] for kept in ring] for ring in (self._predictions, self._carried))
        scale = None
        if self._thresholding is not None:
            ratio, max_value = self._thresholding
            scale = dynamic_threshold(
                x, model_output, self._table, rows, uncond=uncond, negative=negative, ratio=ratio, max_value=max_value
            )
            scale = torch.where(self._thresholded[rows, None], scale, 1.0)
        affine_step(
            x,
            model_output,
            self._table,
            rows,
            uncond=uncond,
            negative=negative,
            scale=scale,
            history=predictions + carried,
            seed=self._seeds[:slots] if self._noisy else None,
            sample_ids=self._sample_ids[:slots] if self._noisy else None,
            out=x,
            pred=predictions[-1] if predictions else None,
            second=carried[-1] if carried else None,
        )
        self._predictions = self._predictions[-1:] + self._predictions[:-1]
        self._carried = self._carried[-1:] + self._carried[:-1]
        rows += rows.sign()  # an empty slot stays at row 0

    def _move(self, source: int, target: int) -> None:
        """Moves a request from one slot to another, with all that is its own."""
        if source == target:
            return
        self.requests[target] = self.requests[source]
        for state in (self._x, *self._predictions, *self._carried, self._rows, self._seeds, self._sample_ids):
            state[target].copy_(state[source])

    def _begin_of(self, plan: StepPlan) -> int:
        """The first of a plan's rows in the table, which they are added to if need be."""
        if plan not in self._begins:
            kept = max(len(self._predictions), plan.predictions) + max(len(self._carried), plan.carried)
            if kept > MAX_HISTORY:
                raise ValueError(f"with this plan the batch would keep {kept} tensors, more than {MAX_HISTORY}")
            while len(self._predictions) < plan.predictions:
                self._predictions.append(torch.empty_like(self._x))
            while len(self._carried) < plan.carried:
                self._carried.append(torch.empty_like(self._x))
            width = HISTORY_COLUMN + 2 * (len(self._predictions) + len(self._carried))
            if self._used + plan.steps > len(self._table) or width != self._table.shape[1]:
                self._build_table(len(self._table), plan)
            else:
                self._add(plan)
        return self._begins[plan]

    def _build_table(self, rows: int, *more: StepPlan) -> None:
        """A new table, twice as long where that is not enough, for the plans that run and ``more``."""
        plans = dict.fromkeys([*(request.plan for request in self.requests), *more])
        needed = 1 + sum(plan.steps for plan in plans)
        while rows < needed:
            rows *= 2
        device, predictions, carried = self._x.device, len(self._predictions), len(self._carried)
        self._begins.clear()
        self._noisy = False
        # Row 0 is that of an empty slot: it reads nothing, and makes zeros.
        self._table = make_table([{}], predictions + carried).to(device, non_blocking=True).repeat(rows, 1)
        self._timesteps = torch.zeros(rows, device=device)
        self._thresholded = torch.zeros(rows, dtype=torch.bool, device=device)
        self._used = 1
        for plan in plans:
            self._add(plan)
        for slot, request in enumerate(self.requests):
            self._rows[slot].fill_(self._begins[request.plan] + request.step)

    def _add(self, plan: StepPlan) -> None:
        begin, self._used = self._used, self._used + plan.steps
        table = widen(plan, len(self._predictions), len(self._carried))
        self._table[begin : self._used].copy_(table, non_blocking=True)
        self._timesteps[begin : self._used].copy_(plan.timesteps, non_blocking=True)
        self._thresholded[begin : self._used].fill_(plan.thresholding is not None)
        self._noisy |= any(plan.noisy)
        self._begins[plan] = begin
