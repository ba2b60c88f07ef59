"""The decoder: sequences join and leave a running batch, whose step is recorded once for each size of batch.

What a request gets does not depend on the others: its keys and values lie in pages of its own or in such that hold the
same numbers, each row of each op is computed as if alone, and its noise is counted by its own tokens.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pygen.autoregressive.cache import PAGE, OutOfPages, PagePool, Pages
from pygen.autoregressive.checkpoint_files import open_checkpoint
from pygen.autoregressive.checkpoints import build, check_packing, read_plan
from pygen.autoregressive.text import Text, TextStream
from pygen.models.decoder import DecoderModel
from pygen.ops.packed_linear import WeightFormat
from pygen.ops.record import Program, record
from pygen.ops.sample_token import sample_token

CHUNK = 256  # tokens of a prompt that are run at once, between two steps of the others

_LARGEST = torch.finfo(torch.float32).max
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, _LARGEST), "top_k": (0, 2**63 - 1), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0), "repetition_penalty": (1e-30, _LARGEST), "presence_penalty": (-_LARGEST, _LARGEST),
    "frequency_penalty": (-_LARGEST, _LARGEST), "seed": (0, 2**64 - 1),
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn; the terms are ``sample_token``'s. Temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            whole = name in ("top_k", "seed")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise TypeError(f"{name} must be {'an integer' if whole else 'a number'}, got {value!r:.100}")
            if not least <= value <= most:
                raise ValueError(f"{name} must lie in [{least:g}, {most:g}], got {value}")

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(eq=False)
class Request:
    """A prompt and what has been made of it.

    tokens: the generated ones so far, the one that ended it included; text: what they say, up to a stop string, of a
    request that names such; ended: None while it runs, then "length", "stop" or "cancelled".
    """

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int]
    sample: int = 0
    stop: tuple[str, ...] = ()
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    ended: str | None = None
    _stream: TextStream | None = None
    _pages: Pages | None = None

    def _take(self, token: int) -> None:
        """The next token, which may end it."""
        assert self._pages is not None
        cached = self._pages.tokens + 1
        if cached % PAGE == 0:
            self._pages.fill(self._sequence, cached)
        self._pages.tokens = cached
        self.tokens.append(token)
        if self._stream is not None:
            self.text += self._stream.put(token)
            found = [place for place in map(self.text.find, self.stop) if place >= 0]
            if found:
                self.text, self.ended = self.text[: min(found)], "stop"
        if token in self.stop_tokens:
            self.ended = "stop"
        elif self.ended is None and len(self.tokens) == self.max_new_tokens:
            self.ended = "length"

    @property
    def _sequence(self) -> list[int]:
        return self.prompt + self.tokens


class Decoder:
    """A language model that generates.

    Args:
        model: its weights.
        cache_tokens: how many tokens the cache holds, of all sequences together.
        cache_dtype: of keys and values; the model's where left out, or torch.int8.
        max_batch: how many sequences a step takes.
        stop_tokens: that end a sequence, unless a request names its own.
        tokenizer: path of a tokenizer.json, or None.
    """

    def __init__(
        self,
        model: DecoderModel,
        *,
        cache_tokens: int = 16384,
        cache_dtype: torch.dtype | None = None,
        max_batch: int = 64,
        stop_tokens: Iterable[int] = (),
        tokenizer: str | os.PathLike[str] | None = None,
    ) -> None:
        self.model = model
        self.max_batch = max_batch
        self.stop_tokens = frozenset(stop_tokens)
        self._tokenizer_file = tokenizer
        self._pool = PagePool(model, cache_tokens, cache_dtype)
        self._pages = min(-(-model.config.positions // PAGE), self._pool.pages)  # of one sequence, at the most
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._steps: dict[int, _Step] = {}
        self._step: _Step | None = None  # that holds the running requests, in order

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        weights: WeightFormat = "bfloat16",
        *,
        group: int | None = None,
        max_length: int | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Decoder:
        """Load a checkpoint: a directory in Hugging Face's layout, or a GGUF file.

        Args:
            directory: with ``config.json`` and safetensors; or the path of a .gguf.
            weights: what linear layers are packed as: "bfloat16", "float32", "int8" or "int4". Activations are float32
                with float32 weights, else bfloat16.
            group: of int8 and int4: see ``pack_linear``.
            max_length: the most tokens that a sequence may have; what the model was made for where left out.
            progress: whether to show a bar on stderr.
            options: of ``Decoder``.

        Raises:
            CheckpointError: in one line, naming the file and the field or tensor.
            ValueError: naming the argument.
        """
        check_packing(weights, group)
        files = open_checkpoint(directory)
        plan = read_plan(files.path, files.config, max_length)
        if progress:
            from rich.console import Console
            from rich.progress import Progress

            with Progress(console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task("", total=plan.layers + 2)
                model = build(
                    files, plan, weights, group,
                    lambda what: bar.update(task, advance=1, description=f"{what} as {weights}"),
                )  # fmt: skip
        else:
            model = build(files, plan, weights, group)
        stop = files.generation_config.get("eos_token_id", files.config.get("eos_token_id"))
        stop = [] if stop is None else stop if isinstance(stop, list) else [stop]
        return cls(model, stop_tokens=stop, tokenizer=files.tokenizer, **options)

    @property
    def has_text(self) -> bool:
        return self._tokenizer_file is not None

    @cached_property
    def text(self) -> Text:
        """The checkpoint's tokenizer; ValueError where it has none."""
        if self._tokenizer_file is None:
            raise ValueError("the checkpoint has no tokenizer.json: give tokens")
        return Text(self._tokenizer_file)

    # ---- Requests ---------------------------------------------------------------------------------------------------

    def submit(
        self,
        ids: Sequence[int] | Tensor,
        max_new_tokens: int,
        *,
        stop_tokens: Iterable[int] | None = None,
        stop: str | Sequence[str] = (),
        sample: int = 0,
        **sampling: Any,
    ) -> Request:
        """Ask for the continuation of a prompt, which ``step`` then works on.

        Where the cache is full, the youngest running request gives up its pages and waits; it goes on as if nothing had
        happened, since what it computes again has the same bits.

        Args:
            ids: the prompt, at least one token.
            max_new_tokens: at the most.
            stop_tokens: that end it, in the place of the decoder's.
            stop: strings that end it where its text holds one of them; needs a tokenizer.
            sample: its number among several of one prompt and seed.
            sampling: the fields of ``Sampling``.

        Raises:
            ValueError, TypeError: naming the argument; also for a request that no empty cache could hold.
        """
        prompt = _token_list(ids, self.model.config.vocabulary)
        known = {field.name for field in fields(Sampling)}
        for name in sampling:
            if name not in known:
                raise TypeError(f"{name} is not a setting of sampling; they are {', '.join(sorted(known))}")
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be a positive integer, got {max_new_tokens!r}")
        length = len(prompt) + max_new_tokens
        if length > self.model.config.positions:
            raise ValueError(
                f"max_new_tokens: a prompt of {len(prompt)} and {max_new_tokens} new tokens are more than the "
                f"{self.model.config.positions} positions of the model"
            )
        if length > self._pool.pages * PAGE:
            raise ValueError(
                f"max_new_tokens: a prompt of {len(prompt)} and {max_new_tokens} new tokens do not fit in a cache of "
                f"{self._pool.pages * PAGE}: give cache_tokens"
            )
        stops = self.stop_tokens if stop_tokens is None else frozenset(stop_tokens)
        strings = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(string, str) and string for string in strings):
            raise ValueError(f"stop must hold strings that are not empty, got {stop!r:.100}")
        stream = self.text.stream() if strings else None
        request = Request(prompt, max_new_tokens, Sampling(**sampling), stops, sample, strings, _stream=stream)
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request, if it has not ended; what it generated stays in it."""
        if request.ended is None:
            request.ended = "cancelled"
            self._release(request)
            if request in self._running:
                self._leave(request)
            else:
                self._waiting.remove(request)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, int]]:
        """A chunk of the next prompt, then one token for every running request: those tokens."""
        self._admit()
        self._reserve()
        if not self._running:
            return []
        if self._step is None:
            rows = len(self._running)
            if rows not in self._steps:
                self._steps[rows] = _Step(self.model, self._pool, rows, self._pages)
            self._step = self._steps[rows]
            for row, request in enumerate(self._running):
                self._step.load(row, request)
        results = list(zip(self._running, self._step.run(), strict=True))
        for request, token in results:
            request._take(token)
            if request.ended is not None:
                self._release(request)
                self._leave(request)
        return results

    def _admit(self) -> None:
        """Run a chunk of the prompts that wait, in their order; the last token of each is left to the step."""
        budget = CHUNK
        while self._waiting and len(self._running) < self.max_batch:
            request = self._waiting[0]
            sequence = request._sequence
            if request._pages is None:
                request._pages = Pages(self._pool)
                request._pages.find(sequence)
            pages = request._pages
            end = min(pages.tokens + budget, len(sequence) - 1)
            try:
                pages.reserve(end + 1)
            except OutOfPages:
                if not self._running:  # whose pages else would come free
                    self._make_room(request)
                return
            ran = end - pages.tokens
            if ran > 0:
                self._prefill(pages, sequence, end)
            if end == len(sequence) - 1:
                self._waiting.popleft()
                self._running.append(request)
                self._step = None
            budget -= ran
            if budget <= 0:
                return

    def _prefill(self, pages: Pages, sequence: list[int], end: int) -> None:
        """Run a sequence's tokens up to ``end``."""
        begin = pages.tokens
        table = torch.full((1, self._pages), -1, dtype=torch.int32)
        pages.write(table[0])
        tokens, first, lengths = torch.tensor([sequence[begin:end]]), torch.tensor([[begin]]), torch.tensor([end])
        self.model.hidden(tokens, first, lengths, table, self._pool.layers)
        pages.fill(sequence, end)

    def _reserve(self) -> None:
        """Room for one more token of every running request; the youngest give up theirs where there is none."""
        for request in list(self._running):
            while request in self._running:
                assert request._pages is not None
                try:
                    changed = request._pages.reserve(request._pages.tokens + 1)
                except OutOfPages:
                    self._make_room(request)
                    continue
                if changed and self._step is not None:
                    request._pages.write(self._step.block_table[self._running.index(request)])
                break

    def _make_room(self, request: Request) -> None:
        """Take the pages of the youngest: of a waiting request that has some, or of the last that began to run."""
        for other in reversed(self._waiting):
            if other is not request and other._pages is not None:
                return self._release(other)
        youngest = self._running[-1]
        self._release(youngest)
        self._leave(youngest)
        self._waiting.appendleft(youngest)

    def _release(self, request: Request) -> None:
        if request._pages is not None:
            request._pages.release()
            request._pages = None

    def _leave(self, request: Request) -> None:
        self._running.remove(request)
        self._step = None

    # ---- Whole generations -------------------------------------------------------------------------------------------

    def stream(self, ids: Sequence[int] | Tensor, max_new_tokens: int, **settings: Any) -> Iterator[int]:
        """The tokens of one sequence, each as soon as it is there; ``settings`` are ``submit``'s.

        Other requests go on meanwhile. Whoever stops listening ends the request.
        """
        request = self.submit(ids, max_new_tokens, **settings)
        return self._listen(request)

    def _listen(self, request: Request) -> Iterator[int]:
        given = 0
        try:
            while request.ended is None or given < len(request.tokens):
                while given == len(request.tokens):
                    self.step()
                yield request.tokens[given]
                given += 1
        finally:
            self.cancel(request)

    def generate(
        self, ids: Sequence[int] | Sequence[Sequence[int]] | Tensor, max_new_tokens: int, **settings: Any
    ) -> Tensor:
        """Prompts and what follows them, as transformers' ``generate`` gives them.

        Args:
            ids: int64 (batch, length), or lists of tokens of any lengths, or one prompt.
            max_new_tokens: at the most, of each.
            settings: ``submit``'s.

        Returns:
            int64 (batch, longest); rows that end sooner are filled up with the first of their stop tokens, or 0.
        """
        requests: list[Request] = []
        try:
            for row in _rows(ids):
                requests.append(self.submit(row, max_new_tokens, **settings))
            while any(request.ended is None for request in requests):
                self.step()
        finally:
            for request in requests:
                self.cancel(request)
        results = [request._sequence for request in requests]
        width = max(map(len, results))
        fill = [min(request.stop_tokens, default=0) for request in requests]
        return torch.tensor([row + [pad] * (width - len(row)) for row, pad in zip(results, fill, strict=True)])

    def prefill(self, ids: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Session:
        """Begin sequences that the caller drives, token by token.

        Args:
            ids: int64 (batch, length) or (length,), or lists of as many tokens each.

        Returns:
            a ``Session``, whose ``logits`` tell what may follow.
        """
        rows = _rows(ids)
        if len({len(row) for row in rows}) != 1:
            raise ValueError("ids must be of one length in a session; generate and submit take any lengths")
        return Session(self, [_token_list(row, self.model.config.vocabulary) for row in rows])


class Session:
    """Sequences whose every token the caller chooses. ``logits``: (batch, vocabulary), of the next one."""

    def __init__(self, decoder: Decoder, prompts: list[list[int]]) -> None:
        self._decoder = decoder
        self._pages = [Pages(decoder._pool) for _ in prompts]
        self._state = _State(len(prompts), decoder._pages)
        self._length = 0
        self._program: Program[Tensor] | None = None
        tokens = torch.tensor(prompts)
        for begin in range(0, tokens.shape[1], CHUNK):
            self.logits = self._run(tokens[:, begin : begin + CHUNK])

    @torch.inference_mode()
    def _run(self, tokens: Tensor) -> Tensor:
        model, pool, state = self._decoder.model, self._decoder._pool, self._state
        length = self._length + tokens.shape[1]
        if length > model.config.positions:
            raise ValueError(f"tokens: the model has {model.config.positions} positions, and they are full")
        for pages, row in zip(self._pages, state.block_table, strict=True):
            try:
                if pages.reserve(length):
                    pages.write(row)
            except OutOfPages:
                raise RuntimeError(f"the cache of {pool.pages * PAGE} tokens is full: give cache_tokens") from None
        state.first.fill_(self._length)
        state.lengths.fill_(length)
        self._length = length
        if tokens.shape[1] > 1:
            x = model.hidden(tokens, state.first, state.lengths, state.block_table, pool.layers)
            return model.project(x.view(*tokens.shape, -1)[:, -1])
        state.tokens.copy_(tokens)
        if self._program is None:
            self._program = record(lambda: model.project(state.hidden(model, pool)))
        return self._program().clone()

    def step(self, tokens: Tensor | Sequence[int]) -> Tensor:
        """Append a token to each sequence, (batch,); the logits of what may follow, which are the caller's to keep."""
        rows = _rows(tokens)[0]
        if len(rows) != len(self._pages):
            raise ValueError(f"tokens must be one for each of {len(self._pages)} sequences, got {len(rows)}")
        self.logits = self._run(torch.tensor(_token_list(rows, self._decoder.model.config.vocabulary))[:, None])
        return self.logits

    def close(self) -> None:
        """Give the pages back; the session is over."""
        for pages in self._pages:
            pages.release()
        self._length = self._decoder.model.config.positions

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *about: object) -> None:
        self.close()


