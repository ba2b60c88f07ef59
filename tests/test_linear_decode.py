"""linear_decode beyond its spec: what packing keeps, invariance, and what is said of wrong arguments."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pygen
from pygen import PackedLinear, pack_linear
from tests.error_rule import assert_error_rule

FLOATS = ("float32", "bfloat16")
CODES = [
    {"format": format, "group": group, "symmetric": symmetric}
    for format in ("int8", "int4")
    for group in (0, 32, 64, 128)
    for symmetric in (True, False)
]
ALL = [*({"format": format} for format in FLOATS), *CODES]
EVERY = pytest.mark.parametrize("layout", ALL, ids=lambda layout: "-".join(map(str, layout.values())))
SIZES = [(1, 1), (16, 8), (31, 33), (32, 64), (45, 129), (64, 200)]


def weight_of(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs + inputs))


@pytest.mark.parametrize("format", FLOATS)
@pytest.mark.parametrize("gated", [False, True])
def test_floats_are_unpacked_as_they_were(format: str, gated: bool) -> None:
    for outputs, inputs in SIZES:
        weight, up = weight_of(2 * outputs, inputs).to(getattr(torch, format)).chunk(2)
        packed = pack_linear(weight, up if gated else None, format=format)
        expected = torch.cat([weight, up]) if gated else weight
        assert torch.equal(packed.unpack(expected.dtype), expected)


@pytest.mark.parametrize("layout", CODES, ids=lambda layout: "-".join(map(str, layout.values())))
@pytest.mark.parametrize("gated", [False, True])
def test_codes_are_off_by_half_a_step(layout: dict[str, Any], gated: bool) -> None:
    """But for what lies at the far end of a symmetric group, which has no code of its own."""
    steps = 256 if layout["format"] == "int8" else 16
    for outputs, inputs in SIZES:
        weight, up = weight_of(2 * outputs, inputs).chunk(2)
        packed = pack_linear(weight, up if gated else None, **layout)
        expected, result = torch.cat([weight, up]) if gated else weight, packed.unpack()
        assert result.shape == expected.shape
        group = packed.group
        padded = torch.nn.functional.pad(expected, (0, -inputs % group)).unflatten(1, (-1, group))
        if layout["symmetric"]:  # the scale was rounded to bfloat16, which has 8 bits
            step = padded.abs().amax(-1, keepdim=True) / (steps / 2)
            far = torch.where(padded.abs() > (steps / 2 - 1) * step, 0.5, 0.0)
            bound = (0.5 + far + steps / 2 * 2.0**-8) * step
        else:
            step = (padded.amax(-1, keepdim=True).clamp(min=0) - padded.amin(-1, keepdim=True).clamp(max=0)) / (
                steps - 1
            )
            bound = torch.full_like(padded, 0.5) * step
        bound *= 1 + 2.0**-7
        assert ((result - expected).abs() <= bound.flatten(1)[:, :inputs]).all()
        if layout["symmetric"]:  # codes are their own best codes
            again = pack_linear(*result.chunk(2) if gated else (result,), **layout)
            assert torch.equal(again.unpack(), result)


def test_quantised_like_the_formula() -> None:
    """One group of int4, by hand: -8 stands for the largest number, the first; its opposite has no code."""
    row = torch.tensor([-3.0, 1.5, 0.0, 0.1, 2.99, -0.6, 3.0, 0.75]).repeat(4)
    scale = 3 / 8
    codes = (row / scale).round().clamp(-8, 7)
    assert torch.equal(pack_linear(row[None], format="int4").unpack()[0], codes * scale)
    offset = pack_linear((row + 10)[None], format="int4", symmetric=False).unpack()[0]
    scale = (int(13 / 15 * 256) + 1) / 256  # up to 8 bits
    assert torch.equal(offset, ((row + 10) / scale).round().clamp(0, 15) * scale)


@EVERY
def test_bytes_are_those_of_the_format(layout: dict[str, Any]) -> None:
    packed = pack_linear(weight_of(64, 256), **layout)
    bits = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}[layout["format"]]
    numbers = 0 if bits > 8 else (1 if layout["symmetric"] else 2) * 64 * (256 // (layout["group"] or 256))
    assert packed.nbytes == 64 * 256 * bits // 8 + 2 * numbers


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
def test_a_row_does_not_depend_on_the_others(layout: dict[str, Any], dtype: torch.dtype, gated: bool, isa: str) -> None:
    """Neither on how many there are: one, few, or as many as a prompt has."""
    weight, up = weight_of(80, 330).chunk(2)
    packed = pack_linear(weight, up if gated else None, **layout)
    x = torch.randn(70, 330, generator=torch.Generator().manual_seed(0)).to(dtype)
    more: dict[str, Any] = {"activation": "silu", "norm": "rms"}
    whole = pygen.linear_decode(x, packed, **more)
    for rows in (*range(1, 18), 64):
        assert torch.equal(pygen.linear_decode(x[:rows], packed, **more), whole[:rows]), rows
    for row in range(70):
        assert torch.equal(pygen.linear_decode(x[row : row + 1], packed, **more), whole[row : row + 1]), row


@pytest.mark.parametrize("gated", [False, True])
def test_a_row_of_a_blocked_call_does_not_depend_on_the_others(gated: bool) -> None:
    """Nor on its place, on the threads, or on what lies in memory beside the rows."""
    weight, up = weight_of(75, 330), weight_of(75, 330).flip(0)
    packed = pack_linear(weight, up if gated else None, format="bfloat16")
    x = torch.randn(70, 330, generator=torch.Generator().manual_seed(0)).bfloat16()
    more: dict[str, Any] = {"activation": "silu", "norm": "rms", "blocked": True}
    whole = pygen.linear_decode(x, packed, **more)
    before = torch.get_num_threads()
    for rows in (1, 2, 15, 31, 32, 33, 64):
        torch.set_num_threads(1 + rows % 3)
        assert torch.equal(pygen.linear_decode(x[-rows:], packed, **more), whole[-rows:]), rows
    torch.set_num_threads(before)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    others = x.clone()
    others[1::2] = math.nan
    assert torch.equal(pygen.linear_decode(x[order], packed, **more), whole[order])
    assert torch.equal(pygen.linear_decode(others, packed, **more)[::2], whole[::2])


@EVERY
def test_threads_do_not_matter_to_the_bit(layout: dict[str, Any]) -> None:
    packed = pack_linear(weight_of(1100, 700), **layout)
    x = torch.randn(130, 700)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(pygen.linear_decode(x, packed, norm="layer"))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_inputs_obey_the_error_rule(layout: dict[str, Any], dtype: torch.dtype) -> None:
    """Where sums are long, and where they cancel: inputs that do not average to 0."""
    weight = weight_of(64, 11008) * 0.02
    packed = pack_linear(weight, **layout)
    for shift in (0.0, 3.0):
        x = (torch.randn(4, 11008, generator=torch.Generator().manual_seed(1)) + shift).to(dtype)
        truth = torch.nn.functional.linear(x.double(), packed.unpack(torch.float64))
        same = torch.nn.functional.linear(x.float(), packed.unpack()).to(dtype)
        assert_error_rule([(pygen.linear_decode(x, packed), same, truth)], f"{layout}, {dtype}, {shift}")


def test_leading_dimensions_are_kept() -> None:
    packed = pack_linear(weight_of(40, 64))
    x, residual = torch.randn(2, 3, 64), torch.randn(2, 3, 40)
    expected = pygen.linear_decode(x.view(6, 64), packed, residual=residual.view(6, 40)).view(2, 3, 40)
    assert torch.equal(pygen.linear_decode(x, packed, residual=residual), expected)
    out = torch.empty(2, 3, 40)
    assert pygen.linear_decode(x, packed, residual=residual, out=out) is out
    assert torch.equal(out, expected)
    assert pygen.linear_decode(torch.empty(0, 5, 64), packed).shape == (0, 5, 40)


def test_weights_may_be_any_float_and_of_any_strides() -> None:
    weight = weight_of(40, 64)
    for format in ("float32", "bfloat16", "int8", "int4"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            given = weight.to(dtype)
            strided = given.T.contiguous().T
            assert torch.equal(pack_linear(given, format=format).data, pack_linear(strided, format=format).data)


def test_a_packed_weight_is_copied_and_compiled() -> None:
    packed = pack_linear(weight_of(2048, 1024), format="float32")  # large enough for large pages
    x = torch.randn(3, 1024)
    expected = pygen.linear_decode(x, packed)
    for other in (packed.clone(), copy.deepcopy(packed), PackedLinear(*packed)):
        assert torch.equal(other.data, packed.data)
        assert torch.equal(pygen.linear_decode(x, other), expected)
    torch._dynamo.reset()
    compiled = torch.compile(pygen.linear_decode, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(x, packed), expected)


def test_no_outputs_and_zero_weights() -> None:
    assert pygen.linear_decode(torch.ones(2, 8), pack_linear(torch.ones(0, 8))).shape == (2, 0)
    for layout in ALL:
        packed = pack_linear(torch.zeros(40, 100), **layout)
        assert not packed.unpack().any()
        assert not pygen.linear_decode(torch.randn(3, 100), packed).any()


X, WEIGHT = torch.ones(2, 64), pack_linear(torch.ones(40, 64))
INT4 = pack_linear(torch.ones(40, 64), format="int4")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(64), "out": torch.ones(40)}, ValueError, "x must have shape"),
        ({"x": torch.ones(2, 63)}, ValueError, r"x must have shape \(2, 64\)"),
        ({"x": X.double()}, TypeError, "x must be float32, bfloat16 or float16"),
        ({"x": X.clone().requires_grad_()}, RuntimeError, "not differentiable, and x requires grad"),
        ({"bias": torch.ones(64)}, ValueError, r"bias must have shape \(40,\)"),
        ({"bias": torch.ones(40).half()}, TypeError, "bias must have x's dtype .* or be float32"),
        ({"residual": torch.ones(1, 40)}, ValueError, r"residual must have shape \(2, 40\)"),
        ({"residual": torch.ones(2, 40).half()}, TypeError, "residual must have x's dtype"),
        ({"out": torch.ones(2, 64)}, ValueError, r"out must have shape \(2, 40\)"),
        ({"out": torch.ones(2, 1).expand(2, 40)}, RuntimeError, "single memory location"),
        ({"activation": "relu"}, ValueError, "activation must be one of silu, gelu, gelu_tanh, none, got relu"),
        ({"soft_cap": 0.0}, ValueError, "soft_cap must be positive, got 0"),
        ({"soft_cap": 30.0, "activation": "silu"}, ValueError, "soft_cap is for a layer without activation and gate"),
        ({"norm": "group"}, ValueError, "norm must be one of none, rms, layer, got group"),
        ({"norm_weight": torch.ones(64)}, ValueError, "norm_weight and norm_bias are for a norm"),
        ({"norm": "rms", "eps": torch.inf}, ValueError, "eps must be finite and not negative, got inf"),
        ({"norm": "rms", "norm_weight": torch.ones(40)}, ValueError, r"norm_weight must have shape \(64,\)"),
        ({"weight": WEIGHT._replace(format="int3")}, ValueError, "format must be one of float32, .*, got int3"),
        ({"weight": WEIGHT._replace(outputs=70)}, ValueError, "weight must hold 3 panels of 4096 bytes"),
        ({"weight": WEIGHT._replace(data=WEIGHT.data[:, 64:])}, ValueError, "weight must hold 2 panels"),
        ({"weight": WEIGHT._replace(data=WEIGHT.data.int())}, TypeError, "weight must be"),
        ({"weight": WEIGHT._replace(group=32)}, ValueError, "weight is not as pack_linear makes it"),
        ({"weight": INT4._replace(group=40)}, ValueError, "weight is not as pack_linear makes it"),
        ({"weight": INT4._replace(group=0)}, ValueError, "weight is not as pack_linear makes it"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pygen.linear_decode(**({"x": X, "weight": WEIGHT} | arguments))


def test_overlap_is_refused() -> None:
    memory = torch.zeros(3, 64)
    with pytest.raises(RuntimeError, match="single memory location"):
        pygen.linear_decode(memory[:2], pack_linear(torch.ones(64, 64)), out=memory[1:])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": torch.ones(8)}, ValueError, r"weight must have shape \(outputs, inputs\)"),
        ({"weight": torch.ones(8, 0)}, ValueError, r"weight must have shape \(outputs, inputs\)"),
        ({"weight": torch.ones(8, 8, dtype=torch.int8)}, TypeError, "weight must be floating point"),
        ({"up": torch.ones(8, 9)}, ValueError, r"up must have weight's shape \[8, 8\]"),
        ({"up": torch.ones(8, 8).int()}, TypeError, "up must be floating point"),
        ({"format": "int2"}, ValueError, "format must be one of float32, bfloat16, int8, int4, got 'int2'"),
        ({"format": "int4", "group": 48}, ValueError, "group must be 0 .*, got 48"),
        ({"format": "bfloat16", "group": 32}, ValueError, "group is for int8 and int4"),
        ({"format": "float32", "symmetric": False}, ValueError, "symmetric is for int8 and int4"),
        ({"format": "int8", "weight": torch.full((8, 8), torch.nan)}, ValueError, "weight must be finite"),
        ({"format": "int4", "weight": torch.full((8, 8), torch.inf)}, ValueError, "weight must be finite"),
    ],
)
def test_wrong_weights(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack_linear(**({"weight": torch.ones(8, 8)} | arguments))


def test_the_packed_header_is_what_torch_packs() -> None:
    """Each code, scale and zero where packed_linear.h says it is."""
    weight = weight_of(40, 64)
    panel = pack_linear(weight, format="bfloat16").data.view(torch.bfloat16).view(2, 32, 32, 2)
    for output, k in ((0, 0), (31, 63), (39, 10), (5, 33)):
        assert panel[output // 32, k // 2, output % 32, k % 2] == weight[output, k].bfloat16()
    for format, per_word in (("int8", 4), ("int4", 8)):
        packed = pack_linear(weight, format=format, group=32, symmetric=False)
        groups = packed.data.view(2, 2, -1)
        numbers = groups[..., :128].contiguous().view(torch.bfloat16).view(2, 2, 2, 16, 2)
        words = groups[..., 128:].contiguous().view(torch.int32).view(2, 2, 32 // per_word, 32)
        for output, k in ((0, 0), (31, 63), (39, 10), (5, 33), (17, 7), (2, 6)):
            panel, lane, group = output // 32, output % 32, k // 32
            scale, zero = numbers[panel, group, :, lane % 16, lane // 16].tolist()
            word, i = words[panel, group, k % 32 // per_word, lane].item(), k % per_word
            code = word >> 8 * i & 255 if per_word == 4 else word >> 4 * (i // 2) + 16 * (i % 2) & 15
            assert scale * (code - zero) == packed.unpack(torch.float64)[output, k]


@pytest.mark.parametrize(("norm", "alone"), [("rms", pygen.rms_norm), ("layer", pygen.layer_norm)])
def test_a_norm_before_is_the_norm_alone(norm: str, alone: Any) -> None:
    """To the bit: the statistics are one piece of code."""
    x, packed = torch.randn(3, 333) + 2, pack_linear(torch.randn(40, 333), format="int8", group=32)
    weight = torch.rand(333)
    fused = pygen.linear_decode(x, packed, norm=norm, norm_weight=weight, eps=1e-5)
    assert torch.equal(fused, pygen.linear_decode(alone(x, weight, eps=1e-5), packed))
