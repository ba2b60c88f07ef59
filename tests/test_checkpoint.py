"""Models on disk: what is written is what is read, and what is damaged is refused in one line."""

import errno
import json
import math
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from pygen.diffusion import make_schedule
from pygen.models import checkpoint
from pygen.models.checkpoint import CheckpointError, ModelDescription, load_model, save_model
from pygen.models.unet import UNet

DESCRIPTION = {
    "schedule": {"name": "cosine", "num_train_timesteps": 100},
    "prediction": "v_prediction",
    "clip": (-1.0, 2.5),
    "shape": (2, 4, 4),
    "num_classes": 3,
}


def make_model(seed=0):
    torch.manual_seed(seed)
    arguments = {"in_channels": 2, "out_channels": 2, "sample_size": 4, "channels": (16, 32), "num_classes": 3}
    model = UNet(**arguments, heads=2, groups=8)
    for parameter in model.parameters():  # those that start at zero too
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", make_model(), **DESCRIPTION)
    return tmp_path / "model"


def refuses(folder, *words):
    """load_model fails with one line that holds all of the words."""
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert line.startswith(str(folder))
    for word in words:
        assert word in line
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_round_trip(folder):
    model, description = load_model(folder)
    original = make_model()
    assert description == ModelDescription(**DESCRIPTION)
    assert not model.training
    assert model.config == original.config
    assert list(model.state_dict()) == list(original.state_dict())
    for loaded, saved in zip(model.state_dict().values(), original.state_dict().values(), strict=True):
        assert loaded.dtype == saved.dtype
        assert torch.equal(loaded, saved)
    x, t, labels = torch.randn(3, 2, 4, 4), torch.tensor([0, 50, 99]), torch.tensor([0, 2, 3])
    assert torch.equal(model(x, t, labels), original.eval()(x, t, labels))
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_clip_may_be_absent(tmp_path):
    save_model(tmp_path, make_model(), **DESCRIPTION | {"clip": None})
    assert load_model(tmp_path)[1].clip is None