class _State:
    """What a step reads of its sequences."""

    def __init__(self, rows: int, pages: int) -> None:
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64)
        self.first = torch.zeros(rows, 1, dtype=torch.int64)
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.block_table = torch.full((rows, pages), -1, dtype=torch.int32)

    def hidden(self, model: DecoderModel, pool: PagePool) -> Tensor:
        return model.hidden(self.tokens, self.first, self.lengths, self.block_table, pool.layers)


class _Step(_State):
    """The recorded step of so many sequences: from their newest tokens to the next ones."""

    def __init__(self, model: DecoderModel, pool: PagePool, rows: int, pages: int) -> None:
        super().__init__(rows, pages)

        def numbers(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((rows,), value, dtype=dtype)

        self.settings: dict[str, Any] = {
            name: numbers(getattr(Sampling(), name), torch.int64 if name in ("top_k", "seed") else torch.float32)
            for name in (field.name for field in fields(Sampling))
        }
        self.draw, self.samples = numbers(0, torch.int64), numbers(0, torch.int64)
        self.previous = torch.empty(rows, pages * PAGE, dtype=torch.int64)
        self.previous_lengths = numbers(0, torch.int64)
        self._penalised: list[int] = []

        def step() -> Tensor:
            return sample_token(
                model.project(self.hidden(model, pool)), **self.settings, previous=self.previous,
                previous_lengths=self.previous_lengths, step=self.draw, sample_ids=self.samples, out=self.tokens[:, 0],
            )  # fmt: skip

        self._program = record(step)

    def load(self, row: int, request: Request) -> None:
        """Put a request, whose last token is not in the cache yet, into a row."""
        assert request._pages is not None
        sequence = request._sequence
        self.tokens[row] = sequence[-1]
        self.first[row] = len(sequence) - 2  # of the step before, which run() counts on from
        self.lengths[row] = len(sequence) - 1
        request._pages.write(self.block_table[row])
        for name, tensor in self.settings.items():
            value = getattr(request.sampling, name)
            tensor[row] = value - (1 << 64) if name == "seed" and value >> 63 else value
        self.draw[row] = len(request.tokens) - 1
        self.samples[row] = request.sample
        if row == 0:
            self._penalised.clear()
        self.previous_lengths[row] = 0
        if request.sampling.penalises:
            self._penalised.append(row)
            self.previous[row, : len(sequence) - 1] = torch.tensor(sequence[:-1])
            self.previous_lengths[row] = len(sequence) - 1

    def run(self) -> list[int]:
        self.first.add_(1)
        self.lengths.add_(1)
        self.draw.add_(1)
        for row in self._penalised:
            self.previous[row, self.previous_lengths[row]] = self.tokens[row, 0]
            self.previous_lengths[row] += 1
        return self._program().tolist()


def _rows(ids: Any) -> list[Any]:
    """Several prompts, or one, as a list of prompts."""
    rows = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    return rows if rows and isinstance(rows[0], (list, tuple, Tensor)) else [rows]


def _token_list(ids: Sequence[int] | Tensor, vocabulary: int) -> list[int]:
    if isinstance(ids, Tensor) and (ids.dim() != 1 or ids.is_floating_point()):
        raise ValueError(f"ids must be integers of shape (length,), got {ids.dtype} of shape {tuple(ids.shape)}")
    tokens = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if not tokens:
        raise ValueError("ids must hold at least one token")
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise ValueError(f"ids must hold tokens from 0 to {vocabulary - 1}, got {token!r:.100}")
    return tokens
