"""rope: rotary position embedding (Su et al. 2021), by a table of cosines and sines; after an RMSNorm over each head
(QK-norm, Henry et al. 2020) where there is one.

Element pairs (a, b) of a head at position p are turned by the angles p * inv_freq:

    a' = a cos - b sin,    b' = a sin + b cos

The table is made on the host in float64 and read by position: at position 10^6 a float32 product of position and
frequency is off by hundredths of a radian, and a kernel that reads an exact cosine does less than one that makes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pygen.ops.backend import use_reference
from pygen.ops.row_norm import row_norm_backward, with_rows
from pygen.ops.spec import Example, OpSpec, tensor_bytes

_BACKENDS = ("reference", "cpu", "cuda")


def rope(
    x: Tensor,
    positions: Tensor,
    table: Tensor,
    *,
    interleaved: bool = False,
    inverse: bool = False,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> Tensor:
    """x with the first 2 * pairs elements of every head turned by its token's position; the others as they are.

    Differentiable with respect to ``x``, any number of times; with a norm once, and with respect to that too.

    Args:
        x: (batch, heads, length, head_dim), float32, bfloat16 or float16, contiguous in head_dim, of up to 1024;
            arithmetic is float32.
        positions: int64, read through a pointer: (length,) or (batch, length); or one, or (batch, 1): the position of
            the first token, from which the others count on. On a GPU, a position outside the table makes NaN.
        table: float32 (positions, 2, pairs), as ``rope_table`` makes it.
        interleaved: pairs are neighbours, as in GPT-J; else elements i and pairs + i, as in Llama and GPT-NeoX.
        inverse: turn by the negative angles, as the backward pass does.
        norm: (head_dim,), the weights of an RMSNorm over every head before that, in x's dtype or float32.
        eps: of the norm.
        out: receives the result; may be x itself. Where it is given, nothing is recorded for autograd.

    Returns:
        the result, in ``out``.

    Raises:
        ValueError, TypeError, IndexError: naming the argument.
    """
    if out is None:
        learns = x.requires_grad or (norm is not None and norm.requires_grad)
        if learns and torch.is_grad_enabled():
            given = (x, positions, table, interleaved, inverse)
            turned: Tensor = _Rope.apply(*given) if norm is None else _NormedRope.apply(*given, norm, eps)
            return turned
        out = torch.empty_like(x)
    if use_reference("rope", _BACKENDS, x.device):
        kind: dict[str, Any] = {"interleaved": interleaved, "inverse": inverse, "norm": norm, "eps": eps}
        return out.copy_(rope_reference(x, positions, table, **kind))
    _kernel(x, positions, table, interleaved, inverse, norm, eps, out)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, table: Tensor, interleaved: bool, inverse: bool) -> Tensor:
        ctx.save_for_backward(positions, table)
        ctx.interleaved, ctx.inverse = interleaved, inverse
        return rope(x, positions, table, interleaved=interleaved, inverse=inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        positions, table = ctx.saved_tensors
        if grad.stride(-1) != 1:  # as that of a sum, which is expanded
            grad = grad.contiguous()
        return (
            rope(grad, positions, table, interleaved=ctx.interleaved, inverse=not ctx.inverse),
            None,
            None,
            None,
            None,
        )


class _NormedRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        positions: Tensor,
        table: Tensor,
        interleaved: bool,
        inverse: bool,
        norm: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, positions, table, norm)
        ctx.interleaved, ctx.inverse, ctx.eps = interleaved, inverse, eps
        return rope(x, positions, table, interleaved=interleaved, inverse=inverse, norm=norm, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, positions, table, norm = ctx.saved_tensors
        of_normed = rope(with_rows(grad), positions, table, interleaved=ctx.interleaved, inverse=not ctx.inverse)
        grad_x, grad_norm = (
            torch.empty_like(of) if wanted else None
            for of, wanted in ((x, ctx.needs_input_grad[0]), (norm, ctx.needs_input_grad[5]))
        )
        row_norm_backward(x, of_normed, norm, ctx.eps, 0.0, False, None, grad_x, grad_norm, None)
        return grad_x, None, None, None, None, grad_norm, None


def rope_reference(
    x: Tensor,
    positions: Tensor,
    table: Tensor,
    *,
    interleaved: bool = False,
    inverse: bool = False,
    norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    rows = table.to(compute)[token_positions(positions, x.shape[0], x.shape[2])]
    cosine, sine = rows[:, None].unbind(-2)
    if inverse:
        sine = -sine
    y, pairs = x.to(compute), table.shape[2]
    if norm is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * norm.to(compute)
    turned, rest = y[..., : 2 * pairs], y[..., 2 * pairs :]
    a, b = turned.unflatten(-1, (pairs, 2)).unbind(-1) if interleaved else turned.chunk(2, dim=-1)
    results = (a * cosine - b * sine, a * sine + b * cosine)
    turned = torch.stack(results, dim=-1).flatten(-2) if interleaved else torch.cat(results, dim=-1)
    return torch.cat((turned, rest), dim=-1).to(x.dtype)


def token_positions(positions: Tensor, batch: int, length: int) -> Tensor:
    """The position of every token, (batch, length), from what ``rope`` takes."""
    if positions.dim() == 0 or positions.shape[-1] == 1:
        positions = positions.reshape(-1, 1) + torch.arange(length, device=positions.device)
    return positions.expand(batch, length)


_kernel = torch.ops.pygen.rope.default


@torch.library.register_fake("pygen::rope")
def _fake(*arguments: object) -> None:
    return None


def rope_table(
    inv_freq: Tensor, positions: int, *, attention_factor: float = 1.0, device: torch.device | str | None = None
) -> Tensor:
    """The cosines and sines of positions 0, 1, ... times ``inv_freq``, and times ``attention_factor``.

    Computed in float64 on the host; float32 (positions, 2, pairs).
    """
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * inv_freq.to("cpu", torch.float64)
    table = torch.empty(positions, 2, len(inv_freq))
    table[:, 0] = angles.cos().mul_(attention_factor)
    table[:, 1] = angles.sin_().mul_(attention_factor)
    return table.to(device)


def rope_frequencies(
    head_dim: int,
    parameters: Mapping[str, Any] | None = None,
    *,
    max_position_embeddings: int | None = None,
    seq_len: int | None = None,
) -> tuple[Tensor, float]:
    """Inverse frequencies and the attention factor, for ``rope_table``.

    Args:
        head_dim: of the model.
        parameters: a configuration's ``rope_parameters``, by the names of transformers 5: ``rope_theta`` (10000),
            ``partial_rotary_factor`` (1) and ``rope_type``, which is "default"; "linear" (``factor``); "dynamic"
            (``factor``: NTK-aware, bloc97 and emozilla 2023); "yarn" (Peng et al. 2023: ``factor``, ``beta_fast``,
            ``beta_slow``, ``truncate``, ``attention_factor``, ``mscale``, ``mscale_all_dim``); "llama3" (``factor``,
            ``low_freq_factor``, ``high_freq_factor``); or "longrope" (Ding et al. 2024: ``short_factor``,
            ``long_factor``, ``factor``, ``attention_factor``). The last three know the length that the model was
            trained at as ``original_max_position_embeddings``.
        max_position_embeddings: of the configuration; for "dynamic", and what ``factor`` is taken from where "yarn" and
            "longrope" leave it out.
        seq_len: how long the sequence is to become: "dynamic" stretches by it, "longrope" chooses its factors by it.

    Returns:
        float64 (pairs,) on the CPU, and the factor.

    Raises:
        ValueError: naming the parameter.
    """
    given = dict(parameters or {})
    kind = given.get("rope_type", "default")
    if kind not in _SCALINGS:
        raise ValueError(f"rope_frequencies: rope_type must be one of {', '.join(_SCALINGS)}, got {kind!r}")
    given |= {"max_position_embeddings": max_position_embeddings, "seq_len": seq_len}
    if given.get("original_max_position_embeddings") is None:
        given["original_max_position_embeddings"] = max_position_embeddings
    dim = int(head_dim * given.get("partial_rotary_factor", 1.0))
    if dim < 2 or dim % 2 != 0:
        raise ValueError(f"rope_frequencies: head_dim * partial_rotary_factor must be even and positive, got {dim}")
    theta = given.get("rope_theta", 10000.0)
    return _SCALINGS[kind](_Parameters(kind, given), float(theta), dim)


class _Parameters:
    def __init__(self, kind: str, values: Mapping[str, Any]) -> None:
        self.kind, self.values = kind, values

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def __getitem__(self, name: str) -> Any:
        value = self.values.get(name)
        if value is None:
            raise ValueError(f"rope_frequencies: rope_type {self.kind!r} needs {name}")
        return value

    def factor(self) -> float:
        """By how much the context grows."""
        factor: float | None = self.values.get("factor")
        return self["max_position_embeddings"] / self["original_max_position_embeddings"] if factor is None else factor


def _powers(theta: float, dim: int) -> Tensor:
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _default(given: _Parameters, theta: float, dim: int) -> tuple[Tensor, float]:
    return _powers(theta, dim), 1.0


def _linear(given: _Parameters, theta: float, dim: int) -> tuple[Tensor, float]:
    return _powers(theta, dim) / given["factor"], 1.0


def _dynamic(given: _Parameters, theta: float, dim: int) -> tuple[Tensor, float]:
    trained, factor = given["max_position_embeddings"], given["factor"]
    stretch = factor * max(given.get("seq_len", trained), trained) / trained - (factor - 1)
    return _powers(theta * stretch ** (dim / (dim - 2)), dim), 1.0


def _yarn(given: _Parameters, theta: float, dim: int) -> tuple[Tensor, float]:
    factor, trained = given.factor(), given["original_max_position_embeddings"]

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    def place(rotations: float) -> float:
        """The frequency, counted from the fastest, that makes so many rotations over the trained length."""
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(given.get("beta_fast", 32)), place(given.get("beta_slow", 1))
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64) - low) / ((high - low) or 0.001)
    slowed = ramp.clamp(0, 1)
    powers = _powers(theta, dim)
    attention_factor = magnitude(1.0)
    if given.get("mscale") and given.get("mscale_all_dim"):
        attention_factor = magnitude(given["mscale"]) / magnitude(given["mscale_all_dim"])
    return powers * (1 - slowed) + powers / factor * slowed, given.get("attention_factor", attention_factor)


def _llama3(given: _Parameters, theta: float, dim: int) -> tuple[Tensor, float]:
    factor, low, high = given["factor"], given["low_freq_factor"], given["high_freq_factor"]
    powers = _powers(theta, dim)
    rotations = given["original_max_position_embeddings"] * powers / (2 * math.pi)  # over the trained length
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return powers * kept + powers / factor * (1 - kept), 1.0


def _longrope(given: _Parameters, theta: float, dim: int) -> tuple[Tensor, float]:
    factor, trained = given.factor(), given["original_max_position_embeddings"]
    name = "long_factor" if given.get("seq_len", 0) > trained else "short_factor"
    divisors = torch.tensor(given[name], dtype=torch.float64)
    if divisors.shape != (dim // 2,):
        raise ValueError(f"rope_frequencies: {name} must hold {dim // 2} numbers, got {len(divisors)}")
    attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    return _powers(theta, dim) / divisors, given.get("attention_factor", attention_factor)


_SCALINGS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def tensor(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    def example(name: str, x: Tensor, positions: Any, pairs: int | None = None, **more: Any) -> Example:
        table = rope_table(rope_frequencies(x.shape[-1] // 2 * 2 if pairs is None else 2 * pairs)[0], 50)
        arguments = {
            "x": x,
            "positions": torch.as_tensor(positions),
            "table": table,
            "interleaved": False,
            "inverse": False,
            "norm": None,
            "eps": 1e-6,
        }
        return Example(name, arguments | {"out": torch.full_like(x, math.nan)} | more)

    for interleaved in (False, True):
        kind = {"interleaved": interleaved}
        for head_dim in (2, 3, 4, 6, 8, 15, 16, 18, 30, 32, 33, 34, 62, 64, 66, 80, 96, 100, 128, 192, 256, 258):
            yield example("every head_dim", tensor(1, 3, 2, head_dim), [7, 49], **kind)
            for pairs in {1, head_dim // 8, head_dim // 4, head_dim // 2 - 1} - {0}:
                if 2 * pairs <= head_dim:
                    yield example("partial", tensor(1, 2, 3, head_dim), [0, 1, 31], pairs, **kind)
        for length in (1, 2, 15, 16, 17, 33):
            yield example("every length", tensor(2, 3, length, 24), [list(range(7, 7 + length))], **kind)
        yield example("inverse", tensor(2, 3, 5, 40), [4, 3, 2, 1, 0], inverse=True, **kind)
        yield example("head_dim 1024", tensor(1, 1, 3, 1024), [4, 3, 2], **kind)
        x = tensor(2, 4, 3, 32)
        yield example("in place", x, [[0], [5]], out=x, **kind)
        for head_dim in (2, 3, 16, 18, 33, 64, 80, 128, 258, 1024):
            x, norm = tensor(1, 3, 18, head_dim), tensor(head_dim)
            yield example("normed", x, list(range(18)), norm=norm, eps=1e-5, **kind)
        x, norm = tensor(2, 5, 9, 40).transpose(1, 2), torch.randn(40, generator=generator)
        yield example("normed in place, in part", x, [0, 3, 1, 2, 4], 8, norm=norm, out=x, **kind)
    yield example("rows differ", tensor(3, 2, 2, 64), [[0, 1], [48, 49], [3, 3]])
    yield example("count on", tensor(3, 2, 20, 64), [[0], [30], [3]])
    yield example("count on, one for all", tensor(3, 2, 20, 64), 11)
    yield example("tokens before heads", tensor(2, 20, 4, 64).transpose(1, 2), list(range(20)))
    fused = tensor(2, 20, 12 * 64).unflatten(-1, (12, 64)).transpose(1, 2)
    yield example("part of a fused projection", fused[:, 8:10], list(range(20)))
    yield example("misaligned", tensor(1 + 2 * 3 * 4 * 48)[1:].view(2, 3, 4, 48), [9, 8, 7, 6])
    reversed_out = torch.full((4, 3, 2, 32), math.nan, dtype=dtype).permute(2, 1, 0, 3)
    yield example("out of other strides", tensor(2, 3, 4, 32), [9, 8, 7, 6], out=reversed_out)
    strided = torch.stack([torch.arange(6), torch.zeros(6)], dim=1).long()[:, 0]
    yield example("strided positions", tensor(1, 3, 6, 32), strided)
    table = rope_table(rope_frequencies(32)[0], 100, attention_factor=1.3)
    yield example("strided table, and a factor", tensor(1, 3, 2, 32), [7, 40], table=table[::2])
    special = tensor(2, 3, 4, 32)
    special[0, 0, :, 3], special[0, 1, :, 17], special[1, 2, 0, 0] = math.nan, math.inf, -math.inf
    yield example("NaN and Inf", special, [5, 6, 7, 8])
    yield example("NaN and Inf, partial", special, [5, 6, 7, 8], 8)
    yield example("NaN and Inf, normed", special, [5, 6, 7, 8], 8, norm=tensor(32))
    yield example("empty batch", tensor(0, 3, 4, 32), [5, 6, 7, 8])


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    """A token of a batch, and a prompt, as a fused projection gives them."""
    table = rope_table(rope_frequencies(128)[0], 8192)
    for name, batch, length in (("a token", 1, 1), ("a token, batch 64", 64, 1), ("a prompt", 1, 4096)):
        x = torch.randn(batch, length, 32, 128).to(dtype).transpose(1, 2)
        positions = torch.full((batch, 1), 1000)
        given = {"x": x, "positions": positions, "table": table, "out": torch.empty_like(x)}
        yield Example(name, given)
        yield Example(f"{name}, normed", given | {"norm": torch.randn(128).to(dtype)})


def _bytes_moved(example: Example) -> int:
    """x, out and every token's row of the table."""
    x, table = example.arguments["x"], example.arguments["table"]
    return tensor_bytes(x, example.arguments["out"]) + x.shape[0] * x.shape[2] * tensor_bytes(table[0])


ROPE = OpSpec(
    name="rope",
    function=rope,
    reference=lambda out, **arguments: (rope_reference(**arguments),),
    operator=_kernel,
    outputs=("out",),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=_bytes_moved,
    flops=lambda example: 3 * example.arguments["x"].numel(),
    benchmarks=_benchmarks,
)
