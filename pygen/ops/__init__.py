"""The ops: one file each, and nothing else to edit when adding one but this list."""

from pygen.ops.affine_step import affine_step
from pygen.ops.backend import backend
from pygen.ops.philox_normal import philox_normal
from pygen.ops.spec import SPECS, Example, OpSpec

__all__ = ["SPECS", "Example", "OpSpec", "affine_step", "backend", "philox_normal"]
