"""Models of a directory that diffusers wrote: ``config.json`` and safetensors, whole or in shards.

What a model does not know of its configuration is refused by name, and so is each tensor that is missing, unknown or of
another shape. Nothing is unpickled.
"""

from __future__ import annotations

import inspect
import json
import os
import reprlib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from pygen.files import refuse, replacing
from pygen.files.safetensors import read_json, stored_tensors
from pygen.models.autoencoder_kl import AutoencoderKL
from pygen.models.conditional_unet import ConditionalUNet
from pygen.models.dit import DiT, PixArt
from pygen.models.fields import describe, matches
from pygen.models.mmdit import Flux, MMDiT

WEIGHTS = "diffusion_pytorch_model"


class Kind(NamedTuple):
    """A model, and the values of those fields that it does not have: with others it would compute something else.

    Those of ``idle`` tell nothing of what is computed.
    """

    model: type[nn.Module]
    fixed: dict[str, tuple[Any, ...]]
    idle: tuple[str, ...] = ()


_TRANSFORMER: dict[str, tuple[Any, ...]] = {
    "dropout": (0,), "activation_fn": ("gelu-approximate",), "norm_elementwise_affine": (False,),
}  # fmt: skip
_OF_TRANSFORMERS = ("norm_num_groups", "upcast_attention")
KINDS = {
    "UNet2DConditionModel": Kind(
        ConditionalUNet,
        {
            "center_input_sample": (False,), "mid_block_type": ("UNetMidBlock2DCrossAttn",),
            "only_cross_attention": (False,), "downsample_padding": (1,), "mid_block_scale_factor": (1,),
            "dropout": (0,), "act_fn": ("silu", "swish"), "resnet_time_scale_shift": ("default",),
            "resnet_skip_time_act": (False,), "resnet_out_scale_factor": (1,), "time_embedding_type": ("positional",),
            "conv_in_kernel": (3,), "conv_out_kernel": (3,), "attention_type": ("default",),
            "class_embeddings_concat": (False,), "dual_cross_attention": (False,),
            **dict.fromkeys(
                (
                    "reverse_transformer_layers_per_block", "encoder_hid_dim", "encoder_hid_dim_type",
                    "num_attention_heads", "class_embed_type", "num_class_embeds", "time_embedding_dim",
                    "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim", "cross_attention_norm",
                ),
                (None,),
            ),
            "mid_block_only_cross_attention": (None, False),
        },
        ("sample_size", "upcast_attention", "addition_embed_type_num_heads"),
    ),
    "DiTTransformer2DModel": Kind(
        DiT, {**_TRANSFORMER, "norm_type": ("ada_norm_zero",)}, _OF_TRANSFORMERS
    ),
    "PixArtTransformer2DModel": Kind(
        PixArt,
        {**_TRANSFORMER, "norm_type": ("ada_norm_single",), "attention_type": ("default", None)},
        (*_OF_TRANSFORMERS, "num_embeds_ada_norm"),
    ),
    "SD3Transformer2DModel": Kind(MMDiT, {}),
    "FluxTransformer2DModel": Kind(Flux, {"patch_size": (1,)}),
    "AutoencoderKL": Kind(
        AutoencoderKL,
        {"act_fn": ("silu", "swish"), "latents_mean": (None,), "latents_std": (None,)},
        ("sample_size", "force_upcast", "down_block_types", "up_block_types"),
    ),
}  # fmt: skip
# What the attention of an autoencoder was called before diffusers 0.12, and still is in many a checkpoint.
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def from_pretrained(
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    variant: str | None = None,
) -> Any:
    """The model that diffusers saved, as one of ours, in eval mode.

    Args:
        directory: with ``config.json`` and ``diffusion_pytorch_model.safetensors``, or shards and their index: of a
            UNet2DConditionModel (a ``ConditionalUNet``), DiTTransformer2DModel (``DiT``), PixArtTransformer2DModel
            (``PixArt``), SD3Transformer2DModel (``MMDiT``), FluxTransformer2DModel (``Flux``) or AutoencoderKL.
        dtype: of the parameters; as they are stored where left out.
        device: that holds them.
        variant: of the weights' file, as "fp16" of diffusion_pytorch_model.fp16.safetensors.

    Raises:
        CheckpointError: in one line, naming the file and the field or tensor.
        TypeError, ValueError: naming the argument.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"directory must be a path, got {directory!r}")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be one of torch's, as 'cpu' or 'cuda:0', got {device!r}") from None
    path = Path(directory)
    if not path.is_dir():
        refuse(path, "not a directory")
    with torch.device("meta"):
        model = from_config(read_json(path / "config.json"), path / "config.json")
    suffix = "" if variant is None else f".{variant}"
    weights = path / f"{WEIGHTS}{suffix}.safetensors"
    index = path / f"{WEIGHTS}.safetensors.index{suffix}.json"
    if not weights.exists() and not index.exists():
        refuse(path, f"holds neither {weights.name} nor {index.name}")
    stored = stored_tensors(weights, index)
    if isinstance(model, AutoencoderKL):
        stored = {_renamed(name): tensor for name, tensor in stored.items()}
    tensors: dict[str, Tensor] = {}
    expected = model.state_dict()
    for name, like in expected.items():
        if name not in stored:
            refuse(path, f"missing tensor {name!r}")
        tensor = stored[name]
        if tensor.shape != tuple(like.shape):
            refuse(tensor.file.path, f"tensor {name!r} must have shape {list(like.shape)}, got {list(tensor.shape)}")
        read = tensor.read()
        if not read.is_floating_point():
            refuse(tensor.file.path, f"tensor {name!r} must be of floating point, got {read.dtype}")
        tensors[name] = torch.empty(tensor.shape, dtype=dtype or read.dtype, device=device).copy_(read)
        tensor.release()
    for name in stored:
        if name not in expected:
            refuse(path, f"unknown tensor {name!r:.100}")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _renamed(name: str) -> str:
    *module, layer, parameter = name.split(".")
    return ".".join([*module, _RENAMED.get(layer, layer), parameter]) if "attentions" in module else name


def from_config(config: Mapping[str, Any], file: Path = Path("config")) -> Any:
    """A new model of a configuration of diffusers', ``_class_name`` included; ``file`` is named in errors.

    Raises:
        CheckpointError: in one line, naming the field.
    """
    name = config.get("_class_name")
    if name not in list(KINDS):
        refuse(file, f"_class_name must be one of {', '.join(KINDS)}, got {reprlib.repr(name)}")
    kind = KINDS[name]
    hints = typing.get_type_hints(kind.model.__init__)
    arguments = {}
    for field, value in config.items():
        if field.startswith("_") or field in kind.idle:
            continue
        if field in kind.fixed:
            if not any(_same(value, known) for known in kind.fixed[field]):
                known = " or ".join(map(repr, kind.fixed[field]))
                refuse(file, f"{field} must be {known}, got {reprlib.repr(value)}")
        elif field not in inspect.signature(kind.model).parameters:
            refuse(file, f"unknown field {field!r:.100}")
        elif not matches(value, hints[field], least=0):
            refuse(file, f"{field} must be {describe(hints[field], least=0)}, got {reprlib.repr(value)}")
        else:
            arguments[field] = value
    try:
        return kind.model(**arguments)
    except (ValueError, ArithmeticError, IndexError, RuntimeError) as error:
        refuse(file, error)


def _same(value: Any, known: Any) -> bool:
    """Equal, where 1 is not True and 0 is not False."""
    return value == known and isinstance(value, bool) == isinstance(known, bool)


def save_pretrained(
    directory: str | os.PathLike[str], model: nn.Module, config: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write a model as diffusers does, so that it loads there, and by ``from_pretrained``.

    Args:
        config: of diffusers' class, ``_class_name`` included, as for ``from_config``.
        dtype: that the weights are stored in; their own where left out.

    Raises:
        CheckpointError: where the configuration is another model's, or the directory cannot be written.
    """
    path = Path(directory)
    with torch.device("meta"):
        expected = from_config(config, path / "config.json").state_dict()
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    if {name: x.shape for name, x in tensors.items()} != {name: x.shape for name, x in expected.items()}:
        refuse(path / "config.json", "the tensors that it says are not the model's")
    text = json.dumps(dict(config), indent=2) + "\n"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with (
            replacing(path / f"{WEIGHTS}.safetensors") as weights_stream,
            replacing(path / "config.json") as config_stream,
        ):
            weights_stream.write(save(tensors, metadata={"format": "pt"}))
            config_stream.write(text.encode())
    except OSError as error:
        refuse(path, error.strerror)
