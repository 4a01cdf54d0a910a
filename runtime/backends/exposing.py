"""Graphs whose inputs are rounded to 8-bit floats, run so that the rounded values can be read.

B batch, S sequence, D channels, L visible cache positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from archwright.compiler.ir import Plan
from archwright.compiler.targets.merge import merge_ranks
from archwright.compiler.targets.portable_form import as_portable
from archwright.compiler.targets.retype import as_float32
from archwright.runtime.backends.base import Ids
from archwright.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from archwright.runtime.backends.onnxruntime_sessions import open_joined

Array = NDArray[Any]
ROUNDED = "/round_to_float8"
"""The end of the names of the nodes that give rounded values."""


@dataclass(frozen=True, kw_only=True)
class RoundedCall:
    """What one call rounded. first_row: of the cache, of those that were computed. index_B: of the token of each row
    that graphs of one token's logits end with.
    """

    first_row: int
    positions_BS: Ids
    index_B: Ids
    values: list[Array] = field(default_factory=list[Array])

    def positions_of(self, values: Array) -> Ids:
        """Where the tokens of [B, T, D] stand: all of the call, or of each row the one whose logits are wanted."""
        if values.shape[1] == self.positions_BS.shape[1]:
            return self.positions_BS
        return np.take_along_axis(self.positions_BS, self.index_B[:, None], axis=1)


@dataclass
class RoundedValues:
    """What each rounding gave, by the place of its token: values of op i [B, T, D], NaN where no call had the token."""

    calls: list[RoundedCall] = field(default_factory=list[RoundedCall])

    def gathered(self, length: int) -> list[Array]:
        """One array for each rounding of the Program, in its order; a later call replaces an earlier one."""
        batch = max(call.first_row + len(call.positions_BS) for call in self.calls)
        found = [np.full((batch, length, array.shape[-1]), np.nan) for array in self.calls[0].values]
        for call in self.calls:
            for target, array in zip(found, call.values, strict=True):
                positions_BT = call.positions_of(array)
                rows_B1 = call.first_row + np.arange(len(array))[:, None]
                rows_BT = np.broadcast_to(rows_B1, positions_BT.shape)
                kept = positions_BT < length
                target[rows_BT[kept], positions_BT[kept]] = array[kept]
        return found


class ExposingBackend(OnnxRuntimeBackend):
    """The rank graphs of a plan, joined and in float32; `rounded` has what the calls since `begin` rounded."""

    def __init__(self, folder: Path, plan: Plan, *, max_batch: int | None) -> None:
        stages = [plan.stage_ranks(stage) for stage in range(len(plan.stages))]
        models = [as_float32(as_portable(merge_ranks(folder, stage=s, ranks=ranks))) for s, ranks in enumerate(stages)]
        names = [[node.output[0] for node in m.graph.node if node.output[0].endswith(ROUNDED)] for m in models]
        for model, own in zip(models, names, strict=True):
            model.graph.output.extend(onnx.helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in own)
        # Of each stage what one rank rounds, in order, and what all ranks call it.
        first = [
            [name.removeprefix(place) for name in own if name.startswith(place)]
            for own, place in ((own, f"rank{ranks[0]}/") for own, ranks in zip(names, stages, strict=True))
        ]
        blocks = dict(plan.program.blocks())
        self._widths = [[blocks[n.removesuffix(ROUNDED)].params()["weight"].shape[-1] for n in own] for own in first]
        super().__init__(
            [open_joined(model.SerializeToString(), folder) for model in models],
            max_batch=max_batch,
            grouped=any(node.op_type == "GroupQueryAttention" for model in models for node in model.graph.node),
            description="ONNX Runtime, CPU, float32, rounded inputs read",
            more=[
                [f"rank{rank}/{name}" for name in own for rank in ranks]
                for own, ranks in zip(first, stages, strict=True)
            ],
        )
        self.begin()

    def begin(self) -> None:
        """Forget what was rounded."""
        self.rounded = RoundedValues()

    def _begin_call(self, first_row: int, positions_BS: Ids, index_B: Ids) -> None:
        positions, index = np.array(positions_BS), np.array(index_B)
        self.rounded.calls.append(RoundedCall(first_row=first_row, positions_BS=positions, index_B=index))

    def _seen(self, stage: int, values: Sequence[Any]) -> None:
        arrays, widths = [value.numpy() for value in values], self._widths[stage]
        each = len(arrays) // max(1, len(widths))
        parts = [arrays[start : start + each] for start in range(0, len(arrays), each or 1)]
        self.rounded.calls[-1].values.extend(map(_whole, parts, widths))


def _whole(parts: list[Array], width: int) -> Array:
    """What all ranks have, or of channels that tensor ranks share the first ranks' parts side by side."""
    return np.concatenate(parts[: width // parts[0].shape[-1]], axis=-1)
