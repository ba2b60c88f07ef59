"""The step of a running batch, recorded: from the newest tokens of so many sequences to the next ones.

Drafted tokens are verified by drawing: each is kept if it is the token that the model draws in its place, by the same
noise as without a draft (Daliri et al. 2024 show how little that loses against rejection). So a draft changes when a
token comes, and never which. A draft model draws by the same noise too, and so agrees as often as it can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from pygen.autoregressive.cache import PAGE, PagePool
from pygen.autoregressive.request import Request, Sampling
from pygen.models.decoder import DecoderModel
from pygen.ops.record import Program, record
from pygen.ops.sample_token import sample_token


class Mirror:
    """Tensors in one block of the host's memory, and on a GPU in one of its own too, that one copy brings up to date.

    Args:
        device: of the programs that read them.
        tensors: by name, with what they hold at first.
    """

    def __init__(self, device: torch.device, tensors: dict[str, Tensor]) -> None:
        sizes = [-(-tensor.nbytes // 16) * 16 for tensor in tensors.values()]
        here = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._blocks = (here, here if device.type == "cpu" else torch.empty_like(here, device=device))

        def views(block: Tensor) -> dict[str, Tensor]:
            parts = zip(tensors.items(), block.split(sizes), strict=True)
            return {name: part[: t.nbytes].view(t.dtype).view(t.shape) for (name, t), part in parts}

        self.here, self.there = views(here), views(self._blocks[1])
        for name, tensor in tensors.items():
            self.here[name].copy_(tensor)
        self._blocks[1].copy_(here)

    def send(self) -> None:
        here, there = self._blocks
        if there is not here:
            there.copy_(here, non_blocking=True)  # whoever writes here next has received since

    def receive(self) -> None:
        here, there = self._blocks
        if there is not here:
            here.copy_(there)


class Step:
    """What the programs read of their sequences, which change under them.

    Args:
        models: the one that is sampled, and after it a draft's, if there is one.
        pool: of their keys and values.
        rows: how many sequences.
        pages: of one sequence, at the most.
        drafted: tokens of each that are verified at once.
    """

    def __init__(self, models: list[DecoderModel], pool: PagePool, rows: int, pages: int, drafted: int = 0) -> None:
        width, device = 1 + drafted, models[0].embedding.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64)

        settings = {
            field.name: torch.full(
                (rows,),
                getattr(Sampling(), field.name),
                dtype=torch.int64 if field.name in ("top_k", "seed") else torch.float32,
            )
            for field in fields(Sampling)
        }
        state = {
            "tokens": zeros(rows, width),  # the newest, and what is drafted to follow
            "positions": zeros(width + 1, rows),  # theirs, and that behind them
            "block_table": torch.full((rows, pages), -1, dtype=torch.int32),
            "draws": zeros(width, rows),
            "samples": zeros(rows),
            "previous_lengths": zeros(width, rows),
        }
        self._state, self._results = Mirror(device, state | settings), Mirror(device, {"drawn": zeros(rows, width)})
        self.tokens, self.positions, self.block_table, self.draws, self.samples, self.previous_lengths = (
            self._state.here[name] for name in state
        )
        self.settings = {name: self._state.here[name] for name in settings}
        self.previous = torch.empty(rows, pages * PAGE, dtype=torch.int64, device=device)
        self._penalised: list[int] = []
        # What the host reads and writes between programs: NumPy's calls cost a tenth of torch's where no cache is warm.
        self._tokens_here, self._drawn_here = self.tokens.numpy(), self._results.here["drawn"].numpy()
        self._counts_here = (self.positions.numpy(), self.draws.numpy())

        there, drawn = self._state.there, self._results.there["drawn"]
        sampling: dict[str, Any] = {name: there[name] for name in settings}
        tokens, positions, block_table, draws, samples, previous_lengths = (there[name] for name in state)

        def hidden(at: int, begin: int, end: int) -> Tensor:
            """Of the tokens from one to another, by one of the models."""
            first, lengths = positions[begin], positions[end]
            return models[at].hidden(tokens[:, begin:end], first[:, None], lengths, block_table, pool.layers[at])

        def draw(logits: Tensor, place: int, known: int, out: Tensor) -> None:
            """The token behind a place, penalised for so many of the drafted ones."""
            sample_token(
                logits, **sampling, previous=self.previous, previous_lengths=previous_lengths[known], step=draws[place],
                sample_ids=samples, out=out,
            )  # fmt: skip

        def verify(width: int) -> None:
            for other in range(1, len(models)):
                hidden(other, 0, width)  # so that its cache holds what the first's does
            logits = models[0].project(hidden(0, 0, width)).view(rows, width, -1)
            for place in range(width):
                draw(logits[:, place], place, place, drawn[:, place])

        def draft() -> None:
            for place in range(drafted):
                draw(models[1].project(hidden(1, place, place + 1)), place, 0, tokens[:, place + 1])

        def program(function: Callable[[], None]) -> Program[None]:
            if device.type == "cuda":
                function()  # of sequences that have no pages: what is made once is made, and nothing is written
            return record(function, device)

        self._step = program(lambda: verify(1))
        if drafted:
            self._verify = program(lambda: verify(width))
        if len(models) > 1:
            self._draft = program(draft)

    def load(self, row: int, request: Request) -> None:
        """Put a request, whose last token is not in the cache yet, into a row."""
        assert request._pages is not None
        sequence = request._sequence
        length, made, width = len(sequence), len(request.tokens), self.tokens.shape[1]
        self.tokens[row, 0] = sequence[-1]
        self.positions[:, row] = torch.arange(length - 1, length + width)
        request._pages.write(self.block_table[row])
        for name, tensor in self.settings.items():
            value = getattr(request.sampling, name)
            tensor[row] = value - (1 << 64) if name == "seed" and value >> 63 else value
        self.draws[:, row] = torch.arange(made, made + width)
        self.samples[row] = request.sample
        if row == 0:
            self._penalised.clear()
        self.previous_lengths[:, row] = 0
        if request.sampling.penalises:
            self._penalised.append(row)
            self.previous[row, :length] = torch.tensor(sequence)
            self.previous_lengths[:, row] = torch.arange(length, length + width)

    def run(self) -> list[list[int]]:
        """One token more of each sequence."""
        self._replay(self._step)
        return self._advance([[token] for token in self._drawn_here[:, 0].tolist()])

    def draft(self) -> list[list[int]]:
        """What the draft model takes to follow each sequence."""
        self._state.send()
        self._draft()
        self._state.receive()
        return self._tokens_here[:, 1:].tolist()

    def verify(self, drafts: list[list[int]]) -> list[list[int]]:
        """Those of the drafted tokens that the model draws too, up to the first other, which is the last."""
        self._tokens_here[:, 1:] = drafts
        for row in self._penalised:
            begin = int(self.previous_lengths[0, row])
            self.previous[row, begin : begin + len(drafts[row])] = self.tokens[row, 1:]
        self._replay(self._verify)
        return self._advance([_kept(*pair) for pair in zip(drafts, self._drawn_here.tolist(), strict=True)])

    def _replay(self, program: Program[None]) -> None:
        self._state.send()
        program()
        self._results.receive()

    def _advance(self, tokens: list[list[int]]) -> list[list[int]]:
        counts = [len(new) for new in tokens]
        for count in self._counts_here:
            count += counts
        self._tokens_here[:, 0] = [new[-1] for new in tokens]
        for row in self._penalised:
            begin = int(self.previous_lengths[0, row])
            self.previous[row, begin : begin + counts[row]] = torch.tensor(tokens[row])
            self.previous_lengths[:, row] += counts[row]
        return tokens


def _kept(draft: list[int], drawn: list[int]) -> list[int]:
    alike = 0
    while alike < len(draft) and draft[alike] == drawn[alike]:
        alike += 1
    return drawn[: alike + 1]
