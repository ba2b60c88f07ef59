"""The decoder: sequences join and leave a running batch, whose step is recorded once for each size of batch.

What a request gets does not depend on the others: its keys and values lie in pages of its own or in such that hold the
same numbers, each row of each op is computed as if alone, and its noise is counted by its own tokens.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from pygen.autoregressive.beam_search import EarlyStopping, beam_search
from pygen.autoregressive.cache import PAGE, OutOfPages, PagePool, Pages
from pygen.autoregressive.checkpoint_files import open_checkpoint
from pygen.autoregressive.checkpoints import build, check_packing, read_plan
from pygen.autoregressive.prompt_lookup import PromptLookup
from pygen.autoregressive.request import Request, Sampling, token_list, token_rows
from pygen.autoregressive.session import CHUNK, Session
from pygen.autoregressive.step import Step
from pygen.autoregressive.text import Text
from pygen.models.decoder import QUERIES, DecoderModel
from pygen.ops.packed_linear import WeightFormat


class Decoder:
    """A language model that generates.

    Args:
        model: its weights.
        cache_tokens: how many tokens the cache holds, of all sequences together.
        cache_dtype: of keys and values; the model's where left out, or torch.int8.
        max_batch: how many sequences a step takes.
        stop_tokens: that end a sequence, unless a request names its own.
        tokenizer: path of a tokenizer.json, or None.
        draft: who guesses the next tokens, which a step then verifies together: a smaller decoder of the same tokens,
            or "prompt" for what followed when the newest tokens came up before. What is generated stays the same,
            token by token, whatever the settings: the model draws each token, and the guesses that it confirms cost
            less. Worth it where a step waits for memory, as with few sequences.
        draft_tokens: how many are guessed at once, of each sequence.
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
        draft: Decoder | Literal["prompt"] | None = None,
        draft_tokens: int = 4,
    ) -> None:
        if type(draft_tokens) is not int or not 1 <= draft_tokens < QUERIES:
            raise ValueError(f"draft_tokens must be an integer from 1 to {QUERIES - 1}, got {draft_tokens!r:.100}")
        if draft is not None and draft != "prompt" and not isinstance(draft, Decoder):
            raise TypeError(f'draft must be a Decoder, "prompt" or None, got {draft!r:.100}')
        self.model = model
        self.max_batch = max_batch
        self.stop_tokens = frozenset(stop_tokens)
        self._tokenizer_file = tokenizer
        self._models = [model]
        if isinstance(draft, Decoder):
            for name in ("vocabulary", "positions"):
                theirs, own = getattr(draft.model.config, name), getattr(model.config, name)
                if theirs != own if name == "vocabulary" else theirs < own:
                    raise ValueError(f"draft has {name} {theirs}, and the model {own}")
            if draft.device != model.embedding.device:
                raise ValueError(f"draft lies on {draft.device}, and the model on {model.embedding.device}")
            self._models.append(draft.model)
        self._drafted = 0 if draft is None else draft_tokens
        self._pool = PagePool(self._models, cache_tokens, cache_dtype)
        self._pages = self._pool.pages_of(model)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._steps: dict[int, Step] = {}
        self._step: Step | None = None  # that holds the running requests, in order

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        weights: WeightFormat = "bfloat16",
        *,
        group: int | None = None,
        max_length: int | None = None,
        device: str | torch.device = "cpu",
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
            device: that holds the weights and the cache: the CPU or a GPU.
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
        return cls(model.to(device), stop_tokens=stop, tokenizer=files.tokenizer, **options)

    @property
    def device(self) -> torch.device:
        """Of the weights and the cache."""
        return self.model.embedding.device

    @property
    def cache_tokens(self) -> int:
        return self._pool.pages * PAGE

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
        prompt = token_list(ids, self.model.config.vocabulary)
        known = {field.name for field in fields(Sampling)}
        for name in sampling:
            if name not in known:
                raise TypeError(f"{name} is not a setting of sampling; they are {', '.join(sorted(known))}")
        self._check_length(prompt, max_new_tokens)
        stops = self.stop_tokens if stop_tokens is None else frozenset(stop_tokens)
        strings = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(string, str) and string for string in strings):
            raise ValueError(f"stop must hold strings that are not empty, got {stop!r:.100}")
        request = Request(prompt, max_new_tokens, Sampling(**sampling), stops, sample, strings)
        if strings:
            request._stream = self.text.stream()
        if self._drafted and len(self._models) == 1:
            request._lookup = PromptLookup()
        self._waiting.append(request)
        return request

    def _check_length(self, prompt: list[int], max_new_tokens: int) -> None:
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be a positive integer, got {max_new_tokens!r}")
        length = len(prompt) + max_new_tokens
        if length > self.model.config.positions:
            raise ValueError(
                f"max_new_tokens: a prompt of {len(prompt)} and {max_new_tokens} new tokens are more than the "
                f"{self.model.config.positions} positions of the model"
            )
        if length > self.cache_tokens:
            raise ValueError(
                f"max_new_tokens: a prompt of {len(prompt)} and {max_new_tokens} new tokens do not fit in a cache of "
                f"{self.cache_tokens}: give cache_tokens"
            )

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
        """A chunk of the next prompt, then a token for every running request, or more where it was drafted: those."""
        self._admit()
        self._reserve()
        if not self._running:
            return []
        if self._step is None:
            rows = len(self._running)
            if rows not in self._steps:
                self._steps[rows] = Step(self._models, self._pool, rows, self._pages, self._drafted)
            self._step = self._steps[rows]
            for row, request in enumerate(self._running):
                self._step.load(row, request)
        drafts = self._drafts(self._step)
        tokens = self._step.run() if drafts is None else self._step.verify(drafts)
        results: list[tuple[Request, int]] = []
        for request, new in list(zip(self._running, tokens, strict=True)):
            if drafts is not None:
                request.drafted += self._drafted
                request.accepted += len(new) - 1
            for token in new:
                if request.ended is None:
                    request._take(token)
                    results.append((request, token))
            if request.ended is not None:
                self._release(request)
                self._leave(request)
        return results

    def _drafts(self, step: Step) -> list[list[int]] | None:
        """What may follow each running request; None where nobody guesses, or there is no room for the guesses."""
        if not self._drafted:
            return None
        ahead = 1 + self._drafted
        for row, request in enumerate(self._running):
            pages = request._pages
            assert pages is not None
            if pages.tokens + ahead > min(self.model.config.positions, self._pages * PAGE):
                return None
            try:
                if pages.reserve(pages.tokens + ahead):
                    pages.write(step.block_table[row])
            except OutOfPages:
                return None
        if len(self._models) > 1:
            return step.draft()
        drafts = [
            request._lookup.draft(request._sequence, self._drafted) if request._lookup else []
            for request in self._running
        ]
        return [draft or [0] * self._drafted for draft in drafts] if any(drafts) else None

    def _admit(self) -> None:
        """Run a chunk of the prompts that wait, in their order; the last token of each is left to the step."""
        budget = CHUNK
        while self._waiting and len(self._running) < self.max_batch:
            request = self._waiting[0]
            sequence = request._sequence
            if request._pages is None:
                request._pages = Pages(self._pool)
                request._pages.find(request._ahead)
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
                self._prefill(request, pages, end)
            if end == len(sequence) - 1:
                self._waiting.popleft()
                self._running.append(request)
                self._step = None
            budget -= ran
            if budget <= 0:
                return

    def _prefill(self, request: Request, pages: Pages, end: int) -> None:
        """Run a request's tokens up to ``end``: each as it would be without an interruption, the prompt's and then what
        steps have run."""
        table = torch.full((1, self._pages), -1, dtype=torch.int32, device=self.device)
        pages.write(table[0])
        sequence, ahead = request._sequence, request._ahead
        while pages.tokens < end:
            begin, prompt = pages.tokens, pages.tokens < len(ahead)
            until = min(end, len(ahead)) if prompt else end
            with self.device:
                tokens, first, length = (torch.tensor(x) for x in ([sequence[begin:until]], [[begin]], [until]))
            for model, layers in zip(self._models, self._pool.layers, strict=True):
                model.hidden(tokens, first, length, table, layers, prompt=prompt)
            pages.fill(ahead, until)

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
            for row in token_rows(ids):
                requests.append(self.submit(row, max_new_tokens, **settings))
            while any(request.ended is None for request in requests):
                self.step()
        finally:
            for request in requests:
                self.cancel(request)
        fill = [min(request.stop_tokens, default=0) for request in requests]
        return _filled([request._sequence for request in requests], fill)

    def prefill(self, ids: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Session:
        """Begin sequences that the caller drives, token by token.

        Args:
            ids: int64 (batch, length) or (length,), or lists of as many tokens each.

        Returns:
            a ``Session``, whose ``logits`` tell what may follow.
        """
        rows = token_rows(ids)
        if len({len(row) for row in rows}) != 1:
            raise ValueError("ids must be of one length in a session; generate and submit take any lengths")
        return Session(self.model, self._pool, [token_list(row, self.model.config.vocabulary) for row in rows])

    def beam_search(
        self,
        ids: Sequence[int] | Tensor,
        max_new_tokens: int,
        *,
        num_beams: int,
        num_return_sequences: int = 1,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        stop_tokens: Iterable[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The likeliest continuations of one prompt that a beam of some width finds; the terms are transformers'.

        Args:
            ids: the prompt, at least one token.
            max_new_tokens: at the most.
            num_beams: how many sequences are kept at each length.
            num_return_sequences: up to so many.
            length_penalty: the score of an ended sequence is its log-probability over length^length_penalty, the
                prompt not counted.
            early_stopping: True to end with ``num_beams`` ended sequences; False once none that runs has a better score
                than the worst of them; "never" once none can get one.
            stop_tokens: that end a sequence, in the place of the decoder's.

        Returns:
            int64 (num_return_sequences, longest), the prompt and what follows, the best first, filled up as
            ``generate`` does; and the scores, float32 (num_return_sequences,).

        Raises:
            ValueError: naming the argument.
        """
        prompt = token_list(ids, self.model.config.vocabulary)
        self._check_length(prompt, max_new_tokens)
        if type(num_beams) is not int or not 1 <= num_beams <= self.model.config.vocabulary:
            raise ValueError(f"num_beams must be an integer from 1 to the vocabulary's size, got {num_beams!r:.100}")
        if type(num_return_sequences) is not int or not 1 <= num_return_sequences <= num_beams:
            raise ValueError(
                f"num_return_sequences must be an integer from 1 to num_beams, got {num_return_sequences!r:.100}"
            )
        if early_stopping not in (True, False, "never"):
            raise ValueError(f'early_stopping must be True, False or "never", got {early_stopping!r:.100}')
        stops = self.stop_tokens if stop_tokens is None else frozenset(stop_tokens)
        with self.prefill(prompt) as session:
            found = beam_search(session, max_new_tokens, num_beams, stops, length_penalty, early_stopping)
        found = found[:num_return_sequences]
        return (
            _filled([prompt + beam.tokens for beam in found], [min(stops, default=0)] * len(found)),
            torch.tensor([beam.score for beam in found]),
        )


def _filled(rows: list[list[int]], fill: list[int]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row, pad in zip(rows, fill, strict=True)])
