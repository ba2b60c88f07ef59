"""The suite `ops`, generated from the specs: every op at the sizes that its spec finds worth timing."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from itertools import islice

import torch

from bench.cases import Case, Work
from pygen.ops import SPECS, Example, OpSpec
from tests.error_rule import Triple, in_double


def cases(quick: bool) -> list[Case]:
    """Quick is the first benchmark of each op, in float32."""
    return [
        Case("ops", f"{spec.name}, {example.name}, {str(dtype)[6:]}", partial(work, spec, example.name, dtype))
        for spec in SPECS.values()
        for dtype in (torch.float32, torch.bfloat16)[: 1 if quick else None]
        for example in islice(spec.benchmarks(dtype), 1 if quick else None)
    ]


def work(spec: OpSpec, name: str, dtype: torch.dtype) -> Work:
    example = next(example for example in spec.benchmarks(dtype) if example.name == name)
    arguments, doubles = example.arguments, in_double(example.arguments)
    compiled = torch.compile(spec.reference, fullgraph=True, dynamic=False)
    return Work(
        {
            "reference": lambda: spec.reference(**doubles),
            "eager": lambda: spec.reference(**arguments),
            "torch.compile": lambda: compiled(**arguments),
            "pygen": lambda: spec.function(**arguments),
        },
        spec.bytes_moved(example),
        spec.flops(example),
        dtype,
        lambda: results(spec, example),
    )


def results(spec: OpSpec, example: Example) -> list[Triple]:
    """Every output that the example asks for, beside torch's in the same dtype and the truth."""
    truth = spec.reference(**in_double(deepcopy(example.arguments)))
    same = spec.reference(**deepcopy(example.arguments))
    arguments = deepcopy(example.arguments)
    spec.function(**arguments)
    places = {name: place for place, name in enumerate(spec.outputs) if arguments.get(name) is not None}
    return [(arguments[name], same[place], truth[place]) for name, place in places.items()]
