"""The command line: the same bytes for the same seed, one line for bad input, nothing left behind."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pygen
from pygen import cli
from pygen.cli import DIGITS, main
from pygen.models.checkpoint import load_model, save_model
from pygen.models.unet import UNet
from pygen.ops import SPECS
from pygen.ops.backend import BACKENDS
from tests.error_rule import assert_error_rule

QUICK = ["sample", "--count", "6", "--steps", "3"]


@pytest.fixture(autouse=True)
def one_thread():
    """The layers are small: on a busy machine, threads that wait for each other cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(folder, channels=1):
    model = UNet(in_channels=channels, out_channels=channels, sample_size=4, channels=(16,), heads=2, groups=8)
    description = {"schedule": {"name": "cosine"}, "prediction": "epsilon", "clip": None, "num_classes": 10}
    save_model(folder, model, shape=model.sample_shape, **description)
    return folder


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pygen", *arguments], capture_output=True, text=True, env=os.environ | environment
    )


def one_line(error, *words):
    assert error.startswith("pygen: error: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


@pytest.mark.parametrize("suffix", [".png", ".npy", ".safetensors"])
def test_same_seed_same_bytes(tmp_path, capsys, suffix):
    if suffix == ".png":
        pytest.importorskip("PIL")
    files = [tmp_path / f"{name}{suffix}" for name in "abc"]
    for file, seed in zip(files, "112", strict=True):
        assert main([*QUICK, "--seed", seed, "--out", str(file)]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        assert captured.out.count("\n") == 1
        for word in ("6 samples", "dpmpp_2m", "3 steps", " s, ", str(file)):
            assert word in captured.out
    first, same, other = (file.read_bytes() for file in files)
    assert first == same
    assert first != other
    assert sorted(tmp_path.iterdir()) == files


def test_tensor_files_hold_the_samples(tmp_path):
    for suffix in (".npy", ".safetensors"):
        assert main([*QUICK, "--out", str(tmp_path / f"x{suffix}")]) == 0
    samples = torch.from_numpy(np.load(tmp_path / "x.npy"))
    assert samples.shape == (6, 1, 8, 8)
    assert samples.dtype == torch.float32
    assert torch.equal(samples, load_file(tmp_path / "x.safetensors")["samples"])


@pytest.mark.parametrize("channels", [1, 3])
def test_grid(tmp_path, channels):
    Image = pytest.importorskip("PIL.Image")
    folder = make_model(tmp_path / "model", channels)
    assert main([*QUICK, "--model", str(folder), "--out", str(tmp_path / "x.png")]) == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.mode == {1: "L", 3: "RGB"}[channels]
        assert picture.size == (3 * 40 + 2 * 2, 2 * 40 + 2)  # 6 tiles of 4 x 4 pixels, enlarged ten times


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddpm"])
def test_samples_do_not_depend_on_the_batch(tmp_path, solver):
    """The noise is the sample's own. The model's layers may sum in another order, so the error rule holds them."""
    results = {}
    for batch in (12, 5, 1):
        out = tmp_path / f"{batch}.npy"
        options = ["--solver", solver, "--steps", "8", "--count", "12", "--batch", str(batch), "--out", str(out)]
        assert main(["sample", *options]) == 0
        results[batch] = torch.from_numpy(np.load(out))

    def by_torch(dtype: torch.dtype, batch: int) -> torch.Tensor:
        model, description = load_model(DIGITS)
        images = []
        for sample_ids in torch.arange(12).split(batch):
            labels = sample_ids % 10
            with pygen.backend("reference"):
                images.append(pygen.sample(
                    model.to(dtype), (len(labels), *description.shape), solver=solver, schedule=description.schedule,
                    steps=8, guidance=2.0, clip=description.clip, cond={"class_labels": labels},
                    uncond={"class_labels": torch.full_like(labels, 10)}, seed=0, sample_ids=sample_ids, dtype=dtype,
                ))  # fmt: skip
        return torch.cat(images)

    truth = by_torch(torch.float64, 12)
    assert_error_rule([(images, by_torch(torch.float32, batch), truth) for batch, images in results.items()])


def test_classes_are_taken_in_turn(tmp_path, monkeypatch):
    seen = []

    def fake(model, shape, *, solver, cond, uncond, seed, sample_ids):
        assert shape == (len(sample_ids), 1, 8, 8)
        assert uncond["class_labels"].tolist() == [10] * len(sample_ids)
        seen.extend(zip(sample_ids.tolist(), cond["class_labels"].tolist(), strict=True))
        return torch.zeros(shape)

    monkeypatch.setattr(pygen, "sample", fake)
    options = ["--classes", "0,2,5-7", "--count", "7", "--batch", "3", "--out", str(tmp_path / "x.npy")]
    assert main(["sample", *options]) == 0
    assert seen == list(enumerate([0, 2, 5, 6, 7, 0, 2]))


@pytest.mark.parametrize(
    ("text", "classes"), [("0-9", list(range(10))), ("3", [3]), ("0,2,5-7", [0, 2, 5, 6, 7]), ("4-4, 1,1", [4, 1, 1])]
)
def test_class_syntax(text, classes):
    assert cli.Numbers().convert(text, None, None) == classes


BAD = {
    "solver": (["--solver", "heun9"], "--solver"),
    "no steps": (["--steps", "0"], "--steps"),
    "negative steps": (["--steps", "-3"], "--steps"),
    "steps in words": (["--steps", "many"], "--steps"),
    "too many steps": (["--steps", "1001"], "steps"),
    "spacing": (["--spacing", "random"], "--spacing"),
    "count": (["--count", "0"], "--count"),
    "huge count": (["--count", str(2**32)], "--count"),
    "batch": (["--batch", "0"], "--batch"),
    "seed": (["--seed", "-1"], "--seed"),
    "large seed": (["--seed", str(2**64)], "--seed"),
    "guidance NaN": (["--guidance", "nan"], "--guidance"),
    "guidance infinite": (["--guidance", "-inf"], "--guidance"),
    "guidance in words": (["--guidance", "strong"], "--guidance"),
    "class out of range": (["--classes", "3,10"], "--classes"),
    "huge class": (["--classes", "0-999999999"], "--classes"),
    "backwards": (["--classes", "7-3"], "--classes"),
    **{f"classes {text!r}": (["--classes", text], "--classes") for text in ("", "a", "1-", "-1", "1,,2", "1-2-3", "٣")},
    "unknown option": (["--colour", "red"], "--colour"),
    "missing value": (["--guidance"], "--guidance"),
    "extra argument": (["digits"], "digits"),
    "no model": (["--model", "nowhere"], "--model"),
}


@pytest.mark.parametrize(("options", "word"), BAD.values(), ids=BAD)
def test_bad_input(tmp_path, capsys, options, word):
    assert main(["sample", "--out", str(tmp_path / "x.npy"), *options]) == 2
    captured = capsys.readouterr()
    one_line(captured.err, word)
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("x.jpeg", [".png", ".npy", ".safetensors"]),
        ("x", [".png"]),
        (".png", [".png"]),
        ("nowhere/x.npy", ["folder", "nowhere"]),
        ("folder.npy", ["directory"]),
        ("/proc/x.npy", ["/proc/x.npy"]),  # a folder where even root cannot write
        ("n" * 255 + ".npy", ["too long"]),
    ],
)
def test_bad_out(tmp_path, capsys, monkeypatch, out, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.npy").mkdir()
    assert main([*QUICK, "--out", out]) == 2
    captured = capsys.readouterr()
    one_line(captured.err, "--out", *words)
    assert captured.out == ""
    assert os.listdir(tmp_path) == ["folder.npy"]


def test_out_is_needed(capsys):
    assert main(QUICK) == 2
    one_line(capsys.readouterr().err, "--out")


@pytest.mark.parametrize("damage", ["truncated", "NaN", "shape", "config"])
def test_bad_model(tmp_path, capsys, damage):
    folder = make_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "config":
        (folder / "config.json").write_text("{")
    else:
        bias = torch.full((16,), torch.nan) if damage == "NaN" else torch.zeros(15)
        save_file(load_file(weights) | {"conv_in.bias": bias}, weights)
    assert main([*QUICK, "--model", str(folder), "--out", str(tmp_path / "x.npy")]) == 2
    one_line(capsys.readouterr().err, "--model", "config.json" if damage == "config" else "model.safetensors")
    assert os.listdir(tmp_path) == ["model"]


def test_grid_of_two_channels(tmp_path, capsys):
    pytest.importorskip("PIL")
    folder = make_model(tmp_path / "model", channels=2)
    assert main([*QUICK, "--model", str(folder), "--out", str(tmp_path / "x.png")]) == 2
    one_line(capsys.readouterr().err, "--out", "channels")
    assert os.listdir(tmp_path) == ["model"]
    assert main([*QUICK, "--model", str(folder), "--out", str(tmp_path / "x.npy")]) == 0


def test_samples_that_are_not_finite(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pygen, "sample", lambda model, shape, **arguments: torch.full(shape, torch.nan))
    assert main([*QUICK, "--out", str(tmp_path / "x.npy")]) == 2
    one_line(capsys.readouterr().err, "not finite")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path, capsys, monkeypatch):
    def write(stream, *arguments):
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "_write", write)
    (tmp_path / "x.npy").write_bytes(b"old")
    assert main([*QUICK, "--out", str(tmp_path / "x.npy")]) == 2
    one_line(capsys.readouterr().err, "--out", "No space left")
    assert os.listdir(tmp_path) == ["x.npy"]
    assert (tmp_path / "x.npy").read_bytes() == b"old"


