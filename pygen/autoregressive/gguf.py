"""GGUF's fields and names of tensors in Hugging Face's terms (ggml's docs/gguf.md; llama.cpp's conversion scripts).

What those scripts change on the way to GGUF is undone here: rows of Llama's q and k projections are reordered, for
llama.cpp rotates neighbours and Hugging Face halves; GPT-2's weights are transposed; GPT-NeoX's q, k and v are put one
after the other (in Hugging Face each head has its three); Gemma's norms are stored plus one; experts are stacked; the
factors of Llama 3's and Phi-3's frequencies are tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pygen.files import refuse
from pygen.files.stored_tensor import StoredTensor

MAX_COUNT = 1 << 30
MAX_LAYERS = MAX_EXPERTS = 1 << 10
_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)")
_REQUIRED: Any = object()


class _Fields:
    """The metadata, each field checked as it is taken; a field of the architecture that nobody takes is refused."""

    def __init__(self, file: Path, metadata: Mapping[str, Any], lengths: Mapping[str, int]) -> None:
        self.file = file
        self.metadata = metadata
        self.lengths = lengths
        self.prefix = ""
        self.taken: set[str] = set()

    def take(self, key: str, kinds: tuple[type, ...], describe: str, default: Any) -> Any:
        key = self.prefix + key
        if key not in self.metadata:
            if default is not _REQUIRED:
                return default
            refuse(self.file, f"missing field {key!r}")
        self.taken.add(key)
        value = self.metadata[key]
        if list not in kinds and isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]  # one for each layer, all the same
        if type(value) not in kinds:
            refuse(self.file, f"{key} must be {describe}, got {value!r:.100}")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        return self.take(key, (str,), "a string", default)

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        return self.take(key, (bool,), "true or false", default)

    def count(self, key: str, default: Any = _REQUIRED, least: int = 1, most: int = MAX_COUNT) -> Any:
        value = self.take(key, (int,), "one integer", default)
        if value is not default and not least <= value <= most:
            refuse(self.file, f"{self.prefix}{key} must lie in [{least}, {most}], got {value}")
        return value

    def real(self, key: str, default: Any = _REQUIRED) -> Any:
        """A positive number. One that was stored as a float32 is the shortest decimal that rounds to it: 1e-5."""
        value = self.take(key, (int, float), "one number", default)
        if value is default:
            return value
        if not (math.isfinite(value) and value > 0):
            refuse(self.file, f"{self.prefix}{key} must be a positive number, got {value}")
        short = float(str(np.float32(value)))
        return short if float(np.float32(value)) == value else float(value)

    def equal(self, key: str, value: Any) -> None:
        """A field that may be there, and says what is so in any case."""
        given = self.take(key, (type(value),), repr(value), value)
        if given != value:
            refuse(self.file, f"{self.prefix}{key} must be {value!r}, got {given!r:.100}")

    def check_all_taken(self) -> None:
        for key in [*self.metadata, *self.lengths]:
            if key.startswith(self.prefix) and key not in self.taken:
                refuse(self.file, f"unknown field {key!r}")


def _rows_of_halves(heads: int, tensor: Tensor) -> Tensor:
    """Rows of (heads, head_dim / 2, 2) in the order (heads, 2, head_dim / 2)."""
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _rows_by_head(heads: int, tensor: Tensor) -> Tensor:
    """Rows of (3, heads, head_dim) in the order (heads, 3, head_dim)."""
    return tensor.reshape(3, heads, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def _minus_one(tensor: Tensor) -> Tensor:
    return (tensor.float() - 1).to(tensor.dtype)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.t()


_LLAMA_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA2_PARTS = _LLAMA_PARTS | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_MIXTRAL_EXPERTS = {
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_QWEN_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}


@dataclass(frozen=True)
class _Architecture:
    """config: makes the fields of config.json; parts: of a block, "{}" for an expert's number; block: their prefix."""

    config: Callable[[_Fields, Mapping[str, StoredTensor]], dict[str, Any]]
    parts: Mapping[str, str]
    block: str = "model.layers"
    whole: Mapping[str, str] = field(
        default_factory=lambda: {
            "token_embd": "model.embed_tokens",
            "output_norm": "model.norm",
            "output": "lm_head",
        }
    )


