"""Pure functions between the spec and the plan, run in order."""

from archwright.compiler.passes.lower import lower
from archwright.compiler.passes.partition import degrees_of, partition

__all__ = ["degrees_of", "lower", "partition"]
