"""One door to TensorRT: `tensorrt` (full) or `tensorrt_rtx` (TensorRT for RTX), whichever this environment has.

The two share the Python API and the ONNX parser. They differ in the GPUs that they build for: TensorRT for RTX builds
without a GPU or a driver for SM 7.5, 8.0, 8.6, 8.9 and 12.x, and neither builds for nor runs on SM 9.0 (H100, H200).
The full one needs a GPU of the kind it builds for.
"""

import importlib
from types import ModuleType
from typing import Literal

from archwright.spec.errors import ArchwrightError

Flavor = Literal["tensorrt", "tensorrt_rtx"]
"""Import names, in the order in which they are tried: the full library serves every GPU."""

_FLAVORS: tuple[Flavor, ...] = ("tensorrt", "tensorrt_rtx")
_TITLES: dict[Flavor, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
_HELP = (
    'pip install "archwright[gpu]" for TensorRT (its libraries come from NVIDIA\'s own package index, which the '
    'machine must reach), or pip install "archwright[tensorrt-rtx]" for TensorRT for RTX (an ordinary wheel; it '
    "builds without a GPU, but not for SM 9.0: H100, H200)"
)


def load_tensorrt(prefer: Flavor | None = None) -> ModuleType:
    """The first of `tensorrt` and `tensorrt_rtx` that imports. prefer: the one to try first.

    Raises:
        ArchwrightError: BUILD001, when neither does. It names the extras, and says of a library that is installed
            and does not load why not.
    """
    failures: list[str] = []
    for name in sorted(_FLAVORS, key=lambda flavor: flavor != prefer):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            # A module that the library itself lacks is a broken installation, not an absent one.
            if error.name != name:
                failures.append(f"{name} is installed and does not load: {error}")
        except (ImportError, OSError, RuntimeError) as error:
            failures.append(f"{name} is installed and does not load: {error}")
    found = "; ".join(failures) or "neither `tensorrt` nor `tensorrt_rtx` is installed"
    raise ArchwrightError("BUILD001", f"engines need TensorRT, and {found}", help=_HELP)


def tensorrt_flavor(module: ModuleType) -> Flavor:
    """Which library `load_tensorrt` gave."""
    for name in _FLAVORS:
        if module.__name__ == name:
            return name
    raise AssertionError(f"{module.__name__} did not come from load_tensorrt")


def tensorrt_title(module: ModuleType) -> str:
    """Name and version for people: `TensorRT for RTX 1.7.1.116`."""
    return f"{_TITLES[tensorrt_flavor(module)]} {module.__version__}"
