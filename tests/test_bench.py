"""`pygen bench`: what it writes, what it refuses, and that what should be fast is: by ratios within one quick run."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import pygen
from bench import decoder, drop_ins, gpu, llama, run, unet
from bench.cases import Case, Work
from bench.measure import LEAST_ROUNDS, Spread, interleaved
from bench.steps import LARGE, SMALL, STEPS
from pygen.cli import main
from pygen.ops import SPECS


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine, threads that wait for each other cost more than a small step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A quick run of everything: bench.json, and bench.png where there is matplotlib."""
    folder = tmp_path_factory.mktemp("bench")
    plot = ["--plot", str(folder / "bench.png")] if find_spec("matplotlib") else []
    assert main(["bench", "--quick", "--json", str(folder / "bench.json"), *plot]) == 0
    return folder


@pytest.fixture(scope="module")
def cases(folder) -> dict[str, Any]:
    return {case["name"]: case for case in json.loads((folder / "bench.json").read_text())["cases"]}


def best(case: dict[str, Any], *, ours: bool) -> float:
    return min(
        t["median"] for c, t in case["times"].items() if c not in ("reference", "stream") and ("pygen" in c) == ours
    )


def test_the_file_is_whole(folder, cases):
    report = json.loads((folder / "bench.json").read_text())
    assert report["pygen"] == pygen.__version__
    assert report["quick"] is True
    assert {"date", "machine", "isa", "threads", "torch", "python"} <= report.keys()
    assert {case["suite"] for case in cases.values()} == set(run.SUITES)
    for case in cases.values():
        assert case["red"] is None
        assert case["bytes_moved"] > 0
        assert case["floor"] >= case["times"]["stream"]["median"] > 0
        for spread in case["times"].values():
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]


def test_every_op_is_timed(cases):
    for name in SPECS:
        assert any(case.startswith(f"{name}, ") for case in cases)


def test_a_decoder_is_timed_whole(cases):
    assert {*cases} >= {case.name for case in decoder.cases(quick=True)}
    alone, batch = cases["decode, tiny, bfloat16"], cases["batch of 8, tiny, bfloat16"]
    assert {"pygen", "transformers"} <= alone["times"].keys()
    assert {"pygen", "pygen, alone"} <= batch["times"].keys()
    assert batch["tokens"] == 8 * batch["bytes_moved"] / alone["bytes_moved"] * alone["tokens"]
    assert "of float64" in alone["remark"]
    kinds = {column for column in cases["one token, tiny, int4 by 32"]["times"] if column.startswith("without ")}
    for kind in ("embedding", "q, k, v, 2", "cache_append", "decode_attention", "merge, 2", "head", "sample_token"):
        assert sum(column.startswith(f"without {kind}") for column in kinds) == 1


def test_a_decoder_with_wrong_weights_is_red():
    work = decoder.decode("tiny", "bfloat16", quick=True)
    assert work.red() is None
    these = decoder.Loaded("tiny", "bfloat16", quick=True)
    these.model.head.weight.data.view(torch.bfloat16)[0, :32] *= 1.5
    triples = these.check(these.ids[:1])
    truth = decoder.Loaded("tiny", "bfloat16", quick=True).triples
    wrong = [(ours, same, right) for (ours, _, _), (_, same, right) in zip(triples, truth, strict=True)]
    work.results = lambda: wrong
    assert "exceeds" in work.red()


def test_the_decoders_verdicts():
    def result(name: str, tokens: int, **seconds: float) -> run.Result:
        times = {column.replace("_", " "): Spread(*[each] * 3) for column, each in seconds.items()}
        facts = ("DRAM", "bfloat16", 64, 64, None, 1.0, 0.1, times, tokens, "as it should")
        return run.Result("decoder", "125M", name, *facts)

    seen = result("decode, 125M, bfloat16", 32, pygen=0.2, transformers=1.0)
    assert [*decoder.verdicts([seen])] == [
        "decode, 125M, bfloat16: as it should",
        "decode, 125M, bfloat16: 5.0 times transformers' in bfloat16, the goal being 3",
    ]
    whole = result("one token, 125M, int4 by 32", 1, pygen=10e-6, program=8e-6, **{"without head": 3e-6})
    assert [" ".join(line.split()) for line in decoder.verdicts([whole])] == [
        "one token, 125M, int4 by 32: where 10 us go",
        "head 5.0 us 50%",
        "all else in the program 3.0 us 30%",
        "Python between two programs 2.0 us 20%",
    ]


@pytest.mark.parametrize("code", [0, 1, -4])
def test_llamas_extra_buffers_are_tried_by_a_child(monkeypatch, tmp_path, code):
    monkeypatch.setattr(llama, "Llama", lambda path, threads, extra_buffers: extra_buffers)
    monkeypatch.setattr(llama.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code))
    used, how = llama.open_llama(tmp_path, 1)
    assert used == (code == 0)
    assert {0: "with its extra buffers", 1: "(exit status 1)", -4: "(SIGILL)"}[code] in how


