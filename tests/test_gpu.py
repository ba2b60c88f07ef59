"""Every spec on a real GPU: what `make gpu` runs first."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

import pygen
from pygen import _C
from pygen.diffusion import SOLVERS, Noising, Stepper, min_snr
from pygen.diffusion.adaptive import ADAPTIVE
from pygen.models.text import TEXT_MODEL
from pygen.ops import SPECS, OpSpec
from pygen.ops.affine_step import make_table
from pygen.ops.packed_linear import WeightFormat
from tests.error_rule import assert_error_rule
from tests.test_ops import BY_DTYPE, in_double, outputs_of, run

GPU_BACKENDS = ("cuda", "triton")
PARTS = 4  # of a spec's examples, which may run side by side
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: `make gpu` runs these on one")
ON_GPU = pytest.mark.parametrize(
    "spec", [spec for spec in SPECS.values() if set(spec.backends) & set(GPU_BACKENDS)], ids=lambda spec: spec.name
)


def to_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same tensors on the GPU: strides, offsets and shared memory included."""
    storages: dict[int, torch.UntypedStorage] = {}
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            storage = tensor.untyped_storage()
            on_gpu = storages.setdefault(storage.data_ptr(), storage.cuda())
            empty = torch.empty(0, dtype=tensor.dtype, device="cuda")
            moved[id(tensor)] = empty.set_(on_gpu, tensor.storage_offset(), tensor.shape, tensor.stride())
        return moved[id(tensor)]

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            return move(value)
        if isinstance(value, list | tuple):
            items = map(visit, value)
            return value._make(items) if hasattr(value, "_make") else type(value)(items)
        return value

    return {name: visit(value) for name, value in arguments.items()}


@ON_GPU
@BY_DTYPE
@pytest.mark.parametrize("part", range(PARTS))
def test_gpu_against_reference(spec: OpSpec, dtype: torch.dtype, part: int) -> None:
    """CUDA C++ kernels give the CPU's bits, but where their spec says otherwise; all obey the error rule."""
    families = defaultdict(list)
    names: dict[str, int] = {}
    for example in spec.examples(dtype):
        if names.setdefault(example.name, len(names)) % PARTS != part:
            continue
        arguments = to_gpu(copy.deepcopy(example.arguments))
        spec.function(**arguments)
        results = {name: arguments[name].cpu() for name in outputs_of(spec, example)}
        if "cuda" in spec.backends and spec.bits_on_gpu:
            for name, expected in run(spec, example).items():
                assert torch.equal(results[name].nan_to_num(3.0), expected.nan_to_num(3.0)), (example.name, name)
        truth = spec.reference(**in_double(copy.deepcopy(example.arguments)))
        same = spec.reference(**copy.deepcopy(example.arguments))
        for name, place in outputs_of(spec, example).items():
            families[example.name, name].append((results[name], same[place], truth[place]))
    for (name, output), triples in families.items():
        assert_error_rule(triples, f"{spec.name}, {name}, {output}")


def steps_on_gpu() -> tuple[Tensor, dict[str, Any]]:
    x = torch.randn(2, 4, 64, 64, device="cuda")
    table = make_table([{"x0": 0.5, "noise0": 1.0, "step": step} for step in range(3)]).cuda()
    arguments = {"rows": torch.tensor([0], device="cuda"), "seed": torch.tensor([1], device="cuda")}
    return x, {"model_output": None, "table": table} | arguments


def test_no_step_waits_for_the_gpu() -> None:
    x, arguments = steps_on_gpu()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pygen.affine_step(x, **arguments)
        pygen.philox_normal(seed=arguments["seed"], step=arguments["rows"], out=x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != ADAPTIVE])
