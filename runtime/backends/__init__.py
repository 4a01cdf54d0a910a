"""What runs a model: PyTorch for runs and model folders; for artifacts their TensorRT engines, or ONNX Runtime."""

from archwright.compiler.weights.folder import ModelFolder
from archwright.runtime.artifact import Artifact
from archwright.runtime.backends.base import AnyBackend, Backend
from archwright.spec import ArchwrightError

__all__ = ["BACKENDS", "AnyBackend", "Backend", "open_backend"]

BACKENDS = ("auto", "torch", "onnxruntime", "tensorrt")
_UNUSABLE = ("BUILD001", "RUN041", "RUN042", "RUN043")
"""Why engines cannot run on a machine. Everything else that is wrong with them is an error, also with `auto`."""


def open_backend(opened: ModelFolder | Artifact, *, backend: str, device: str, precision: str) -> AnyBackend:
    """The back end of an opened folder.

    auto: of an artifact its engines where they can run, else ONNX Runtime; the description says which and why.
    Raises ArchwrightError RUN021 to RUN023 where it cannot serve as asked, RUN040 to RUN048 of engines.
    """
    is_artifact = isinstance(opened, Artifact)
    natural = ("onnxruntime", "tensorrt") if is_artifact else ("torch",)
    if backend not in BACKENDS:
        raise ArchwrightError("RUN022", f"there is no back end `{backend}`", help=f"use {', '.join(BACKENDS)}")
    if backend not in ("auto", *natural):
        found = (
            "an artifact runs on onnxruntime or tensorrt" if is_artifact else "a run or a model folder runs on torch"
        )
        help = "leave the back end out" + ("" if is_artifact else ", or `archwright build` an artifact and open that")
        raise ArchwrightError("RUN022", f"{found}, not on {backend}", where=str(opened.path), help=help)
    # Each library is imported where it is needed: an artifact runs where PyTorch is not installed, and the reverse.
    if isinstance(opened, Artifact):
        return _open_artifact(opened, backend, device, precision)
    from archwright.runtime.backends.torch_backend import open_torch

    return open_torch(opened, device, precision)


def _open_artifact(artifact: Artifact, backend: str, device: str, precision: str) -> AnyBackend:
    from archwright.runtime.engines.opening import has_engines

    reason = ""
    if backend == "tensorrt" or (backend == "auto" and device != "cpu" and has_engines(artifact)):
        from archwright.runtime.backends.tensorrt_backend import open_tensorrt

        try:
            return open_tensorrt(artifact, device, precision)
        except ArchwrightError as error:
            if backend == "tensorrt" or error.code not in _UNUSABLE:
                raise
            reason = f"; its engines are not used: {error.message}"
    from archwright.runtime.backends.onnxruntime_backend import open_onnxruntime

    opened = open_onnxruntime(artifact, device, precision)
    opened.description += reason
    return opened
