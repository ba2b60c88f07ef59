"""rope beyond its spec: transformers' own embeddings and scalings, far positions, gradients, and wrong arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTJConfig, GPTNeoXConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

import pygen
from pygen.ops.rope import rope_reference
from tests.error_rule import assert_error_rule

BY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4], [100, 101, 102, 103, 104]])


def heads_of(dtype: torch.dtype, head_dim: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, head_dim, generator=generator).to(dtype) for heads in (4, 2))
    return q, k


def double_angles(inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines and sines that transformers' modules would make in float64."""
    angles = (POSITIONS[..., None].double() * inv_freq).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


@BY_DTYPE
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_is_transformers_rotation_by_halves(family: str, dtype: torch.dtype, isa: str) -> None:
    """Of Llama, and of GPT-NeoX, which turns a quarter of the head."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 128}
    if family == "llama":
        config, modeling = LlamaConfig(**sizes), modeling_llama
        embedding = modeling_llama.LlamaRotaryEmbedding(config)
    else:
        config, modeling = GPTNeoXConfig(**sizes), modeling_gpt_neox
        embedding = modeling_gpt_neox.GPTNeoXRotaryEmbedding(config)
    inv_freq, factor = pygen.rope_frequencies(64, config.rope_parameters)
    assert 2 * len(inv_freq) == (64 if family == "llama" else 16)
    q, k = heads_of(dtype)
    same = modeling.apply_rotary_pos_emb(q, k, *embedding(q, POSITIONS))
    truth = modeling.apply_rotary_pos_emb(q.double(), k.double(), *double_angles(inv_freq))
    table = pygen.rope_table(inv_freq, 128, attention_factor=factor)
    for x, theirs, exact in zip((q, k), same, truth, strict=True):
        assert_error_rule([(pygen.rope(x, POSITIONS, table), theirs, exact)])


@BY_DTYPE
def test_is_transformers_interleaved_rotation(dtype: torch.dtype, isa: str) -> None:
    """Of GPT-J, whose first 16 elements turn, with tokens before heads."""
    config = GPTJConfig(n_embd=256, n_head=4, n_positions=128, rotary_dim=16)
    sinusoids = modeling_gptj.create_sinusoidal_positions(config.n_positions, config.rotary_dim)[POSITIONS]
    inv_freq, _ = pygen.rope_frequencies(config.rotary_dim)
    cosine, sine = (angles[..., : len(inv_freq)] for angles in double_angles(inv_freq))
    x = heads_of(dtype)[0].transpose(1, 2).contiguous()

    def theirs(x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
        turned = modeling_gptj.apply_rotary_pos_emb(x[..., :16], sine, cosine)
        return torch.cat((turned, x[..., 16:]), dim=-1).transpose(1, 2)

    same = theirs(x, *(half.to(dtype) for half in sinusoids.chunk(2, dim=-1)))
    ours = pygen.rope(x.transpose(1, 2), POSITIONS, pygen.rope_table(inv_freq, 128), interleaved=True)
    assert_error_rule([(ours, same, theirs(x.double(), sine, cosine))])


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 16.0},
    "yarn of DeepSeek": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.2, "mscale_all_dim": 0.8, "beta_fast": 24},
    "yarn of gpt-oss": {"rope_type": "yarn", "factor": 32.0, "truncate": False, "beta_slow": 2.0},
    "yarn with a factor": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.25},
    "yarn by lengths": {"rope_type": "yarn", "factor": None},
    "yarn without a ramp": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0 + i / 9 for i in range(32)],
                 "long_factor": [1.5 + i for i in range(32)]},
    "longrope with factors": {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32,
                              "factor": 4.0, "attention_factor": 1.1},
    "partial": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("seq_len", [None, 1000, 10000])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_transformers(name: str, theta: float, seq_len: int | None) -> None:
    parameters = {"original_max_position_embeddings": 2048} | SCALINGS[name] | {"rope_theta": theta}
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=8192, rope_parameters=dict(parameters)
    )
    theirs, their_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=seq_len)
    ours, our_factor = pygen.rope_frequencies(
        64, config.rope_parameters, max_position_embeddings=config.max_position_embeddings, seq_len=seq_len
    )
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours.float(), theirs)
    assert math.isclose(our_factor, their_factor)
    table = pygen.rope_table(ours, 3, attention_factor=our_factor)
    torch.testing.assert_close(table[2, 0], (2 * theirs).cos() * their_factor)


def test_far_positions_keep_their_digits() -> None:
    """At a million, float32 angles have lost theirs."""
    inv_freq, _ = pygen.rope_frequencies(128)
    table, far = pygen.rope_table(inv_freq, 1_000_001), torch.tensor([1_000_000])
    x = torch.randn(1, 1, 1, 128, generator=torch.Generator().manual_seed(0))
    angles = (1_000_000 * inv_freq).repeat(2)
    truth = modeling_llama.apply_rotary_pos_emb(
        x.double(), x.double(), angles.cos()[None, None], angles.sin()[None, None]
    )
    embedding = modeling_llama.LlamaRotaryEmbedding(LlamaConfig(hidden_size=128, num_attention_heads=1))
    theirs = modeling_llama.apply_rotary_pos_emb(x, x, *embedding(x, far[None]))
    ours = (pygen.rope(x, far, table).double() - truth[0]).abs().max()
    assert ours < 3e-7
    assert 1000 * ours < (theirs[0].double() - truth[0]).abs().max()


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved: bool) -> None:
    x = torch.randn(2, 2, 3, 10, dtype=torch.float64, requires_grad=True)
    table = pygen.rope_table(pygen.rope_frequencies(8)[0], 30, attention_factor=1.3).double()
    positions = torch.tensor([[4], [9]])
    with pygen.backend("reference"):
        for inverse in (False, True):
            arguments = (lambda x: pygen.rope(x, positions, table, interleaved=interleaved, inverse=inverse)), (x,)  # noqa: B023
            assert torch.autograd.gradcheck(*arguments)
            assert torch.autograd.gradgradcheck(*arguments)


@BY_DTYPE
def test_autograd_is_within_the_error_rule(dtype: torch.dtype, isa: str) -> None:
    """Of a strided part, from an upstream gradient of no strides and of full ones."""
    table = pygen.rope_table(pygen.rope_frequencies(32)[0], 30)
    whole = torch.randn(2, 3, 6, 40, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    x, weights = whole.transpose(1, 2)[:, 1:4], torch.randn(2, 3, 3, 40)
    for weight in (torch.ones(1), weights):
        results = [
            torch.autograd.grad((turn(x.to(to), torch.tensor(5), table.to(at)) * weight).sum(), whole)[0]
            for turn, to, at in (
                (pygen.rope, dtype, torch.float32), (rope_reference, dtype, torch.float32),
                (rope_reference, torch.float64, torch.float64),
            )
        ]  # fmt: skip
        assert_error_rule([tuple(results)])


def test_turning_back_is_the_identity() -> None:
    x = torch.randn(2, 3, 4, 64)
    table = pygen.rope_table(pygen.rope_frequencies(64)[0], 500)
    there = pygen.rope(x, torch.tensor([7, 8, 499, 0]), table)
    back = pygen.rope(there, torch.tensor([7, 8, 499, 0]), table, inverse=True)
    torch.testing.assert_close(back, x)
    assert pygen.rope(x, torch.tensor(3), table, out=x) is x


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "x must have shape", {"x": torch.zeros(3, 4, 8)}),
        (ValueError, "x must be contiguous in head_dim", {"x": torch.zeros(2, 3, 8, 4).transpose(2, 3)}),
        (ValueError, "head_dim of x must be 1 to 1024", {"x": torch.zeros(2, 3, 4, 1026)}),
        (TypeError, "x must be float32, bfloat16 or float16", {"x": torch.zeros(2, 3, 4, 8).double()}),
        (TypeError, "positions must be Long", {"positions": torch.zeros(4)}),
        (ValueError, "positions must have shape", {"positions": torch.zeros(3, 4, dtype=torch.int64)}),
        (ValueError, "positions must have shape", {"positions": torch.zeros(5, dtype=torch.int64)}),
        (IndexError, "position 30 lies outside the table, which holds 30", {"positions": torch.tensor([0, 1, 2, 30])}),
        (IndexError, "position -1 lies outside", {"positions": torch.tensor(-1)}),
        (IndexError, "position 30 lies outside", {"positions": torch.tensor(27)}),
        (ValueError, "table must have shape", {"table": torch.zeros(30, 2, 5)}),
        (ValueError, "table must have shape", {"table": torch.zeros(30, 4, 2)}),
        (ValueError, "table must be contiguous but for its positions", {"table": torch.zeros(30, 3, 2).mT}),
        (TypeError, "table must be Float", {"table": torch.zeros(30, 2, 4).double()}),
        (ValueError, "out must have x's shape", {"out": torch.zeros(2, 3, 4, 9)}),
        (TypeError, "out must have x's dtype", {"out": torch.zeros(2, 3, 4, 8).half()}),
        (RuntimeError, "memory", {"out": torch.zeros(1, 3, 4, 8).expand(2, 3, 4, 8)}),
    ],
)  # fmt: skip
def test_wrong_arguments(error: type[Exception], message: str, change: dict[str, Tensor]) -> None:
    right = {"x": torch.zeros(2, 3, 4, 8), "positions": torch.arange(4), "table": torch.zeros(30, 2, 4)}
    with pytest.raises(error, match=message):
        pygen.rope(**right | change)
    pygen.rope(**right)


@pytest.mark.parametrize(
    ("message", "head_dim", "parameters"),
    [
        ("rope_type must be one of default, linear", 64, {"rope_type": "other"}),
        ("rope_type 'linear' needs factor", 64, {"rope_type": "linear"}),
        ("rope_type 'yarn' needs original_max_position_embeddings", 64, {"rope_type": "yarn", "factor": 2.0}),
        ("rope_type 'llama3' needs low_freq_factor", 64, {"rope_type": "llama3", "factor": 2.0}),
        ("rope_type 'dynamic' needs max_position_embeddings", 64, {"rope_type": "dynamic", "factor": 2.0}),
        ("short_factor must hold 32 numbers, got 3", 64,
         {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 9, "short_factor": [1, 2, 3]}),
        ("must be even and positive, got 7", 7, {}),
        ("must be even and positive, got 0", 8, {"partial_rotary_factor": 0.1}),
    ],
)  # fmt: skip
def test_wrong_parameters(message: str, head_dim: int, parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        pygen.rope_frequencies(head_dim, parameters)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_through_a_norm(dtype: torch.dtype, interleaved: bool) -> None:
    table, positions = pygen.rope_table(pygen.rope_frequencies(24)[0], 50), torch.arange(7)
    inputs, grad = [torch.randn(2, 3, 7, 40).to(dtype), torch.randn(40).to(dtype)], torch.randn(2, 3, 7, 40).to(dtype)

    def gradients(function: Any, to: torch.dtype) -> list[Tensor]:
        x, norm = leaves = [tensor.to(to, copy=True).requires_grad_() for tensor in inputs]
        y = function(x, positions, table, interleaved=interleaved, norm=norm, eps=1e-3)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(to))]

    same, truth = gradients(rope_reference, dtype), gradients(rope_reference, torch.float64)
    assert_error_rule(zip(gradients(pygen.rope, dtype), same, truth, strict=True))


@pytest.mark.parametrize(
    ("norm", "error", "match"),
    [
        (torch.ones(5), ValueError, r"rope: norm must have shape \(32,\) and be contiguous, got \[5\]"),
        (torch.ones(64)[::2], ValueError, "norm must have shape"),
        (torch.ones(32).int(), TypeError, "norm"),
    ],
)
def test_a_wrong_norm(norm: Tensor, error: type[Exception], match: str) -> None:
    table = pygen.rope_table(pygen.rope_frequencies(32)[0], 50)
    with pytest.raises(error, match=match):
        pygen.rope(torch.ones(1, 2, 3, 32), torch.arange(3), table, norm=norm)
    with pytest.raises(ValueError, match="eps"):
        pygen.rope(torch.ones(1, 2, 3, 32), torch.arange(3), table, norm=torch.ones(32), eps=-1.0)
