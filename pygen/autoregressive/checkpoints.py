"""From a checkpoint to a decoder: what each family's ``config.json`` means, and where its tensors go.

A field that is not understood, or has a value that no decoder here computes, is refused by name; so is a tensor that is
missing, unknown or of another shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from pygen.files import refuse
from pygen.models.decoder import DecoderConfig, DecoderModel, Experts, Layer, Linear, Norm
from pygen.ops.linear_decode import Activation
from pygen.ops.packed_linear import FORMATS, GROUPS, WeightFormat, pack_experts, pack_linear
from pygen.ops.rope import rope_frequencies, rope_table

# What says how a model was trained, is to be sampled or printed, and nothing of what it computes.
_IGNORED = {
    "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "auto_map", "bos_token_id",
    "cache_implementation", "chunk_size_feed_forward", "classifier_dropout", "dtype", "embd_pdrop", "eos_token_id",
    "hidden_dropout", "id2label", "initializer_range", "is_decoder", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type",
    "reorder_and_upcast_attn", "resid_pdrop", "return_dict", "router_aux_loss_coef", "router_jitter_noise",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip
_REQUIRED: Any = object()
_MOST = 1 << 31  # no count or width is larger


class Files(Protocol):
    """An open checkpoint; see ``checkpoint_files``."""

    path: Any
    config: dict[str, Any]
    names: list[str]

    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor: ...
    def release(self, name: str) -> None: ...
    def file(self, name: str) -> Any: ...


class Fields:
    """The fields of a configuration, each asked for by name and checked; those never asked for are refused."""

    def __init__(self, path: Any, values: dict[str, Any]) -> None:
        self.path = path
        self._values = {name: value for name, value in values.items() if name not in _IGNORED}
        self._asked: set[str] = set()

    def refuse(self, problem: str) -> Any:
        refuse(self.path, f"config: {problem}")

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        self._asked.add(name)
        value = self._values.get(name)
        if value is None:
            if default is _REQUIRED:
                self.refuse(f"missing field {name!r}")
            return default
        return value

    def count(self, name: str, default: Any = _REQUIRED) -> int:
        value = self.get(name, default)
        if type(value) is not int or not 1 <= value <= _MOST:
            self.refuse(f"{name} must be an integer from 1 to {_MOST}, got {value!r:.100}")
        return value

    def window(self, name: str) -> int | None:
        return None if self.get(name, None) is None else self.count(name)

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self.refuse(f"{name} must be a positive number, got {value!r:.100}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            self.refuse(f"{name} must be true or false, got {value!r:.100}")
        return value

    def choice(self, name: str, choices: dict[str, Any], default: Any = _REQUIRED) -> Any:
        value = self.get(name, default)
        if not isinstance(value, str) or value not in choices:
            self.refuse(f"{name} must be one of {', '.join(choices)}, got {value!r:.100}")
        return choices[value]

    def only(self, name: str, *values: Any) -> None:
        """A field that may be there with these values alone."""
        value = self.get(name, values[0])
        if value not in values:
            self.refuse(f"{name} must be {' or '.join(map(repr, values))}, got {value!r:.100}")

    def end(self) -> None:
        for name in self._values:
            if name not in self._asked:
                self.refuse(f"field {name!r} is not understood")


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts in the place of the MLP of some layers.

    name: of the block in a layer; gate, up, down: of an expert's layers.
    """

    layers: frozenset[int]
    experts: int
    top_k: int
    normalise: bool
    intermediate: int
    name: str
    gate: str
    up: str
    down: str


@dataclass
class Plan:
    """A decoder without its weights, and where they are.

    prefix: of all names but the head's; parts: of a layer, the tensors' names by their roles, with * for ".weight" and
    ".bias". ropes, windows: of each layer. transposed: weights are stored as (inputs, outputs) (GPT-2's Conv1D).
    interleaved: the projections of queries, keys and values are stored head by head (GPT-NeoX). offset: added to all
    norms' weights (Gemma).
    """

    config: DecoderConfig
    layers: int
    intermediate: int
    prefix: str
    parts: dict[str, str | tuple[str, ...]]
    embedding: str
    final_norm: str
    tied: bool
    layer_list: str = "layers"
    head: str = "lm_head"
    position_embedding: str | None = None
    ropes: Sequence[Tensor | None] = ()
    windows: Sequence[int | None] = ()
    biases: set[str] = field(default_factory=set)
    transposed: bool = False
    interleaved: bool = False
    offset: float = 0.0
    buffers: tuple[str, ...] = ()
    mixture: Mixture | None = None


