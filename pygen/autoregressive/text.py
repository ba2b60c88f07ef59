"""Between text and tokens, by the ``tokenizers`` library and a checkpoint's tokenizer.json."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pygen.files import refuse


class Text:
    """A tokenizer, and pieces of text as tokens come."""

    def __init__(self, file: str | os.PathLike[str]) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(os.fspath(file))
        except Exception as error:  # the library raises nothing narrower
            refuse(Path(file), f"not a tokenizer: {error}")

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def stream(self) -> TextStream:
        return TextStream(self._tokenizer)


class TextStream:
    """The text of tokens that come one by one; characters of several tokens are held back until they are whole."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def put(self, token: int) -> str:
        """What the token adds."""
        return self._stream.step(self._tokenizer, token) or ""
