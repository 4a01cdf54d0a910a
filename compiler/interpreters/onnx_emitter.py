"""What every part of `OnnxOps` builds on."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

if TYPE_CHECKING:
    from archwright.compiler.interpreters.onnx_ops import Tensor


class OnnxEmitter(ABC):
    """Appends nodes and constants to a graph; see `OnnxOps`."""

    @property
    @abstractmethod
    def dtype(self) -> ir.DataType: ...

    @abstractmethod
    def emit(self, op: str, inputs: "list[Tensor]", *, name: str, **rest: Any) -> "Tensor": ...

    @abstractmethod
    def constant(self, name: str, value: Any, dtype: ir.DataType) -> "Tensor": ...
