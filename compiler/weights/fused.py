"""The weights of a fused Program (`passes.fuse`), made of the canonical ones when they are read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from archwright.compiler.ir import Param
from archwright.compiler.passes.fuse import Part, WeightMap
from archwright.compiler.weights.streaming import Array, Weights


@dataclass(frozen=True, kw_only=True)
class FusedWeights:
    """params: of the fused Program. Scales are powers of two, so that no value is rounded."""

    weights: Weights
    params: Mapping[str, Param]
    parts: WeightMap

    def names(self) -> Iterable[str]:
        return self.params

    def shape(self, name: str) -> tuple[int, ...]:
        return self.params[name].shape

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Array:
        if name not in self.parts:
            return self.weights.read(name, slices)
        whole = np.concatenate([self._scaled(part) for part in self.parts[name]])
        return whole if slices is None else whole[slices]

    def _scaled(self, part: Part) -> Array:
        array = self.weights.read(part.name)
        return array if part.scale == 1 else array * array.dtype.type(part.scale)
