"""The weights of a quantized Program, made from the model's when they are read, some rows at a time.

Symmetric, round to nearest, ties to even: scale = largest magnitude of a group / largest value of the type, rounded to
the precision that it is stored in; weight = round(w / scale) with that rounded scale.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from archwright.compiler.ir import Param, Program, Storage
from archwright.compiler.passes import build_program
from archwright.compiler.passes.quantize import INPUT_SCALE, SCALE
from archwright.compiler.weights.streaming import PRECISIONS, Weights
from archwright.spec import ArchwrightError, Spec

Array = NDArray[Any]

LARGEST: Mapping[Storage, float] = {"int4": 7, "int8": 127, "float8": 448}
"""Value that the largest magnitude of a group becomes."""
KEPT_SCALES = 4
"""Parameters whose scales are kept until they are read: the writer asks for them right after the matrix."""


def group_scales(groups: Array, storage: Storage, precision: str) -> Array:
    """float32 scales [...] of float32 values [..., group], as `precision` holds them; positive, 1 for a group of 0."""
    largest = np.maximum(groups.max(axis=-1), -groups.min(axis=-1))
    dtype = PRECISIONS[precision]
    # Never 0 nor subnormal: what a half-precision scale loses below that, TensorRT may flush to 0.
    smallest = float(ml_dtypes.finfo(dtype).smallest_normal)
    scale = np.maximum(largest / np.float32(LARGEST[storage]), np.float32(smallest)).astype(dtype).astype(np.float32)
    return np.where(largest == 0, np.float32(1), scale)


def rounded(values: Array, scale: Array, storage: Storage) -> Array:
    """The values that are stored for float32 [..., groups, group] and scales [..., groups]. Overwrites `values`."""
    values /= scale[..., None]
    if storage == "float8":
        return np.clip(values, -448, 448, out=values).astype(ml_dtypes.float8_e4m3fn)
    lowest = -8 if storage == "int4" else -127
    np.clip(np.rint(values, out=values), lowest, LARGEST[storage], out=values)
    return values.astype(np.int8)


def as_float32(array: Array) -> Array:
    """A float32 copy; of bfloat16 by moving its bits, for which NumPy has no fast way."""
    if array.dtype == ml_dtypes.bfloat16:
        return (np.ascontiguousarray(array).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.array(array, np.float32)


@dataclass(kw_only=True)
class QuantizedWeights:
    """The parameters of a quantized Program (of global sizes).

    base: the model's weights. precision: of the scales. input_scales: name → value, of what was calibrated.
    A matrix of int4 is held as int8 here. Raises ArchwrightError BUILD061 where a group is not finite.
    """

    program: Program
    base: Weights
    precision: str
    input_scales: Mapping[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        self._params = self.program.params()
        self._matrices = {f"{name}{SCALE}": name for name, param in self._params.items() if param.storage is not None}
        self._known = _KnownScales()

    def names(self) -> Iterable[str]:
        return self._params

    def shape(self, name: str) -> tuple[int, ...]:
        return self._params[name].shape

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Array:
        param = self._params[name]
        if name.rpartition(".")[2] == INPUT_SCALE:
            return np.full(param.shape, self.input_scales[name], PRECISIONS[self.precision])
        if param.storage is None and name not in self._matrices:
            return self.base.read(name, slices)
        slices = tuple(slice(None) for _ in param.shape) if slices is None else slices
        if name in self._matrices:
            known = self._known.read(name)
            if known is not None:
                return known[slices]
        matrix = self._matrices.get(name, name)
        values, scale = self._quantized(matrix, slices[:-1])
        return (scale if name in self._matrices else values)[..., slices[-1]]

    def _quantized(self, name: str, rows: tuple[slice, ...]) -> tuple[Array, Array]:
        """Stored values and scales of whole rows: a scale may belong to all input channels."""
        param, scale_param = self._params[name], self._params[f"{name}{SCALE}"]
        assert param.storage is not None
        groups = scale_param.shape[-1]
        values = as_float32(self.base.read(name, (*rows, slice(None))))
        shape = values.shape
        values = values.reshape(*shape[:-1], groups, shape[-1] // groups)
        scale = group_scales(values, param.storage, self.precision)
        if not np.isfinite(scale).all():
            help = "train again from a checkpoint before the loss became NaN"
            raise ArchwrightError("BUILD061", "it holds an infinity or a NaN, and no scale fits", where=name, help=help)
        stored = rounded(values, scale, param.storage).reshape(shape)
        scale = scale.astype(PRECISIONS[self.precision])
        self._known.note(f"{name}{SCALE}", scale_param, rows, scale)
        return stored, scale


class _KnownScales:
    """The scales that came about while matrices were read, so that these are not read twice."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._arrays: OrderedDict[str, Array] = OrderedDict()
        self._missing: dict[str, Array] = {}

    def note(self, name: str, param: Param, rows: tuple[slice, ...], scale: Array) -> None:
        with self._lock:
            if name not in self._arrays:
                self._arrays[name] = np.empty(param.shape, scale.dtype)
                self._missing[name] = np.ones(param.shape[:-1], bool)
                while len(self._arrays) > KEPT_SCALES:
                    oldest, _ = self._arrays.popitem(last=False)
                    del self._missing[oldest]
            self._arrays[name][rows] = scale
            self._missing[name][rows] = False

    def read(self, name: str) -> Array | None:
        """All scales of a parameter, if every row of the matrix was read."""
        with self._lock:
            return None if name not in self._arrays or self._missing[name].any() else self._arrays[name]


def dequantized(values: Array, scale: Array) -> Array:
    """float32 weights of stored values [..., in] and scales [..., groups]."""
    size = values.shape[-1] // scale.shape[-1]
    return values.astype(np.float32) * np.repeat(scale.astype(np.float32), size, axis=-1)


def built_weights(spec: Spec, base: Weights, input_scales: Mapping[str, float] | None = None) -> Weights:
    """The weights of what a spec builds: `base` itself, or quantized as `build.quantize` says.

    input_scales: of inputs that are rounded; 1 where nothing is given, for models that are only looked at.
    """
    if spec.build.quantize is None:
        return base
    program = build_program(spec)
    ones = {name: 1.0 for name in program.params() if name.rpartition(".")[2] == INPUT_SCALE}
    return QuantizedWeights(
        program=program, base=base, precision=spec.build.precision, input_scales=ones | dict(input_scales or {})
    )
