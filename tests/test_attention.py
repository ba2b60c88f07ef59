"""attention beyond its spec: beside scaled_dot_product_attention, invariance, and what is said of wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import pygen
from pygen.ops.attention import attention_reference
from tests.error_rule import Triple, assert_error_rule

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
@pytest.mark.parametrize("case", ["growing", "shrinking", "one far above", "all far below", "nan", "inf", "-inf"])
def test_scores_of_any_course_over_the_keys(case: str, dtype: torch.dtype) -> None:
    q, k, v = (drawn(1, 2, length, 40, seed=seed) for seed, length in enumerate((300, 832, 832)))
    if case in ("growing", "shrinking"):
        k *= torch.linspace(0.1, 20.0, 832).flip(0 if case == "shrinking" else ()).unsqueeze(1)
    elif case == "one far above":
        k[:, :, 400] *= 60
    elif case == "all far below":  # what the first keys have
        k[:, :, :64] *= 60
    else:
        k[:, 0, 500, 3] = float(case)
    q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
    for causal, keys in ((False, 832), (True, 832), (False, 777)):
        same = scaled_dot_product_attention(q, k[:, :, :keys], v[:, :, :keys], is_causal=causal)
        wide = (tensor.double() for tensor in (q, k[:, :, :keys], v[:, :, :keys]))
        truth = scaled_dot_product_attention(*wide, is_causal=causal)
        lengths = torch.tensor([keys]) if keys < 832 else None
        assert_error_rule([(pygen.attention(q, k, v, causal=causal, lengths=lengths), same, truth)], f"{causal} {keys}")


def gradients(function: Any, *tensors: torch.Tensor, grad: torch.Tensor, **arguments: Any) -> list[torch.Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    function(*leaves, **arguments).backward(grad.to(leaves[0].dtype))
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "keys", "head_dim"),
    [(2, 2, 300, 77, 40), (1, 1, 513, 1300, 72), (4, 2, 130, 600, 160), (1, 1, 260, 1100, 24)],
)
def test_gradients_err_no_more_than_torchs(
    heads: int, kv_heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype
) -> None:
    families: dict[str, list[Triple]] = {name: [] for name in "qkv"}
    for seed in range(0, 16, 4):
        q, grad = (drawn(2, heads, queries, head_dim, dtype=dtype, seed=seed + i) for i in (0, 3))
        k, v = (drawn(2, kv_heads, keys, head_dim, dtype=dtype, seed=seed + i) for i in (1, 2))
        causal = seed % 8 > 0
        ours = gradients(pygen.attention, q, k, v, grad=grad, causal=causal)
        by_torch = {"is_causal": causal, "enable_gqa": heads != kv_heads}
        same = gradients(scaled_dot_product_attention, q, k, v, grad=grad, **by_torch)
        wide = (tensor.double() for tensor in (q, k, v))
        truth = gradients(scaled_dot_product_attention, *wide, grad=grad, **by_torch)
        for name, *triple in zip("qkv", ours, same, truth, strict=True):
            families[name].append(tuple(triple))
    for name, triples in families.items():
        assert_error_rule(triples, name)


def test_gradients_are_those_of_the_reference() -> None:
    q, k, v, _ = (drawn(2, 2, 7, 5, seed=seed).double().requires_grad_() for seed in range(4))
    mask, lengths = drawn(2, 1, 7, 7).double(), torch.tensor([7, 3])
    with pygen.backend("reference"):
        for arguments in (
            {},
            {"causal": True, "window": 3},
            {"mask": mask, "lengths": lengths, "scale": 0.8},
            {"lengths": lengths, "dropout_p": 0.3, "seed": 5},
        ):
            assert torch.autograd.gradcheck(
                lambda *qkv, how=arguments: pygen.attention(*qkv, **how), (q, k[:, :1], v[:, :1])
            )


def test_gradients_do_not_depend_on_the_threads_and_flow_through_views() -> None:
    fused = drawn(2, 1200, 3, 2, 40, dtype=torch.bfloat16).requires_grad_()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        q, k, v = fused.permute(2, 0, 3, 1, 4)
        y = pygen.attention(q, k, v, causal=True)
        results.append(torch.autograd.grad(y.float().square().sum(), fused)[0])
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


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


def kept(batch: int, heads: int, queries: int, keys: int, **arguments: Any) -> torch.Tensor:
    """Which weights dropout keeps, read off equal weights of values that are each a dimension's own."""
    alike = torch.zeros(batch, heads, max(queries, keys), keys)
    v = torch.eye(keys).expand(batch, heads, keys, keys)
    return pygen.attention(alike[:, :, :queries], alike[:, :, :keys], v, **arguments) > 0


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_each_weight_by_itself(p: float) -> None:
    mask = kept(4, 4, 500, 512, dropout_p=p, seed=7)
    dropped = round(p * 65536) / 65536
    deviation = (dropped * (1 - dropped) / mask.numel()) ** 0.5
    assert abs(1 - mask.double().mean().item() - dropped) < 5 * deviation
    centred = (mask.double() - (1 - dropped)) / (dropped * (1 - dropped)) ** 0.5
    for dim in range(4):
        for by in (1, 2, 8)[: 1 if dim < 2 else 3]:
            neighbours = centred * centred.roll(by, dim)
            assert abs(neighbours.mean().item()) < 5 / neighbours.numel() ** 0.5, (dim, by)


