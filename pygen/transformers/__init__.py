"""What ``pygen.accelerate`` puts into a loaded transformers model: its ``generate``, and its forward's attention."""

from pygen.transformers.attention import implementation
from pygen.transformers.generate import Generate, generation

__all__ = ["Generate", "generation", "implementation"]
