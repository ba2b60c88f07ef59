"""attention beyond its spec: beside scaled_dot_product_attention, invariance, and what is said of wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import pygen
from tests.error_rule import assert_error_rule

Q, K = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 12, 16)


def drawn(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "head_dim"),
    [(1, 2, 1030, 1030, 40), (2, 8, 300, 77, 40), (1, 4, 256, 256, 160), (1, 3, 520, 777, 128), (1, 2, 400, 515, 72)],
)
def test_errs_no_more_than_torch(
    batch: int, heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype
) -> None:
    q = drawn(batch, heads, queries, head_dim, dtype=dtype)
    k, v = (drawn(batch, heads, keys, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    for causal in (False, True):
        same = scaled_dot_product_attention(q, k, v, is_causal=causal)
        truth = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
        assert_error_rule([(pygen.attention(q, k, v, causal=causal), same, truth)], f"causal: {causal}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sample_does_not_depend_on_the_others_or_the_threads(dtype: torch.dtype) -> None:
    q, k, v = (drawn(3, 4, 300, 40, dtype=dtype, seed=seed) for seed in range(3))
    lengths = torch.tensor([300, 5, 123])
    whole = pygen.attention(q, k, v, lengths=lengths, window=90)
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(pygen.attention(q, k, v, lengths=lengths, window=90), whole)
    torch.set_num_threads(before)
    for b in range(3):
        alone = pygen.attention(q[b : b + 1, 1:3], k[b : b + 1, 1:3], v[b : b + 1, 1:3], lengths=lengths[b : b + 1],
                                window=90)  # fmt: skip
        assert torch.equal(alone, whole[b : b + 1, 1:3])


def test_masks_say_what_the_arguments_say() -> None:
    q, k, v = (drawn(2, 3, 150, 24, seed=seed) for seed in range(3))
    ahead = torch.arange(150) - torch.arange(150)[:, None]
    lengths = torch.tensor([150, 70])
    within = torch.arange(150) < lengths.view(-1, 1, 1, 1)
    for arguments, mask in (
        ({"causal": True}, ahead <= 0),
        ({"window": 30}, ahead.abs() < 30),
        ({"window": 30, "causal": True, "lengths": lengths}, (ahead <= 0) & (ahead > -30) & within),
    ):
        expected = scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(2, 3, 150, 150)).nan_to_num(0.0)
        torch.testing.assert_close(pygen.attention(q, k, v, **arguments), expected)  # type: ignore[arg-type]
        assert torch.equal(pygen.attention(q, k, v, **arguments), pygen.attention(q, k, v, mask=mask))  # type: ignore[arg-type]


def test_records_and_writes_in_place() -> None:
    q, lengths = Q.clone(), torch.tensor([12, 5])
    program = pygen.record(lambda: pygen.attention(q, K, K, lengths=lengths))
    q.copy_(drawn(2, 4, 9, 16, seed=4))
    lengths.copy_(torch.tensor([3, 12]))
    assert torch.equal(program(), pygen.attention(q, K, K, lengths=lengths))
    out = torch.empty(2, 9, 4, 16).transpose(1, 2)
    assert pygen.attention(q, K, K, out=out) is out
    assert torch.equal(out, pygen.attention(q, K, K))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, "q must have shape (batch, heads, length, head_dim)"),
        ({"k": K[..., :8]}, ValueError, "k must have shape [2, 2, 12, 16], got [2, 2, 12, 8]"),
        ({"v": K[:, :, :5]}, ValueError, "v must have shape [2, 2, 12, 16], got [2, 2, 5, 16]"),
        ({"q": Q[:, :3]}, ValueError, "q has 3 heads, not a multiple of k's 2"),
        ({"q": Q.double()}, TypeError, "q must be float32, bfloat16 or float16"),
        ({"v": K.bfloat16()}, TypeError, "v must have q's dtype Float, got BFloat16"),
        (dict.fromkeys("qkv", torch.ones(1, 1, 1, 257)), ValueError, "head_dim must be 1 to 256, got 257"),
        ({"mask": torch.ones(3, 12)}, ValueError, "mask of shape [3, 12] does not broadcast to [2, 4, 9, 12]"),
        ({"mask": torch.ones(9, 12, dtype=torch.int64)}, TypeError, "mask must be bool, float32 or of q's dtype"),
        ({"lengths": torch.tensor([1])}, ValueError, "lengths must have shape (batch,) = (2,)"),
        ({"lengths": torch.tensor([1, 2], dtype=torch.int32)}, TypeError, "lengths must be Long"),
        ({"window": 0}, ValueError, "window must be positive, got 0"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"out": torch.empty(2, 4, 9, 8)}, ValueError, "out must have shape [2, 4, 9, 16]"),
        ({"out": Q}, RuntimeError, "single memory location"),
        ({"q": Q.clone().requires_grad_()}, RuntimeError, "attention is not differentiable, and q requires grad"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        pygen.attention(**({"q": Q, "k": K, "v": K} | arguments))
    assert message in str(caught.value)
