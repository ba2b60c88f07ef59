"""Files that are either whole or not there, and the error of those that cannot be used."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written: one line that names the file and the field or tensor."""


def refuse(file: Path, problem: object) -> NoReturn:
    """Raise the :class:`CheckpointError` of ``file``."""
    raise CheckpointError(f"{file}: {' '.join(str(problem).split())}") from None


def open_regular(file: Path) -> IO[bytes]:
    """A stream that reads a regular file; what is none (a pipe, whose opening may wait for ever) is refused."""
    try:
        mode = os.stat(file).st_mode
        if not stat.S_ISREG(mode):
            refuse(file, "a directory, where a file should be" if stat.S_ISDIR(mode) else "not a regular file")
        return open(file, "rb")
    except OSError as error:
        refuse(file, error.strerror)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream that becomes the file ``path`` if the block ends well, and leaves nothing if it does not.

    It is opened beside ``path`` at once, so that a folder that cannot be written fails before any work is done.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
