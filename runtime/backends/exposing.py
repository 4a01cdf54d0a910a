"""Graphs whose inputs are rounded to 8-bit floats, run so that the rounded values can be read.

B batch, S sequence, D channels, L visible cache positions.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from archwright.compiler.ir import Program
from archwright.compiler.targets.merge import merge_ranks
from archwright.compiler.targets.retype import as_float32
from archwright.runtime.backends.base import Ids, Logits
from archwright.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend, OrtCache, open_joined

Array = NDArray[Any]
ROUNDED = "/round_to_float8"
"""The end of the names of the nodes that give rounded values."""


@dataclass
class RoundedValues:
    """What each rounding gave, by the place of its token: values of op i [B, T, D], NaN where no call had the token."""

    calls: list[tuple[Ids, list[Array]]] = field(default_factory=list[tuple[Ids, list[Array]]])

    def gathered(self, length: int) -> list[Array]:
        """One array for each rounding of the Program, in its order; a later call replaces an earlier one."""
        positions_BS, values = self.calls[0]
        batch = len(positions_BS)
        found = [np.full((batch, length, array.shape[-1]), np.nan) for array in values]
        for positions_BS, values in self.calls:
            rows_B1 = np.arange(batch)[:, None]
            for target, array in zip(found, values, strict=True):
                kept = positions_BS < length
                target[np.broadcast_to(rows_B1, positions_BS.shape)[kept], positions_BS[kept]] = array[kept]
        return found


class ExposingBackend(OnnxRuntimeBackend):
    """The rank graphs joined, in float32; `rounded` has what the calls since `begin` rounded.

    program: what they compute, of global sizes.
    """

    def __init__(self, folder: Path, program: Program, *, ranks: int, max_batch: int | None) -> None:
        model = as_float32(merge_ranks(folder))
        names = [node.output[0] for node in model.graph.node if node.output[0].endswith(ROUNDED)]
        model.graph.output.extend(onnx.helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
        session = open_joined(model.SerializeToString(), folder)
        super().__init__(session, max_batch=max_batch, description="ONNX Runtime, CPU, float32, rounded inputs read")
        self._names = [name.removeprefix("rank0/") for name in names if name.startswith("rank0/")]
        blocks = dict(program.blocks())
        self._widths = [blocks[name.removesuffix(ROUNDED)].params()["weight"].shape[-1] for name in self._names]
        self._ranks = ranks
        self.begin()

    def begin(self) -> None:
        """Forget what was rounded."""
        self.rounded = RoundedValues()

    def forward(self, cache: OrtCache, ids_BS: Ids, positions_BS: Ids, write_index_B: Ids, visible: int) -> Logits:
        every = [f"rank{rank}/{name}" for name in self._names for rank in range(self._ranks)]
        logits, *arrays = self.forward_with(cache, ids_BS, positions_BS, write_index_B, visible, every)
        parts = [arrays[i : i + self._ranks] for i in range(0, len(arrays), self._ranks)]
        self.rounded.calls.append((np.array(positions_BS), list(map(_whole, parts, self._widths))))
        return logits


def _whole(parts: list[Array], width: int) -> Array:
    """What all ranks have, or of channels that are cut over them the parts side by side."""
    return parts[0] if parts[0].shape[-1] == width else np.concatenate(parts, axis=-1)
