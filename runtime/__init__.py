"""Open a model or an artifact and run it; build artifacts and verify them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archwright.runtime.building import build
    from archwright.runtime.model import open_model
    from archwright.runtime.verification import verify

# The modules bear other names than the functions: importing a module sets its name on the package.
_LAZY = {
    "build": "archwright.runtime.building",
    "open_model": "archwright.runtime.model",
    "verify": "archwright.runtime.verification",
}

__all__ = ["build", "open_model", "verify"]


def __getattr__(name: str) -> Any:
    """Import PyTorch, ONNX and the back ends only for those who ask for what needs them."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