def test_dropout_changes_no_mean() -> None:
    q, k, v = (drawn(1, 2, 40, 16, seed=seed) for seed in range(3))
    steps, p = 400, 0.25
    mean = sum(pygen.attention(q, k, v, dropout_p=p, seed=3, step=step) for step in range(steps)) / steps
    weights = (q @ k.mT / 4).softmax(-1)
    deviation = (p / (1 - p) * weights.square() @ v.square() / steps).sqrt()
    assert ((mean - weights @ v).abs() < 5 * deviation).all()


def test_a_weight_is_kept_whatever_else_there_is() -> None:
    whole = kept(3, 4, 300, 270, dropout_p=0.4, seed=7, step=2)
    assert torch.equal(kept(3, 4, 300, 270, dropout_p=0.4, seed=7, step=2), whole)
    few = kept(
        1, 2, 19, 35, dropout_p=0.4, seed=torch.tensor([7]), step=torch.tensor([2]), sample_ids=torch.tensor([1])
    )
    assert torch.equal(few, whole[1:2, :2, :19, :35])
    mixed = {"seed": torch.tensor([8, 7]), "step": torch.tensor([2, 2]), "sample_ids": torch.tensor([0, 2])}
    assert torch.equal(kept(2, 4, 300, 270, dropout_p=0.4, **mixed)[1], whole[2])
    for other in ({"seed": 8, "step": 2}, {"seed": 7, "step": 3}, {"seed": 7}):
        share = (kept(3, 4, 300, 270, dropout_p=0.4, **other) == whole).double().mean().item()
        assert abs(share - (0.4**2 + 0.6**2)) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_does_not_depend_on_the_threads(dtype: torch.dtype) -> None:
    before, results = torch.get_num_threads(), []
    q, k, v = (drawn(3, 2, 400, 40, dtype=dtype, seed=seed).requires_grad_() for seed in range(3))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = pygen.attention(q, k, v, dropout_p=0.3, seed=1)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), (q, k, v))])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_with_dropout_are_those_of_the_reference(dtype: torch.dtype) -> None:
    families: dict[str, list[Triple]] = {name: [] for name in "qkv"}
    seed = torch.tensor([11])
    for causal in (False, True):
        q, grad = (drawn(2, 4, 300, 40, dtype=dtype, seed=i) for i in (0, 3))
        k, v = (drawn(2, 2, 290, 40, dtype=dtype, seed=i) for i in (1, 2))

        def plain(*qkv: torch.Tensor, causal: bool = causal) -> torch.Tensor:
            return attention_reference(*qkv, causal=causal, dropout_p=0.2, seed=seed)[0]

        ours = gradients(pygen.attention, q, k, v, grad=grad, causal=causal, dropout_p=0.2, seed=11)
        same = gradients(plain, q, k, v, grad=grad)
        truth = gradients(plain, q.double(), k.double(), v.double(), grad=grad)
        for name, *triple in zip("qkv", ours, same, truth, strict=True):
            families[name].append(tuple(triple))
    for name, triples in families.items():
        assert_error_rule(triples, name)


