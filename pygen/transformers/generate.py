"""The ``generate`` of a loaded transformers model, on pygen's decoder: what ``pygen.accelerate(model)`` puts there.

transformers prepares a call as ever (its settings, their defaults, checks and errors, the attention mask), and hands it
to the decoder through the hook that it has for other loops, ``custom_generate``. What the decoder does not do runs as
before, and says so.
"""

from __future__ import annotations

import functools
import inspect
import json
import threading
import warnings
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pygen.autoregressive.beam_search import beam_search
from pygen.autoregressive.cache import PAGE
from pygen.autoregressive.checkpoints import build, check_packing, read_plan
from pygen.autoregressive.decode import Decoder
from pygen.autoregressive.request import Request
from pygen.files import CheckpointError, refuse
from pygen.models.decoder import QUERIES
from pygen.ops.packed_linear import WeightFormat
from pygen.patch import Found, Left, Replacement

CACHE_TOKENS = 16384  # at the least; what no token has met takes no memory
_DTYPES: dict[torch.dtype, WeightFormat] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}  # and what leaves them out
_SHARES = ("top_p", "typical_p")  # of which transformers takes 1 and more for all
# What generate is given or configured with that the decoder does as transformers does, ...
_DONE = {
    "inputs", "input_ids", "attention_mask", "generation_config", "streamer", "max_length", "max_new_tokens",
    "do_sample", *_SAMPLING, "repetition_penalty", "num_return_sequences", "eos_token_id", "pad_token_id",
    "bos_token_id", "num_beams", "length_penalty", "early_stopping", "assistant_model", "prompt_lookup_num_tokens",
}  # fmt: skip
# ... what changes nothing, or nothing without a setting that is not done, ...
_IDLE = {
    "use_cache", "disable_compile", "compile_config", "transformers_version", "tokenizer", "max_matching_ngram_size",
    "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "decoder_start_token_id",
}  # fmt: skip
# ... and what does with this value. Of everything else, only what is empty, 0 or False.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beam_groups": (1,), "encoder_repetition_penalty": (1,), "guidance_scale": (1,),
    "cache_implementation": ("dynamic", "hybrid"),
}  # fmt: skip


class _NotDone(Exception):
    """Names what the decoder does not do."""


class _Parameters:
    """The parameters of a loaded model, read as a checkpoint's: see ``checkpoints.Files``."""

    def __init__(self, model: Any) -> None:
        from transformers.core_model_loading import revert_weight_conversion

        self.path = Path(type(model).__name__)  # for messages
        self.config: dict[str, Any] = json.loads(model.config.to_json_string())  # as it would be saved; so the names
        self._tensors: dict[str, Tensor] = revert_weight_conversion(model, model.state_dict())
        self.names = list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.read(name).shape)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._tensors:
            refuse(self.path, f"missing tensor {name!r}")
        return self._tensors[name].to("cpu", dtype)

    def release(self, name: str) -> None:
        pass

    def file(self, name: str) -> Any:
        return self.path