def _shape_fields(fields: _Fields, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """What every architecture has."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.stored_shape) != 2:
        refuse(fields.file, "missing tensor 'token_embd.weight' of two dimensions")
    fields.equal("vocab_size", embedding.stored_shape[0])
    fields.equal("attention.causal", True)
    return {
        "vocab_size": embedding.stored_shape[0],
        "max_position_embeddings": fields.count("context_length"),
        "num_hidden_layers": fields.count("block_count", most=MAX_LAYERS),
        "hidden_size": fields.count("embedding_length"),
        "num_attention_heads": fields.count("attention.head_count"),
        "intermediate_size": fields.count("feed_forward_length", None, least=0),
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def _decoder_fields(
    fields: _Fields, tensors: Mapping[str, StoredTensor], model_type: str, theta: float = 10000.0
) -> dict[str, Any]:
    """What the architectures with rotated heads and RMS norms have. theta: where the file names none."""
    config = {"model_type": model_type} | _shape_fields(fields, tensors)
    heads = config["num_attention_heads"]
    head_dim = fields.count("attention.key_length", max(1, config["hidden_size"] // heads))
    fields.equal("attention.value_length", head_dim)
    rotated = fields.count("rope.dimension_count", head_dim)
    if model_type != "phi3" and rotated != head_dim:
        refuse(fields.file, f"{fields.prefix}rope.dimension_count must be {head_dim}, got {rotated}")
    return (
        config
        | {
            "num_key_value_heads": fields.count("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rms_norm_eps": fields.real("attention.layer_norm_rms_epsilon"),
            "rope_theta": fields.real("rope.freq_base", theta),
            "rope_scaling": _rope_scaling(fields, config["max_position_embeddings"], rotated, tensors),
            "hidden_act": "silu",
        }
        | ({"partial_rotary_factor": rotated / head_dim} if model_type == "phi3" else {})
    )


def _rope_scaling(
    fields: _Fields, positions: int, rotated: int, tensors: Mapping[str, StoredTensor]
) -> dict[str, Any] | None:
    """positions: what the model was made for; rotated: elements of a head."""

    def factors(name: str) -> list[float]:
        if tensors[name].stored_shape != (rotated // 2,):
            refuse(fields.file, f"tensor {name!r} must have {rotated // 2} elements, one per frequency")
        return [float(str(np.float32(value))) for value in tensors[name].read().tolist()]

    kind = fields.text("rope.scaling.type", "none")
    fields.flag("rope.scaling.finetuned", None)  # of no consequence
    original = fields.count("rope.scaling.original_context_length", positions)
    if "rope_factors_long.weight" in tensors and "rope_factors_short.weight" in tensors:
        attention = fields.real("rope.scaling.attn_factor", None)
        return {
            "rope_type": "longrope",
            "long_factor": factors("rope_factors_long.weight"),
            "short_factor": factors("rope_factors_short.weight"),
            "original_max_position_embeddings": original,
        } | ({} if attention is None else {"attention_factor": attention})
    if "rope_freqs.weight" in tensors:
        # Llama 3's scaling, made into a divisor of each frequency: Hugging Face's name for such is longrope.
        divisors = factors("rope_freqs.weight")
        return {
            "rope_type": "longrope",
            "long_factor": divisors,
            "short_factor": divisors,
            "original_max_position_embeddings": original,
            "attention_factor": 1.0,
        }
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        refuse(fields.file, f"{fields.prefix}rope.scaling.type must be none, linear or yarn here, got {kind!r:.100}")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": fields.real("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = original
        options = {"attn_factor": "attention_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
        values = {name: fields.real(f"rope.scaling.yarn_{key}", None) for key, name in options.items()}
        scaling |= {name: value for name, value in values.items() if value is not None}
    return scaling


def _llama(fields: _Fields, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    fields.text("tensor_data_layout", None)  # of files of 2023; the layout has since been one
    experts = fields.count("expert_count", 0, least=0, most=MAX_EXPERTS)
    window = fields.count("attention.sliding_window", None)
    if experts == 0:
        fields.equal("expert_used_count", 0)
        config = _decoder_fields(fields, tensors, "llama" if window is None else "mistral")
    else:
        config = _decoder_fields(fields, tensors, "mixtral") | {
            "num_local_experts": experts,
            "num_experts_per_tok": fields.count("expert_used_count"),
        }
    if window is not None:
        config["sliding_window"] = window
    if config["model_type"] == "llama":
        config |= {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    return config


def _qwen2(fields: _Fields, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    return _decoder_fields(fields, tensors, "qwen2") | {"use_sliding_window": False}


def _qwen3(fields: _Fields, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    return _decoder_fields(fields, tensors, "qwen3") | {"use_sliding_window": False}


def _qwen3moe(fields: _Fields, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    return _decoder_fields(fields, tensors, "qwen3_moe") | {
        "num_experts": fields.count("expert_count", most=MAX_EXPERTS),
        "num_experts_per_tok": fields.count("expert_used_count"),
        "moe_intermediate_size": fields.count("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }


def _gemma(
    fields: _Fields, tensors: Mapping[str, StoredTensor], model_type: str, theta: float, layers_of_27b: int, every: int
) -> dict[str, Any]:
    """every: of so many layers, the last one attends to all positions. llama.cpp knows the largest model of each by
    its number of layers: its queries are scaled by another number."""
    config = _decoder_fields(fields, tensors, model_type, theta)
    layers, hidden, heads = (config[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    window = fields.count("attention.sliding_window", None)
    pattern = fields.take("attention.sliding_window_pattern", (int, list), "an integer or flags", every)
    if isinstance(pattern, int):
        pattern = [(layer + 1) % max(1, pattern) != 0 for layer in range(layers)]
    if len(pattern) != layers or not all(type(local) is bool for local in pattern):
        refuse(fields.file, f"{fields.prefix}attention.sliding_window_pattern must have {layers} flags")
    del config["hidden_act"]
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // heads if layers == layers_of_27b else config["head_dim"],
        "final_logit_softcapping": fields.real("final_logit_softcapping", None),
        "sliding_window": window,
        "layer_types": ["sliding_attention" if local and window else "full_attention" for local in pattern],
    }


def _gemma2(fields: _Fields, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    config = _gemma(fields, tensors, "gemma2", 10000.0, layers_of_27b=46, every=2)
    return config | {"attn_logit_softcapping": fields.real("attn_logit_softcapping", None)}


def _gemma3(fields: _Fields, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    config = _gemma(fields, tensors, "gemma3_text", 1000000.0, layers_of_27b=62, every=6)
    return config | {"rope_local_base_freq": fields.real("rope.freq_base_swa", 10000.0)}


def _phi3(fields: _Fields, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    config = _decoder_fields(fields, tensors, "phi3")
    window = fields.count("attention.sliding_window", 0, least=0)  # 0 says that there is none
    original = fields.count("rope.scaling.original_context_length", config["max_position_embeddings"])
    return config | {"sliding_window": window or None, "original_max_position_embeddings": original}


def _gpt2(fields: _Fields, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    shape = _shape_fields(fields, tensors)
    return {
        "model_type": "gpt2",
        "vocab_size": shape["vocab_size"],
        "n_positions": shape["max_position_embeddings"],
        "n_ctx": shape["max_position_embeddings"],
        "n_layer": shape["num_hidden_layers"],
        "n_embd": shape["hidden_size"],
        "n_head": shape["num_attention_heads"],
        "n_inner": shape["intermediate_size"],
        "layer_norm_epsilon": fields.real("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": shape["tie_word_embeddings"],
    }


def _gptneox(fields: _Fields, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    config = _shape_fields(fields, tensors)
    head_dim = max(1, config["hidden_size"] // config["num_attention_heads"])
    return config | {
        "model_type": "gpt_neox",
        "layer_norm_eps": fields.real("attention.layer_norm_epsilon"),
        "rotary_pct": fields.count("rope.dimension_count", head_dim) / head_dim,
        "rotary_emb_base": fields.real("rope.freq_base", 10000.0),
        "use_parallel_residual": fields.flag("use_parallel_residual", True),
        "attention_bias": "blk.0.attn_qkv.bias" in tensors,
        "hidden_act": "gelu",
    }


ARCHITECTURES = {
    "llama": _Architecture(_llama, _LLAMA_PARTS | _MIXTRAL_EXPERTS | {"ffn_gate_inp": "block_sparse_moe.gate"}),
    "qwen2": _Architecture(_qwen2, _LLAMA_PARTS),
    "qwen3": _Architecture(_qwen3, _LLAMA_PARTS | _QK_NORMS),
    "qwen3moe": _Architecture(_qwen3moe, _LLAMA_PARTS | _QK_NORMS | _QWEN_EXPERTS | {"ffn_gate_inp": "mlp.gate"}),
    "gemma2": _Architecture(_gemma2, _GEMMA2_PARTS),
    "gemma3": _Architecture(_gemma3, _GEMMA2_PARTS | _QK_NORMS),
    "phi3": _Architecture(_phi3, _PHI3_PARTS),
    "gpt2": _Architecture(
        _gpt2,
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        "transformer.h",
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
    ),
    "gptneox": _Architecture(
        _gptneox,
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        "gpt_neox.layers",
        {
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
        },
    ),
}
_IN_CONFIG = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


def translate(
    file: Path, metadata: Mapping[str, Any], lengths: Mapping[str, int], stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, StoredTensor]]:
    """The fields of config.json, those of generation_config.json, and the tensors by Hugging Face's names.

    metadata, lengths: as the parser gives them; stored: the tensors by GGUF's names.
    """
    fields = _Fields(file, metadata, lengths)
    architecture = fields.text("general.architecture")
    if architecture not in ARCHITECTURES:
        refuse(file, f"general.architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r:.100}")
    fields.equal("general.type", "model")
    if fields.count("split.count", 1, least=0) > 1:
        refuse(file, "split.count: the model is split into several files; merge them with llama.cpp's gguf-split")
    generation_config = _generation_config(fields)
    fields.prefix = architecture + "."
    config = ARCHITECTURES[architecture].config(fields, stored)
    fields.check_all_taken()
    return config, generation_config, _rename(file, architecture, config, stored)


def _generation_config(fields: _Fields) -> dict[str, Any]:
    ids = {
        name: fields.count(f"tokenizer.ggml.{name}_token_id", None, least=0) for name in ("bos", "eos", "eot", "eom")
    }
    ids["pad"] = fields.count("tokenizer.ggml.padding_token_id", None, least=0)
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None))
    config = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": ids["pad"],
    }
    return {name: value for name, value in config.items() if value not in (None, [])}


def _rename(
    file: Path, architecture: str, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    known = ARCHITECTURES[architecture]
    whole = {f"{name}.{kind}": f"{of}.{kind}" for name, of in known.whole.items() for kind in ("weight", "bias")}
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    experts = config.get("num_local_experts", config.get("num_experts", 0))
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if name in _IN_CONFIG:
            continue
        match = _BLOCK.fullmatch(name)
        if name in whole:
            part, to = name.partition(".")[0], whole[name]
        elif match and match[2] in known.parts and int(match[1]) < layers:
            part, to = match[2], f"{known.block}.{match[1]}.{known.parts[match[2]]}.{match[3]}"
        else:
            refuse(file, f"unknown tensor {name!r}")
        tensor = _arranged(file, architecture, part, name, config, tensor)
        if not part.endswith("_exps"):
            tensors[to] = tensor
            continue
        if len(tensor.stored_shape) != 3 or tensor.stored_shape[0] != experts:
            refuse(file, f"tensor {name!r} must have {experts} experts, has shape {list(tensor.stored_shape)}")
        size = (tensor.end - tensor.begin) // experts
        for expert in range(experts):
            begin = tensor.begin + expert * size
            one = replace(tensor, stored_shape=tensor.stored_shape[1:], begin=begin, end=begin + size)
            tensors[to.format(expert)] = one
    return tensors


def _arranged(
    file: Path, architecture: str, part: str, name: str, config: Mapping[str, Any], tensor: StoredTensor
) -> StoredTensor:
    """The tensor with what undoes the conversion to GGUF."""
    heads, parts = config.get("num_attention_heads", 1), 2
    if architecture == "llama" and part in ("attn_q", "attn_k"):
        heads = config["num_key_value_heads"] if part == "attn_k" else heads
        arrange: Callable[[Tensor], Tensor] = partial(_rows_of_halves, heads)
    elif architecture == "gptneox" and part == "attn_qkv":
        arrange, parts = partial(_rows_by_head, heads), 3
    elif architecture in ("gemma2", "gemma3") and part.endswith("norm"):
        return replace(tensor, arrange=_minus_one)
    elif architecture == "gpt2" and part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"):
        return replace(tensor, arrange=_transposed) if len(tensor.stored_shape) == 2 else tensor
    else:
        return tensor
    if not tensor.stored_shape or tensor.stored_shape[0] % (parts * heads) != 0:
        refuse(file, f"tensor {name!r} must have rows for {heads} heads, has shape {list(tensor.stored_shape)}")
    return replace(tensor, arrange=arrange)
