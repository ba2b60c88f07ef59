"""Every op by its spec: against the reference, in guarded memory, on every instruction set, fake and compiled."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

import pygen
from pygen import _C
from pygen.ops import SPECS, Example, OpSpec
from tests.error_rule import assert_error_rule, in_double

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def tensors_of(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [item for item in values if isinstance(item, Tensor)]


def outputs_of(spec: OpSpec, example: Example) -> dict[str, int]:
    """The outputs that an example asks for, and their places among the reference's results."""
    return {name: place for place, name in enumerate(spec.outputs) if example.arguments.get(name) is not None}


def run(spec: OpSpec, example: Example) -> dict[str, Tensor]:
    arguments = copy.deepcopy(example.arguments)
    returned = spec.function(**arguments)
    assert returned is arguments[spec.outputs[0]]
    return {name: arguments[name] for name in outputs_of(spec, example)}


def in_guarded_memory(example: Example, outputs: list[str]) -> tuple[Example, list[Tensor]]:
    """The example with each output inside a larger buffer, and what surrounds the outputs, to be left untouched."""
    surroundings = []
    arguments = copy.deepcopy(example.arguments)
    for name in outputs:
        out = arguments[name]
        others = [tensor for key, value in arguments.items() if key != name for tensor in tensors_of(value)]
        if any(out is other for other in others):
            continue  # written in place: it must stay the very tensor that is read
        span = sum((size - 1) * stride for size, stride in zip(out.shape, out.stride(), strict=True)) + 1
        buffer = torch.full((max(span, 0) + 128,), 7, dtype=out.dtype)
        arguments[name] = buffer.as_strided(out.shape, out.stride(), 61).copy_(out)
        outside = torch.ones_like(buffer, dtype=torch.bool)
        outside.as_strided(out.shape, out.stride(), 61).fill_(False)
        surroundings.append((buffer, outside))
    return Example(example.name, arguments), surroundings


@OPS
@BY_DTYPE
def test_kernel_against_reference(spec: OpSpec, dtype: torch.dtype, isa: str) -> None:
    families = defaultdict(list)
    for example in spec.examples(dtype):
        truth = spec.reference(**in_double(copy.deepcopy(example.arguments)))
        same = spec.reference(**copy.deepcopy(example.arguments))
        for name, result in run(spec, example).items():
            place = spec.outputs.index(name)
            families[example.name, name].append((result, same[place], truth[place]))
    assert families
    for (name, output), triples in families.items():
        assert_error_rule(triples, f"{spec.name}, {name}, {output}")


@OPS
@BY_DTYPE
def test_nothing_is_written_outside(spec: OpSpec, dtype: torch.dtype, isa: str) -> None:
    for example in spec.examples(dtype):
        guarded, surroundings = in_guarded_memory(example, list(outputs_of(spec, example)))
        expected = run(spec, example)
        spec.function(**guarded.arguments)
        for name, result in expected.items():
            assert torch.equal(guarded.arguments[name].nan_to_num(3.0), result.nan_to_num(3.0)), (example.name, name)
        for buffer, outside in surroundings:
            assert bool((buffer[outside] == torch.tensor(7).to(buffer.dtype)).all()), f"{example.name}: written outside"


@OPS
@BY_DTYPE
def test_instruction_sets_agree_to_the_bit(spec: OpSpec, dtype: torch.dtype, threads: int) -> None:
    before = _C.isa()
    try:
        for example in spec.examples(dtype):
            if example.own_bits:
                continue
            results = []
            for isa in _C.supported_isas():
                _C.set_isa(isa)
                results.append(run(spec, example))
            for name, result in results[0].items():
                for other in results[1:]:
                    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[result.itemsize]
                    same = result.contiguous().view(bits) == other[name].contiguous().view(bits)
                    assert bool((same | result.isnan().contiguous()).all()), (example.name, name)
    finally:
        _C.set_isa(before)


@OPS
def test_reference_backend_is_the_reference(spec: OpSpec) -> None:
    for example in spec.examples(torch.float32):
        expected = spec.reference(**copy.deepcopy(example.arguments))
        with pygen.backend("reference"):
            results = run(spec, example)
        for name, place in outputs_of(spec, example).items():
            assert torch.equal(results[name].nan_to_num(3.0), expected[place].nan_to_num(3.0)), (example.name, name)


@OPS
def test_opcheck(spec: OpSpec) -> None:
    seen = set()
    for example in spec.examples(torch.float32):
        if example.name in seen:
            continue
        seen.add(example.name)
        arguments = copy.deepcopy(example.arguments)
        schema = spec.operator._schema.arguments
        positional = tuple(arguments.pop(argument.name, None) for argument in schema if not argument.kwarg_only)
        torch.library.opcheck(spec.operator, positional, arguments)


@OPS
def test_compiles_without_a_break(spec: OpSpec) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(spec.function, fullgraph=True, dynamic=False)
    wanted = {"latents", "rows differ", "mask", "noise given", "in place"}
    checked = 0
    for example in spec.examples(torch.float32):
        if example.name in wanted:
            arguments = copy.deepcopy(example.arguments)
            compiled(**arguments)
            for name, result in run(spec, example).items():
                assert torch.equal(arguments[name], result), (example.name, name)
            checked += 1
    assert checked


@OPS
def test_a_missing_backend_raises(spec: OpSpec) -> None:
    example = next(iter(spec.examples(torch.float32)))
    for name in {"cpu", "cuda", "triton"} - set(spec.backends):
        with pygen.backend(name), pytest.raises(RuntimeError, match=f"{spec.name} has no backend '{name}'"):
            spec.function(**copy.deepcopy(example.arguments))
    with pytest.raises(ValueError, match="backend must be one of"), pygen.backend("opencl"):
        pass


def test_every_operator_has_a_spec() -> None:
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("pygen::")}
    assert registered == set(SPECS)
