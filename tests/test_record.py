"""Programs: what a function launches, recorded and replayed, by every op's spec."""

from __future__ import annotations

import copy
import multiprocessing
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import pygen
from pygen.ops import SPECS, OpSpec
from tests.test_ops import outputs_of, run


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_replay_gives_the_bits_of_the_call(spec: OpSpec, dtype: torch.dtype, threads: int) -> None:
    for example in spec.examples(dtype):
        arguments = copy.deepcopy(example.arguments)
        before = {name: arguments[name].clone() for name in outputs_of(spec, example)}
        program = pygen.record(lambda arguments=arguments: spec.function(**arguments))
        for name, tensor in before.items():
            assert torch.equal(arguments[name].nan_to_num(3.0), tensor.nan_to_num(3.0)), "recorded, and run too"
        assert program() is arguments[spec.outputs[0]]
        for name, expected in run(spec, example).items():
            assert torch.equal(arguments[name].nan_to_num(3.0), expected.nan_to_num(3.0)), (example.name, name)


def layers(x: Tensor, weights: list[Any]) -> Tensor:
    for up, down in weights:
        x = pygen.linear_decode(pygen.linear_decode(x, up, norm="rms", activation="silu"), down, residual=x)
    return x


@pytest.fixture(scope="module")
def chain() -> tuple[Tensor, list[Any]]:
    generator = torch.Generator().manual_seed(0)

    def packed(outputs: int, inputs: int) -> Any:
        return pygen.pack_linear(
            torch.randn(outputs, inputs, generator=generator) / inputs**0.5, format="int8", group=32
        )

    return torch.randn(2, 256, generator=generator), [(packed(512, 256), packed(256, 512)) for _ in range(8)]


def test_a_program_reads_what_lies_there_at_each_replay(chain: tuple[Tensor, list[Any]], threads: int) -> None:
    x, weights = chain
    given = x.clone()
    program = pygen.record(lambda: layers(given, weights))
    for _ in range(200):
        given.copy_(torch.randn_like(given))
        assert torch.equal(program(), layers(given, weights))


def test_counts_are_taken_at_each_replay() -> None:
    q, k, v = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 4096, 32), torch.randn(2, 2, 4096, 32)
    lengths = torch.zeros(2, dtype=torch.int64)
    program = pygen.record(lambda: pygen.decode_attention(q, k, v, lengths))
    for one, other in ((0, 0), (1, 4096), (4096, 300), (17, 0)):
        lengths.copy_(torch.tensor([one, other]))
        assert torch.equal(program(), pygen.decode_attention(q, k, v, lengths))


def test_threads_take_turns(chain: tuple[Tensor, list[Any]]) -> None:
    """Several threads replay programs of their own at once."""
    x, weights = chain
    failures = []

    def work(seed: int) -> None:
        own = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        program = pygen.record(lambda: layers(own, weights))
        expected = layers(own, weights)
        failures.extend(i for i in range(50) if not torch.equal(program(), expected))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def in_a_child(chain: tuple[Tensor, list[Any]], queue: Any) -> None:
    x, weights = chain
    torch.set_num_threads(2)
    program = pygen.record(lambda: layers(x, weights))
    queue.put(program().clone().numpy())


def test_a_forked_child_has_threads_of_its_own(chain: tuple[Tensor, list[Any]]) -> None:
    x, weights = chain
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    program = pygen.record(lambda: layers(x, weights))
    expected = program().clone()  # the parent's threads are there
    torch.set_num_threads(before)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_a_child, args=(chain, queue))
    child.start()
    result = queue.get(timeout=60)
    child.join(timeout=60)
    assert child.exitcode == 0
    assert torch.equal(torch.from_numpy(result), expected)


def test_foreign_ops_are_named(chain: tuple[Tensor, list[Any]]) -> None:
    x, weights = chain
    with pytest.raises(RuntimeError, match=r"record: aten.add.Tensor is not an op of pygen"):
        pygen.record(lambda: layers(x + 1, weights))
    with pytest.raises(RuntimeError, match=r"record: aten._local_scalar_dense.default is not"):
        pygen.record(lambda: layers(x, weights)[0, 0].item())
    assert torch.equal(layers(x, weights), pygen.record(lambda: layers(x, weights))())  # nothing stayed behind


def test_an_error_while_recording_leaves_nothing_behind(chain: tuple[Tensor, list[Any]]) -> None:
    x, weights = chain
    with pytest.raises(ValueError, match="x must have shape"):
        pygen.record(lambda: layers(x[:, :7], weights))
    assert torch.equal(pygen.rms_norm(x), pygen.record(lambda: pygen.rms_norm(x))())