def test_the_roofline_is_a_picture(folder):
    pytest.importorskip("matplotlib")
    Image = pytest.importorskip("PIL.Image")
    with Image.open(folder / "bench.png") as picture:
        assert min(picture.size) > 500


def test_steps_beat_their_peers(cases):
    guided = cases["guided step (2, 4, 64, 64) float32"]
    assert best(guided, ours=True) <= best(guided, ours=False)
    if find_spec("diffusers"):
        unipc = cases["unipc step (2, 4, 64, 64)"]
        assert 5 * best(unipc, ours=True) <= best(unipc, ours=False)


def test_every_drop_in_is_timed():
    pytest.importorskip("diffusers")
    names = [case.name for case in drop_ins.cases(quick=False)]
    for name in drop_ins.schedulers():
        own = drop_ins.drive_of(name).shape
        assert all(f"{name} {shape}" in names for shape in ([own] if own else [SMALL, LARGE]))
    import pygen.diffusers

    assert {*pygen.diffusers.__all__} == {*drop_ins.schedulers(), "PhiloxGenerator"}
    assert len(names) == len(set(names))


@pytest.mark.filterwarnings("ignore")  # numpy's and torchsde's, by the thousand
@pytest.mark.parametrize("name", drop_ins.schedulers())
def test_drop_ins_are_driven_as_pipelines_do(name):
    """By small samples: what they give back is diffusers', and a run begins again where it ends."""
    own = drop_ins.drive_of(name).shape
    shape = (own[0], min(own[1], 64), own[2]) if own else (2, 4, 8, 8)
    with torch.no_grad():
        work = drop_ins.work(name, shape)
        assert work.red() is None
        assert work.bytes_moved > 0
        for column in work.calls.keys() - {"torch.compile"}:
            firsts = [drop_ins.tuple_of(work.calls[column]())[0] for _ in range(2 * STEPS)]
            assert all(first.isfinite().all() for first in firsts), column


@pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")
@pytest.mark.parametrize("name", drop_ins.REPRESENTATIVE)
def test_the_formula_that_is_compiled_is_the_rows(name):
    kind, drive = drop_ins.schedulers()[name], drop_ins.drive_of(name)
    with torch.no_grad():
        x, outputs = drive.draw(drop_ins.prepared(kind, drive, torch.Generator()), (2, 4, 8, 8), 3)
        call = drop_ins.Run(kind, drive, ours=True).watched(x, outputs).timed
        made = [call[result] for result in ("out", "pred", "second") if call[result] is not None]
        torch.testing.assert_close(drop_ins.row_formula(*drop_ins.row_terms(call)), made)


def test_the_verdict_names_what_misses_a_goal():
    def result(name: str, shape: tuple[int, ...], micros: float) -> run.Result:
        spread = Spread(*[micros / 1e6] * 3)
        facts = ("warm", "float32", 64, 0, None, 0.0, 50e-6)
        return run.Result("steps", drop_ins.LATENTS, f"{name} {shape}", *facts, {"pygen": spread})

    quick, slow = (result(name, SMALL, micros) for name, micros in (("A", 24.0), ("B", 26.0)))
    assert [*drop_ins.verdicts([quick])] == ["drop-ins (2, 4, 64, 64) within 25 us: 1 of 1"]
    large = [result("A", LARGE, 64.0), result("B", LARGE, 66.0)]
    small, large = drop_ins.verdicts([quick, slow, *large])
    assert small == "drop-ins (2, 4, 64, 64) within 25 us: 1 of 2, but for B"
    assert large == "drop-ins (8, 4, 128, 128) within 1.3 floors: 1 of 2, but for B"


def test_a_models_verdict_names_its_peers_and_goals():
    def result(dtype: str, **seconds: float) -> run.Result:
        times = {column: Spread(*[each] * 3) for column, each in seconds.items()}
        return run.Result("unet", "", f"DiT-L/2, {dtype}", "warm", dtype, 64, 64, None, 1.0, 0.1, times)

    halves, floats = result("bfloat16", pygen=2.0, diffusers=3.0, OpenVINO=2.5), result("float32", pygen=5, diffusers=6)
    assert [*unet.verdicts([halves, floats])] == [
        "DiT-L/2, bfloat16: 1.50 times torch channels-last (goal: 1.35); 1.25 times OpenVINO (goal: 1.22); "
        "3.00 times torch in float32 (goal: 2.7)",
        "DiT-L/2, float32: 1.20 times torch channels-last (goal: 1.3)",
    ]


def case_of(results: Any, calls: dict[str, Any]) -> Case:
    return Case("steps", "a case", lambda: Work(calls, 64, 0, torch.float32, results))


def right() -> list[Any]:
    return [(torch.ones(1), torch.ones(1), torch.ones(1))]


