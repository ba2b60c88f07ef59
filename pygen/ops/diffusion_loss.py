"""diffusion_loss: how far a model's output lies from what it was to predict, as each sample's mean.

    r      = model_output - (x0_c * x0 + noise_c * z)
    loss   = mean(mask * (weight * huber(r) + bound * nats(r, variance)))

where huber(r) = 2 c (sqrt(r^2 + c^2) - c), or r^2 where c is infinite, and nats is the variational bound of a learned
variance, of which only that variance has a gradient (Nichol & Dhariwal 2021, section 3.1). In standard deviations of
the posterior q(x_{t-1} | x_t, x_0), the model's mean is off by mean * r, and its log variance by w = spread *
(variance + 1) / 2 (their equation 15): nats is the divergence of the two, (w - 1 + e^-w (1 + (mean r)^2)) / 2. Where
bin is not 0, it is the decoder's -log p(x_0 | x_1): of what the Gaussian gives to the values closer than bin to x_0,
and to all beyond where x_0 is the least or the largest, -1 or 1 (Ho et al. 2020, equation 13).

The coefficients are the columns of a float64 table, the row of each sample (or token) an integer. z may be drawn by
Philox once more, in the forward pass and in the backward pass: it is never stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pygen import _C
from pygen.ops.affine_step import noise_of_rows
from pygen.ops.backend import use_reference
from pygen.ops.spec import Example, OpSpec, tensor_bytes

# The table's columns.
COLUMNS: dict[str, int] = {name: i for i, name in enumerate(_C.LOSS_COLUMNS)}
_BACKENDS = ("reference", "cpu", "cuda")
_OUTPUTS = ("out", "grad_output", "grad_x0", "grad_noise", "grad_variance")


def diffusion_loss(
    model_output: Tensor,
    x0: Tensor,
    table: Tensor,
    rows: Tensor,
    *,
    noise: Tensor | None = None,
    variance: Tensor | None = None,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
    sample_ids: Tensor | None = None,
    grad: Tensor | None = None,
    out: Tensor | None = None,
    grad_output: Tensor | None = None,
    grad_x0: Tensor | None = None,
    grad_noise: Tensor | None = None,
    grad_variance: Tensor | None = None,
) -> Tensor:
    """The loss of each sample; see the module's formula. A term whose coefficient is exactly 0 is not read.

    Differentiable with respect to ``model_output``, ``x0``, ``noise`` and ``variance``. Elementwise tensors have any
    strides and are float32, bfloat16 or float16, each by itself; arithmetic is float32, the order of sums is fixed.

    Args:
        model_output, x0: (batch, ...).
        table: float64 (rows, columns); the columns are ``COLUMNS``.
        rows: int64, one index, or shape (batch,), or (batch, tokens) where x0 is (batch, tokens, ...).
        noise: z; broadcasts to x0. Or
        seed: int64, one or (batch,): z is what ``affine_step`` draws with the same seed, step column and
            ``sample_ids`` (int64 (batch,)).
        variance: what the model says of its variance, -1 for the posterior's and 1 for the step's; where rows bound it.
        mask: elementwise weights, or bool; broadcasts to x0. The mean is over all elements, masked or not.
        out: float32 (batch,), receives the losses; new where left out. Where it is given, nothing is recorded for
            autograd; instead
        grad_output, grad_x0, grad_noise, grad_variance: of x0's shape, receive the gradients in the same pass, where
        grad: float32 (batch,), is the gradient of each loss; 1 where left out.

    Returns:
        the losses, in ``out``.

    Raises:
        ValueError, TypeError, IndexError: naming the argument.
    """
    inputs = (model_output, x0, noise, variance, table, rows, mask, seed, sample_ids)
    gradients = (grad_output, grad_x0, grad_noise, grad_variance)
    if out is not None:
        _run(*inputs, grad, out, *gradients)
        return out
    if any(tensor is not None for tensor in (grad, *gradients)):
        raise ValueError("diffusion_loss: grad and the gradients need out; without it, call backward()")
    losses: Tensor = _DiffusionLoss.apply(*inputs)
    return losses


class _DiffusionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, model_output: Tensor, *others: Any) -> Tensor:
        ctx.save_for_backward(model_output, *others)
        dtype = torch.promote_types(model_output.dtype, torch.float32)
        out = model_output.new_empty(model_output.shape[:1], dtype=dtype)
        _run(model_output, *others, None, out, None, None, None, None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        wanted = zip(inputs[:4], ctx.needs_input_grad, strict=False)
        gradients = [torch.empty_like(inputs[0], dtype=tensor.dtype) if want else None for tensor, want in wanted]
        _run(*inputs, grad, None, *gradients)
        made = (None if g is None else g.sum_to_size(i.shape) for g, i in zip(gradients, inputs, strict=False))
        return *made, None, None, None, None, None


def _run(
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor | None,
    variance: Tensor | None,
    table: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    grad: Tensor | None,
    *outputs: Tensor | None,
) -> None:
    if not use_reference("diffusion_loss", _BACKENDS, model_output.device):
        _kernel(model_output, x0, table, rows, noise, variance, mask, seed, sample_ids, grad, *outputs)
        return
    named = {"noise": noise, "variance": variance, "mask": mask, "seed": seed, "sample_ids": sample_ids, "grad": grad}
    results = diffusion_loss_reference(model_output, x0, table, rows, **named)
    for tensor, result in zip(outputs, results, strict=True):
        if tensor is not None:
            tensor.copy_(result)


def diffusion_loss_reference(
    model_output: Tensor,
    x0: Tensor,
    table: Tensor,
    rows: Tensor,
    *,
    noise: Tensor | None = None,
    variance: Tensor | None = None,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
    sample_ids: Tensor | None = None,
    grad: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The losses, and the gradients of model_output, x0, noise and variance."""
    compute = torch.promote_types(model_output.dtype, torch.float32)
    coefficients = table[rows.reshape(1) if rows.numel() == 1 else rows]

    def column(name: str) -> Tensor:
        values = coefficients[..., COLUMNS[name]].to(compute)
        return values.reshape(values.shape + (1,) * (x0.dim() - values.dim()))

    def per_sample(values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (x0.dim() - 1))

    z = noise
    if seed is not None:
        steps = coefficients[..., COLUMNS["step"]].to(torch.int64)
        z = noise_of_rows(x0, seed, steps.expand(len(x0)) if steps.dim() == 1 else steps, sample_ids, compute)
    target = torch.zeros(x0.shape, dtype=compute, device=x0.device)
    for name, tensor in (("x0", x0), ("noise", z)):
        if tensor is not None:
            target = target + torch.where(column(name) == 0, 0, column(name) * tensor.to(compute))
        elif bool((column(name) != 0).any()):
            raise ValueError("diffusion_loss: a row reads the noise: give seed or noise")

    r, c = model_output.to(compute) - target, column("huber_c")
    squared = c.isinf()
    huber = torch.where(squared, r**2, 2 * c * (torch.sqrt(r**2 + c**2) - c))
    slope = torch.where(squared, 2 * r, 2 * c * r / torch.sqrt(r**2 + c**2))
    bound = column("bound")
    if variance is not None:
        nats, bound_slope = _bound(r, x0.to(compute), variance.to(compute), column)
        nats, bound_slope = (torch.where(bound == 0, 0, bound * term) for term in (nats, bound_slope))
    elif bool((bound != 0).any()):
        raise ValueError("diffusion_loss: a row reads the variance, and variance is None")
    else:
        nats = bound_slope = torch.zeros_like(r)
    share = torch.ones_like(r) if mask is None else mask.to(compute).expand(r.shape)
    values = share * (column("weight") * huber + nats)
    losses = values.flatten(1).mean(1) if x0.dim() > 1 else values
    upstream = torch.ones(len(x0), dtype=compute, device=x0.device) if grad is None else grad.to(compute)
    share = per_sample(upstream) * share / max(math.prod(x0.shape[1:]), 1)
    gradient = share * column("weight") * slope
    return losses, gradient, -column("x0") * gradient, -column("noise") * gradient, share * bound_slope


