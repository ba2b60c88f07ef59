"""Models on disk: a directory with ``config.json`` (what the model is) and ``model.safetensors`` (its weights).

Nothing is unpickled and nothing is guessed: every field and tensor must be there, known, well typed and finite, or
there is one :class:`CheckpointError`, whose line names the file and the field or tensor.
"""

from __future__ import annotations

import json
import os
import reprlib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from pygen import _C
from pygen.diffusion.plan import PREDICTIONS
from pygen.diffusion.schedules import SCHEDULES, make_schedule
from pygen.files import CheckpointError as CheckpointError
from pygen.files import refuse, replacing
from pygen.models.fields import describe, matches
from pygen.models.unet import UNet

FORMAT = "pygen-model"
VERSION = 1

# A model class takes JSON values by keyword, keeps them in ``config``, and has ``sample_shape`` and ``num_classes``.
MODELS: dict[str, type[UNet]] = {"UNet": UNet}


@dataclass(frozen=True)
class ModelDescription:
    """What a sampler must know about a model.

    schedule: name and arguments, for :func:`pygen.diffusion.schedules.make_schedule`; prediction: what the output is,
    one of ``PREDICTIONS``; clip: the range of the data, if it has one; shape: channels, height and width of a sample;
    num_classes: labels are 0 to num_classes - 1, and num_classes is the null class.
    """

    schedule: dict[str, Any]
    prediction: str
    clip: tuple[float, float] | None
    shape: tuple[int, int, int]
    num_classes: int


def save_model(directory: str | os.PathLike[str], model: UNet, **description: Any) -> None:
    """Write ``model`` and the fields of its :class:`ModelDescription`; refuse what :func:`load_model` would refuse."""
    config, weights = _files(directory)
    header = {"format": FORMAT, "version": VERSION, "model": type(model).__name__, "arguments": model.config}
    try:
        text = json.dumps({**header, **description}, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        refuse(config, error)
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    skeleton, _ = _parse_config(config, text)
    _parse_weights(weights, data, skeleton)

    try:
        config.parent.mkdir(parents=True, exist_ok=True)
        with replacing(weights) as weights_stream, replacing(config) as config_stream:
            weights_stream.write(data)
            config_stream.write(text.encode())
    except OSError as error:
        refuse(config.parent, error.strerror)


def load_model(directory: str | os.PathLike[str]) -> tuple[UNet, ModelDescription]:
    """The model, on the CPU and in eval mode, and its description."""
    config, weights = _files(directory)
    if not config.parent.is_dir():
        refuse(config.parent, "not a directory")
    model, description = _parse_config(config, _read(config))
    model.load_state_dict(_parse_weights(weights, _read(weights), model), assign=True)
    return model.eval(), description


def _files(directory: str | os.PathLike[str]) -> tuple[Path, Path]:
    return Path(directory) / "config.json", Path(directory) / "model.safetensors"


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        refuse(file, error.strerror)


def _parse_config(file: Path, text: str | bytes) -> tuple[UNet, ModelDescription]:
    """The model without storage for its weights, on the meta device, and its description."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        refuse(file, f"not JSON: {error}")
    if not isinstance(config, dict):
        refuse(file, "must hold a JSON object")
    for name, value in {"format": FORMAT, "version": VERSION}.items():  # first: another version has other fields
        if name not in config:
            refuse(file, f"missing field {name!r}")
        if config[name] != value:
            refuse(file, f"{name} must be {value!r}, got {reprlib.repr(config[name])}")
    hints = typing.get_type_hints(ModelDescription)
    _check_fields(file, "", config, {"format": str, "version": int, "model": str, "arguments": dict[str, Any], **hints})
    if config["model"] not in MODELS:
        refuse(file, f"model must be one of {', '.join(MODELS)}, got {config['model']!r}")
    if config["prediction"] not in PREDICTIONS:
        refuse(file, f"prediction must be one of {', '.join(PREDICTIONS)}, got {config['prediction']!r}")
    if config["clip"] is not None and config["clip"][0] >= config["clip"][1]:
        refuse(file, f"clip must be an increasing pair, got {config['clip']!r}")
    _check_schedule(file, config["schedule"])

    model_class = MODELS[config["model"]]
    hints = typing.get_type_hints(model_class.__init__)
    del hints["return"]
    _check_fields(file, "arguments.", config["arguments"], hints)
    try:
        with torch.device("meta"):
            model = model_class(**config["arguments"])
    except ValueError as error:
        refuse(file, f"arguments: {error}")

    description = ModelDescription(
        schedule=config["schedule"],
        prediction=config["prediction"],
        clip=None if config["clip"] is None else (float(config["clip"][0]), float(config["clip"][1])),
        shape=tuple(config["shape"]),
        num_classes=config["num_classes"],
    )
    if description.shape != model.sample_shape:
        refuse(file, f"shape {description.shape} is not the model's, {model.sample_shape}")
    if description.num_classes != model.num_classes:
        refuse(file, f"num_classes {description.num_classes} is not the model's, {model.num_classes}")
    return model, description


def _check_schedule(file: Path, schedule: dict[str, Any]) -> None:
    if schedule.get("name") not in list(SCHEDULES):
        refuse(file, f"schedule.name must be one of {', '.join(SCHEDULES)}, got {schedule.get('name')!r}")
    hints = typing.get_type_hints(SCHEDULES[schedule["name"]])
    given = {argument: hint for argument, hint in hints.items() if argument in schedule}
    _check_fields(file, "schedule.", schedule, {"name": str, **given})
    try:
        with np.errstate(divide="raise", invalid="raise"):
            make_schedule(schedule)
    except (ValueError, ArithmeticError) as error:
        refuse(file, f"schedule: {error}")


def _parse_weights(file: Path, data: bytes, model: UNet) -> dict[str, Tensor]:
    """The tensors of a safetensors file, each one checked against the model's."""
    try:
        entries, _, _ = _C.parse_safetensors(data)
    except ValueError as error:
        refuse(file, f"not a safetensors file, or a damaged one: {error}")
    found = {name: entry for name, *entry in entries}
    expected = model.state_dict()
    _check_names(file, "tensor", found, expected)
    tensors = {}
    for name, parameter in expected.items():
        dtype, shape, begin, end = found[name]
        if dtype != "F32":
            refuse(file, f"tensor {name!r} must be F32, got {dtype}")
        if shape != tuple(parameter.shape):
            refuse(file, f"tensor {name!r} must have shape {list(parameter.shape)}, got {list(shape)}")
        tensors[name] = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.float32).reshape(shape)
        if not tensors[name].isfinite().all():
            refuse(file, f"tensor {name!r} has NaN or infinite values")
    return tensors


def _check_fields(file: Path, prefix: str, fields: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Exactly the fields of ``hints``, each of its type."""
    _check_names(file, "field", {prefix + name: None for name in fields}, {prefix + name: None for name in hints})
    for name, hint in hints.items():
        if not matches(fields[name], hint):
            refuse(file, f"{prefix}{name} must be {describe(hint)}, got {reprlib.repr(fields[name])}")


def _check_names(file: Path, kind: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name in expected:
        if name not in found:
            refuse(file, f"missing {kind} {name!r}")
    for name in found:
        if name not in expected:
            refuse(file, f"unknown {kind} {name!r}")
