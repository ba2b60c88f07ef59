"""What ``pygen.accelerate`` puts into a loaded transformers model: its ``generate``, and its
forward's attention, norms, gated MLPs and rotary embeddings."""

from pygen.transformers.attention import implementation
from pygen.transformers.generate import Generate, generation
from pygen.transformers.modules import modules

__all__ = ["Generate", "generation", "implementation", "modules"]
