"""The weights that lie in an artifact: each rank's part, and the whole tensors that the parts make up."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto

from archwright.compiler.interpreters.onnx_quantization import Packing, unpack
from archwright.compiler.ir import Param
from archwright.compiler.passes.fuse import Part
from archwright.compiler.targets.onnx_graph import RankGraph, emit_stage
from archwright.compiler.targets.rank_data import Placed
from archwright.compiler.targets.stages import stages_of
from archwright.compiler.weights.streaming import Weights
from archwright.runtime.artifact import Artifact
from archwright.spec import ArchwrightError

Array = NDArray[Any]

SLAB_BYTES = 64 << 20
SAMPLED_ROWS = 32
"""Rows of a tensor that are compared where comparing all would take minutes."""
WINDOW_COLUMNS = 16
Sample = Literal["all", "rows", "windows"]
"""What is compared. rows: some of each tensor. windows: of the same rows, where they are stored as columns, the first,
middle and last WINDOW_COLUMNS values, since whole columns lie on every page of the file: right after a build, which
leaves none of them in the page cache, this would read the artifact again."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a rank's part of a parameter lies.

    shape: of the initializer that holds it. natural: of its dims, in the order in which they are stored. rows, scale:
    which of the stored rows are the parameter's, and what they were multiplied by, where it is fused with others.
    """

    file: Path
    offset: int
    stored: Placed
    natural: tuple[int, ...]
    order: tuple[int, ...]
    rows: tuple[int, int]
    scale: float = 1.0


class PackedPart:
    """A part whose values share bytes, two in one: read like an array, where only what is asked for is unpacked."""

    dtype = np.dtype(np.int8)

    def __init__(self, place: _Place, packing: Packing) -> None:
        self._place = place
        self._packing: Packing = packing
        first, stop = place.rows
        self.shape = (stop - first, *(place.natural[place.order.index(dim)] for dim in range(1, len(place.order))))
        self._bytes = np.memmap(place.file, np.uint8, "r", offset=place.offset, shape=(place.stored.num_bytes,))

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self[:].astype(dtype or self.dtype)

    def __getitem__(self, key: slice | tuple[slice, ...]) -> Array:
        """Unit steps only."""
        given = key if isinstance(key, tuple) else (key,)
        start, stop, _ = given[0].indices(len(self))
        first, _ = self._place.rows
        rows = slice(first + start, first + max(start, stop))
        slices = (rows, *given[1:], *[slice(None)] * (len(self.shape) - len(given)))
        *outer, last = (slices[dim] for dim in self._place.order)
        *_, width = self._place.natural
        if width % 2:  # a byte may belong to two rows
            whole = unpack(self._bytes, self._packing, prod(self._place.natural)).reshape(self._place.natural)
            return whole[(*outer, last)].transpose(np.argsort(self._place.order))
        start, stop, _ = last.indices(width)
        packed = self._bytes.reshape(*self._place.natural[:-1], width // 2)
        part = np.ascontiguousarray(packed[(*outer, slice(start // 2, -(-stop // 2)))])
        values = unpack(part.reshape(-1), self._packing, 2 * part.size).reshape(*part.shape[:-1], -1)
        return values[..., start % 2 : start % 2 + max(0, stop - start)].transpose(np.argsort(self._place.order))


class RankWeights:
    """The parameters of an artifact's Program, read from the data files through what the graphs say about them.

    Raises ArchwrightError VERIFY006 where a graph lacks a parameter or gives it another shape or type than the spec.
    """

    def __init__(self, artifact: Artifact) -> None:
        plan = artifact.plan
        self.params = plan.program.params()
        self.coordinates = [plan.coordinates(rank) for rank in range(plan.degrees.world)]
        self._places: list[dict[str, _Place]] = []
        for stage in stages_of(plan):
            # Ranks of other experts lay their data out alike.
            emitted = next(
                emit_stage(
                    plan, stage, precision=artifact.precision, capacity=artifact.capacity, options=artifact.options
                )
            )
            ranks = plan.stage_ranks(stage.number)
            self._places += [_places(artifact, artifact.graphs[rank], emitted) for rank in ranks]

    def holders(self, name: str) -> list[int]:
        """The ranks that store a parameter or a part of it: those of the stages that read it."""
        return [rank for rank, places in enumerate(self._places) if name in places]

    def names(self) -> Iterable[str]:
        return self.params

    def shape(self, name: str) -> tuple[int, ...]:
        return self.params[name].shape

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Array:
        """The whole tensor, put together from the ranks (of equal parts, the first rank's), or a part of it."""
        param, ranks = self.params[name], self.holders(name)
        whole = np.empty(param.shape, self.held(name, ranks[0]).dtype)
        for rank in reversed(ranks):
            whole[self.slices(param, rank)] = self.part(name, rank)[:]
        return whole if slices is None else whole[slices]

    def part(self, name: str, rank: int) -> Array | PackedPart:
        """What a rank has of a parameter, [out, in] as the canonical tensor is."""
        held, scale = self.held(name, rank), self.scale(name)
        return held if scale == 1 else held[:] * held.dtype.type(1 / scale)

    def held(self, name: str, rank: int) -> Array | PackedPart:
        """A view of the same, multiplied by `scale` as it is stored."""
        place = self._places[rank][name]
        if place.stored.external.packing is not None:
            return PackedPart(place, place.stored.external.packing)
        view = np.memmap(place.file, place.stored.dtype, "r", offset=place.offset, shape=place.natural)
        return np.asarray(view).transpose(np.argsort(place.order))[slice(*place.rows)]

    def scale(self, name: str) -> float:
        """What the stored values of a parameter were multiplied by: a power of two, 1 unless a pass folded it in."""
        return self._places[self.holders(name)[0]][name].scale

    def stored_bytes(self) -> dict[str, int]:
        """Type as ONNX calls it → bytes of all parameters, on all ranks together, the largest first."""
        sizes: dict[str, int] = {}
        for places in self._places:
            for stored in {place.stored.name: place.stored for place in places.values()}.values():
                dtype = stored.external.value.dtype
                assert dtype is not None
                sizes[dtype.name.lower()] = sizes.get(dtype.name.lower(), 0) + stored.num_bytes
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def slices(self, param: Param, rank: int) -> tuple[slice, ...]:
        """Where a rank's part lies in the whole tensor."""
        return param.slices(self.coordinates[rank])


def _places(artifact: Artifact, graph: Path, emitted: RankGraph) -> dict[str, _Place]:
    """Canonical name → where its part lies beside a rank's graph, which must have the layout that its stage has."""
    tensors = {t.name: t for t in onnx.load(graph, load_external_data=False).graph.initializer}
    local = artifact.plan.local.params()
    places: dict[str, _Place] = {}
    for placed in emitted.layout:
        name = placed.external.source
        if not isinstance(name, str):
            continue
        if placed.name not in tensors:
            raise _wrong(graph, f"has no initializer `{placed.name}`")
        parts = emitted.weights.get(name, (Part(name=name),))
        shape = _stacked([local[part.name].shape for part in parts])
        place = _place(graph, tensors[placed.name], shape, placed)
        start = 0
        for part in parts:
            stop = start + local[part.name].shape[0]
            places[part.name] = replace(place, rows=(start, stop), scale=part.scale)
            start = stop
    return places


def _stacked(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of tensors behind each other along dim 0."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _place(graph: Path, tensor: TensorProto, shape: tuple[int, ...], stored: Placed) -> _Place:
    """shape: of the rank's part. stored: what the initializer must be."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    found = ir.DataType(tensor.data_type)
    if "location" not in entries:
        raise _wrong(graph, f"`{tensor.name}` is not stored beside the graph")
    if tuple(tensor.dims) != stored.shape or found != stored.external.value.dtype:
        raise _wrong(graph, f"`{tensor.name}` is {found.name} {list(tensor.dims)}")
    order = stored.external.order or tuple(range(len(shape)))
    file = graph.parent / entries["location"]
    offset = int(entries.get("offset", 0))
    if int(entries.get("length", stored.num_bytes)) != stored.num_bytes:
        raise _wrong(graph, f"`{tensor.name}` has {stored.num_bytes} bytes, and the graph says {entries['length']}")
    if not file.is_file() or offset + stored.num_bytes > file.stat().st_size:
        raise _wrong(graph, f"`{tensor.name}` lies outside {entries['location']}")
    natural = tuple(shape[dim] for dim in order)
    return _Place(file=file, offset=offset, stored=stored, natural=natural, order=order, rows=(0, shape[0]))


def _wrong(graph: Path, message: str) -> ArchwrightError:
    where = f"{graph.parent.name}/{graph.name}"
    return ArchwrightError("VERIFY006", message, where=where, help="build the artifact again")


def differing_ranks(weights: RankWeights, *, sample: Sample) -> Iterator[str]:
    """A sentence for each parameter of which two ranks should have the same part, and do not."""
    for name, param in weights.params.items():
        owners: dict[tuple[int, ...], int] = {}
        for rank in weights.holders(name):
            first = owners.setdefault(param.pieces(weights.coordinates[rank]), rank)
            if first != rank and not _equal(weights.held(name, first), weights.held(name, rank).__getitem__, sample):
                yield f"rank{rank}: its part of `{name}` differs from rank{first}'s, of which it is a copy"


def differing_source(weights: RankWeights, source: Weights, *, sample: Sample) -> Iterator[str]:
    """A sentence for each part that is not the source's, rounded once to the artifact's precision."""
    for name, param in weights.params.items():
        for rank in weights.holders(name):
            own, *inner = weights.slices(param, rank)
            first, _, _ = own.indices(param.shape[0])

            def read(rows: slice, name: str = name, first: int = first, inner: list[slice] = inner) -> Array:
                array = source.read(name, (slice(first + rows.start, first + rows.stop), *inner))
                scale = weights.scale(name)
                if scale == 1:
                    return array
                return array.astype(np.float64 if array.dtype == np.float64 else np.float32) * scale

            if not _equal(weights.held(name, rank), read, sample):
                yield f"rank{rank}: its part of `{name}` is not that of the model"


def not_finite(weights: RankWeights, *, sample: Sample) -> Iterator[str]:
    """A sentence for each part that holds an infinity or a NaN."""
    for name in weights.params:
        for rank in weights.holders(name):
            part = weights.held(name, rank)
            if isinstance(part, PackedPart):
                continue  # whole numbers
            slabs = (part[rows][..., columns] for rows in _slabs(part, sample) for columns in _windows(part, sample))
            if not all(np.isfinite(slab).all() for slab in slabs):
                yield f"rank{rank}: its part of `{name}` is not finite"


def _equal(part: Array | PackedPart, expected: Callable[[slice], Array], sample: Sample) -> bool:
    """Whether rows are equal bit for bit, the expected ones rounded to the type of `part`. Only these are read."""
    for rows in _slabs(part, sample):
        wanted = expected(rows)
        for columns in _windows(part, sample):
            found = _window(part, rows, columns)
            if found.shape != wanted[..., columns].shape:
                return False
            if _bits(found) != _bits(wanted[..., columns].astype(part.dtype)):
                return False
    return True


def _window(part: Array | PackedPart, rows: slice, columns: slice) -> Array:
    if not isinstance(part, PackedPart):
        return part[rows][..., columns]
    return part[(rows, *[slice(None)] * (len(part.shape) - 2), columns)]


def _bits(array: Array) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def _slabs(array: Array | PackedPart, sample: Sample) -> Iterator[slice]:
    """Row ranges that cover the array, or evenly spaced rows of a large one, the first and the last among them."""
    rows = len(array)
    if sample != "all" and rows > SAMPLED_ROWS:
        for row in np.unique(np.linspace(0, rows - 1, SAMPLED_ROWS).astype(int)).tolist():
            yield slice(row, row + 1)
        return
    step = max(1, SLAB_BYTES // max(1, prod(array.shape[1:]) * array.dtype.itemsize))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _windows(array: Array | PackedPart, sample: Sample) -> list[slice]:
    """Ranges of the last axis."""
    columns = array.shape[-1]
    whole = not isinstance(array, PackedPart) and array.flags.c_contiguous
    if sample != "windows" or whole or columns <= 3 * WINDOW_COLUMNS:
        return [slice(None)]
    starts = (0, (columns - WINDOW_COLUMNS) // 2, columns - WINDOW_COLUMNS)
    return [slice(start, start + WINDOW_COLUMNS) for start in starts]