def test_interrupt(tmp_path):
    command = [sys.executable, "-m", "pygen", "sample", "--steps", "1000", "--out", str(tmp_path / "x.npy")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)  # until the file that will become x.npy is there
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert error.strip() == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["sample", "--help"], ["--version"]])
def test_help(capsys, arguments):
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out
    assert captured.err == ""


def test_unknown_command(capsys):
    assert main(["dance"]) == 2
    one_line(capsys.readouterr().err, "dance")


def test_doctor_lists_every_op(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = dict(line.strip().split("   ", 1) for line in lines if "   " in line.strip())
    assert facts["pygen"].strip() == pygen.__version__
    assert pygen._C.isa() in facts["CPU instructions"]
    for name, spec in SPECS.items():
        said = dict.fromkeys(spec.backends, "yes")
        if "cuda" in said and not pygen._C.CUDA_BUILT:
            said["cuda"] = "not built"
        assert re.split(r"\s{2,}", facts[name].strip()) == [said.get(backend, "-") for backend in BACKENDS]


def test_instruction_set_that_is_unknown():
    result = run("doctor", PYGEN_CPU_ISA="sse9")
    assert result.returncode == 2
    assert result.stdout == ""
    one_line(result.stderr, "PYGEN_CPU_ISA", "sse9")


def test_instruction_set_that_is_chosen():
    result = run("doctor", PYGEN_CPU_ISA="baseline")
    assert (result.returncode, result.stderr) == (0, "")
    assert "baseline in use" in result.stdout


@pytest.mark.parametrize(("module", "package"), [("PIL", "pillow"), ("sklearn", "scikit-learn")])
def test_missing_extra(tmp_path, capsys, monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--out", str(tmp_path / "x.png")]) == 2
    one_line(capsys.readouterr().err, package, "pip install")
    assert not list(tmp_path.iterdir())


def test_demo_without_diffusers(monkeypatch):
    from rich.console import Console

    from pygen import demo

    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert demo._scheduler(demo.RUNS[0]) is None
    text = io.StringIO()
    Console(file=text, width=100).print(demo._table([demo.Result(demo.RUNS[0], 1.0, 10.0, None, 1e-4, 1e-4, 1.0)]))
    assert "not installed" in text.getvalue()


def test_demo(tmp_path, capsys, monkeypatch):
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("sklearn")
    from pygen import demo

    kept = []
    whole = demo.run
    monkeypatch.setattr(demo, "run", lambda *arguments: kept.append(whole(*arguments)) or kept[-1])
    assert main(["demo", "--out", str(tmp_path / "digits.png")]) == 0
    table = capsys.readouterr().out
    assert str(tmp_path / "digits.png") in table

    [(picture, results)] = kept
    assert [result.run for result in results] == list(demo.RUNS)
    for result in results:
        assert result.run.label in table
        assert result.share >= 0.95
        last = 2.0**-21 if result.run.latent else 2.0**-23  # of values up to 1, and to 4
        assert result.deviation <= 2 * result.torch_deviation + last  # the error rule
        assert result.model_seconds > 0
        assert result.step_us > 0
        assert (result.scheduler_us is None) == (find_spec("diffusers") is None)
    with Image.open(tmp_path / "digits.png") as written:
        assert written.size == picture.size
        assert written.size[0] > 1500
        assert written.tobytes() == picture.tobytes()
