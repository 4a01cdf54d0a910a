"""How far each target may be from the oracle: one table, for the tests and for `verify`.

The oracle computes in float64 with the weights that the target has, rounded as the target has them. Errors are relative
to the largest magnitude of the oracle's tensor, since single logits may be arbitrarily close to 0:

    error = max |actual - expected| / max |expected|
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Target = Literal["torch", "onnxruntime", "tensorrt"]

TOLERANCES: Mapping[tuple[Target, str], float] = {
    ("torch", "float64"): 1e-12,
    ("torch", "float32"): 2e-5,
    # One rounding is 2⁻⁸ (bfloat16) or 2⁻¹¹ (float16); a residual stream adds some dozens of them.
    ("torch", "bfloat16"): 6e-2,
    ("torch", "float16"): 8e-3,
    # Also of half-precision graphs on CPUs, which run as float32 copies (`targets.retype`), and of merged ranks.
    ("onnxruntime", "float32"): 2e-5,
    # Of half-precision graphs as they are, which a GPU runs: torch rounds at the same places.
    ("onnxruntime", "bfloat16"): 6e-2,
    ("onnxruntime", "float16"): 8e-3,
    # Those of torch, which rounds at the same places. No engine has been run yet, so none of them was measured.
    ("tensorrt", "float32"): 2e-5,
    ("tensorrt", "bfloat16"): 6e-2,
    ("tensorrt", "float16"): 8e-3,
}
"""(target, dtype of its computation) → largest error."""


def largest_error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """max |actual - expected| / max |expected|; infinite where the shapes differ or `actual` is not finite."""
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    difference = np.abs(np.asarray(actual, np.float64) - expected).max(initial=0.0)
    return float(difference / max(np.abs(expected).max(initial=0.0), np.finfo(np.float64).tiny))
