"""Continuous batching: what a request gets does not depend on who else is in the batch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import pygen
from pygen.diffusion import ContinuousBatch, Request, Stepper, StepPlan

SHAPE = (3, 5, 7)
PLANS: list[tuple[str, dict[str, Any]]] = [
    ("ddim", {}),
    ("dpmpp_2m", {"guidance": 3.0}),
    ("unipc", {"guidance": [1.0, 4.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0], "steps": 8}),
    ("heun", {"clip": (-2.0, 2.0)}),
    ("ddpm", {"guidance": 2.0}),
    ("ipndm", {"clip": (-1.0, 1.0)}),  # remembers second results
    ("dpmpp_3m_sde", {}),
    ("euler", {"schedule": "flow", "prediction": "flow"}),
    ("ddim", {"guidance": 0.5, "thresholding": (0.9, 1.5), "eta": 0.5}),
]


def plan_of(index: int) -> StepPlan:
    solver, options = PLANS[index]
    return pygen.plan(solver, **({"schedule": "scaled_linear", "steps": 3 + index % 4} | options))


def model(x: Tensor, t: Tensor) -> Tensor:
    """Its bits do not depend on the batch: products and sums only, one element at a time."""
    t = t.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    x = x.clamp(-1.5, 1.5)
    return 0.5 * x - 0.125 * x * x * x + 0.0001 * t


def unconditional(x: Tensor, t: Tensor) -> Tensor:
    return 0.25 * x.clamp(-1.5, 1.5)


def alone(plan: StepPlan, seed: int, sample_id: int, **more: Any) -> Tensor:
    def both(x: Tensor, t: Tensor, guided: bool) -> Tensor:
        half = len(x) // 2
        return torch.cat([model(x[:half], t[:half]), unconditional(x[half:], t)]) if guided else model(x, t)

    more |= {"uncond": {"guided": True}} if plan.guided else {}
    return pygen.sample(
        both, (1, *SHAPE), solver=plan, seed=seed, sample_ids=torch.tensor([sample_id]),
        cond={"guided": plan.guided}, **more,
    )[0]  # fmt: skip


def step(batch: ContinuousBatch, padded: int | None = None) -> list[Request]:
    """One step, as a server makes it; what is not to be read is NaN."""
    x, t = batch.x, batch.timesteps()
    output, uncond = torch.full((2, padded or len(x), *SHAPE), torch.nan)
    output[: len(x)] = model(x, t)
    uncond[: batch.guided] = unconditional(x[: batch.guided], t)
    return batch.step(output, uncond)


@pytest.mark.parametrize("capacity", [1, 4, 13])
def test_requests_that_come_and_go_get_what_they_get_alone(capacity: int, threads: int) -> None:
    chance = random.Random(capacity)
    plans = [plan_of(index) for index in range(len(PLANS))]
    image = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    batch = ContinuousBatch(torch.full((capacity, *SHAPE), torch.nan))
    waiting = [
        (plans[i % len(plans)] if chance.random() < 0.7 else plan_of(i % len(plans)), chance.getrandbits(64), i)
        for i in range(4 * len(plans))
    ]
    chance.shuffle(waiting)
    running: dict[Request, dict[str, Any]] = {}
    done = 0
    while waiting or batch.requests:
        while waiting and len(batch.requests) < capacity and chance.random() < 0.7:
            plan, seed, sample_id = waiting.pop()
            more = {"init": image} if chance.random() < 0.3 else {}
            request = batch.join(plan, seed=seed, sample_id=sample_id, **more)
            running[request] = {"plan": plan, "seed": seed, "sample_id": sample_id} | more
        if batch.requests and chance.random() < 0.1:
            leaving = chance.choice(batch.requests)
            batch.leave(leaving)
            del running[leaving]
        assert all(request.plan.guided == (i < batch.guided) for i, request in enumerate(batch.requests))
        for i, request in enumerate(batch.requests):
            assert float(batch.timesteps()[i]) == float(request.plan.timesteps[request.step])
        for request in step(batch, chance.choice([None, capacity])):
            assert request.step == request.plan.steps
            assert torch.equal(request.result, alone(**running.pop(request)))
            done += 1
    assert not running
    assert done > 2 * len(plans)


def test_the_state_may_be_a_part_of_the_models_input_in_any_format() -> None:
    memory = torch.zeros(2, 2 + SHAPE[0], *SHAPE[1:], dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    batch = ContinuousBatch(memory[:, 1 : 1 + SHAPE[0]])
    plan = pygen.plan("dpmpp_sde", "cosine", 4)
    requests = [batch.join(plan, seed=3, sample_id=i) for i in (6, 2)]
    while batch.requests:
        batch.step(model(batch.x, batch.timesteps()))
    for request, sample_id in zip(requests, (6, 2), strict=True):
        assert torch.equal(request.result, alone(plan, 3, sample_id, dtype=torch.bfloat16))
    assert not memory[:, [0, -1]].any()


def test_a_request_may_bring_its_first_sample_and_read_three_outputs() -> None:
    plan = pygen.plan("unipc", "cosine", 4, guidance=2.0, negative=-0.5)
    first = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    batch = ContinuousBatch(torch.empty(2, *SHAPE))
    other = batch.join(pygen.plan("ddim", "cosine", 4), seed=1)
    request = batch.join(plan, x=first)
    assert torch.equal(batch.x[0], first)
    while batch.requests:
        x, t = batch.x, batch.timesteps()
        third = torch.stack([0.125 * x[0], torch.full(SHAPE, torch.nan)])
        batch.step(model(x, t), unconditional(x, t), third)
    stepper = Stepper(plan, first[None])
    x = first[None]
    for i, t in enumerate(plan.timesteps):
        x = stepper.step(i, x, model(x, t), uncond=unconditional(x, t), negative=0.125 * x)
    assert torch.equal(request.result, x[0])
    assert torch.equal(other.result, alone(other.plan, 1, 0))


def test_the_table_forgets_plans_that_nobody_runs() -> None:
    batch = ContinuousBatch(torch.empty(2, *SHAPE))
    sizes = set()
    for count in range(40):
        requests = [batch.join(pygen.plan("euler", "cosine", 50 + count), seed=0) for _ in range(2)]
        sizes.add(len(batch._table))
        for request in requests:
            batch.leave(request)
    assert sizes == {256}


def test_one_graph_serves_all_who_come_and_go() -> None:
    plans = [plan_of(index) for index in range(len(PLANS) - 1)]
    capacity = 3

    def run(advance: Any) -> list[Tensor]:
        batch = ContinuousBatch(torch.zeros(capacity, *SHAPE))
        for plan in plans:  # whatever will be needed is allocated
            batch.leave(batch.join(plan, seed=0))
        batch.advance = advance(batch)  # type: ignore[method-assign]
        requests, waiting = [], list(enumerate(plans))
        while waiting or batch.requests:
            if waiting and len(batch.requests) < capacity:
                index, plan = waiting.pop()
                requests.append(batch.join(plan, seed=5, sample_id=index))
            step(batch, capacity)
        return [request.result for request in requests if request.result is not None]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = run(lambda batch: torch.compile(batch.advance, fullgraph=True, backend=counter))
    eager = run(lambda batch: batch.advance)
    assert len(compiled) == len(plans)
    for ours, expected in zip(compiled, eager, strict=True):
        assert torch.equal(ours, expected)
    assert counter.frame_count == 1


def test_wrong_arguments() -> None:
    batch = ContinuousBatch(torch.empty(2, *SHAPE))
    plan, noisy = pygen.plan("ddim", "cosine", 4, guidance=2.0), pygen.plan("ddpm", "cosine", 4)
    x = torch.zeros(SHAPE)
    for arguments, message in (
        ({"plan": plan}, "seed must be given"),
        ({"plan": noisy, "x": x}, "seed must be given"),
        ({"plan": plan, "x": x, "init": x}, "give init or x"),
    ):
        with pytest.raises(ValueError, match=message):
            batch.join(**arguments)  # type: ignore[arg-type]
    batch.join(pygen.plan("ddim", "cosine", 4, thresholding=(0.9, 2.0)), seed=0)
    with pytest.raises(ValueError, match="share thresholding"):
        batch.join(pygen.plan("ddim", "cosine", 4, thresholding=(0.8, 2.0)), seed=0)
    request = batch.join(plan, seed=0)
    with pytest.raises(ValueError, match="the batch is full"):
        batch.join(plan, seed=0)
    with pytest.raises(ValueError, match="model_output must be of 2 samples"):
        batch.step(torch.zeros(1, *SHAPE))
    with pytest.raises(ValueError, match="uncond must be given"):
        batch.step(torch.zeros(2, *SHAPE))
    assert request.step == 0
