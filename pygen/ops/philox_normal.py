"""philox_normal: standard normals that belong to their sample, the same in any batch and on any device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pygen import _C
from pygen.ops.backend import use_reference
from pygen.ops.spec import Example, OpSpec, index_tensor, tensor_bytes

# The top four bits of a draw name the op that draws.
DRAW_AFFINE_STEP: int = _C.DRAW_AFFINE_STEP
_BACKENDS = ("reference", "cpu", "cuda")
_WORD = 0xFFFFFFFF


def philox_normal(
    size: Sequence[int] | None = None,
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    out: Tensor | None = None,
) -> Tensor:
    """Standard normals by Philox-4x32-10 (Salmon et al. 2011) and Box-Muller.

    A number depends on the seed, its sample's id, the step, the draw, and its logical index within the sample; not on
    the batch, strides, threads, instruction set or device.

    Args:
        size: the shape, batch first. Left out where ``out`` is given.
        seed: 64 bits, one for all or an int64 tensor of shape (batch,); a tensor is read when the kernel runs.
        step: a counter, one for all or an int64 tensor of shape (batch,).
        sample_ids: int64 (batch,), taken modulo 2^32; 0, 1, 2, ... where left out.
        draw: tells apart several draws of one step, 0 to 4095 (the bits above name the op that draws).
        dtype, device: of the new tensor: float32, bfloat16 or float16.
        out: filled in place, whatever its strides.

    Returns:
        The tensor of normals, ``out`` where given.
    """
    if out is None:
        if size is None:
            raise ValueError("philox_normal: give size or out")
        out = torch.empty(tuple(size), dtype=dtype, device=device)
    elif size is not None and tuple(size) != tuple(out.shape):
        raise ValueError(f"philox_normal: size {tuple(size)} is not the shape of out, {tuple(out.shape)}")
    seed, step = index_tensor(seed, out.device), index_tensor(step, out.device)
    if use_reference("philox_normal", _BACKENDS, out.device):
        return out.copy_(
            philox_normal_reference(out.shape, seed=seed, step=step, sample_ids=sample_ids, draw=draw, dtype=out.dtype)[
                0
            ]
        )
    _kernel(out, seed, step, sample_ids, draw=draw)
    return out


def philox_words(counter: Sequence[Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four int64 tensors of counter words, each in [0, 2^32), to four of random words."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ key0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ key1,
            product0 & _WORD,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def philox_normal_reference(
    size: Sequence[int],
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor]:
    batch, sample_size = size[0], math.prod(size[1:])
    seed = index_tensor(seed, torch.device("cpu")).reshape(-1, 1)
    device = seed.device
    step = index_tensor(step, device).expand(batch)
    sample = (torch.arange(batch, device=device) if sample_ids is None else sample_ids) & _WORD
    block = torch.arange((sample_size + 3) // 4, device=device)
    counter = torch.broadcast_tensors(
        block & _WORD, (block >> 32 & 0xFFFF) | draw << 16, (step & _WORD)[:, None], sample[:, None]
    )
    words = philox_words(counter, seed)

    compute = torch.promote_types(dtype, torch.float32)
    normals = []
    for radius_word, angle_word in (words[0:2], words[2:4]):
        uniform = radius_word.to(compute) * 2.0**-32 + 2.0**-33
        radius = torch.sqrt(-2.0 * torch.log(uniform))
        quadrant, rest = angle_word >> 30, (angle_word << 2) & _WORD
        turn = (rest - (rest >> 31 << 32)).to(compute) * 2.0**-32  # in [-1/2, 1/2) of a quadrant
        angle = (quadrant.to(compute) + turn) * (math.pi / 2)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return (torch.stack(normals, dim=-1).flatten(1)[:, :sample_size].reshape(tuple(size)).to(dtype),)


_kernel = torch.ops.pygen.philox_normal.default


@torch.library.register_fake("pygen::philox_normal")
def _fake(out: Tensor, seed: Tensor, step: Tensor, sample_ids: Tensor | None = None, *, draw: int = 0) -> None:
    return None


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    def example(name: str, out: Tensor, **arguments: object) -> Example:
        return Example(
            name, {"out": out, "seed": torch.tensor([0x0123456789ABCDEF]), "step": torch.tensor([0])} | arguments
        )

    def empty(*size: int) -> Tensor:
        return torch.full(size, math.nan, dtype=dtype)

    for count in range(36):
        yield example("every count", empty(1, count))
    yield example("latents", empty(2, 4, 64, 64), step=torch.tensor([3]))
    yield example("empty batch", empty(0, 4))
    yield example("channels-last", empty(2, 4, 5, 7).to(memory_format=torch.channels_last), draw=5)
    yield example("sliced", empty(3, 100)[:, 7:90:3], seed=torch.tensor([-1]))
    yield example("misaligned", empty(211)[1:].view(2, 105))
    yield example("seeds", empty(3, 50), seed=torch.tensor([4, 2**62, -1]))
    yield example(
        "steps and ids", empty(3, 50), step=torch.tensor([4, 0, 9]), sample_ids=torch.tensor([8, 2**32 - 1, 0])
    )


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    for name, size in {"latents": (2, 4, 64, 64), "a million": (16, 4, 128, 128)}.items():
        out = torch.empty(size, dtype=dtype)
        yield Example(name, {"out": out, "seed": torch.tensor([42]), "step": torch.tensor([3])})


PHILOX_NORMAL = OpSpec(
    name="philox_normal",
    function=philox_normal,
    reference=lambda **arguments: philox_normal_reference(
        arguments["out"].shape, dtype=arguments.pop("out").dtype, **arguments
    ),
    operator=_kernel,
    outputs=("out",),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(example.arguments["out"]),
    flops=lambda example: 30 * example.arguments["out"].numel(),  # Box-Muller's; those of Philox are integers
    benchmarks=_benchmarks,
)
