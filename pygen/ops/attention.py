"""attention: softmax(q k^T scale + mask) v of many queries, as scaled_dot_product_attention (Vaswani et al. 2017).

Computed a block of keys at a time with a running maximum (FlashAttention, Dao et al. 2022), the products by torch's
blocked matrix product on packed keys and values. Weights are dropped by numbers of Philox that belong to them
(Srivastava et al. 2014), which the backward pass draws again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pygen import _C
from pygen.ops.backend import triton_kernels, use_reference, use_triton
from pygen.ops.philox_normal import philox_words
from pygen.ops.spec import Example, OpSpec, index_tensor, tensor_bytes

_BACKENDS = ("reference", "cpu", "triton")
_WORD = 0xFFFFFFFF
# mask, lengths, causal, window, scale, dropout_p, seed, step, sample_ids
Settings = tuple[
    Tensor | None, Tensor | None, bool, int | None, float | None, float, Tensor | None, Tensor | None, Tensor | None
]  # fmt: skip


MOST_HEAD_DIM = {"cpu": 512, "cuda": 256}
MOST_WITH_DROPOUT = {"heads": 1 << 12, "queries": 1 << 24, "keys": 8 << 24}  # whose weights have numbers of their own


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of q over k and v; layouts and terms are scaled_dot_product_attention's. Differentiable in q, k and v.

    A query that sees no key gives zeros. A sample's result does not depend on the others, nor on the number of threads.
    In bfloat16 the weights are rounded to bfloat16, and sums are float32; float16 is computed in float32. Under
    torch.autocast q, k and v become its dtype, as torch's do.

    Args:
        q: (batch, heads, queries, head_dim), float32, bfloat16 or float16, of any strides; head_dim up to 512, on
            a GPU 256; heads a multiple of kv_heads: query head h reads kv head h // (heads // kv_heads).
        k, v: (batch, kv_heads, keys, head_dim), in q's dtype, of any strides.
        mask: broadcast to (batch, heads, queries, keys): bool, True where a key is seen; or float32 or q's dtype, added
            to the scores.
        lengths: int64 (batch,): how many keys each sample has; what lies behind them is not read.
        causal: query i sees the keys up to i.
        window: and of those, or of all, the ones less than so far from i.
        scale: of q k^T; 1 / sqrt(head_dim) where left out.
        dropout_p: the share of the weights that become 0, rounded to a multiple of 1/65536; the others are divided by
            the share that is kept. Whether a weight is kept depends on the seed, step and id of its sample, its head,
            query and key, and on nothing else; the backward pass draws it again.
        seed: of Philox, one, or int64 (batch,). Where left out, torch's default generator of the device makes one at
            each call, so that ``torch.manual_seed`` decides.
        step: a counter, one, or int64 (batch,): another one drops other weights.
        sample_ids: int64 (batch,), taken modulo 2^32; 0, 1, 2, ... where left out.
        out: q's shape and dtype, receives the result, and nothing is recorded for autograd; new where left out.

    Returns:
        (batch, heads, queries, head_dim) in q's dtype, or ``out``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"attention: dropout_p must lie in [0, 1], got {dropout_p}")
    draw: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if dropout_p:
        seed = torch.randint(2**63 - 1, (1,), device=q.device) if seed is None else index_tensor(seed, q.device)
        draw = (seed, index_tensor(step, q.device), sample_ids)
    settings: Settings = (mask, lengths, causal, window, scale, dropout_p, *draw)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in (q, k, v))
    if out is None:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
            recorded: Tensor = _Attention.apply(q, k, v, *settings)
            return recorded
        out = torch.empty_like(q)
    return attention_forward(q, k, v, *settings, out=out)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
        out = torch.empty_like(q)
        logsumexp = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        attention_forward(q, k, v, *settings, out=out, logsumexp=logsumexp)
        mask, lengths, *ctx.rest, seed, step, sample_ids = settings
        ctx.save_for_backward(q, k, v, out, logsumexp, mask, lengths, seed, step, sample_ids)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = tuple(torch.empty_like(tensor) for tensor in saved[:3])
        attention_backward(grad, *saved[:7], *ctx.rest, *saved[7:], *gradients)
        return *gradients, *(None,) * (5 + len(ctx.rest))


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    sample_ids: Tensor | None = None,
    *,
    out: Tensor,
    logsumexp: Tensor | None = None,
) -> Tensor:
    """``attention`` into ``out``, and what its backward pass needs: the log of the sum of exp of each query's scores.

    logsumexp: float32 (batch, heads, queries), contiguous; -inf where a query sees no key.
    """
    settings: Settings = (mask, lengths, causal, window, scale, dropout_p, seed, step, sample_ids)
    if use_reference("attention", _BACKENDS, q.device):
        for tensor, result in zip((out, logsumexp), attention_reference(q, k, v, *settings), strict=True):
            if tensor is not None:
                tensor.copy_(result)
        return out
    run = _triton if use_triton("attention", q.device) else _kernel
    run(q, k, v, *settings, out, logsumexp)
    return out


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_ids: Tensor | None,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> Tensor:
    """Writes the gradients of q, k and v from that of ``out``; all of the dtype and shapes of what they belong to.

    ``out`` and ``logsumexp`` are those of ``attention_forward``. Deterministic. Returns ``grad_q``.
    """
    draw = (dropout_p, seed, step, sample_ids)
    arguments = (grad, q, k, v, out, logsumexp, mask, lengths, causal, window, scale, *draw)
    if use_reference("attention_backward", _BACKENDS, q.device):
        for tensor, result in zip((grad_q, grad_k, grad_v), attention_backward_reference(*arguments), strict=True):
            tensor.copy_(result)
        return grad_q
    run = _triton_backward if use_triton("attention_backward", q.device) else _backward_kernel
    run(*arguments, grad_q, grad_k, grad_v)
    return grad_q


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The result, and logsumexp; in float32 or better, but for bfloat16's weights."""
    _, _, v_seen, scores = _scores(q, k, v, mask, lengths, causal, window, scale)
    weights = torch.where((scores == -math.inf).all(-1, keepdim=True), 0, scores.softmax(-1))
    weights = _dropout(weights, dropout_p, seed, step, sample_ids)
    return (_rounded(weights, q.dtype) @ v_seen).to(q.dtype), scores.logsumexp(-1)