def test_dropout_without_a_seed_is_torchs_generators() -> None:
    def drop() -> torch.Tensor:
        return pygen.attention(Q, K, K, dropout_p=0.5)

    torch.manual_seed(3)
    first, second = drop(), drop()
    torch.manual_seed(3)
    assert torch.equal(drop(), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    assert torch.equal(pygen.attention(Q, K, K, dropout_p=0.0, seed=1), pygen.attention(Q, K, K))
    assert torch.equal(torch.get_rng_state(), state)
    for dropped in (pygen.attention, scaled_dot_product_attention):
        assert not dropped(Q, Q, Q, dropout_p=1.0).any()


def test_dropout_compiles_once_for_all_steps_and_is_made_again_in_checkpoints() -> None:
    q, k, v = (drawn(2, 2, 60, 16, seed=seed).requires_grad_() for seed in range(3))

    def loss(step: torch.Tensor, function: Any = pygen.attention) -> torch.Tensor:
        y: torch.Tensor = function(q, k, v, dropout_p=0.4, seed=5, step=step)
        return y.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            found = torch.autograd.grad(compiled(torch.tensor([step])), (q, k, v))
            assert all(map(torch.equal, found, torch.autograd.grad(loss(torch.tensor([step])), (q, k, v))))

    def unseeded(*qkv: torch.Tensor) -> torch.Tensor:
        return pygen.attention(*qkv, dropout_p=0.4)

    def checkpointed(*qkv: torch.Tensor) -> Any:
        return checkpoint(unseeded, *qkv, use_reentrant=False)

    results = []
    for function in (unseeded, checkpointed):
        torch.manual_seed(4)
        results.append(torch.autograd.grad(function(q, k, v).square().sum(), (q, k, v)))
    assert all(map(torch.equal, *results))
    torch.compile(unseeded, fullgraph=True, backend="aot_eager")(q, k, v).sum().backward()


def test_dropout_is_recorded() -> None:
    seed, step = torch.tensor([4]), torch.tensor([0])
    program = pygen.record(lambda: pygen.attention(Q, K, K, dropout_p=0.5, seed=seed, step=step))
    for seed_now, step_now in ((4, 0), (4, 1), (9, 1)):
        seed.fill_(seed_now), step.fill_(step_now)
        assert torch.equal(program(), pygen.attention(Q, K, K, dropout_p=0.5, seed=seed_now, step=step_now))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_heads_wider_than_a_gpu_takes(dtype: torch.dtype) -> None:
    """An autoencoder's have 512."""
    populations: list[list[Triple]] = [[], [], [], []]  # of results, and of the gradients of q, k and v
    for head_dim in (257, 320, 512):
        grad, *given = (drawn(2, 3, 150, head_dim, dtype=dtype, seed=head_dim + i) for i in range(4))
        results = [
            [attend(*parts), *gradients(attend, *parts, grad=grad)]
            for attend, parts in (
                (pygen.attention, given),
                (scaled_dot_product_attention, given),
                (scaled_dot_product_attention, [part.double() for part in given]),
            )
        ]
        for population, *triple in zip(populations, *results, strict=True):
            population.append((triple[0], triple[1], triple[2]))
    for population in populations:
        assert_error_rule(population)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, "q must have shape (batch, heads, length, head_dim)"),
        ({"k": K[..., :8]}, ValueError, "k must have shape [2, 2, 12, 16], got [2, 2, 12, 8]"),
        ({"v": K[:, :, :5]}, ValueError, "v must have shape [2, 2, 12, 16], got [2, 2, 5, 16]"),
        ({"q": Q[:, :3]}, ValueError, "q has 3 heads, not a multiple of k's 2"),
        ({"q": Q.double()}, TypeError, "q must be float32, bfloat16 or float16"),
        ({"v": K.bfloat16()}, TypeError, "v must have q's dtype Float, got BFloat16"),
        (dict.fromkeys("qkv", torch.ones(1, 1, 1, 513)), ValueError, "head_dim must be 1 to 512, got 513"),
        ({"mask": torch.ones(3, 12)}, ValueError, "mask of shape [3, 12] does not broadcast to [2, 4, 9, 12]"),
        ({"mask": torch.ones(9, 12, dtype=torch.int64)}, TypeError, "mask must be bool, float32 or of q's dtype"),
        ({"lengths": torch.tensor([1])}, ValueError, "lengths must have shape (batch,) = (2,)"),
        ({"lengths": torch.tensor([1, 2], dtype=torch.int32)}, TypeError, "lengths must be Long"),
        ({"window": 0}, ValueError, "window must be positive, got 0"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must lie in [0, 1], got 1.5"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p must lie in [0, 1], got nan"),
        ({"dropout_p": 0.1, "seed": 0.5}, TypeError, "seed, step and key must be integers"),
        ({"dropout_p": 0.1, "seed": torch.zeros(1)}, TypeError, "seed must be Long, got Float"),
        ({"dropout_p": 0.1, "step": torch.tensor([1, 2, 3])}, ValueError, "step must hold one number, or one per"),
        ({"dropout_p": 0.1, "sample_ids": torch.arange(3)}, ValueError, "sample_ids must hold one number, or one per"),
        (dict.fromkeys("qkv", torch.ones(1, 4097, 1, 1)) | {"dropout_p": 0.1}, ValueError, "up to 4096 heads"),
        ({"out": torch.empty(2, 4, 9, 8)}, ValueError, "out must have shape [2, 4, 9, 16]"),
        ({"out": Q}, RuntimeError, "single memory location"),
        ({"mask": torch.zeros(9, 12, requires_grad=True)}, RuntimeError, "attention is not differentiable, and mask"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        pygen.attention(**({"q": Q, "k": K, "v": K} | arguments))
    assert message in str(caught.value)
