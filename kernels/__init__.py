"""pygen.kernels: the headers of the kernels, for C++ users."""

from pathlib import Path


def include_dir() -> Path:
    """The folder to put on a C++ compiler's include path; the headers are ``pygen/<op>.h``."""
    return Path(__file__).resolve().parent / "include"