def test_no_step_of_a_solver_waits_for_the_gpu(solver: str) -> None:
    plan = pygen.plan(solver, "cosine", 5, guidance=2.0, device="cuda")
    x, seed = torch.randn(2, 4, 16, 16, device="cuda"), torch.tensor([1], device="cuda")
    stepper = Stepper(plan, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(plan.steps):
            x = stepper.step(i, x, 0.5 * x, uncond=0.25 * x, seed=seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Noise that is made on the host, by definition: torchsde's. Drop-ins that are driven in other ways than by
# step(output, t, sample) run on a CPU in test_diffusers.py.
ON_THE_HOST = {"CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"}


def test_no_step_of_a_drop_in_waits_for_the_gpu() -> None:
    pytest.importorskip("diffusers")
    import pygen.diffusers
    from tests.diffusers_trajectories import DRIVERS

    offered = {name for name in pygen.diffusers.__all__ if name.endswith("Scheduler")}
    for name in sorted(offered - set(DRIVERS) - ON_THE_HOST):
        scheduler = getattr(pygen.diffusers, name)()
        scheduler.set_timesteps(5, device="cuda")
        x = torch.randn(2, 4, 16, 16, device="cuda")
        generator = torch.Generator("cuda").manual_seed(0)
        takes = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t in scheduler.timesteps:
                scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else None
                x = scheduler.step(0.5 * x, t, x, **takes)[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_no_training_step_waits_for_the_gpu() -> None:
    x0, seed = torch.randn(2, 4, 32, 32, device="cuda"), torch.tensor([1], device="cuda")
    model = torch.nn.Conv2d(4, 4, 1).cuda()
    noising, rows = Noising.from_schedule("cosine", weighting=min_snr(), device="cuda"), torch.arange(2, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        times = torch.randint(len(noising), (2,), device="cuda")
        noising.loss(model(noising.add_noise(x0, times, seed=seed)), x0, times, seed=seed).mean().backward()
        t = torch.rand(2, device="cuda")
        drawn = Noising.at(1 - t, t, prediction="flow")
        drawn.loss(model(drawn.add_noise(x0, rows, seed=seed)), x0, rows, seed=seed).mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_follows_its_row_and_seed() -> None:
    x, arguments = steps_on_gpu()
    out = torch.empty_like(x)
    pygen.affine_step(x, **arguments, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pygen.affine_step(x, **arguments, out=out)
    drawn = []
    for row, seed in ((0, 1), (1, 1), (1, 2)):
        arguments["rows"].fill_(row)
        arguments["seed"].fill_(seed)
        graph.replay()
        drawn.append(out.clone())
        assert torch.equal(drawn[-1], pygen.affine_step(x, **arguments))
    assert len(torch.stack(drawn).flatten(1).unique(dim=0)) == 3


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_the_decoder_on_a_gpu(weights: WeightFormat) -> None:
    """Tokens of the shipped model, by CUDA graphs: alone, in a batch, drafted, and through a session."""
    texts = ["The for statement", "class", "An exception is raised when an operator is given", "x"]
    here, there = (
        pygen.Decoder.from_pretrained(TEXT_MODEL, weights, device=device, cache_tokens=2048)
        for device in ("cpu", "cuda")
    )
    prompts = [here.text.encode(text) for text in texts]
    alone = [there.generate([prompt], 48)[0].tolist() for prompt in prompts]
    together = [there.submit(prompt, 48) for prompt in prompts]
    while there.busy:
        there.step()
    assert [prompt + request.tokens for prompt, request in zip(prompts, together, strict=True)] == alone
    drafted = pygen.Decoder(there.model, draft="prompt", stop_tokens=there.stop_tokens)
    assert [drafted.generate([prompt], 48)[0].tolist() for prompt in prompts] == alone
    guessed = pygen.Decoder(there.model, draft=there, stop_tokens=there.stop_tokens)
    assert [guessed.generate([prompt], 48)[0].tolist() for prompt in prompts] == alone
    settings = {"temperature": 0.8, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.2}
    assert drafted.generate(prompts[0], 32, **settings).tolist() == there.generate(prompts[0], 32, **settings).tolist()
    with here.prefill(prompts[2]) as ours, there.prefill(prompts[2]) as theirs:
        for token in prompts[0]:
            far = (theirs.logits.cpu() - ours.logits).abs().max()  # in bfloat16 two roundings of the largest
            assert far <= (1e-6 if weights == "float32" else 2**-7) * 2 * ours.logits.abs().max()
            ours.step([token])
            theirs.step([token])
    if weights == "float32":
        assert alone == [here.generate([prompt], 48)[0].tolist() for prompt in prompts]
        beams, best = (decoder.beam_search(prompts[0], 8, num_beams=3) for decoder in (here, there))
        assert torch.equal(beams[0], best[0])


def test_generate_of_a_loaded_model() -> None:
    """transformers' tokens, on the device of the prompt."""
    pytest.importorskip("transformers")
    from tests.decoder_families import made

    model = made("llama-3").to("cuda")
    prompt = torch.randint(1, 199, (3, 21), generator=torch.Generator().manual_seed(0)).cuda()
    before = model.generate(prompt, max_new_tokens=40)
    assert "generate: method" in pygen.accelerate(model).replaced
    after = model.generate(prompt, max_new_tokens=40)
    assert after.device == prompt.device
    assert torch.equal(after, before)
    assert torch.equal(model.generate(prompt, max_new_tokens=40, prompt_lookup_num_tokens=4), before)
    beams = model.generate(prompt, max_new_tokens=8, num_beams=3)
    assert torch.equal(beams, type(model).generate(model, prompt, max_new_tokens=8, num_beams=3))


def test_the_extension_has_cuda() -> None:
    assert _C.CUDA_BUILT