def _bound(r: Tensor, x0: Tensor, variance: Tensor, column: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """The variational bound in nats, and its derivative by the variance."""
    spread, bin = column("spread"), column("bin")
    w, off = spread * (variance + 1) / 2, column("mean") * r
    scale = torch.exp(-w / 2)
    divergence = (w - 1 + scale**2 * (1 + off**2)) / 2
    divergence_by_w = (1 - scale**2 * (1 + off**2)) / 2

    # The bin reaches from near to far on the side of the mean where digits are; outermost bins have no far end.
    low, high = x0 < -0.999, x0 > 0.999
    near = (torch.where(low, -off, torch.where(high, off, off.abs())) - bin) * scale
    far = (off.abs() + bin) * scale
    beyond_near = torch.special.log_ndtr(-near)
    beyond_far = torch.where(low | high, -math.inf, torch.special.log_ndtr(-far))
    log_p = beyond_near + torch.log1p(-torch.exp(beyond_far - beyond_near))
    at_near, at_far = (x * torch.exp(-(x**2) / 2 - log_p) / math.sqrt(2 * math.pi) for x in (near, far))
    decoder_by_w = (torch.where(low | high, 0, at_far) - at_near) / 2
    nats = torch.where(bin == 0, divergence, -log_p)
    return nats, torch.where(bin == 0, divergence_by_w, decoder_by_w) * spread / 2


_kernel = torch.ops.pygen.diffusion_loss.default


@torch.library.register_fake("pygen::diffusion_loss")
def _fake(*arguments: object) -> None:
    return None


def make_table(rows: Sequence[dict[str, float]]) -> Tensor:
    """A table from rows of named coefficients; squared error of weight 1 where they say nothing else."""
    defaults = {"weight": 1.0, "huber_c": math.inf}
    return torch.tensor([[(defaults | row).get(name, 0.0) for name in COLUMNS] for row in rows], dtype=torch.float64)


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def tensor(*size: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(like)

    epsilon, sample = {"noise": 1.0, "step": 7, "weight": 0.7}, {"x0": 1.0}
    velocity = {"x0": -0.6, "noise": 0.8, "step": 3, "huber_c": 0.3}
    flow = {"x0": -1.0, "noise": 1.0, "weight": 2.5}
    table = make_table([epsilon, sample, velocity, flow])

    def example(name: str, *size: int, rows: object = 2, gradients: Sequence[str] = (), **more: Any) -> Example:
        arguments = {
            "model_output": tensor(*size), "x0": tensor(*size), "table": table, "rows": torch.tensor(rows),
            "seed": None if "noise" in more else torch.tensor([42]), "out": torch.full(size[:1], math.nan),
        }  # fmt: skip
        if gradients:
            arguments["grad"] = torch.randn(size[0], generator=generator)
        arguments |= {name: torch.full(size, math.nan, dtype=dtype) for name in gradients}
        return Example(name, arguments | more)

    every = ("grad_output", "grad_x0", "grad_noise")
    learned = {"noise": 1.0, "bound": 1.4, "mean": 1.7, "spread": 0.9}
    decoder = {"noise": 1.0, "weight": 0.0, "bound": 0.8, "mean": 1.4, "spread": 0.7, "bin": 0.55}
    bounds = make_table([learned, decoder, learned | {"spread": 1e-4, "mean": 0.01}, epsilon])
    for count in range(0, 132):
        yield example("every count", 1, count, gradients=every)
    for count in (1023, 1024, 1025, 4095, 4096, 4097, 9001):
        yield example("around a segment", 2, count, rows=[2, 0], gradients=every)
    for row in range(4):
        yield example(f"row {row}", 2, 4, 8, 8, rows=row, gradients=every)
    yield example("latents", 2, 4, 64, 64, gradients=("grad_output",))
    shape = (5, 3, 7, 9)
    yield example("rows differ", *shape, rows=[2, 0, 3, 1, 0], gradients=every)
    yield example("losses alone", *shape, rows=[2, 0, 3, 1, 0])
    yield example("no gradient given", *shape, grad_output=torch.full(shape, math.nan, dtype=dtype))
    yield example("rows by token", 2, 3, 65, rows=[[0, 1, 2], [3, 1, 0]], gradients=every)
    yield example("many tokens", 1, 300, 5, rows=[[i % 4 for i in range(300)]], gradients=every)
    yield example("tokens without channels", 2, 3, rows=[[0, 1, 2], [3, 1, 0]], gradients=every)
    yield example("samples without elements", 3, rows=[0, 1, 2], gradients=every)
    for rows in ([0, 2, 3, 0, 2], [1, 1, 3, 1, 0]):
        more: dict[str, Any] = {"table": bounds, "variance": tensor(*shape), "gradients": (*every, "grad_variance")}
        ends = tensor(*shape).clamp(-1, 1)
        yield example(f"variances by rows {rows}", *shape, rows=rows, x0=ends, **more)
        yield example(f"masked variances by rows {rows}", *shape, rows=rows, x0=ends, mask=tensor(7, 1), **more)
    for factor in (0.01, 3.0, 30.0):
        output = factor * tensor(2, 4096, like=torch.float32)
        more |= {"variance": tensor(2, 4096), "noise": torch.zeros(2, 4096), "x0": tensor(2, 4096).clamp(-1, 1)}
        yield example(f"a decoder {factor} off", 2, 4096, rows=1, model_output=output.to(dtype), **more)
    yield example("sample ids", *shape, sample_ids=torch.tensor([5, 1, 9, 2**31, 0]))
    yield example("seeds", *shape, seed=torch.tensor([3, -1, 2**62, 3, 0]), gradients=every)
    yield example("noise given", *shape, noise=tensor(*shape), gradients=every)
    yield example("broadcast", *shape, noise=tensor(5, 1, 1, 9), mask=tensor(7, 1), gradients=every)
    yield example("mask", *shape, mask=torch.rand(5, 1, 7, 9, generator=generator).to(dtype), gradients=every)
    yield example("bool mask", *shape, mask=torch.rand(shape, generator=generator) > 0.5, gradients=every)
    for other in (torch.float32, torch.bfloat16, torch.float16):
        yield example(f"x0 in {other}", *shape, x0=tensor(*shape, like=other), gradients=every)
    last = torch.channels_last
    yield example(
        "channels-last", *shape, model_output=tensor(*shape).to(memory_format=last), noise=tensor(*shape),
        x0=tensor(*shape).to(memory_format=last), grad_output=tensor(*shape).to(memory_format=last),
    )  # fmt: skip
    wide = tensor(5, 6, 7, 18)
    yield example("sliced", *shape, model_output=wide[:, 1:4, :, ::2], x0=wide[:, 3:, :, 1::2], gradients=every)
    misaligned: dict[str, Any] = {"x0": tensor(388)[1:].view(3, 129), "model_output": tensor(390)[3:].view(3, 129)}
    yield example("misaligned", 3, 129, **misaligned, gradients=every)
    yield example("strided losses", 3, 50, out=torch.full((6,), math.nan)[::2])
    x0 = tensor(*shape)
    yield example("in place", *shape, x0=x0, grad_output=x0)
    special = tensor(3, 64)
    special[0, 3], special[1, 5] = math.nan, math.inf
    yield example("NaN and Inf", 3, 64, rows=[1, 2, 2], model_output=special)
    yield example("NaN and Inf, squared", 3, 64, rows=[1, 3, 3], model_output=special, gradients=("grad_output",))
    unread = torch.full((2, 64), math.nan, dtype=dtype)
    yield example("unread noise", 2, 64, rows=1, noise=unread, gradients=every)
    yield example("unread variance", 2, 64, rows=0, variance=unread, gradients=(*every, "grad_variance"))
    more = {"table": bounds, "variance": special, "gradients": ("grad_output", "grad_variance")}
    yield example(
        "NaN as variance", 3, 64, rows=[0, 3, 1], **more | {"variance": special.nan_to_num(posinf=0.0, nan=math.nan)}
    )
    yield example("unread x0", 2, 64, rows=0, x0=unread, gradients=every)
    yield example("no noise", 2, 9, rows=1, seed=None, gradients=every)
    yield example("small residuals", *shape, rows=1, seed=None, x0=x0, model_output=x0 + 0.01 * tensor(*shape))
    huber = make_table([{"x0": 1.0, "huber_c": c} for c in (1e-3, 0.1, 10.0, 1e4, math.inf)])
    yield example("from absolute to squared", *shape, rows=[0, 1, 2, 3, 4], table=huber, seed=None, gradients=every)
    far = 1e30 * tensor(5, 64, like=torch.float32)
    yield example("far away", 5, 64, rows=0, model_output=far.to(dtype if dtype != torch.float16 else torch.float32),
                  table=make_table([{"x0": 1.0, "huber_c": 0.5}]), seed=None)  # fmt: skip


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    """A loss with its gradient by Philox, and with noise given."""
    table = make_table([{"noise": 1.0}])
    sizes = {"latents": (2, 4, 64, 64), "a batch of latents": (64, 4, 64, 64)}
    for name, size in sizes.items():
        output, x0, noise = (torch.randn(size).to(dtype) for _ in range(3))
        arguments = {
            "model_output": output, "x0": x0, "table": table, "rows": torch.tensor(0), "out": torch.empty(size[0]),
            "grad_output": torch.empty_like(output),
        }  # fmt: skip
        yield Example(name, arguments | {"seed": torch.tensor([42])})
        yield Example(f"{name}, noise given", arguments | {"noise": noise})


def _bytes_moved(example: Example) -> int:
    """The benchmarks' row does not read x0."""
    names = ("model_output", "noise", "grad_output")
    return tensor_bytes(*(example.arguments.get(name) for name in names))


DIFFUSION_LOSS = OpSpec(
    name="diffusion_loss",
    function=diffusion_loss,
    reference=lambda **arguments: diffusion_loss_reference(
        **{name: value for name, value in arguments.items() if name not in _OUTPUTS}
    ),
    operator=_kernel,
    outputs=_OUTPUTS,
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=_bytes_moved,
    flops=lambda example: 10 * example.arguments["x0"].numel(),
    benchmarks=_benchmarks,
)
