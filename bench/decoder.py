"""The suite `decoder`: whole tokens of a random Llama, beside llama.cpp and transformers on the same weights.

A call makes so many tokens, and shows as tokens per second. Before that, logits of a prompt and of steps behind it are
held beside transformers' model on the unpacked weights, in float64.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pygen
from bench.cases import Case, Work
from bench.decode import FORMATS, ROTATED, ROTATED_QUICK, reads
from bench.llama import Llama, open_llama
from bench.measure import Call
from pygen.autoregressive.step import Step
from pygen.models.decoder import DecoderModel, Layer, Linear
from pygen.testing.gguf_writer import TensorType, write_llama_gguf
from tests.error_rule import Triple

if TYPE_CHECKING:
    from bench.run import Result

Part = TypeVar("Part")
SIZES: dict[str, dict[str, int]] = {
    "125M": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
             "intermediate_size": 2048, "vocab_size": 32000},
    "1.1B": {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
             "intermediate_size": 5632, "vocab_size": 32000},
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 256, "vocab_size": 512},
}  # fmt: skip
TOKENS = {"125M": 32, "1.1B": 8, "tiny": 4}  # of a sequence in one call
LLAMA_TYPES: dict[str, TensorType] = {"bfloat16": "BF16", "int8": "Q8_0", "int8 by 32": "Q8_0", "int4 by 32": "Q4_0"}
PREFILL, PREFILLED = 256, ("bfloat16", "int8")
BATCH, PROFILED = 8, ("125M", "int4 by 32")
PROFILED_STEPS = 8
PROMPT, LONGEST = 16, 256  # tokens before those that are decoded, and how many these are before all begin anew
CHECKED_STEPS = 4
# How many times the peer's tokens per second.
DECODE_GOALS = {
    "125M": {"bfloat16": 1.1, "int8": 1.4, "int4 by 32": 1.7},
    "1.1B": {"bfloat16": 0.97, "int8": 1.15, "int4 by 32": 1.1},
}
PREFILL_GOALS = {"1.1B": {"bfloat16": 1.4, "int8": 2.0}}
TRANSFORMERS_GOAL, BATCH_GOAL = 3.0, 4.0


def cases(quick: bool) -> list[Case]:
    """None without transformers, which tells the truth; llama.cpp has a column where it is there."""
    if find_spec("transformers") is None:
        return []

    def case(size: str, what: str, name: str, make: Callable[..., Work], **how: Any) -> Case:
        return Case("decoder", f"{what}, {size}, {name}", partial(make, size, name, quick=quick, **how), size)

    return [
        one
        for size in (["tiny"] if quick else ["125M", "1.1B"])
        for name in (["bfloat16", "int4 by 32"] if quick else LLAMA_TYPES)  # what needs the same weights together
        for one in [
            case(size, "decode", name, decode),
            *([case(size, f"prefill of {PREFILL}", name, prefill)] if name in PREFILLED else []),
            *([case(size, f"batch of {BATCH}", name, batched)] if name == "bfloat16" else []),
            *([case(size, "one token", name, profile)] if (size, name) in (PROFILED, ("tiny", PROFILED[1])) else []),
        ]
    ]


class Checkpoint:
    """A random Llama, in files that are removed with it."""

    def __init__(self, size: str) -> None:
        self._folder = TemporaryDirectory(prefix="pygen-bench-")
        self.directory = Path(self._folder.name)
        self.config: dict[str, Any] = SIZES[size] | {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        }  # fmt: skip
        (self.directory / "config.json").write_text(json.dumps(self.config))
        save_file(self._tensors(), self.directory / "model.safetensors", metadata={"format": "pt"})

    def _tensors(self) -> dict[str, Tensor]:
        """bfloat16; always the same."""
        generator = torch.Generator().manual_seed(0)
        width, inner, vocabulary = (self.config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
        kv = width // self.config["num_attention_heads"] * self.config["num_key_value_heads"]
        shapes = {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,),
        }  # fmt: skip
        every = {"model.embed_tokens": (vocabulary, width), "model.norm": (width,), "lm_head": (vocabulary, width)}
        for layer in range(self.config["num_hidden_layers"]):
            every |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}

        def numbers(shape: tuple[int, ...]) -> Tensor:
            if len(shape) == 1:
                return torch.ones(shape, dtype=torch.bfloat16)
            return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).bfloat16()

        return {f"{name}.weight": numbers(shape) for name, shape in every.items()}

    def gguf(self, type: TensorType) -> Path:
        path = self.directory / f"{type}.gguf"
        if not path.exists():
            write_llama_gguf(path, self.config, self._tensors(), type)
        return path


checkpoint = lru_cache(maxsize=1)(Checkpoint)


class Loaded:
    """A checkpoint's weights in one format, what is known of their logits, and the peers on the same."""

    def __init__(self, size: str, name: str, quick: bool) -> None:
        self.files = checkpoint(size)
        self.name = name
        weights, group = FORMATS[name]["format"], FORMATS[name].get("group")
        self.decoder = pygen.Decoder.from_pretrained(self.files.directory, weights, group=group)
        self.model = model = self.decoder.model
        self.linears = [linear.weight for layer in model.layers for linear in linears(layer).values()]
        self.linears.append(model.head.weight)
        self.bytes = sum(weight.nbytes for weight in self.linears)
        self.rotated = ROTATED_QUICK if quick else ROTATED
        draw = torch.Generator().manual_seed(1)
        length = (PREFILL if name in PREFILLED else PROMPT) + CHECKED_STEPS
        self.ids = torch.randint(3, model.config.vocabulary, (BATCH, length), generator=draw)

    @cached_property
    def triples(self) -> list[Triple]:
        return [*self.check(self.ids[:1])]

    def check(self, ids: Tensor) -> Iterator[Triple]:
        """Logits of a prompt and of steps behind it; those of bfloat16 and float64 by transformers."""
        same, truth = (self.exact_logits(ids, CHECKED_STEPS + 1, dtype) for dtype in (torch.bfloat16, torch.float64))
        with self.decoder.prefill(ids[:, :-CHECKED_STEPS]) as session:
            yield session.logits, same[:, 0], truth[:, 0]
            for i in range(1, CHECKED_STEPS + 1):
                yield session.step(ids[:, i - CHECKED_STEPS - 1]), same[:, i], truth[:, i]

    def exact_logits(self, ids: Tensor, last: int, dtype: torch.dtype) -> Tensor:
        """transformers' own, (batch, last, vocabulary), of the weights as they are unpacked, a layer at a time."""
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        config, model = LlamaConfig(**self.files.config), self.model
        with torch.device("meta"):
            theirs = LlamaForCausalLM(config).eval()
        theirs.model.rotary_emb = LlamaRotaryEmbedding(config)

        def filled(module: nn.Module, weights: Callable[[], dict[str, Tensor]]) -> None:
            """Gives a module its weights for as long as it runs."""

            def fill(module: nn.Module, *_: Any) -> None:
                for name, weight in weights().items():
                    part = module.get_submodule(name)
                    part.weight = nn.Parameter(weight.to(dtype), requires_grad=False)

            module.register_forward_pre_hook(fill)
            module.register_forward_hook(lambda module, *_: module.to("meta") and None)

        for layer, ours in zip(theirs.model.layers, model.layers, strict=True):
            filled(layer, partial(unpacked, ours, config, dtype))
        filled(theirs.model.embed_tokens, lambda: {"": model.embedding})
        filled(theirs.model.norm, lambda: {"": given(model.final_norm.weight)})
        filled(theirs.lm_head, lambda: {"": model.head.weight.unpack(dtype)})
        theirs.config.dtype = dtype
        with torch.inference_mode():
            return theirs(ids, use_cache=False, logits_to_keep=last).logits

    @cached_property
    def transformers(self) -> Transformers:
        return Transformers(self.files.directory)

    @cached_property
    def _llama(self) -> tuple[Llama, str] | None:
        if find_spec("llama_cpp") is None:
            return None
        return open_llama(self.files.gguf(LLAMA_TYPES[self.name]), torch.get_num_threads())

    @property
    def llama(self) -> Llama | None:
        return self._llama and self._llama[0]

    def remark(self) -> str:
        """What was seen of the logits, before anything is timed."""
        ours, _, truth = self.triples[0]
        text = f"pygen's logits within {deviation(ours, truth):.2g} of float64"
        if self._llama:
            llama, how = self._llama
            llama.prefill(self.ids[0, :-CHECKED_STEPS].tolist())
            theirs = llama.logits()[None]
            same = "the same" if torch.equal(theirs.argmax(-1), truth.argmax(-1)) else "another"
            text += f"; llama.cpp {how}, {LLAMA_TYPES[self.name]}: within {deviation(theirs, truth):.2g}, {same} token"
        return text

    def stream(self, steps: float) -> Call:
        """Reads as many bytes as so many steps, of memory that no cache holds."""
        parts = -(-self.bytes // (256 << 20))
        read = reads(self.bytes // parts, self.rotated)
        count = max(1, round(steps * parts))

        def all_of_it() -> None:
            for _ in range(count):
                read()

        return all_of_it

    def work(self, calls: dict[str, Call], steps: int, tokens: int, triples: Callable[[], Iterable[Triple]]) -> Work:
        """Of calls that make so many tokens each, and read all weights so many times."""
        flops = 2 * tokens * sum(w.outputs * (1 + w.gated) * w.inputs for w in self.linears)
        return Work(
            calls, steps * self.bytes, flops, torch.bfloat16, triples, self.stream(steps), "DRAM", tokens, self.remark
        )


loaded = lru_cache(maxsize=1)(Loaded)


def linears(layer: Layer) -> dict[str, Linear]:
    return {"q, k, v": layer.qkv, "merge": layer.merge, "gate and up": given(layer.up), "down": given(layer.down)}


def given(part: Part | None) -> Part:
    assert part is not None
    return part


def unpacked(layer: Layer, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer's weights by transformers' names."""
    q, k, v = layer.qkv.weight.unpack(dtype).split([heads * config.head_dim for heads in (
        config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)])  # fmt: skip
    gate, up = given(layer.up).weight.unpack(dtype).chunk(2)
    return {
        "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "mlp.gate_proj": gate, "mlp.up_proj": up,
        "self_attn.o_proj": layer.merge.weight.unpack(dtype), "mlp.down_proj": given(layer.down).weight.unpack(dtype),
        "input_layernorm": given(layer.attention_norm.weight),
        "post_attention_layernorm": given(layer.mlp_norm.weight),
    }  # fmt: skip


def deviation(logits: Tensor, truth: Tensor) -> float:
    return (logits.double() - truth).abs().max().item()


class Transformers:
    """transformers' model in bfloat16, one sequence, greedy: what ``generate`` does, without its own bookkeeping."""

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(device)

    def prefill(self, tokens: Sequence[int]) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)
        self._run(torch.tensor([tokens], device=self._model.device))

    def step(self) -> None:
        self._run(self._token)

    @torch.inference_mode()
    def _run(self, tokens: Tensor) -> None:
        out = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._token = out.logits[:, -1].argmax(-1, keepdim=True)


class Ours:
    """pygen's decoder, with a cache of its own: a batch of sequences, greedy."""

    def __init__(self, model: DecoderModel, batch: int = 1) -> None:
        self.decoder = pygen.Decoder(model, cache_tokens=batch * (PROMPT + LONGEST + 4 * BATCH))
        self._batch = batch
        self._requests: list[Any] = []

    def prefill(self, tokens: Sequence[int]) -> None:
        for request in self._requests:
            self.decoder.cancel(request)
        rows = ([token + row for token in tokens] for row in range(self._batch))
        self._requests = [self.decoder.submit(row, LONGEST + 2 * self._batch) for row in rows]
        while len(self.step()) < self._batch:
            pass

    def step(self) -> list[Any]:
        return self.decoder.step()


def turns(of: Ours | Transformers | Llama, count: int) -> Call:
    """Each makes so many tokens more of a sequence, which begins anew when it is long."""
    made = LONGEST

    def call() -> None:
        nonlocal made
        if made + count > LONGEST:
            of.prefill(range(3, 3 + PROMPT))
            made = 0
        for _ in range(count):
            of.step()
        made += count

    return call


def decode(size: str, name: str, quick: bool) -> Work:
    these, count = loaded(size, name, quick), TOKENS[size]
    calls = {"pygen": turns(Ours(these.model), count)}
    if name == "bfloat16":
        calls["transformers"] = turns(these.transformers, count)
    if these.llama:
        calls["llama.cpp"] = turns(these.llama, count)
    return these.work(calls, count, count, lambda: these.triples)


def prefill(size: str, name: str, quick: bool) -> Work:
    these = loaded(size, name, quick)
    tokens = these.ids[0, :PREFILL].tolist()
    calls: dict[str, Call] = {"pygen": lambda: these.decoder.prefill(tokens).close()}
    if name == "bfloat16":
        calls["transformers"] = lambda: these.transformers.prefill(tokens)
    if these.llama:
        calls["llama.cpp"] = lambda: these.llama.prefill(tokens)
    return these.work(calls, 1, PREFILL, lambda: these.triples)


def batched(size: str, name: str, quick: bool) -> Work:
    """A batch, beside one sequence that makes as many tokens."""
    these, steps = loaded(size, name, quick), TOKENS[size] // 2
    calls = {
        "pygen": turns(Ours(these.model, BATCH), steps),
        "pygen, alone": turns(Ours(these.model), BATCH * steps),
    }
    return these.work(calls, steps, BATCH * steps, lambda: these.check(these.ids[:, : PROMPT + CHECKED_STEPS]))


class Without(TorchDispatchMode):
    """Records a step without its launches of one kind."""

    def __init__(self, kinds: dict[int, str], left_out: str = "") -> None:
        super().__init__()
        self._kinds, self._left_out = kinds, left_out
        self.launches: Counter[str] = Counter()
        self._stale: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "pygen":
            return func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        kind = self._kinds[args[1].data_ptr()] if name == "linear_decode" else name
        self.launches[kind] += 1
        if kind != self._left_out:
            return func(*args, **(kwargs or {}))
        arguments = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and "cache" not in argument.name and arguments.get(argument.name) is not None:
                self._stale.append(arguments[argument.name])
        return None

    def __exit__(self, *about: Any) -> None:
        super().__exit__(*about)
        for tensor in self._stale:  # what nothing writes holds numbers all the same
            tensor.zero_()


def profile(size: str, name: str, quick: bool) -> Work:
    """The step's program without its launches of one kind each, so that data lie where they lie in the whole."""
    these = loaded(size, name, quick)
    ours = Ours(these.model)
    decoder, model = ours.decoder, these.model
    turns(ours, LONGEST // 2)()  # so long is the sequence that the programs stay at
    live = decoder._step
    assert live is not None

    kinds = {model.head.weight.data.data_ptr(): f"head, {model.head.weight.nbytes / 1e6:.1f} MB"}
    for what in linears(model.layers[0]):
        weights = [linears(layer)[what].weight for layer in model.layers]
        label = f"{what}, {len(weights)} of {sum(weight.nbytes for weight in weights) / 1e6:.1f} MB"
        kinds |= {weight.data.data_ptr(): label for weight in weights}

    def program(left_out: str = "") -> tuple[Call, Counter[str]]:
        with Without(kinds, left_out) as mode:
            step = Step([model], decoder._pool, 1, decoder._pages)
        for state in ("tokens", "positions", "block_table"):
            getattr(step, state).copy_(getattr(live, state))
        return step._step, mode.launches

    def replays(replay: Call) -> Call:
        def call() -> None:
            for _ in range(PROFILED_STEPS):
                replay()

        return call

    ((request, _),) = ours.step()
    made, cached = len(request.tokens), request._pages.tokens

    def steps() -> None:
        """From where the programs stay, again and again."""
        del request.tokens[made:]
        request._pages.tokens = cached
        decoder._step = None
        for _ in range(PROFILED_STEPS):
            decoder.step()

    whole, launches = program()
    calls: dict[str, Call] = {"pygen": steps, "program": replays(whole)}
    calls |= {f"without {kind}": replays(program(kind)[0]) for kind in launches}
    return these.work(calls, PROFILED_STEPS, PROFILED_STEPS, lambda: these.triples)


def breakdown(result: Result) -> Iterator[str]:
    """Where the time of a token goes: what the program saves where it has no such launches."""
    times = {column: spread.median / result.tokens for column, spread in result.times.items()}
    whole, program = times["pygen"], times["program"]
    parts = {column[8:]: program - seconds for column, seconds in times.items() if column.startswith("without ")}
    parts["all else in the program"] = program - sum(parts.values())
    parts["Python between two programs"] = whole - program
    yield f"{result.name}: where {whole * 1e6:.0f} us go"
    for kind, seconds in parts.items():
        yield f"  {kind:30} {seconds * 1e6:8.1f} us  {seconds / whole:4.0%}"


def verdicts(results: Iterable[Result]) -> Iterator[str]:
    """What was seen of the logits, where the time of a token goes, and which goals are reached."""
    timed = {result.name: result for result in results if result.suite == "decoder" and result.times}

    def speed(name: str, column: str) -> float | None:
        """Tokens per second."""
        found = timed.get(name)
        return found.tokens / found.times[column].median if found and column in found.times else None

    for result in timed.values():
        if result.name.startswith("decode, "):
            yield f"{result.name}: {result.remark}"
        if "program" in result.times:
            yield from breakdown(result)
    for what, sizes in (("decode", DECODE_GOALS), (f"prefill of {PREFILL}", PREFILL_GOALS)):
        for size, goals in sizes.items():
            for name, goal in goals.items():
                ours = speed(f"{what}, {size}, {name}", "pygen")
                theirs = speed(f"{what}, {size}, {name}", "llama.cpp")
                slow = speed(f"{what}, {size}, bfloat16", "transformers")
                beside = []
                if ours and theirs:
                    beside.append(f"{ours / theirs:.2f} times llama.cpp's speed, the goal being {goal:g}")
                if ours and slow:
                    wanted = f", the goal being {TRANSFORMERS_GOAL:g}" if what == "decode" else ""
                    beside.append(f"{ours / slow:.1f} times transformers' in bfloat16{wanted}")
                if beside:
                    yield f"{what}, {size}, {name}: {'; '.join(beside)}"
    for name, result in timed.items():
        if "pygen, alone" in result.times:
            gain = result.times["pygen, alone"].median / result.times["pygen"].median
            yield f"{name}: {gain:.1f} times the tokens of one sequence, the goal being {BATCH_GOAL:g}"