def attention_backward_reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; in float32 or better, but for bfloat16's weights and their gradients."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    q_wide, k_seen, v_seen, scores = _scores(q, k, v, mask, lengths, causal, window, scale)
    grad = grad.to(scores.dtype)
    delta = (grad * out.to(scores.dtype)).sum(-1, keepdim=True)
    weights = torch.where(scores == -math.inf, 0, (scores - logsumexp.to(scores.dtype)[..., None]).exp())
    draw = (dropout_p, seed, step, sample_ids)
    slopes = torch.where(scores == -math.inf, 0, weights * (_dropout(grad @ v_seen.mT, *draw) - delta))
    weights = _dropout(weights, *draw)
    weights, slopes = _rounded(weights, q.dtype), _rounded(slopes, q.dtype)

    def of_group(gradient: Tensor) -> Tensor:
        return gradient.unflatten(1, (k.shape[1], q.shape[1] // k.shape[1])).sum(2).to(q.dtype)

    return (scale * slopes @ k_seen).to(q.dtype), of_group(scale * slopes.mT @ q_wide), of_group(weights.mT @ grad)


def _scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, and k and v of each of its heads, 0 where nothing is seen; and the scores, -inf there."""
    compute = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    k, v = (tensor.to(compute).repeat_interleave(groups, dim=1) for tensor in (k, v))
    ahead = torch.arange(k.shape[2], device=q.device) - torch.arange(q.shape[2], device=q.device)[:, None]
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        seen = seen & (ahead <= 0)
    if window is not None:
        seen = seen & (ahead.abs() < window)
    if lengths is not None:
        within = torch.arange(k.shape[2], device=q.device) < lengths.view(-1, 1, 1, 1)
        seen = seen & within
        k, v = (torch.where(within.mT, tensor, 0) for tensor in (k, v))
    q = q.to(compute)
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask.to(compute)
    return q, k, v, torch.where(seen, scores, -math.inf)


def _dropout(weights: Tensor, p: float, seed: Tensor | None, step: Tensor | None, sample_ids: Tensor | None) -> Tensor:
    """(batch, heads, queries, keys): 0 where a weight's number is among the first p of 2^16, the others by their share
    more."""
    dropped = round(p * 65536)
    if not dropped:
        return weights
    kept = dropout_numbers(weights.shape, seed, step, sample_ids) >= dropped
    return torch.where(kept, weights / (1 - dropped / 65536), 0) if dropped < 65536 else torch.zeros_like(weights)


def dropout_numbers(size: Sequence[int], seed: Tensor | None, step: Tensor | None, sample_ids: Tensor | None) -> Tensor:
    """A number of 16 bits for each weight: eight keys of a query share a block of Philox, and its four words."""
    assert seed is not None
    (batch, _, _, keys), device = size, seed.device
    head, query, eight = torch.meshgrid(
        *(torch.arange(n, device=device) for n in (*size[1:3], (keys + 7) // 8)), indexing="ij"
    )
    block, draw = query << 24 | eight, _C.DRAW_DROPOUT | head
    samples = torch.arange(batch, device=device) if sample_ids is None else sample_ids
    seed, steps, samples = (
        number.reshape(-1, 1, 1, 1) for number in (seed, torch.zeros_like(seed) if step is None else step, samples)
    )
    counter = (block & _WORD, block >> 32 | draw << 16, steps & _WORD, samples & _WORD)
    words = philox_words(torch.broadcast_tensors(*counter), seed)
    return torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1).flatten(3)[..., :keys]


def _rounded(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """What a product of bfloat16 takes."""
    return weights.to(dtype).to(weights.dtype) if dtype == torch.bfloat16 else weights


_kernel = torch.ops.pygen.attention.default
_backward_kernel = torch.ops.pygen.attention_backward.default


@torch.library.register_fake("pygen::attention")
def _fake(*arguments: object) -> None:
    return None


@torch.library.register_fake("pygen::attention_backward")
def _fake_backward(*arguments: object) -> None:
    return None


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_ids: Tensor | None,
    out: Tensor,
    logsumexp: Tensor | None,
) -> None:
    _check(q, k, v, mask, lengths, window, out)
    if not q.numel():
        return
    dropout = _dropout_for_triton(q, k, dropout_p, seed, step, sample_ids)
    how = (*_for_triton(q, k, mask, lengths, causal, window, scale), dropout)
    with torch.cuda.device_of(q):
        triton_kernels("attention").launch(q, k, v, *how, out, logsumexp)


def _triton_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_ids: Tensor | None,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    _check(q, k, v, mask, lengths, window, out, grad, grad_q)
    if not q.shape[0]:
        return
    dropout = _dropout_for_triton(q, k, dropout_p, seed, step, sample_ids)
    how = (*_for_triton(q, k, mask, lengths, causal, window, scale), dropout)
    gradients, delta = (grad_q, grad_k, grad_v), torch.empty_like(logsumexp)
    with torch.cuda.device_of(q):
        triton_kernels("attention_backward").launch(grad, q, k, v, out, logsumexp, delta, *how, *gradients)


torch.library.impl("pygen::attention", "CUDA", _triton)
torch.library.impl("pygen::attention_backward", "CUDA", _triton_backward)


def _for_triton(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor | None, Tensor | None, tuple[int, int], float, str]:
    """mask and lengths, how far before and behind a query sees, the scale, and which tiles are taken."""
    band = triton_kernels("attention").BAND
    before = band if window is None else min(window - 1, band)
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    scale = q.shape[3] ** -0.5 if scale is None else scale
    groups = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] in (9, 10)
    lengths = None if lengths is None else lengths.contiguous()
    return mask, lengths, (before, 0 if causal else before), scale, "warpgroup" if groups else "warp"


def _dropout_for_triton(
    q: Tensor, k: Tensor, p: float, seed: Tensor | None, step: Tensor | None, sample_ids: Tensor | None
) -> Any:
    """What weights are dropped by, if some are; checked."""
    dropped = round(p * 65536)
    if not dropped:
        return None
    if seed is None:
        raise ValueError("attention: dropout needs a seed")
    for (name, most), got in zip(MOST_WITH_DROPOUT.items(), (*q.shape[1:3], k.shape[2]), strict=True):
        if got > most:
            raise ValueError(f"attention: dropout takes up to {most} {name}, got {got}")
    for name, numbers in (("seed", seed), ("step", step), ("sample_ids", sample_ids)):
        if numbers is None:
            continue
        if numbers.dtype != torch.int64 or numbers.device != q.device or numbers.shape not in ((), (1,), q.shape[:1]):
            raise ValueError(
                f"attention: {name} must be int64 ({q.shape[0]},) on {q.device}, or hold one number, got "
                f"{numbers.dtype} {list(numbers.shape)} on {numbers.device}"
            )
    return triton_kernels("attention").dropout_of(_C.DRAW_DROPOUT, dropped, q.shape[0], seed, step, sample_ids)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    window: int | None,
    *like_q: Tensor,
) -> None:
    """What csrc checks for the CPU."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"attention: {name} must have shape (batch, heads, length, head_dim), got {tensor.shape}")
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"attention: q must be float32, bfloat16 or float16, got {q.dtype}")
    (batch, heads, _, head_dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    if not 1 <= head_dim <= MOST_HEAD_DIM["cuda"]:
        raise ValueError(f"attention: head_dim must be 1 to {MOST_HEAD_DIM['cuda']}, got {head_dim}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"attention: q has {heads} heads, not a multiple of k's {kv_heads}")
    of_keys, of_queries = (batch, kv_heads, keys, head_dim), tuple(q.shape)
    sizes = [
        ("k", k, of_keys),
        ("v", v, of_keys),
        *(("out and its gradients", tensor, of_queries) for tensor in like_q),
    ]
    for name, tensor, size in sizes:
        if tensor.shape != size or tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"attention: {name} must be {q.dtype} {list(size)} on {q.device}, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise TypeError(f"attention: mask must be bool, float32 or of q's dtype {q.dtype}, got {mask.dtype}")
    if lengths is not None and (lengths.shape != (batch,) or lengths.dtype != torch.int64):
        raise ValueError(f"attention: lengths must be int64 ({batch},), got {lengths.dtype} {list(lengths.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be positive, got {window}")
    for name, wide in (("q", q), ("k", k), ("v", v), ("mask", mask)):
        if torch.is_grad_enabled() and wide is not None and wide.requires_grad:
            raise RuntimeError(
                f"attention is not differentiable, and {name} requires grad: call it under torch.no_grad()"
            )


def _examples(dtype: torch.dtype) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(to)

    def called(name: str, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Example:
        defaults = {"mask": None, "lengths": None, "causal": False, "window": None, "scale": None, "dropout_p": 0.0}
        defaults |= dict.fromkeys(("seed", "step", "sample_ids"))
        out, logsumexp = torch.full_like(q, math.nan), torch.full(q.shape[:3], math.nan)
        arguments = {"q": q, "k": k, "v": v} | defaults | more
        return Example(name, arguments | {"out": out, "logsumexp": logsumexp}, own_bits=True)

    def example(
        name: str,
        queries: int,
        keys: int,
        head_dim: int = 40,
        heads: int = 2,
        kv_heads: int = 2,
        batch: int = 2,
        **more: Any,
    ) -> Example:
        k, v = (draw(batch, kv_heads, keys, head_dim) for _ in range(2))
        return called(name, draw(batch, heads, queries, head_dim), k, v, **more)

    def dropouts(seed: Tensor) -> Iterator[Example]:
        for head_dim in (1, 16, 33, 64, 160, 256):
            yield example("dropout, every head_dim", 20, 37, head_dim, dropout_p=0.1, seed=seed)
        for p in (1e-6, 0.001, 0.5, 0.99, 1.0):
            yield example("dropout, every share", 40, 50, dropout_p=p, seed=seed)
        few: dict[str, Any] = {"heads": 1, "kv_heads": 1, "batch": 1, "head_dim": 16, "seed": seed}
        for queries, keys in ((1, 1), (1, 300), (17, 7), (65, 129), (300, 8), (270, 530)):
            yield example("dropout, every length", queries, keys, dropout_p=0.2, **few)
        yield example("dropout, blocks of keys", 20, 600, dropout_p=0.3, **few)
        yield example("dropout, blocks of queries", 600, 20, dropout_p=0.3, **few)
        yield example("dropout, causal", 65, 70, causal=True, dropout_p=0.3, seed=seed)
        yield example("dropout, window", 60, 70, window=20, dropout_p=0.3, seed=seed)
        yield example("dropout, causal window", 50, 70, window=9, causal=True, dropout_p=0.3, seed=seed)
        yield example("dropout, lengths", 30, 70, lengths=torch.tensor([70, 35]), dropout_p=0.3, seed=seed)
        yield example("dropout, no keys of one", 20, 30, lengths=torch.tensor([0, 30]), dropout_p=0.3, seed=seed)
        yield example("dropout, groups", 40, 50, heads=6, kv_heads=2, head_dim=16, dropout_p=0.3, seed=-seed)
        small = torch.rand(2, 2, 20, 40, generator=generator)
        for name, mask in (("bool mask", small > 0.3), ("mask", small.log())):
            yield example(f"dropout, {name}", 20, 40, 16, mask=mask, dropout_p=0.3, seed=seed)
        yield example(
            "dropout, samples of their own", 40, 50, dropout_p=0.3, seed=torch.tensor([4, -1]),
            step=torch.tensor([3, 9]), sample_ids=torch.tensor([2**32 - 1, 7]),
        )  # fmt: skip
        yield example("dropout, a step", 40, 50, dropout_p=0.3, seed=seed, step=torch.tensor([5]))

    for head_dim in (1, 2, 3, 15, 16, 17, 31, 33, 40, 64, 72, 80, 96, 127, 128, 160, 256):
        yield example("every head_dim", 70, 77, head_dim)
    for queries, keys in ((1, 1), (1, 300), (15, 16), (17, 33), (64, 128), (65, 129), (130, 257), (300, 77)):
        yield example("every length", queries, keys)
        yield example("causal", queries, keys, causal=True)
        yield example("window", queries, keys, window=20)
        yield example("causal window", queries, keys, window=1 + queries // 3, causal=True)
        yield example("lengths", queries, keys, lengths=torch.tensor([keys, keys // 2]))
    for heads, kv_heads in ((1, 1), (6, 2), (8, 1)):
        yield example("groups", 40, 50, heads=heads, kv_heads=kv_heads)
    drawn = torch.rand(2, 2, 70, 150, generator=generator)
    masks = {
        "bool mask": drawn > 0.3, "bool mask of keys": drawn[:, :1, :1] > 0.5, "mask": drawn.log(),
        "mask of heads": (8 * drawn[:1, :, :1]).to(dtype),
        "mask by columns": drawn.transpose(2, 3).contiguous().transpose(2, 3),
        "nothing seen": (drawn > 0.5) & (torch.arange(70)[:, None] % 7 > 0),
    }  # fmt: skip
    for name, mask in masks.items():
        yield example(name, 70, 150, mask=mask)
        yield example(f"{name}, causal", 70, 150, mask=mask, causal=True)
    yield from dropouts(torch.tensor([0x0123456789ABCDEF]))
    yield example("scale", 40, 50, scale=0.7)
    yield example("no keys", 5, 0)
    yield example("no keys of one", 20, 30, lengths=torch.tensor([0, 30]))
    behind = example("NaN behind the lengths", 20, 300, lengths=torch.tensor([130, 7]))
    for name in ("k", "v"):
        behind.arguments[name][0, :, 130:], behind.arguments[name][1, :, 7:] = math.nan, math.nan
    yield behind
    large = example("large scores", 40, 300)
    large.arguments["q"] *= 60
    yield large
    special = example("NaN and Inf", 40, 150, heads=6, kv_heads=6)
    special.arguments["logsumexp"] = None  # where a score is infinite, NaN is as good as infinity
    special.arguments["q"][0, 0, 3, 5] = special.arguments["k"][0, 1, 140, 2] = math.nan
    special.arguments["v"][0, 2, 9, 4], special.arguments["v"][0, 3, 9, 4] = math.inf, math.nan
    special.arguments["q"][0, 4, :, 0], special.arguments["k"][0, 4, 10, 0] = 1.0, math.inf
    special.arguments["q"][0, 5, :, 0], special.arguments["k"][0, 5, 10, 0] = 1.0, -math.inf
    yield special
    strided = example("(batch, length, heads, head_dim)", 70, 77, 64)
    for name in ("q", "k", "v", "out"):
        strided.arguments[name] = strided.arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    yield strided
    columns = example("head_dim strided", 20, 40, 24)
    for name in ("q", "k", "v", "out"):
        columns.arguments[name] = columns.arguments[name].transpose(2, 3).contiguous().transpose(2, 3)
    yield columns
    fused = draw(2, 50, 3, 4, 40).permute(2, 0, 3, 1, 4)
    yield called("latents", *fused)
    yield example("no batch", 5, 7, batch=0)


def _benchmarks(dtype: torch.dtype) -> Iterator[Example]:
    """Of U-Nets (Stable Diffusion 1.5 and XL at 64 x 64) and of diffusion transformers."""
    for batch, heads, queries, keys, head_dim in (
        (2, 8, 256, 256, 160), (2, 8, 4096, 77, 40), (2, 8, 1024, 1024, 80), (2, 10, 1024, 1024, 64),
        (2, 20, 1024, 1024, 64), (1, 16, 1024, 1024, 72), (2, 24, 1280, 1280, 128), (1, 8, 4096, 4096, 40),
    ):  # fmt: skip
        q = torch.randn(batch, heads, queries, head_dim).to(dtype)
        k, v = (torch.randn(batch, heads, keys, head_dim).to(dtype) for _ in range(2))
        settings = {"mask": None, "lengths": None, "causal": False, "window": None, "scale": None, "dropout_p": 0.0}
        settings |= dict.fromkeys(("seed", "step", "sample_ids"))
        name = f"{batch} x {heads}, {queries} over {keys}, {head_dim}"
        yield Example(name, {"q": q, "k": k, "v": v} | settings | {"out": torch.empty_like(q)}, own_bits=True)


SPEC = OpSpec(
    name="attention",
    function=attention_forward,
    reference=lambda out=None, logsumexp=None, **arguments: attention_reference(**arguments),
    operator=_kernel,
    outputs=("out", "logsumexp"),
    backends=_BACKENDS,
    examples=_examples,
    bytes_moved=lambda example: tensor_bytes(*(example.arguments[name] for name in ("q", "k", "v", "out"))),
    flops=lambda example: 4 * example.arguments["q"].numel() * example.arguments["k"].shape[2],
    benchmarks=_benchmarks,
)


def _backward_of(examples: Iterator[Example]) -> Iterator[Example]:
    """The backward pass of forward examples, of what the reference makes of them."""
    generator = torch.Generator().manual_seed(1)
    for example in examples:
        if example.name in ("NaN and Inf", "large scores"):  # whose gradients are of rounding errors
            continue
        arguments = {name: value for name, value in example.arguments.items() if name not in ("out", "logsumexp")}
        out, logsumexp = attention_reference(**arguments)
        grad = torch.empty_like(arguments["q"])
        grad.copy_(torch.randn(grad.shape, generator=generator))
        gradients = {f"grad_{name}": torch.full_like(arguments[name], math.nan) for name in ("q", "k", "v")}
        given = {"grad": grad} | arguments | {"out": out, "logsumexp": logsumexp.float()} | gradients
        yield Example(example.name, given, own_bits=True)


BACKWARD_SPEC = OpSpec(
    name="attention_backward",
    function=attention_backward,
    reference=lambda grad_q=None, grad_k=None, grad_v=None, **arguments: attention_backward_reference(**arguments),
    operator=_backward_kernel,
    outputs=("grad_q", "grad_k", "grad_v"),
    backends=_BACKENDS,
    examples=lambda dtype: _backward_of(_examples(dtype)),
    bytes_moved=lambda example: 2 * tensor_bytes(*(example.arguments[name] for name in ("q", "k", "v", "out"))),
    flops=lambda example: 10 * example.arguments["q"].numel() * example.arguments["k"].shape[2],
    benchmarks=lambda dtype: _backward_of(_benchmarks(dtype)),
)
