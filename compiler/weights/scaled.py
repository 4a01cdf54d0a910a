"""Weights with some channels multiplied: how the scales of AWQ are folded into a model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archwright.compiler.weights.streaming import Weights

Array = NDArray[Any]
Vector = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ScaledWeights:
    """`base` with rows (of a vector: its elements) and columns multiplied, by the name of the tensor.

    Powers of two lose nothing, as long as no value becomes subnormal.
    """

    base: Weights
    rows: Mapping[str, Vector] = field(default_factory=dict[str, Vector])
    columns: Mapping[str, Vector] = field(default_factory=dict[str, Vector])

    def names(self) -> Iterable[str]:
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Array:
        array = self.base.read(name, slices)
        rows, columns = self.rows.get(name), self.columns.get(name)
        if rows is None and columns is None:
            return array
        slices = slices or tuple(slice(None) for _ in array.shape)
        scaled = array.astype(np.float32)
        if rows is not None:
            scaled *= rows[slices[0]].reshape(-1, *[1] * (array.ndim - 1))
        if columns is not None:
            scaled *= columns[slices[-1]]
        return scaled