def _state(model: Any) -> list[tuple[Any, ...]]:
    """What changes when the parameters do: where each lies, how often it was written, and a few of its bytes.

    The bytes, of a CPU's, see what the version does not: writes through ``.data``, and to tensors of inference mode,
    without one.
    """
    state = []
    for parameter in model.parameters():
        tensor = parameter.detach()
        few: list[int] = []
        if tensor.device.type == "cpu":  # a GPU would be waited for
            few = tensor.flatten()[:: max(1, tensor.numel() // 8)].contiguous().view(torch.uint8).tolist()
        version = None if parameter.is_inference() else parameter._version
        state.append((tensor.device, tensor.dtype, tensor.data_ptr(), version, *few))
    return state


class Generate:
    """``generate`` of a causal language model, called and answering as transformers'.

    The weights are packed at the first call, and again at the first after the parameters have changed. Copies and
    pickles of the model take it with them, unpacked. Calls from several threads wait for each other.

    Args:
        model: a transformers model of a family that ``Decoder`` knows.
        weights, group: as in ``Decoder.from_pretrained``; without, the parameters' own dtype.
        cache_tokens: how many tokens the cache holds, all sequences together; without, 16384 or the longest sequence.
    """

    def __init__(
        self, model: Any, weights: WeightFormat | None = None, group: int | None = None, cache_tokens: int | None = None
    ) -> None:
        self._options = (weights, group, cache_tokens)
        self._model = model
        self._theirs = type(model).generate.__get__(model)
        self._lock = threading.RLock()  # a streamer may call generate
        self._decoder: Decoder | None = None
        self._packed: list[tuple[Any, ...]] = []
        self._assistant: Generate | None = None  # the last
        self._drafting: tuple[tuple[Any, ...], Decoder] | None = None  # of decoder, draft and draft_tokens
        functools.update_wrapper(self, self._theirs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Generate, (self._model, *self._options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(self._theirs).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        try:
            self._check(given)
            given["custom_generate"] = functools.partial(
                self._decode, given.pop("streamer", None), given.pop("assistant_model", None)
            )
            return self._theirs(**given)
        except _NotDone as what:
            warnings.warn(f"generate runs as transformers' own, without pygen: {what} is not supported", stacklevel=2)
        return self._theirs(*args, **kwargs)

    def decoder(self) -> Decoder:
        """Of the parameters as they are now.

        Raises:
            CheckpointError: in one line, for parameters or a configuration that no decoder takes.
        """
        state = _state(self._model)
        if self._decoder is None or state != self._packed:
            self._decoder = self._drafting = None  # their memory is free before the next one's is taken
            self._decoder, self._packed = self._pack(), state
        return self._decoder

    def _drafted(self, assistant: Any, config: Any) -> Decoder:
        """The decoder; or where drafts are asked for, one of the same model that has them."""
        decoder, count = self.decoder(), config.prompt_lookup_num_tokens
        draft: Decoder | Literal["prompt"] = "prompt"
        if count is None:
            if assistant is None:
                return decoder
            draft, count = self._draft_of(assistant), assistant.generation_config.num_assistant_tokens or 4
        parts = (decoder, draft, min(count, QUERIES - 1))
        if self._drafting is None or any(a is not b for a, b in zip(self._drafting[0], parts, strict=True)):
            self._drafting = None
            try:
                drafting = Decoder(
                    decoder.model, cache_tokens=decoder.cache_tokens, draft=draft, draft_tokens=parts[-1]
                )
            except ValueError as error:
                raise _NotDone(f"assistant_model ({error})") from None
            self._drafting = (parts, drafting)
        return self._drafting[1]

    def _draft_of(self, assistant: Any) -> Decoder:
        if self._assistant is None or self._assistant._model is not assistant:
            own = getattr(assistant, "generate", None)
            self._assistant = own if isinstance(own, Generate) else Generate(assistant, *self._options)
        try:
            return self._assistant.decoder()
        except CheckpointError as error:
            raise _NotDone(f"assistant_model ({error})") from None

    def _pack(self) -> Decoder:
        weights, group, cache_tokens = self._options
        files = _Parameters(self._model)
        plan = read_plan(files.path, files.config)
        devices = {parameter.device for parameter in self._model.parameters()}
        if len(devices) > 1 or not all(device.type in ("cpu", "cuda") for device in devices):
            refuse(files.path, f"parameters must be on the CPU or a GPU, got {', '.join(map(str, devices))}")
        for parameter in self._model.parameters():
            if weights is None and parameter.dtype not in _DTYPES:
                refuse(files.path, f"parameters must be float32 or bfloat16 without weights=, got {parameter.dtype}")
        dtypes = {parameter.dtype for parameter in self._model.parameters()}
        if weights is None and len(dtypes) > 1:
            refuse(files.path, "parameters must have one dtype without weights=, got float32 and bfloat16")
        head = self._model.get_output_embeddings().weight
        if plan.tied and head.data_ptr() != self._model.get_input_embeddings().weight.data_ptr():
            refuse(files.path, "config: tie_word_embeddings is true, and the head has weights of its own")
        model = build(files, plan, weights or _DTYPES[dtypes.pop()], group)
        cache_tokens = cache_tokens or max(CACHE_TOKENS, model.config.positions)
        return Decoder(model.to(devices.pop()), cache_tokens=cache_tokens)

    def _check(self, given: dict[str, Any]) -> None:
        """That nothing is asked for, by the call or by either configuration, that ``_decode`` would leave out."""
        if self._model.training:
            raise _NotDone("a model in training mode (call model.eval())")
        configs = [config for config in (given.get("generation_config"), self._model.generation_config) if config]
        for name in {name: None for source in (given, *map(vars, configs)) for name in source}:
            found = (value for config in configs if (value := getattr(config, name, None)) is not None)
            value = given[name] if name in given else next(found, None)
            if name in _DONE or name in _IDLE or name.startswith("_") or value is None:
                continue
            empty = isinstance(value, int | float | str | list | tuple | dict) and not value
            if not empty and value not in _NEUTRAL.get(name, ()):
                raise _NotDone(name)

    def _decode(
        self,
        streamer: Any,
        assistant: Any,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        generation_config: Any,
        **prepared: Any,
    ) -> Tensor:
        """The loop, in the place of transformers' ``_sample``, on what it would be given."""
        length = input_ids.shape[1]
        new = generation_config.max_length - length
        if length == 0 or new < 1:
            raise _NotDone("max_length" if length else "input_ids of length 0")
        rows, mask = input_ids.tolist(), prepared.get("attention_mask")
        sampling: dict[str, Any] = {"repetition_penalty": generation_config.repetition_penalty or 1.0}
        if mask is not None:
            if mask.shape != input_ids.shape or not torch.equal(mask.bool(), mask.bool().cummax(1).values):
                raise _NotDone("attention_mask of anything but padding on the left")
            rows = [row[length - count :] for row, count in zip(rows, mask.bool().sum(1).tolist(), strict=True)]
            # Earlier versions of transformers penalise the padding too.
            spared = any(isinstance(getattr(p, "prompt_ignore_length", None), Tensor) for p in logits_processor)
            if sampling["repetition_penalty"] != 1.0 and not spared and not mask.all():
                raise _NotDone("repetition_penalty of padded prompts")
        if not all(rows):
            raise _NotDone("attention_mask of a prompt without a token")
        if generation_config.do_sample:
            for name, neutral in _SAMPLING.items():
                value = getattr(generation_config, name)
                sampling[name] = neutral if value is None else min(value, 1.0) if name in _SHARES else value
            sampling["seed"] = int(torch.randint(2**63 - 1, ()))
        stops = _token_ids(generation_config.eos_token_id)
        pad = (_token_ids(generation_config.pad_token_id) or stops or [0])[0]
        if (generation_config.num_beams or 1) > 1:
            if streamer is not None or len(sampling) > 1 or sampling["repetition_penalty"] != 1.0:
                raise _NotDone("num_beams with a streamer, do_sample or repetition_penalty")
            return self._search(input_ids, rows, new, stops, pad, generation_config)
        columns = []
        with self._lock:
            decoder = self._drafted(assistant, generation_config)
            if max(map(len, rows)) + new > decoder.model.config.positions:
                raise _NotDone(f"a length of more than {decoder.model.config.positions} positions")
            if streamer is not None:
                streamer.put(input_ids.cpu())
            with closing(_columns(decoder, rows, new, pad, stop_tokens=stops, **sampling)) as generated:
                for column in generated:
                    columns.append(column)
                    if streamer is not None:
                        streamer.put(column)
        if streamer is not None:
            streamer.end()
        return torch.cat([input_ids, torch.stack(columns, dim=1).to(input_ids.device)], dim=1)

    def _search(
        self, input_ids: Tensor, rows: list[list[int]], new: int, stops: list[int], pad: int, config: Any
    ) -> Tensor:
        """Beam search, on prompts that transformers has repeated."""
        beams, kept = config.num_beams, config.num_return_sequences or 1
        penalty = 1.0 if config.length_penalty is None else config.length_penalty
        found: list[Tensor] = []
        with self._lock:
            decoder = self.decoder()
            longest = max(map(len, rows)) + new
            if longest > decoder.model.config.positions or beams * (longest + PAGE) > decoder.cache_tokens:
                raise _NotDone(f"num_beams of {longest} tokens each, without more cache_tokens,")
            for row in rows[::beams]:
                with decoder.prefill(row) as session:
                    best = beam_search(session, new, beams, stops, penalty, config.early_stopping or False)
                found += [torch.tensor(beam.tokens) for beam in best[:kept]]
        tokens = pad_sequence(found, batch_first=True, padding_value=pad or (stops or [0])[0])
        return torch.cat([input_ids[::beams].repeat_interleave(kept, dim=0), tokens.to(input_ids.device)], dim=1)


def _columns(
    decoder: Decoder, rows: list[list[int]], new: int, pad: int, **settings: Any
) -> Generator[Tensor, None, None]:
    """The next tokens of all rows, int64 (rows,), ``pad`` where one has ended, until all have."""
    requests: list[Request] = []
    try:
        for i, row in enumerate(rows):
            requests.append(decoder.submit(row, new, sample=i, **settings))
        for at in range(new):
            while any(request.ended is None and len(request.tokens) == at for request in requests):
                decoder.step()
            if all(len(request.tokens) <= at for request in requests):
                return
            yield torch.tensor([request.tokens[at] if at < len(request.tokens) else pad for request in requests])
    finally:
        for request in requests:
            decoder.cancel(request)


def _token_ids(value: Any) -> list[int]:
    """Of a setting that is None, a token, several, or a tensor."""
    return [] if value is None else torch.as_tensor(value).reshape(-1).tolist()


def generation(
    target: Any, *, weights: WeightFormat | None = None, group: int | None = None, cache_tokens: int | None = None
) -> Found:
    """The rule for a causal language model: its ``generate``; options are those of ``Generate``."""
    check_packing(weights or "float32", group)
    if cache_tokens is not None and (type(cache_tokens) is not int or cache_tokens < 1):
        raise ValueError(f"cache_tokens must be a positive integer, got {cache_tokens!r}")
    kind = type(target)
    if "generate" in vars(target):
        ours = isinstance(target.generate, Generate)
        yield Left("generate", "pygen's already" if ours else "the model has one of its own")
        return
    if not kind.__module__.startswith("transformers.models.") or not target.can_generate():
        yield Left("generate", f"{kind.__module__}.{kind.__name__} is no causal language model of transformers'")
        return
    generate = Generate(target, weights, group, cache_tokens)
    try:
        generate.decoder()
    except CheckpointError as error:
        yield Left("generate", str(error))
        return
    yield Replacement(target, "generate", generate)