def test_saving_twice_writes_the_same_bytes(folder, tmp_path):
    save_model(tmp_path / "again", make_model(), **DESCRIPTION)
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_shipped_model_loads():
    from pygen.cli import DIGITS

    model, description = load_model(DIGITS)
    assert description.shape == model.sample_shape == (1, 8, 8)
    assert make_schedule(description.schedule).num_train_timesteps == 1000


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_save_leaves_the_old_model(folder, monkeypatch, failing):
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, failing, fail)
    with pytest.raises((OSError, CheckpointError)):
        save_model(folder, make_model(seed=1), **DESCRIPTION)
    monkeypatch.undo()
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"prediction": "eps"}, "prediction"),
        ({"clip": (1.0, -1.0)}, "clip"),
        ({"clip": (torch.ones(1), 2.0)}, "Tensor"),
        ({"shape": (2, 4, 5)}, "shape"),
        ({"num_classes": 4}, "num_classes"),
        ({"schedule": {"name": "exponential"}}, "schedule.name"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_save_refuses_what_load_would(folder, change, word):
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    with pytest.raises(CheckpointError, match=word):
        save_model(folder, make_model(seed=1), **DESCRIPTION | change)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_save_refuses_weights_that_are_not_finite(tmp_path, value):
    model = make_model()
    model.conv_in.bias.data[3] = value
    with pytest.raises(CheckpointError, match=r"conv_in\.bias"):
        save_model(tmp_path / "new", model, **DESCRIPTION)
    assert not (tmp_path / "new").exists()


def test_save_refuses_halves(tmp_path):
    with pytest.raises(CheckpointError, match="BF16"):
        save_model(tmp_path / "new", make_model().to(torch.bfloat16), **DESCRIPTION)


FIELDS = ["format", "version", "model", "arguments", *DESCRIPTION, "arguments.heads", "schedule.name"]


def edited(folder, path, edit):
    """Apply ``edit`` to the object that holds the field ``path`` of the config."""
    config = json.loads((folder / "config.json").read_text())
    *parents, last = path.split(".")
    holder = config
    for parent in parents:
        holder = holder[parent]
    edit(holder, last)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("field", FIELDS)
def test_missing_field(folder, field):
    edited(folder, field, lambda holder, last: holder.pop(last))
    refuses(folder, "config.json", field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bogus", 1),
        ("arguments.bogus", 1),
        ("schedule.bogus", 1),
        ("format", 3),
        ("format", "pygen"),
        ("version", 2),
        ("version", True),
        ("version", "1"),
        ("model", "GAN"),
        ("model", []),
        ("model", None),
        ("arguments", []),
        ("arguments.heads", "4"),
        ("arguments.heads", True),
        ("arguments.heads", 0),
        ("arguments.heads", 5),
        ("arguments.groups", 7),
        ("arguments.channels", []),
        ("arguments.channels", [16, 1.5]),
        ("arguments.channels", 16),
        ("arguments.sample_size", 9),
        ("arguments.in_channels", -1),
        ("arguments.in_channels", 10**30),
        ("arguments.channels", [16 * 10**28, 96]),
        ("schedule", 5),
        ("schedule.name", "x"),
        ("schedule.name", []),
        ("schedule.num_train_timesteps", "a"),
        ("schedule.num_train_timesteps", 0),
        ("schedule.offset", True),
        ("prediction", "eps"),
        ("prediction", 3),
        ("clip", [1, -1]),
        ("clip", [1, 1]),
        ("clip", [1]),
        ("clip", ["a", 2]),
        ("clip", math.nan),
        ("clip", [-math.inf, 1]),
        ("clip", [-(10**400), 1]),
        ("shape", [2, 4]),
        ("shape", [2, 4, 9]),
        ("shape", "x"),
        ("num_classes", 11),
        ("num_classes", 3.0),
    ],
)
def test_wrong_field(folder, field, value):
    edited(folder, field, lambda holder, last: holder.__setitem__(last, value))
    refuses(folder, "config.json", field.split(".")[-1])


def test_schedule_without_meaning(folder):
    edited(folder, "schedule.offset", lambda holder, last: holder.__setitem__(last, -1))
    refuses(folder, "config.json", "schedule")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"[1]", b"null", b'{"a": 1e999}', b"1" * 5000], ids=range(8)
)
def test_config_that_is_not_one(folder, text):
    (folder / "config.json").write_bytes(text)
    refuses(folder, "config.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    refuses(folder, name, "No such file")
    (folder / name).mkdir()
    refuses(folder, name, "directory")


def test_missing_folder(tmp_path):
    refuses(tmp_path / "nowhere", "not a directory")
    (tmp_path / "file").touch()
    refuses(tmp_path / "file", "not a directory")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_truncated_weights(folder, keep):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    refuses(folder, "model.safetensors", "damaged")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data + b"x",
        lambda data: data.replace(b'"F32"', b'"Q99"', 1),
        lambda data: data.replace(b'"F32"', b'"I32"', 1),
        lambda data: struct.pack("<Q", 2**63) + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
    ],
    ids=["longer", "unknown dtype", "other dtype", "header size", "header"],
)
def test_damaged_weights(folder, damage):
    weights = folder / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    refuses(folder, "model.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("conv_in.weight", None),
        ("unknown", torch.ones(2)),
        ("conv_in.bias", torch.ones(15)),
        ("conv_in.bias", torch.ones(16, 1)),
        ("conv_in.bias", torch.ones(16).half()),
        ("conv_in.bias", torch.full((16,), math.nan)),
        ("conv_in.bias", torch.full((16,), -math.inf)),
    ],
    ids=["missing", "unknown", "size", "rank", "dtype", "NaN", "infinite"],
)
def test_wrong_tensor(folder, name, tensor):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), folder / "model.safetensors")
    refuses(folder, "model.safetensors", repr(name))