def wrong() -> list[Any]:
    return [(torch.ones(1) + 0.1, torch.ones(1), torch.ones(1))]


def raises() -> list[Any]:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(("results", "reason"), [(wrong, "error 0.1 exceeds"), (raises, "no such kernel")])
def test_a_red_case_shows_no_time(tmp_path, capsys, monkeypatch, results, reason):
    def call() -> None:
        pytest.fail("a red case was timed")

    monkeypatch.setitem(run.SUITES, "steps", lambda quick: [case_of(results, {"pygen": call, "torch.compile": call})])
    assert main(["bench", "steps", "--json", str(tmp_path / "x.json")]) == 1
    assert reason in capsys.readouterr().out
    (case,) = json.loads((tmp_path / "x.json").read_text())["cases"]
    assert reason in case["red"]
    assert case["times"] == {}


def test_a_reference_that_breaks_the_graph_has_no_compiled_column(monkeypatch):
    torch._dynamo.reset()
    broken = torch.compile(lambda x: x + 1 if bool(x.sum() > 0) else x, fullgraph=True)
    calls = {"pygen": lambda: None, "torch.compile": lambda: broken(torch.ones(3))}
    (result,) = run.measure([case_of(right, calls)], quick=False)
    assert set(result.times) == {"pygen", "stream"}


def test_compare(tmp_path, capsys, monkeypatch):
    tick = torch.ones(64)
    monkeypatch.setitem(run.SUITES, "steps", lambda quick: [case_of(right, {"pygen": tick.clone, "eager": tick.exp})])
    file = tmp_path / "old.json"
    command = ["bench", "steps", "--quick", "--compare", str(file), "--fail-slower", "3"]
    assert main(["bench", "steps", "--quick", "--json", str(file)]) == 0
    assert main(command) == 0
    assert "old / new" in capsys.readouterr().out

    report = json.loads(file.read_text())
    report["cases"][0]["times"]["pygen"]["median"] /= 100
    file.write_text(json.dumps(report))
    assert main(command) == 1
    assert "times the old time" in capsys.readouterr().out
    assert main(command[:-2]) == 0

    report["cases"][0] |= {"red": "it was wrong", "times": {}}
    file.write_text(json.dumps(report))
    assert main(command) == 0


BAD_OLD = {"list": "[]", "empty": "", "no cases": "{}", "no medians": '{"cases": [{"suite": "a", "name": "b"}]}'}


@pytest.mark.parametrize("text", BAD_OLD.values(), ids=BAD_OLD)
def test_a_file_that_cannot_be_compared(tmp_path, capsys, text):
    (tmp_path / "old.json").write_text(text)
    refused(capsys, ["--compare", str(tmp_path / "old.json")], "--compare", "old.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["steps", "dance"], ["dance", "steps, decode, decoder, attention, unet, ops"]),
        (["--compare", "nowhere.json"], ["--compare", "nowhere.json", "No such file"]),
        (["--fail-slower", "1.5"], ["--compare"]),
        (["--fail-slower", "nan", "--compare", "x"], ["--fail-slower"]),
        (["--json", "x.txt"], ["--json", ".json"]),
        (["--plot", "/nowhere/x.png"], ["--plot", "nowhere"]),
        (["--json", "/proc/x.json"], ["--json", "/proc/x.json"]),
    ],
)
def test_bad_input(capsys, options, words):
    refused(capsys, options, *words)


def test_outside_a_checkout(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pygen, "__file__", str(tmp_path / "pygen" / "__init__.py"))
    refused(capsys, [], "source checkout")


def refused(capsys, options: list[str], *words: str) -> None:
    assert main(["bench", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pygen: error: ")
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err


def test_calls_take_turns():
    order: list[str] = []
    times = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, seconds=0.0)
    assert set(times) == {"a", "b"}
    rounds = [name for i, name in enumerate(order) if i == 0 or name != order[i - 1]]
    assert rounds == ["a", "b"] * (1 + LEAST_ROUNDS)


def test_a_stage_of_make_gpu_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def fails() -> dict[str, Any]:
        raise RuntimeError("no GPU")

    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    stages = {"machine": lambda: {"device": "A GPU (80 GB)"}, "specs": fails, "steps": lambda: {"us": 1.0}}
    monkeypatch.setattr(gpu, "STAGES", stages)
    assert gpu.main() == 1
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("a-gpu-80-gb-")
    report = json.loads(file.read_text())
    assert report["specs"]["error"] == "RuntimeError: no GPU"
    assert report["steps"]["us"] == 1.0


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on this machine")
def test_the_bugs_planted_for_the_sanitizers_compile(tmp_path):
    command = ["nvcc", "-arch=sm_90", "bench/planted_bugs.cu", "-o", str(tmp_path / "planted")]
    subprocess.run(command, check=True, cwd=gpu.ROOT)
