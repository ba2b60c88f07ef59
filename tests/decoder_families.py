"""Small models of every family, made by transformers' own classes and saved in their own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 199, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 160, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
SMALL_THETA: dict[str, Any] = {"rope_type": "default", "rope_theta": 500.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("LlamaConfig", {"num_key_value_heads": 6}),
    "llama-3": (
        "LlamaConfig",
        {
            "tie_word_embeddings": True, "head_dim": 32, "attention_bias": True, "mlp_bias": True,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
                                "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": 40}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "gemma2": ("Gemma2Config", {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 30}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 30,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {"full_attention": SMALL_THETA, "sliding_attention": {"rope_type": "default"}},
        },
    ),
    "phi3": (
        "Phi3Config",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}},
    ),
    "gpt2": ("GPT2Config", {"n_embd": 96, "n_head": 6, "n_layer": 3, "n_positions": 512}),
    "pythia": ("GPTNeoXConfig", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 72, "mlp_only_layers": [1],
            "head_dim": 24, "norm_topk_prob": True,
        },
    ),
    "gpt-neox": ("GPTNeoXConfig", {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"}),
}  # fmt: skip


def made(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights that are far from their initial ones: norms and biases too."""
    name, given = FAMILIES[family]
    known = getattr(transformers, name)().to_dict()
    own = {key: value for key, value in SIZES.items() if key in known}
    config = getattr(transformers, name)(**own | given)
    torch.manual_seed(sum(map(ord, family)))
    # The other implementations know no float64.
    how = {"experts_implementation": "eager"} if "num_experts_per_tok" in known else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **how).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
            else:
                tensor.copy_(torch.randn_like(tensor) * 1.5 / tensor.shape[-1] ** 0.5)
    model.generation_config.eos_token_id = None
    return model.to(dtype)


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32, **how: Any) -> tuple[Any, Path]:
    model = made(family, dtype)
    model.save_pretrained(folder / family, **how)
    return model, folder / family
