"""Noising: what a model sees and learns, the weights of the papers, and a model that learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pygen
from pygen.diffusion import Noising, edm, make_schedule, min_snr
from pygen.ops.diffusion_loss import COLUMNS
from pygen.ops.philox_normal import DRAW_AFFINE_STEP

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow")
SEED = torch.tensor([2**40 + 1])
T = torch.tensor([0, 999, 500])


def philox(x0: Tensor, ids: Tensor | None = None) -> Tensor:
    return pygen.philox_normal(x0.shape, seed=SEED, sample_ids=ids, draw=DRAW_AFFINE_STEP)


def levels(schedule: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    made = make_schedule(schedule)
    alpha, sigma = (torch.from_numpy(level(rows.double().numpy())) for level in (made.alpha, made.sigma))
    return alpha, sigma


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_add_noise_is_the_forward_process_with_philoxs_noise(schedule: str) -> None:
    x0, ids = torch.randn(3, 4, 65), torch.tensor([7, 0, 2**32 - 1])
    noising = Noising.from_schedule(schedule)
    alpha, sigma = (level.float().reshape(3, 1, 1) for level in levels(schedule, T))
    expected = alpha * x0 + sigma * philox(x0, ids)
    drawn = noising.add_noise(x0, T, seed=SEED, sample_ids=ids)
    torch.testing.assert_close(drawn, expected)
    assert torch.equal(noising.add_noise(x0, T, noise=philox(x0, ids)), drawn)
    assert torch.equal(noising.add_noise(x0, T, seed=SEED, sample_ids=ids, out=torch.empty_like(x0)), drawn)


def test_noise_does_not_depend_on_the_time_and_a_zero_hides_nothing() -> None:
    noising = Noising.at(torch.zeros(5), torch.ones(5))
    x0 = torch.zeros(2, 64)
    for rows in (torch.tensor([0, 1]), torch.tensor([4, 4])):
        assert torch.equal(noising.add_noise(x0, rows, seed=SEED), philox(x0))


def test_tokens_may_have_times_of_their_own() -> None:
    """Diffusion forcing: Chen et al. 2024."""
    x0, rows = torch.randn(2, 3, 5), torch.tensor([[0, 999, 500], [7, 7, 0]])
    noising = Noising.from_schedule("cosine")
    drawn = noising.add_noise(x0, rows, seed=SEED)
    losses = noising.loss(torch.zeros_like(x0), x0, rows, seed=SEED)
    for token in range(3):
        whole = noising.add_noise(x0, rows[:, token], seed=SEED)
        assert torch.equal(drawn[:, token], whole[:, token])
    torch.testing.assert_close(losses, philox(x0).square().mean(dim=(1, 2)))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_is_to_the_target_of_the_prediction(prediction: str) -> None:
    x0, output = torch.randn(2, 3, 4, 33)
    noising = Noising.from_schedule("linear", prediction=prediction)
    alpha, sigma = (level.float().reshape(3, 1, 1) for level in levels("linear", T))
    z = philox(x0)
    target = {"epsilon": z, "sample": x0, "v_prediction": alpha * z - sigma * x0, "flow": z - x0}[prediction]
    expected = (output - target).square().mean(dim=(1, 2))
    torch.testing.assert_close(noising.loss(output, x0, T, seed=SEED), expected)


def weights_of(weighting: Any, prediction: str, schedule: str = "cosine") -> tuple[Tensor, Tensor, Tensor]:
    noising = Noising.from_schedule(schedule, prediction=prediction, weighting=weighting)
    return noising.targets[:, COLUMNS["weight"]], *levels(schedule, torch.arange(1000))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_papers(gamma: float) -> None:
    """Hang et al. 2023, section 3.4: on x_0; divided by SNR for the noise, by SNR + 1 for the velocity."""
    for prediction, divisor in (("sample", 0), ("epsilon", 1), ("v_prediction", 2)):
        weights, alpha, sigma = weights_of(min_snr(gamma), prediction)
        snr = alpha**2 / sigma**2
        expected = torch.minimum(snr, torch.tensor(gamma)) / (torch.ones_like(snr), snr, snr + 1)[divisor]
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)


def test_edm_is_the_papers() -> None:
    """Karras et al. 2022, table 1: the denoiser's weight, where x_t = x_0 + sigma eps."""
    sigma = torch.exp(torch.randn(50) * 1.2 - 1.2)
    noising = Noising.at(torch.ones(50), sigma, prediction="sample", weighting=edm(0.7))
    expected = (sigma.double() ** 2 + 0.7**2) / (sigma.double() * 0.7) ** 2
    torch.testing.assert_close(noising.targets[:, COLUMNS["weight"]], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_weighting_weighs_the_same_error_whatever_the_prediction(prediction: str) -> None:
    """A model that is wrong by delta in x_0 loses w delta^2, in whichever terms it speaks."""
    x0, z, delta = torch.randn(3, 3, 8, dtype=torch.float64)
    noising = Noising.from_schedule("linear", prediction=prediction, weighting=lambda a, s: 2 + a)
    alpha, sigma = (level.reshape(3, 1) for level in levels("linear", T))
    believed, noise = x0 + delta, z - alpha / sigma * delta
    output = {"epsilon": noise, "sample": believed, "v_prediction": alpha * noise - sigma * believed,
              "flow": noise - believed}[prediction]  # fmt: skip
    with pygen.backend("reference"):
        losses = noising.loss(output, x0, T, noise=z)
    torch.testing.assert_close(losses, (2 + alpha[:, 0]) * delta.square().mean(1))


def bits_of_the_bound(t: int, x0: Tensor, epsilon: Tensor, v: Tensor, z: Tensor) -> Tensor:
    """L_t of one step of the linear schedule, per dimension, as Ho et al. 2020 and Nichol & Dhariwal 2021 write it."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)
    alpha_bar_before = torch.cat([torch.ones(1), alpha_bar[:-1]])
    beta_tilde = (1 - alpha_bar_before) / (1 - alpha_bar) * beta
    log_beta_tilde = torch.log(torch.cat([beta_tilde[1:2], beta_tilde[1:]]))[t]

    def posterior_mean(x0: Tensor) -> Tensor:
        of_x0 = alpha_bar_before[t].sqrt() * beta[t] / (1 - alpha_bar[t])
        of_x_t = (1 - beta[t]).sqrt() * (1 - alpha_bar_before[t]) / (1 - alpha_bar[t])
        return of_x0 * x0 + of_x_t * x_t

    x_t = alpha_bar[t].sqrt() * x0 + (1 - alpha_bar[t]).sqrt() * z
    mean = posterior_mean((x_t - (1 - alpha_bar[t]).sqrt() * epsilon) / alpha_bar[t].sqrt())
    share = (v + 1) / 2
    deviation = torch.exp((share * beta[t].log() + (1 - share) * log_beta_tilde) / 2)
    p = torch.distributions.Normal(mean, deviation)
    if t > 0:
        q = torch.distributions.Normal(posterior_mean(x0), torch.exp(log_beta_tilde / 2))
        nats = torch.distributions.kl_divergence(q, p)
    else:
        upper = torch.where(x0 > 0.999, 1.0, p.cdf(x0 + 1 / 255))
        lower = torch.where(x0 < -0.999, 0.0, p.cdf(x0 - 1 / 255))
        nats = -torch.log(upper - lower)
    return nats.mean() / np.log(2)


def test_the_variational_bound_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (4, 3, 30), generator=generator).double() / 127.5 - 1
    pixels[:, :, :3], pixels[:, :, 3:6] = -1, 1
    z, v, off = torch.randn(3, 4, 3, 30, generator=generator, dtype=torch.float64)
    steps = torch.tensor([0, 1, 500, 999])
    alpha, sigma = (level.reshape(4, 1, 1) for level in levels("linear", steps))
    epsilon = z + 0.5 * off
    x_t = alpha * pixels + sigma * z
    believed = (x_t - sigma * epsilon) / alpha
    outputs = {"epsilon": epsilon, "sample": believed, "v_prediction": alpha * epsilon - sigma * believed}

    def bits(v: Tensor) -> Tensor:
        parts = zip(steps.tolist(), pixels, epsilon, v, z, strict=True)
        return torch.stack([bits_of_the_bound(*part) for part in parts])

    for prediction, output in outputs.items():
        plain = Noising.from_schedule("linear", prediction=prediction)
        hybrid = Noising.from_schedule("linear", prediction=prediction, variational_weight=0.001)
        with pygen.backend("reference"):
            variance = v.clone().requires_grad_()
            learned = output.clone().requires_grad_()
            losses = hybrid.loss(learned, pixels, steps, noise=z, variance=variance)
            simple = plain.loss(output, pixels, steps, noise=z)
            gradients = torch.autograd.grad(losses.sum(), (variance, learned))
        torch.testing.assert_close(losses.detach() - simple, bits(v), rtol=1e-7, atol=1e-12)  # 0.001 * 1000
        # Of the bound only the variance has a gradient.
        leaf = v.clone().requires_grad_()
        expected = torch.autograd.grad(bits(leaf).sum(), leaf)[0]
        torch.testing.assert_close(gradients[0], expected, rtol=1e-6, atol=1e-9)
        r = output - {"epsilon": z, "sample": pixels, "v_prediction": alpha * z - sigma * pixels}[prediction]
        torch.testing.assert_close(gradients[1], 2 * r / 90)


def test_gradients_of_add_noise(isa: str) -> None:
    x0, noise = torch.randn(3, 4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    noising, grad = Noising.from_schedule("cosine"), torch.randn(3, 4, 5)
    alpha, sigma = (level.float().reshape(3, 1, 1) for level in levels("cosine", T))
    to_x0, to_noise = torch.autograd.grad(noising.add_noise(x0, T, noise=noise), (x0, noise), grad)
    torch.testing.assert_close(to_x0, alpha * grad)
    torch.testing.assert_close(to_noise, (sigma * grad).sum(0))
    with pygen.backend("reference"):
        doubles = (x0.detach().double().requires_grad_(), noise.detach().double().requires_grad_())
        assert torch.autograd.gradcheck(lambda x0, noise: noising.add_noise(x0, T, noise=noise), doubles)
        assert torch.autograd.gradcheck(lambda x0: noising.add_noise(x0, T, seed=SEED), doubles[:1])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_learns_from_one_graph(compiled: bool) -> None:
    """Two points in the plane, by a small network; every step of it the same compiled graph."""
    torch.manual_seed(0)
    noising = Noising.from_schedule("cosine", prediction="sample", weighting=min_snr())
    model = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    points, seed = torch.tensor([[1.0, -1.0], [-1.0, 0.5]]), torch.zeros(1, dtype=torch.int64)

    def loss_of(x0: Tensor, t: Tensor, seed: Tensor) -> Tensor:
        x_t = noising.add_noise(x0, t, seed=seed)
        output = model(torch.cat([x_t, noising.timesteps[t, None] / 1000], dim=1))
        return noising.loss(output, x0, t, seed=seed).mean()

    step = torch.compile(loss_of, fullgraph=True, dynamic=False) if compiled else loss_of
    losses = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(150):
            x0, t = points[torch.randint(2, (64,))], torch.randint(len(noising), (64,))
            loss = step(x0, t, seed)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            seed += 1
    assert sum(losses[-20:]) < 0.5 * sum(losses[:5]) / 5 * 20


def test_continuous_times() -> None:
    """Rectified flow, its levels drawn for one batch; and a continuous schedule at given times."""
    x0, t = torch.randn(4, 6), torch.rand(4)
    noising, rows = Noising.at(1 - t, t, prediction="flow"), torch.arange(4)
    torch.testing.assert_close(noising.add_noise(x0, rows, seed=SEED), (1 - t[:, None]) * x0 + t[:, None] * philox(x0))
    assert torch.equal(noising.timesteps, t)
    given = Noising.from_schedule("flow", t.double().numpy(), prediction="flow")
    for ours, theirs in ((noising.table, given.table), (noising.targets, given.targets)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_huber_may_follow_the_schedule() -> None:
    sigma = make_schedule("linear").sigma(np.arange(1000.0))
    noising = Noising.from_schedule("linear", huber_c=0.1 + 0.9 * (1 - sigma))
    x0, output = torch.randn(2, 3, 8)
    c = 0.1 + 0.9 * (1 - torch.from_numpy(sigma)[T, None]).float()
    r = output - philox(x0)
    torch.testing.assert_close(noising.loss(output, x0, T, seed=SEED), (2 * c * ((r**2 + c**2).sqrt() - c)).mean(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "flow"}, "times must be given: schedule 'flow'"),
        ({"times": [1000]}, "times must be a sequence of numbers between -1 and 999"),
        ({"prediction": "score"}, "prediction must be one of epsilon, sample"),
        ({"huber_c": 0.0}, "huber_c must be positive"),
        ({"weighting": lambda alpha, sigma: alpha / 0}, "the loss of prediction 'epsilon' is not finite"),
        ({"schedule": {"name": "linear", "zero_terminal_snr": True}, "variational_weight": 1.0}, "is not finite"),
        ({"times": [3, 2], "variational_weight": 1.0}, "variational_weight needs the schedule's own training steps"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Noising.from_schedule(**({"schedule": "linear"} | arguments))
    with pytest.raises(ValueError, match="alpha and sigma must have one shape"):
        Noising.at(torch.ones(3), torch.ones(4))


def test_a_time_that_the_schedule_lacks_is_refused() -> None:
    with pytest.raises(IndexError, match="rows holds 1000, but the table has 1000 rows"):
        Noising.from_schedule("linear").add_noise(torch.ones(1, 4), torch.tensor([1000]), seed=SEED)
