"""philox_normal beyond its spec: known answers, the distribution, and whose noise is whose."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

import pygen
from pygen.ops.philox_normal import philox_words
from pygen.ops.spec import index_tensor

# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    seed = torch.tensor(signed(key[1] << 32 | key[0]))
    assert [int(word) for word in philox_words([torch.tensor(c) for c in counter], seed)] == words


def test_kernel_draws_the_known_words(isa: str) -> None:
    """The counter of a known answer, spelled as step and sample id; the words come back through Box-Muller."""
    counter, _, words = KNOWN_ANSWERS[0]
    z = pygen.philox_normal((1, 4), seed=0, step=counter[2], sample_ids=torch.tensor([counter[3]]))[0].double()
    uniform = torch.exp(-(z[0::2] ** 2 + z[1::2] ** 2) / 2)  # |z|^2 = -2 ln u
    torch.testing.assert_close(uniform, torch.tensor(words[0::2]).double() / 2**32, rtol=1e-5, atol=0)
    turns = torch.atan2(z[1::2], z[0::2]) / (2 * torch.pi)
    # The angle is the word's top two bits in quadrants plus the rest as a signed fraction of one.
    fraction = torch.tensor([((word << 2 & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000 for word in words[1::2]]).double()
    expected = torch.tensor([word >> 30 for word in words[1::2]]).double() / 4 + fraction / 2**34
    torch.testing.assert_close(turns % 1, expected % 1, rtol=1e-5, atol=0)


def test_distribution() -> None:
    z = pygen.philox_normal((8, 1 << 17), seed=11).double()
    assert stats.kstest(z.flatten()[::4].numpy(), "norm").pvalue > 1e-3
    count = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean().item() - moment) < 4 * (variance / count) ** 0.5
    pairs = torch.stack([z[:, 0::2].flatten(), z[:, 1::2].flatten(), z.roll(1, 0)[:, 0::2].flatten()])
    assert (torch.corrcoef(pairs) - torch.eye(3)).abs().max() < 5 * (2 / count) ** 0.5
    assert z.abs().max() > 4.5  # the tails are there: 32 bits of radius


def test_noise_belongs_to_the_sample(isa: str, threads: int) -> None:
    ids, steps = torch.tensor([9, 4, 7]), torch.tensor([1, 2, 1])
    together = pygen.philox_normal((3, 5, 4001), seed=3, sample_ids=ids, step=steps)
    for i in range(3):
        alone = pygen.philox_normal((1, 5, 4001), seed=3, sample_ids=ids[i : i + 1], step=int(steps[i]))
        assert torch.equal(together[i : i + 1], alone)
    strided = torch.empty(3, 4001, 10).permute(0, 2, 1)[:, ::2]
    assert torch.equal(pygen.philox_normal(out=strided, seed=3, sample_ids=ids, step=steps), together)
    assert torch.equal(pygen.philox_normal((3, 100), seed=3, sample_ids=ids, step=steps), together.flatten(1)[:, :100])


def test_seed_step_sample_and_draw_are_independent_streams() -> None:
    draws = [
        pygen.philox_normal((1, 64), seed=seed, step=step, draw=draw, sample_ids=torch.tensor([sample]))
        for seed in (0, 1, 1 << 32, -1)
        for step in (0, 1)
        for draw in (0, 1, 1 << 12)
        for sample in (0, 1)
    ]
    assert len(torch.cat(draws).unique(dim=0)) == len(draws)


def test_seeds_of_the_samples_are_their_own(isa: str) -> None:
    together = pygen.philox_normal((3, 5, 401), seed=torch.tensor([4, -1, 2**62]))
    for i, seed in enumerate((4, -1, 2**62)):
        assert torch.equal(pygen.philox_normal((3, 5, 401), seed=seed)[i], together[i])


def test_seeds_are_taken_modulo_two_to_the_64() -> None:
    assert torch.equal(pygen.philox_normal((1, 8), seed=-1), pygen.philox_normal((1, 8), seed=(1 << 64) - 1))


def test_offsets_beyond_32_bits() -> None:
    """Strides reach over 8 GB of address space, of which only what is written is ever backed by memory."""
    far = torch.empty(1 << 31, dtype=torch.float32)[:: (1 << 30) + 7].view(1, -1)
    near = pygen.philox_normal((1, 2), seed=5)
    assert torch.equal(pygen.philox_normal(out=far, seed=5), near)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": None}, ValueError, "give size or out"),
        ({"out": torch.empty(2, 3)}, ValueError, "size .* is not the shape of out"),
        ({"size": ()}, ValueError, "the shape must begin with the batch"),
        ({"dtype": torch.float64}, TypeError, "out must be float32, bfloat16 or float16"),
        ({"seed": torch.tensor([1, 2, 3])}, ValueError, "seed must hold one number, or one per sample"),
        ({"seed": torch.tensor(1.0)}, TypeError, "seed must be Long"),
        ({"step": torch.tensor([1, 2, 3])}, ValueError, "step must hold one number, or one per sample"),
        ({"sample_ids": torch.tensor([1])}, ValueError, "sample_ids must have shape"),
        ({"draw": 1 << 16}, ValueError, r"draw must lie in \[0, 65536\)"),
        ({"size": None, "out": torch.empty(1).expand(2)}, RuntimeError, "single memory location"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pygen.philox_normal(**({"size": (2, 4), "seed": 0} | arguments))


def test_a_seed_first_met_in_inference_mode_may_be_recorded() -> None:
    device = torch.device("cpu")
    with torch.inference_mode():
        seed = index_tensor(2**40 + 17, device)
    assert index_tensor(2**40 + 17, device) is seed
    assert not seed.is_inference()