_LLAMA_PARTS: dict[str, str | tuple[str, ...]] = {
    "attention_norm": "input_layernorm",
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "merge": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": "mlp.down_proj",
}
_HEAD_NORMS: dict[str, str | tuple[str, ...]] = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
_GEMMA_NORMS: dict[str, str | tuple[str, ...]] = {
    "mlp_norm": "pre_feedforward_layernorm",
    "after_attention": "post_attention_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}


def _llama(fields: Fields, positions: int | None) -> Plan:
    """Llama 2 and 3, and what differs from them in a few fields: Mistral, Qwen2, Qwen3, Phi-3."""
    family = fields.get("model_type")
    biases = set()
    if family == "qwen2" or fields.flag("attention_bias", False):
        biases |= {"qkv"} if family == "qwen2" else {"qkv", "merge"}
    if fields.flag("mlp_bias", False):
        biases |= {"up", "down"}
    plan = _rms_plan(fields, positions, biases=biases)
    if family == "qwen3":
        plan.parts |= _HEAD_NORMS
    elif family == "phi3":
        plan.parts |= {"qkv": "self_attn.qkv_proj", "up": "mlp.gate_up_proj"}
    return plan


def _mixtral(fields: Fields, positions: int | None) -> Plan:
    """Mixtral (Jiang et al. 2024)."""
    plan = _rms_plan(fields, positions, biases=set())
    every = frozenset(range(plan.layers))
    experts, top_k = fields.count("num_local_experts"), fields.count("num_experts_per_tok")
    plan.mixture = Mixture(every, experts, top_k, True, plan.intermediate, "block_sparse_moe", "w1", "w3", "w2")
    return plan


def _qwen3_moe(fields: Fields, positions: int | None) -> Plan:
    """Qwen3-MoE (2025): some layers may have an MLP."""
    plan = _rms_plan(fields, positions, biases={"qkv", "merge"} if fields.flag("attention_bias", False) else set())
    plan.parts |= _HEAD_NORMS
    dense, step = fields.get("mlp_only_layers", []), fields.count("decoder_sparse_step", 1)
    if not isinstance(dense, list):
        fields.refuse(f"mlp_only_layers must be a list, got {dense!r:.100}")
    plan.mixture = Mixture(
        frozenset(i for i in range(plan.layers) if i not in dense and (i + 1) % step == 0),
        fields.count("num_experts", fields.get("num_local_experts", None)), fields.count("num_experts_per_tok"),
        fields.flag("norm_topk_prob", False), fields.count("moe_intermediate_size"),
        "mlp", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    return plan


def _gemma(fields: Fields, positions: int | None) -> Plan:
    """Gemma 2 (2024) and 3 (2025)."""
    fields.only("use_bidirectional_attention", False)
    plan = _rms_plan(
        fields, positions, biases={"qkv", "merge"} if fields.flag("attention_bias", False) else set(),
        activation=fields.choice("hidden_activation", _ACTIVATIONS, "gelu_pytorch_tanh"), tied=True,
        scale=fields.number("query_pre_attn_scalar") ** -0.5,
        attention_soft_cap=fields.get("attn_logit_softcapping", None) and fields.number("attn_logit_softcapping"),
        logit_soft_cap=fields.get("final_logit_softcapping", None) and fields.number("final_logit_softcapping"),
        embedding_scale=fields.count("hidden_size") ** 0.5,
    )  # fmt: skip
    plan.parts |= _GEMMA_NORMS | (_HEAD_NORMS if fields.get("model_type") == "gemma3_text" else {})
    plan.offset = 1.0
    return plan


def _rms_plan(
    fields: Fields,
    positions: int | None,
    *,
    biases: set[str],
    activation: Activation | None = None,
    tied: bool = False,
    scale: float | None = None,
    **more: Any,
) -> Plan:
    """RMSNorm, rotary embedding, grouped queries and a gated MLP."""
    heads, layers, width = (
        fields.count("num_attention_heads"), fields.count("num_hidden_layers"), fields.count("hidden_size"),
    )  # fmt: skip
    head_dim = fields.count("head_dim", width // heads)
    trained = fields.count("max_position_embeddings")
    kinds = _layer_kinds(fields, layers)
    window = fields.window("sliding_window")
    ropes = _ropes(fields, head_dim, trained, positions, kinds)
    return Plan(
        config=DecoderConfig(
            vocabulary=fields.count("vocab_size"), width=width, heads=heads,
            kv_heads=fields.count("num_key_value_heads", heads), head_dim=head_dim, positions=len(ropes[0]),
            norm="rms", eps=fields.number("rms_norm_eps"),
            activation=activation or fields.choice("hidden_act", _ACTIVATIONS),
            scale=head_dim**-0.5 if scale is None else scale, **more,
        ),
        layers=layers,
        intermediate=fields.count("intermediate_size"),
        prefix="model.",
        parts=dict(_LLAMA_PARTS),
        embedding="embed_tokens",
        final_norm="norm",
        tied=fields.flag("tie_word_embeddings", tied),
        ropes=ropes,
        windows=[window if kind == "sliding_attention" else None for kind in kinds],
        biases=biases,
    )  # fmt: skip


def _layer_kinds(fields: Fields, layers: int) -> list[str]:
    """Of each layer, "full_attention" or "sliding_attention"."""
    family = fields.get("model_type")
    kinds = fields.get("layer_types", None)
    pattern = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6))
    uses = fields.flag("use_sliding_window", False)
    full = fields.get("max_window_layers", 0)
    if kinds is None:
        if family == "gemma2":
            slides = [i % 2 == 0 for i in range(layers)]
        elif family == "gemma3_text":
            slides = [(i + 1) % pattern != 0 for i in range(layers)]
        elif family in ("qwen2", "qwen3", "qwen3_moe"):
            slides = [uses and i >= full for i in range(layers)]
        else:
            slides = [True] * layers
        kinds = ["sliding_attention" if slide else "full_attention" for slide in slides]
    if not isinstance(kinds, list) or len(kinds) != layers or set(kinds) - {"sliding_attention", "full_attention"}:
        fields.refuse(
            f"layer_types must name full_attention or sliding_attention for {layers} layers, got {kinds!r:.100}"
        )
    return kinds


def _ropes(fields: Fields, head_dim: int, trained: int, positions: int | None, kinds: list[str]) -> list[Tensor]:
    """The table of each layer; layers with the same parameters share one."""
    given = fields.get("rope_parameters", None)
    base = {"rope_theta": fields.number("rope_theta", 10000.0)}
    local = fields.number("rope_local_base_freq", 10000.0)
    partial = fields.number("partial_rotary_factor", 1.0)
    scaling = fields.get("rope_scaling", None)
    original = fields.get("original_max_position_embeddings", None)
    if given is None:
        scaling = {"rope_type": "default"} if scaling is None else dict(scaling)
        scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type", "default"))
        given = base | {"partial_rotary_factor": partial} | scaling
        if fields.get("model_type") == "gemma3_text":
            given = {"full_attention": given, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    if not isinstance(given, dict):
        fields.refuse(f"rope_parameters must be an object, got {given!r:.100}")
    by_kind = {kind: given.get(kind, given) if kind in given else given for kind in set(kinds)}
    tables = {}
    for kind, parameters in by_kind.items():
        if not isinstance(parameters, dict):
            fields.refuse(f"rope_parameters must be an object, got {parameters!r:.100}")
        if original is not None:
            parameters = {"original_max_position_embeddings": original} | parameters
        length = positions or trained
        if parameters.get("rope_type") == "longrope" and positions is None:
            length = parameters.get("original_max_position_embeddings", trained)  # with the factors of short sequences
        try:
            frequencies, factor = rope_frequencies(
                head_dim, parameters, max_position_embeddings=trained, seq_len=length
            )
        except (ValueError, TypeError) as error:
            fields.refuse(f"rope_parameters: {error}")
        tables[kind] = rope_table(frequencies, length, attention_factor=factor)
    return [tables[kind] for kind in kinds]


def _gpt2(fields: Fields, positions: int | None) -> Plan:
    """GPT-2 (Radford et al. 2019)."""
    for name, value in {"scale_attn_weights": True, "add_cross_attention": False,
                        "scale_attn_by_inverse_layer_idx": False}.items():  # fmt: skip
        fields.only(name, value)
    heads, width, layers = fields.count("n_head"), fields.count("n_embd"), fields.count("n_layer")
    trained = fields.count("n_positions")
    fields.get("n_ctx", None)  # an older name of the same
    return Plan(
        config=DecoderConfig(
            vocabulary=fields.count("vocab_size"), width=width, heads=heads, kv_heads=heads, head_dim=width // heads,
            positions=min(positions or trained, trained), norm="layer", eps=fields.number("layer_norm_epsilon", 1e-5),
            activation=fields.choice("activation_function", _ACTIVATIONS, "gelu_new"), scale=(width // heads) ** -0.5,
        ),
        layers=layers,
        intermediate=fields.count("n_inner", 4 * width),
        prefix="transformer.",
        layer_list="h",
        parts={
            "attention_norm": "ln_1", "qkv": "attn.c_attn", "merge": "attn.c_proj", "mlp_norm": "ln_2",
            "up": "mlp.c_fc", "down": "mlp.c_proj",
        },
        embedding="wte",
        position_embedding="wpe",
        final_norm="ln_f",
        tied=fields.flag("tie_word_embeddings", True),
        biases={"qkv", "merge", "up", "down"},
        transposed=True,
        buffers=("attn.bias", "attn.masked_bias"),
    )  # fmt: skip


def _gpt_neox(fields: Fields, positions: int | None) -> Plan:
    """GPT-NeoX and Pythia (Black et al. 2022, Biderman et al. 2023)."""
    heads, width, layers = (
        fields.count("num_attention_heads"), fields.count("hidden_size"), fields.count("num_hidden_layers"),
    )  # fmt: skip
    trained = fields.count("max_position_embeddings")
    parameters = fields.get("rope_parameters", None)
    old = {
        "rope_theta": fields.number("rotary_emb_base", fields.number("rope_theta", 10000.0)),
        "partial_rotary_factor": fields.number("rotary_pct", fields.number("partial_rotary_factor", 0.25)),
    }
    fields.only("rope_scaling", None)
    parameters = old if parameters is None else old | parameters
    frequencies, factor = rope_frequencies(width // heads, parameters, max_position_embeddings=trained)
    table = rope_table(frequencies, positions or trained, attention_factor=factor)
    return Plan(
        config=DecoderConfig(
            vocabulary=fields.count("vocab_size"), width=width, heads=heads, kv_heads=heads, head_dim=width // heads,
            positions=len(table), norm="layer", eps=fields.number("layer_norm_eps", 1e-5),
            activation=fields.choice("hidden_act", _ACTIVATIONS, "gelu"), scale=(width // heads) ** -0.5,
            parallel=fields.flag("use_parallel_residual", True),
        ),
        layers=layers,
        intermediate=fields.count("intermediate_size"),
        prefix="gpt_neox.",
        parts={
            "attention_norm": "input_layernorm", "qkv": "attention.query_key_value", "merge": "attention.dense",
            "mlp_norm": "post_attention_layernorm", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h",
        },
        embedding="embed_in",
        head="embed_out",
        final_norm="final_layer_norm",
        tied=fields.flag("tie_word_embeddings", False),
        ropes=[table] * layers,
        biases={"up", "down"} | ({"qkv", "merge"} if fields.flag("attention_bias", True) else set()),
        interleaved=True,
        buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    )  # fmt: skip


FAMILIES: dict[str, Callable[[Fields, int | None], Plan]] = {
    "llama": _llama, "mistral": _llama, "qwen2": _llama, "qwen3": _llama, "phi3": _llama,
    "gemma2": _gemma, "gemma3_text": _gemma, "gpt2": _gpt2, "gpt_neox": _gpt_neox,
    "mixtral": _mixtral, "qwen3_moe": _qwen3_moe,
}  # fmt: skip


def read_plan(path: Any, config: dict[str, Any], positions: int | None = None) -> Plan:
    """What a ``config.json`` describes; CheckpointError names the field that is missing, wrong or not understood."""
    fields = Fields(path, config)
    fields._values["model_type"] = config.get("model_type")
    family = fields.choice("model_type", {name: name for name in FAMILIES})
    plan = FAMILIES[family](fields, positions)
    fields.end()
    if plan.mixture is not None and plan.mixture.top_k > plan.mixture.experts:
        fields.refuse(f"num_experts_per_tok {plan.mixture.top_k} is more than the {plan.mixture.experts} experts")
    config_ = plan.config
    if config_.heads % config_.kv_heads != 0 or config_.heads * config_.head_dim > _MOST:
        fields.refuse(f"{config_.heads} heads do not share {config_.kv_heads} of keys and values")
    return plan


def check_packing(weights: WeightFormat, group: int | None) -> None:
    """ValueError names the argument that ``build`` does not take."""
    if weights not in FORMATS:
        raise ValueError(f"weights must be one of {', '.join(FORMATS)}, got {weights!r}")
    if group is not None and (weights not in ("int8", "int4") or group not in (0, *GROUPS)):
        raise ValueError(f"group must be 0, 32, 64 or 128, of int8 or int4, got {group!r} for {weights}")


def build(
    files: Files,
    plan: Plan,
    weights: WeightFormat,
    group: int | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> DecoderModel:
    """The decoder, its weights packed one by one; ``progress`` is told each part that begins."""
    return _Builder(files, plan, weights, group).build(progress)


class _Stack(Sequence[Tensor]):
    """Tensors of one shape that are read when they are asked for."""

    def __init__(self, builder: _Builder, names: list[str], shape: tuple[int, int]) -> None:
        self._builder, self._names, self._shape = builder, names, shape

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: Any) -> Any:
        if i > 0:
            self._builder.files.release(self._names[i - 1])
        return self._builder._read(self._names[i], self._shape)


class _Builder:
    def __init__(self, files: Files, plan: Plan, weights: WeightFormat, group: int | None) -> None:
        self.files, self.plan = files, plan
        self.packing: dict[str, Any] = {"format": weights, "group": group}
        self.dtype = torch.float32 if weights == "float32" else torch.bfloat16
        self._unmet = set(files.names)
        if not any(name.startswith(plan.prefix) for name in files.names):  # a bare model's names, as GPT-2's own
            plan.prefix = ""

    def build(self, progress: Callable[[str], None]) -> DecoderModel:
        plan, config = self.plan, self.plan.config
        # In the activations' dtype, as transformers has it.
        config = replace(config, embedding_scale=float(torch.tensor(config.embedding_scale, dtype=self.dtype)))
        progress("embedding")
        size = (config.vocabulary, config.width)
        embedding = self._read(f"{plan.prefix}{plan.embedding}.weight", size, self.dtype)
        learned = None
        if plan.position_embedding is not None:
            name = f"{plan.prefix}{plan.position_embedding}.weight"
            learned = self._read(name, (None, config.width), self.dtype)
        layers = []
        for i in range(plan.layers):
            progress(f"layer {i}")
            layers.append(self._layer(i))
        progress("head")
        head_name = f"{plan.prefix}{plan.embedding}" if plan.tied else plan.head
        head = self._linear(head_name, {"outputs": config.vocabulary, "inputs": config.width}, bias=False, plain=True)
        if plan.tied:
            self._unmet.discard(f"{plan.head}.weight")
        final_norm = self._norm(f"{plan.prefix}{plan.final_norm}", config.width)
        for name in sorted(self._unmet):
            if not name.endswith(plan.buffers or ("\0",)):
                refuse(self.files.file(name), f"unknown tensor {name!r}")
        return DecoderModel(config, embedding, layers, final_norm, head, self.dtype, learned)

    def _layer(self, i: int) -> Layer:
        plan, config = self.plan, self.plan.config
        at = f"{plan.prefix}{plan.layer_list}.{i}."
        inner = config.heads * config.head_dim
        sizes: dict[str, dict[str, int]] = {
            "qkv": {"outputs": inner + 2 * config.kv_heads * config.head_dim, "inputs": config.width},
            "merge": {"outputs": config.width, "inputs": inner},
            "up": {"outputs": plan.intermediate, "inputs": config.width},
            "down": {"outputs": config.width, "inputs": plan.intermediate},
        }
        mixed = plan.mixture is not None and i in plan.mixture.layers
        parts: dict[str, Any] = {"experts": self._experts(plan.mixture, at)} if mixed and plan.mixture else {}
        for role, names in plan.parts.items():
            if mixed and role in ("up", "down"):
                continue
            if role in sizes:
                full = tuple(at + name for name in ([names] if isinstance(names, str) else names))
                parts[role] = self._linear(full, sizes[role], role in plan.biases, role=role)
            elif role in ("attention_norm", "mlp_norm"):
                parts[role] = self._norm(f"{at}{names}", config.width)
            else:
                width = config.head_dim if role in ("query_norm", "key_norm") else config.width
                parts[role] = self._norm(f"{at}{names}", width).weight
        rope = plan.ropes[i] if plan.ropes else None
        return Layer(**parts, rope=rope, window=plan.windows[i] if plan.windows else None)

    def _experts(self, mixture: Mixture, at: str) -> Experts:
        """Packed one after the other, as their tensors are read."""
        width, inner = self.plan.config.width, mixture.intermediate
        one = f"{at}{mixture.name}.experts."
        router = self._read(f"{at}{mixture.name}.gate.weight", (mixture.experts, width))

        def stack(name: str, shape: tuple[int, int]) -> _Stack:
            return _Stack(self, [f"{one}{i}.{name}.weight" for i in range(mixture.experts)], shape)

        gate, up = stack(mixture.gate, (inner, width)), stack(mixture.up, (inner, width))
        try:
            packed = (
                pack_experts(gate, up, **self.packing),
                pack_experts(stack(mixture.down, (width, inner)), **self.packing),
            )
        except ValueError as error:
            refuse(self.files.path, f"experts of {at}{mixture.name}: {error}")
        format: WeightFormat = "float32" if self.dtype == torch.float32 else "bfloat16"
        return Experts(pack_linear(router, format=format), *packed, mixture.top_k, mixture.normalise)

    def _norm(self, name: str, width: int) -> Norm:
        weight = self._read(f"{name}.weight", (width,)).float() + self.plan.offset
        return Norm(weight, self._read(f"{name}.bias", (width,)).float() if self.plan.config.norm == "layer" else None)

    def _linear(
        self, names: str | tuple[str, ...], size: dict[str, int], bias: bool, *, role: str = "", plain: bool = False
    ) -> Linear:
        """One layer of one or several tensors, that lie below each other."""
        names = (names,) if isinstance(names, str) else names
        outputs, inputs = size["outputs"], size["inputs"]
        gated = role == "up" and "gate" in names[0]
        total = outputs * (1 + gated)

        def rows(what: str, columns: tuple[int, ...]) -> Tensor:
            turned = self.plan.transposed and not plain and bool(columns)
            shape = (None, *columns) if len(names) > 1 else (total, *columns)
            tensors = [self._read(f"{name}.{what}", shape[::-1] if turned else shape) for name in names]
            tensors = [tensor.t() for tensor in tensors] if turned else tensors
            found = sum(tensor.shape[0] for tensor in tensors)
            if found != total:
                refuse(self.files.path, f"tensors {', '.join(names)} have {found} rows in all, and not {total}")
            one = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            if role == "qkv" and self.plan.interleaved:
                config = self.plan.config
                one = one.unflatten(0, (config.heads, 3, config.head_dim)).transpose(0, 1).flatten(0, 2)
            return one

        weight = rows("weight", (inputs,))
        parts = weight.split(outputs) if gated else (weight,)
        try:
            packed = pack_linear(*parts, **self.packing)
        except ValueError as error:
            refuse(self.files.file(f"{names[0]}.weight"), f"tensor '{names[0]}.weight': {error}")
        for name in names:
            self.files.release(f"{name}.weight")
        return Linear(packed, rows("bias", ()).float() if bias else None)

    def _read(self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype | None = None) -> Tensor:
        found = self.files.shape(name)
        if len(found) != len(shape) or any(want not in (None, got) for want, got in zip(shape, found, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            refuse(self.files.file(name), f"tensor {name!r} must have shape ({wanted}), got {tuple(found)}")
        self._unmet.discard(name)
        tensor = self.files.read(name)
        if not tensor.is_floating_point():
            refuse(self.files.file(name), f"tensor {name!r} must be floating point, got {tensor.dtype}")
        if dtype not in (None, tensor.dtype):
            tensor = tensor.to(dtype)
            self.files.release(name)
        return tensor
