"""spec → Program → Plan → torch modules and ONNX graphs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archwright.compiler.exporting import export_graphs
    from archwright.compiler.module import compile_module
    from archwright.compiler.planning.planner import plan

_LAZY = {
    "compile_module": "archwright.compiler.module",
    "export_graphs": "archwright.compiler.exporting",
    "plan": "archwright.compiler.planning.planner",
}

__all__ = ["compile_module", "export_graphs", "plan"]


def __getattr__(name: str) -> Any:
    """Import torch and onnx only for those who ask for what needs them."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
