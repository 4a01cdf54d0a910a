"""The scope that NumPy, ONNX and cost interpreters share; torch has its modules."""

from collections.abc import Mapping
from typing import Any

from archwright.compiler.ir.block import Block
from archwright.compiler.ir.program import Site


class Instance:
    """A block at a path, for an interpreter that offers `param(name, param)` and, if it wants, `scope(path)`."""

    def __init__(self, block: Block, path: str, ops: Any, sites: Mapping[str, Site]) -> None:
        self.block = block
        self.path = path
        self._ops = ops
        self._sites = sites

    def __call__(self, *args: Any) -> Any:
        with self._ops.scope(self.path):
            return self.block.forward(self._ops, self, *args)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.block, name)
        if isinstance(value, Block):
            return type(self)(value, self.block.child_path(name, self.path), self._ops, self._sites)
        site = self._sites[f"{self.path}.{name}" if self.path else name]
        return self._ops.param(site.name, site.param)
