"""What runs a model: PyTorch for runs and model folders, ONNX Runtime for artifacts."""

from archwright.compiler.weights.folder import ModelFolder
from archwright.runtime.artifact import Artifact
from archwright.runtime.backends.base import AnyBackend, Backend
from archwright.spec import ArchwrightError

__all__ = ["AnyBackend", "Backend", "open_backend"]


def open_backend(opened: ModelFolder | Artifact, *, backend: str, device: str, precision: str) -> AnyBackend:
    """The back end of an opened folder. Raises ArchwrightError RUN021 to RUN023 where it cannot serve as asked."""
    natural = "onnxruntime" if isinstance(opened, Artifact) else "torch"
    if backend not in ("auto", "torch", "onnxruntime"):
        raise ArchwrightError("RUN022", f"there is no back end `{backend}`", help="use auto, torch or onnxruntime")
    if backend not in ("auto", natural):
        is_artifact = isinstance(opened, Artifact)
        found = "an artifact runs on onnxruntime" if is_artifact else "a run or a model folder runs on torch"
        help = "leave the back end out" + ("" if is_artifact else ", or `archwright build` an artifact and open that")
        raise ArchwrightError("RUN022", f"{found}, not on {backend}", where=str(opened.path), help=help)
    # Each library is imported where it is needed: an artifact runs where PyTorch is not installed, and the reverse.
    if isinstance(opened, Artifact):
        from archwright.runtime.backends.onnxruntime_backend import open_onnxruntime

        return open_onnxruntime(opened, device, precision)
    from archwright.runtime.backends.torch_backend import open_torch

    return open_torch(opened, device, precision)
