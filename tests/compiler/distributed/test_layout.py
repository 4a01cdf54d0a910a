"""Layouts: what all ranks keep of a parameter tiles the full tensor, each element as often as `copies` says."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from archwright.compiler.distributed.layout import Layout
from archwright.compiler.distributed.mesh import Mesh
from archwright.compiler.ir import MESH_AXES, Axis, Degrees, Normal, Param
from archwright.compiler.passes import TRAINING_TABLE
from archwright.compiler.passes.partition import _splits


@dataclass(frozen=True)
class Axes:
    """What layouts ask of a DeviceMesh: sizes of named dims, and this rank's coordinates."""

    sizes: dict[str, int]
    ranks: dict[str, int]

    def __getitem__(self, names: str | tuple[str, ...]) -> "Axes":
        chosen = (names,) if isinstance(names, str) else names
        return Axes({name: self.sizes[name] for name in chosen}, {name: self.ranks[name] for name in chosen})

    def size(self, dim: int) -> int:
        return list(self.sizes.values())[dim]

    def get_local_rank(self, dim: int) -> int:
        return list(self.ranks.values())[dim]


def meshes(degrees: Degrees) -> Iterator[Mesh]:
    """That of each rank of one pipeline stage, without processes."""
    for place in itertools.product(*(range(size) for axis, size in degrees.sizes.items() if axis != "pipeline")):
        ranks = dict(zip(MESH_AXES, (0, *place), strict=True))
        inner = ranks["data_shard"] * degrees.context + ranks["context"]
        outer = {"data_replicate": degrees.data_replicate}
        dense = Axes(
            {**outer, "shard": degrees.shard, "tensor": degrees.tensor},
            {**ranks, "shard": ranks["expert"] * degrees.data_shard * degrees.context + inner},
        )
        sparse = Axes(
            {**outer, "expert": degrees.expert, "expert_shard": degrees.data_shard * degrees.context},
            {**ranks, "expert_shard": inner},
        )
        groups: Any = {axis: object() for axis, size in degrees.sizes.items() if size > 1}
        fakes: Any = {"dense": dense, "sparse": sparse, "batch": None, "ends": None}
        yield Mesh(degrees=degrees, ranks=ranks, groups=groups, **fakes)


def layouts(param: Param, degrees: Degrees) -> list[tuple[Layout, int]]:
    """Of each rank, with the rows that it stores. FSDP cuts dim 0 as torch.chunk does: the last pieces may be short."""
    param = Param(
        shape=param.shape, axes=param.axes, init=param.init, grain=param.grain,
        splits=_splits(param, degrees, TRAINING_TABLE),
    )  # fmt: skip
    found: list[tuple[Layout, int]] = []
    for mesh in meshes(degrees):
        layout = Layout(param=param, mesh=mesh, fully_sharded=degrees.shard * degrees.data_replicate > 1)
        rows = layout.model_shape()[0]
        pieces = torch.empty(rows, 0).chunk(layout.num_shards) if layout.num_shards > 1 else [torch.empty(rows, 0)]
        number = layout.shard_mesh.get_local_rank(-1) if layout.num_shards > 1 else 0
        found.append((layout, len(pieces[number]) if number < len(pieces) else 0))
    return found


@st.composite
def params(draw: st.DrawFn) -> Param:
    """Tables, matrices cut along either dim, vectors, shared key/value heads, stacks of experts."""
    units, width, grain = draw(st.integers(1, 25)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    shapes: list[tuple[tuple[Axis, ...], tuple[int, ...], tuple[int, ...]]] = [
        (("vocab", "embed"), (units, width), (1, 1)),
        (("positions", "embed"), (units, width), (1, 1)),
        (("heads", "embed"), (units * grain, width), (grain, 1)),
        (("kv_heads", "embed"), (units * grain, width), (grain, 1)),
        (("embed", "ffn"), (width, units), (1, 1)),
        (("ffn",), (units,), (1,)),
        (("embed",), (units,), (1,)),
        (("expert", "ffn", "embed"), (draw(st.integers(1, 6)), units, width), (1, 1, 1)),
    ]
    axes, shape, grains = draw(st.sampled_from(shapes))
    return Param(shape=shape, axes=axes, init=Normal(std=1.0), grain=grains)


degrees_ = st.builds(
    Degrees,
    data_replicate=st.integers(1, 2),
    expert=st.integers(1, 2),
    data_shard=st.integers(1, 4),
    context=st.integers(1, 2),
    tensor=st.integers(1, 4),
)


@settings(max_examples=150, deadline=None)
@given(param=params(), degrees=degrees_)
def test_what_ranks_keep_is_the_whole(param: Param, degrees: Degrees) -> None:
    assume(degrees.world > 1)
    try:
        ranks = layouts(param, degrees)
    except Exception as error:
        assume("IR001" not in str(error))  # these ranks cannot share it
        raise
    count, values = np.zeros(param.shape, dtype=int), np.arange(float(np.prod(param.shape))).reshape(param.shape) + 1
    rebuilt = np.zeros(param.shape)
    for layout, rows in ranks:
        part = layout.slices(rows)
        assert all(0 <= each.start <= each.stop <= size for each, size in zip(part, param.shape, strict=True))
        count[part] += 1
        stored = torch.full((rows, *layout.model_shape()[1:]), 9.0, dtype=torch.float64)
        layout.fill(stored, lambda wanted: values if wanted is None else values[wanted])
        real = tuple(slice(0, each.stop - each.start) for each in part)
        rebuilt[part] = stored[real].numpy()
        stored[real] = 0
        assert not stored.any(), "rows past the end of the tensor are 0"
    (copies,) = {layout.copies for layout, _ in ranks}
    assert (count == copies).all()
    assert (rebuilt == values).all()


@pytest.mark.parametrize(("rows", "tensor", "shard"), [(91, 4, 1), (91, 4, 3), (5, 4, 4), (3, 4, 2), (1, 2, 2)])
def test_a_table_is_filled_up_to_equal_pieces(rows: int, tensor: int, shard: int) -> None:
    """Each tensor rank computes with as many rows as any other, FSDP cuts those."""
    param = Param(shape=(rows, 3), axes=("vocab", "embed"), init=Normal(std=1.0))
    ranks = layouts(param, Degrees(tensor=tensor, data_shard=shard))
    assert {layout.model_shape() for layout, _ in ranks} == {(-(-rows // tensor), 3)}
    assert sum(stored for _, stored in ranks) == tensor * -(-rows // tensor)


def test_ends_hold_a_tied_tensor_twice() -> None:
    param = Param(shape=(8, 3), axes=("vocab", "embed"), init=Normal(std=1.0))
    for mesh in meshes(Degrees(pipeline=2, data_replicate=3)):
        assert Layout(param=param, mesh=mesh, fully_sharded=True).copies == 3
        assert Layout(param=param, mesh=mesh, fully_sharded=True, tied=True).copies == 6


def test_one_process_keeps_all() -> None:
    param = Param(shape=(8, 3), axes=("vocab", "embed"), init=Normal(std=1.0))
    layout = Layout(param=param, mesh=None)
    assert layout.copies == 1 and layout.model_shape() == (8, 3) and layout.slices(8) == (slice(0, 8), slice(0, 3))
