"""Train the text model that ships with pygen: a small byte-level Llama on the language reference inside Python.

    python examples/train_text.py --out /tmp/text

It writes a checkpoint that transformers reads. Every twentieth topic of ``pydoc_data.topics`` is held out; that text is
kept beside the weights, and training.json tells its bits per byte in every format of the weights. It takes about
half an hour of one core with AMX, and goes on where it was stopped. The same seed, machine and thread count give the
same files.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from contextlib import ExitStack
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from pygen.files import replacing
from pygen.models.text import TEXT_MODEL, bits_per_token, with_packed_weights

END_OF_TEXT = 256  # after the 256 bytes; also what a text begins with
END_OF_TEXT_SYMBOL = "<|endoftext|>"
CONTEXT = 1024
CONTEXTS = ((0.6, CONTEXT // 4), (0.9, CONTEXT // 2), (1.0, CONTEXT))  # up to this part of the steps, windows this long
TOKENS_PER_STEP = 4096
MATRIX_RATE = 2e-2  # of Muon
LEARNING_RATE = 5e-3  # of AdamW
WARMUP_STEPS = 50
DECAY = 0.6
WEIGHT_DECAY = 0.1
DROPOUT = 0.1
SAVE_EVERY = 100
PACKINGS: dict[str, dict[str, Any]] = {
    "bfloat16": {"format": "bfloat16"},
    "int8": {"format": "int8", "group": 32},
    "int4": {"format": "int4", "group": 32},
}
CONFIG = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    dtype="bfloat16",
    vocab_size=257,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=CONTEXT,
    tie_word_embeddings=True,
    bos_token_id=END_OF_TEXT,
    eos_token_id=END_OF_TEXT,
    use_cache=True,
)


def split_topics() -> tuple[list[str], list[str], list[str]]:
    """The texts to train on, the names held out, and their texts.

    Topics repeat each other: a paragraph of a text held out is taken out of the others.
    """
    held_out = sorted(topics)[::20]
    hidden = {paragraph for name in held_out for paragraph in topics[name].split("\n\n")}
    texts = [
        "\n\n".join(paragraph for paragraph in topics[name].split("\n\n") if paragraph not in hidden)
        for name in sorted(topics.keys() - held_out)
    ]
    return texts, held_out, [topics[name] for name in held_out]


def to_tokens(texts: list[str]) -> Tensor:
    """The bytes of the texts, END_OF_TEXT before each and after the last."""
    return torch.tensor([END_OF_TEXT, *(token for text in texts for token in (*text.encode(), END_OF_TEXT))])


def make_tokenizer() -> Tokenizer:
    """A token is a byte, and its id the byte's value. A text that spells END_OF_TEXT_SYMBOL has that token in it."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = iter(sorted(symbol for symbol in alphabet if ord(symbol) > 255))
    symbols = [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({symbol: byte for byte, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT_SYMBOL, normalized=False)])
    return tokenizer


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then constant, then linear down to zero over the last DECAY of the steps."""
    return min((step + 1) / WARMUP_STEPS, (steps - step) / (DECAY * steps), 1.0)


def add_dropout(model: nn.Module) -> None:
    """Behind the embedding and at the end of every branch, as in GPT-2: Llama itself has none there."""
    for name, layer in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            layer.register_forward_hook(lambda layer, _, output: F.dropout(output, DROPOUT, layer.training))


def bits_of(model: nn.Module, tokens: Tensor) -> float:
    with torch.inference_mode():
        return bits_per_token(lambda window: model(window, use_cache=False).logits, tokens, CONTEXT // 2)


def train(steps: int, seed: int, state_file: Path) -> LlamaForCausalLM:
    """The model, by Muon (Jordan et al. 2024) on the matrices of its layers and AdamW on the rest."""
    torch.manual_seed(seed)
    texts, _, held_out = split_topics()
    tokens, unseen = to_tokens(texts), to_tokens(held_out)
    model = LlamaForCausalLM(CONFIG)
    model.set_attn_implementation("eager")  # the fused one is slower backwards, at these sizes on a CPU
    add_dropout(model)
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.dim() == 2]
    rest = [model.model.embed_tokens.weight, *(p for p in model.parameters() if p.dim() == 1)]
    muon = torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    rates = [LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps)) for optimizer in (muon, adamw)]
    parts = {"model": model, "muon": muon, "adamw": adamw, "muon_rate": rates[0], "adamw_rate": rates[1]}

    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["run"] != [steps, seed]:
            raise SystemExit(
                f"{state_file} is of another run, of [steps, seed] {state['run']}: delete it to begin anew"
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        first = state["step"]

    progress = tqdm(range(first, steps), desc="train", unit="step", initial=first, total=steps)
    for step in progress:
        model.train()
        context = next(length for until, length in CONTEXTS if step < until * steps)
        starts = torch.randint(len(tokens) - context, (TOKENS_PER_STEP // context, 1))
        window = tokens[starts + torch.arange(context + 1)]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(window[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (muon, adamw, *rates):
            part.step()
        model.zero_grad()
        if (step + 1) % SAVE_EVERY == 0:
            bits = bits_of(model.eval(), unseen[:8192])
            progress.write(f"{step + 1} loss {loss.item() / math.log(2):.4f} held out {bits:.4f}")
            with replacing(state_file) as stream:
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save(state | {"random": torch.get_rng_state(), "step": step + 1, "run": [steps, seed]}, stream)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TEXT_MODEL, help="of the checkpoint (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=750, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and batches (default: %(default)s)")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    state_file = options.out.with_name(f"{options.out.name}-training.pt")  # not shipped
    model = train(options.steps, options.seed, state_file)
    weights = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    model.load_state_dict(weights)  # in float32, but the numbers that are written
    del weights["lm_head.weight"]  # is the embedding's

    texts, names, held_out = split_topics()
    tokens = to_tokens(["\n".join(held_out)])[:-1]
    bits = {name: bits_of(with_packed_weights(model, **packing), tokens) for name, packing in PACKINGS.items()}
    about = {
        "text": f"The Python {platform.python_version()} language reference (pydoc_data.topics). Copyright Python "
        "Software Foundation; PSF License Version 2.",
        "bytes": sum(len(text.encode()) for text in texts),
        "steps": options.steps,
        "tokens_per_step": TOKENS_PER_STEP,
        "seed": options.seed,
        "held_out": names,
        "packings": PACKINGS,
        "bits_per_byte": bits,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT_SYMBOL,
        "eos_token": END_OF_TEXT_SYMBOL,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    generation = GenerationConfig(bos_token_id=END_OF_TEXT, eos_token_id=END_OF_TEXT, do_sample=True, temperature=0.7)
    files = {
        "config.json": CONFIG.to_json_string(),
        "generation_config.json": generation.to_json_string(),
        "held_out.txt": "\n".join(held_out),
        "model.safetensors": save(weights, metadata={"format": "pt"}),
        "tokenizer.json": make_tokenizer().to_str(pretty=True),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2) + "\n",
        "training.json": json.dumps(about, indent=2) + "\n",
    }
    with ExitStack() as stack:
        for name, content in files.items():
            stream = stack.enter_context(replacing(options.out / name))
            stream.write(content if isinstance(content, bytes) else content.encode())
    state_file.unlink(missing_ok=True)
    print(f"bits per byte held out: {bits}; wrote {options.out}")


if __name__ == "__main__":
    main()
