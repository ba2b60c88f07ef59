"""Drafts without a model: what followed when a sequence's newest tokens came up before (Saxena 2023)."""

from __future__ import annotations

SIZES = (3, 2)  # of the runs of tokens that are looked up, the longest first


class PromptLookup:
    """The runs of a sequence that grows, and where each ended last."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._known = 0  # runs that end here or sooner are in it

    def draft(self, sequence: list[int], count: int) -> list[int]:
        """So many tokens as they followed the latest run that the sequence ends with; none where none did.

        What follows may reach the end of the sequence, and goes on with itself there.
        """
        for end in range(self._known + 1, len(sequence)):  # the last run of all has nothing behind it yet
            for size in SIZES:
                if size <= end:
                    self._ends[tuple(sequence[end - size : end])] = end
        self._known = max(self._known, len(sequence) - 1)
        for size in SIZES:
            begin = self._ends.get(tuple(sequence[-size:]))
            if begin is not None:
                period = len(sequence) - begin
                return [sequence[begin + i % period] for i in range(count)]
        return []
