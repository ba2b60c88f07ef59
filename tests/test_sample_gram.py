"""sample_gram beyond its spec: the statistics that follow from it, its order of summation, and wrong arguments."""

from __future__ import annotations

import pytest
import torch

import pygen


def test_norms_variances_and_angles_follow(isa: str) -> None:
    a, b = torch.randn(3, 4, 33, 35) * 2 + 5, torch.randn(3, 4, 33, 35)
    gram = pygen.sample_gram([a, b])
    count = gram[:, 2, 2]
    assert count.tolist() == [4 * 33 * 35] * 3
    flat = a.double().flatten(1)
    torch.testing.assert_close(gram[:, 0, 0].sqrt(), flat.norm(dim=1), rtol=1e-14, atol=0)
    torch.testing.assert_close(gram[:, 0, 2] / count, flat.mean(1), rtol=1e-14, atol=0)
    variance = (gram[:, 0, 0] - gram[:, 0, 2] ** 2 / count) / (count - 1)
    torch.testing.assert_close(variance, flat.var(1), rtol=1e-13, atol=0)
    assert torch.equal(gram, gram.mT)


def test_a_large_mean_leaves_the_variance(isa: str) -> None:
    a = torch.randn(1, 100_000) + 1000
    gram = pygen.sample_gram([a])[0]
    variance = gram[0, 0] / gram[1, 1] - (gram[0, 1] / gram[1, 1]) ** 2
    torch.testing.assert_close(variance, a.double().var(correction=0), rtol=1e-9, atol=0)


def test_samples_and_threads_share_the_work_to_the_bit(isa: str) -> None:
    a, b = torch.randn(3, 70001), torch.randn(3, 70001)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(pygen.sample_gram([a, b]))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for i in range(3):
        assert torch.equal(pygen.sample_gram([a[i : i + 1], b[i : i + 1]]), results[0][i : i + 1])


def test_offsets_beyond_32_bits() -> None:
    far = torch.empty(1 << 31, dtype=torch.float32)[:: (1 << 30) + 7].view(1, -1)
    far.copy_(torch.tensor([[1.0, 2.0]]))
    assert pygen.sample_gram([far]).tolist() == [[[5.0, 3.0], [3.0, 2.0]]]


X = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tensors": []}, ValueError, "tensors must hold 1 to 4 of them, got 0"),
        ({"tensors": [X] * 5}, ValueError, "tensors must hold 1 to 4 of them, got 5"),
        ({"tensors": [torch.tensor(1.0)]}, ValueError, "tensors must begin with the batch"),
        ({"tensors": [X, X[:, :4]]}, ValueError, "tensors must have one shape"),
        ({"tensors": [X.double()]}, TypeError, "tensors must be float32, bfloat16 or float16"),
        ({"tensors": [X.clone().requires_grad_()]}, RuntimeError, "not differentiable, and tensors requires grad"),
        ({"out": torch.ones(2, 3, 3)}, TypeError, "out must be Double"),
        ({"out": torch.ones(2, 2, 2).double()}, ValueError, "out must have shape"),
        ({"out": torch.ones(1).double().expand(2, 3, 3)}, RuntimeError, "single memory location"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pygen.sample_gram(**({"tensors": [X, X]} | arguments))
