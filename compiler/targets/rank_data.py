"""The weights of all ranks, written beside their graphs in one pass over the model's weights.

Each parameter is read once, some rows at a time, and written while the next one is read. What is in memory: a few slabs
of rows, and the whole of two parameters whose matrices are stored transposed and of one that is fused, in the precision
of the files.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from math import prod
from os import cpu_count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from archwright.compiler.interpreters.onnx_ops import NUMPY_DTYPES, External
from archwright.compiler.interpreters.onnx_quantization import pack
from archwright.compiler.ir import Param, Program
from archwright.compiler.passes.fuse import Part, WeightMap
from archwright.compiler.weights.hashed_file import HashedFile
from archwright.compiler.weights.streaming import Weights, write_array
from archwright.spec.manifest import FileEntry

Array = NDArray[Any]

SLAB_VALUES = 1 << 23
"""Values that are read at once where rows are written as they come."""
TILE_VALUES = 1 << 19
"""Values that a thread reads at once where rows are transposed: as many as its processor's cache holds."""
SCRATCH_BYTES = 256 << 20
"""Transposed matrices up to this size are made in memory that is used again: the system takes longer to hand out fresh
memory than the transposing takes."""
TILE_ROWS, TILE_COLUMNS = 64, 512
CACHE_LINE_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Placed:
    """An external initializer and where its bytes lie in the data file."""

    external: External
    offset: int

    @property
    def name(self) -> str:
        return str(self.external.value.name)

    @property
    def dtype(self) -> np.dtype[Any]:
        assert self.external.value.dtype is not None
        return NUMPY_DTYPES[self.external.value.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.external.value.shape is not None
        return tuple(int(size) for size in self.external.value.shape)  # pyright: ignore[reportArgumentType]

    @property
    def num_bytes(self) -> int:
        """In the file."""
        values = prod(self.shape)
        return -(-values // 2) if self.external.packing == "int4" else values * self.dtype.itemsize


class Graph(Protocol):
    """What a rank's graph says about its data file; see `onnx_graph.RankGraph`."""

    @property
    def layout(self) -> Sequence[Placed]: ...

    @property
    def weights(self) -> WeightMap: ...


def write_rank_data(
    paths: Sequence[Path], graph: Graph, program: Program, weights: Weights, places: Sequence[Mapping[str, int]]
) -> list[FileEntry]:
    """Write the data file of every rank of a stage, and return their hashes and sizes.

    program: the global one, whose parameters say how they are split. places: of each rank, mesh axis → coordinate.
    """
    layout = graph.layout
    params = program.params()
    with ExitStack() as stack:
        files = [stack.enter_context(HashedFile(path)) for path in paths]
        writer = stack.enter_context(_Writer())
        scratch = _Scratch(max((prod(p.shape) * p.dtype.itemsize for p in layout), default=0) * len(files))
        for placed in layout:
            source = placed.external.source
            if not isinstance(source, str):
                pieces = iter([[source()] * len(files)])
            elif (parts := graph.weights.get(source)) is not None:
                pieces = iter([_fused(parts, placed, params, weights, places)])
            elif (order := placed.external.order) is not None:
                param = params[source]
                whole = scratch.empty(tuple(param.shape[dim] for dim in order), placed.dtype)
                _fill(whole, order, param, weights, source)
                cuts = [param.slices(place) for place in places]
                pieces = iter([[_reordered(whole, order, cut, placed.shape) for cut in cuts]])
            else:
                pieces = _rows(params[source], weights, source, places)
            for number, arrays in enumerate(pieces):
                writer.submit(files, placed, arrays, first=number == 0)
    return [FileEntry(sha256=file.sha256, bytes=file.num_bytes) for file in files]


class _Writer:
    """A thread that writes while the next values are made; one piece waits at most."""

    def __enter__(self) -> "_Writer":
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        return self

    def submit(self, files: Sequence[HashedFile], placed: Placed, parts: Sequence[Array], *, first: bool) -> None:
        """Append each rank's part to its file, behind the padding where it is the first piece of a tensor."""

        def write() -> None:
            for file, part in zip(files, parts, strict=True):
                if first:
                    file.write(bytes(placed.offset - file.num_bytes))
                if placed.external.packing is not None:
                    file.write(pack(part, placed.external.packing))
                else:
                    write_array(file, part, placed.dtype, part.shape, placed.name)

        self._wait()
        self._last = self._pool.submit(write)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._pool.shutdown()


class _Scratch:
    """Memory for two pieces in turn: one that is written, and one that is made."""

    def __init__(self, largest_bytes: int) -> None:
        size = min(largest_bytes, SCRATCH_BYTES)
        self._buffers = [np.empty(size, np.uint8) for _ in range(2)]

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array whose memory is used again at the second call after this."""
        num_bytes = prod(shape) * dtype.itemsize
        if num_bytes > len(self._buffers[0]):
            return np.empty(shape, dtype)
        self._buffers.reverse()
        return self._buffers[0][:num_bytes].view(dtype).reshape(shape)


def _rows(param: Param, weights: Weights, name: str, places: Sequence[Mapping[str, int]]) -> Iterator[list[Array]]:
    """Each rank's part as it is stored, [out, in], some rows at a time."""
    slices = [param.slices(place) for place in places]
    for rows in _slabs(param.shape[0], prod(param.shape[1:]), SLAB_VALUES):
        slab = weights.read(name, (rows, *[slice(None)] * (len(param.shape) - 1)))
        parts: list[Array] = []
        for own, *inner in slices:
            first, stop, _ = own.indices(param.shape[0])
            mine = slice(max(first, rows.start) - rows.start, max(0, min(stop, rows.stop) - rows.start))
            parts.append(slab[(mine, *inner)])
        yield parts


def _fill(whole: Array, order: tuple[int, ...], param: Param, weights: Weights, name: str) -> None:
    """The parameter into `whole`, whose dims are the parameter's in another order: each of its matrices transposed."""
    natural = whole.transpose(np.argsort(order))
    *stack, rows, columns = param.shape

    def fill(place: tuple[tuple[int, ...], slice]) -> None:
        number, part = place
        slices = (*(slice(index, index + 1) for index in number), part, slice(None))
        _transpose(weights.read(name, slices).reshape(-1, columns), natural[(*number, part)].T)

    with ThreadPoolExecutor(cpu_count()) as pool:
        for _ in pool.map(fill, product(np.ndindex(*stack), _slabs(rows, columns, TILE_VALUES))):
            pass


def _reordered(whole: Array, order: tuple[int, ...], own: tuple[slice, ...], shape: tuple[int, ...]) -> Array:
    """A rank's part of what `_fill` made: a view of `whole`, or a copy where `shape` joins dims that are cut."""
    part = whole[tuple(own[dim] for dim in order)]
    assert part.size == prod(shape), f"a part is {part.shape}, announced as {shape}"
    return part.reshape(shape)


def _fused(
    parts: Sequence[Part],
    placed: Placed,
    params: Mapping[str, Param],
    weights: Weights,
    places: Sequence[Mapping[str, int]],
) -> list[Array]:
    """Each rank's fused parameter: its pieces of the canonical ones behind each other, scaled in the files' type."""
    order = placed.external.order or tuple(range(len(params[parts[0].name].shape)))
    wholes: list[Array] = []
    for part in parts:
        param = params[part.name]
        whole = np.empty(tuple(param.shape[dim] for dim in order), placed.dtype)
        if len(order) == 1:
            whole[:] = weights.read(part.name)
        else:
            _fill(whole, order, param, weights, part.name)
        wholes.append(whole if part.scale == 1 else np.multiply(whole, placed.dtype.type(part.scale), out=whole))
    joined: list[Array] = []
    for place in places:
        cuts = [tuple(params[part.name].slices(place)[dim] for dim in order) for part in parts]
        pieces = [whole[cut] for whole, cut in zip(wholes, cuts, strict=True)]
        joined.append(np.concatenate(pieces, axis=order.index(0)))
    return joined


def _transpose(source: Array, target: Array) -> None:
    """target = sourceᵀ, in tiles: what is read and what is written both stay in the processor's cache, and a tile's
    rows fill whole cache lines, several in a row. Ten times faster than NumPy's own copy of a transposed array.
    """
    source = source.astype(target.dtype, copy=False)
    if target.dtype.itemsize < 4:  # NumPy is slow at copying bfloat16 and float8, which it does not know
        words = f"u{target.dtype.itemsize}"
        source, target = source.view(words), target.view(words)
    rows, columns = source.shape
    for row in range(0, rows, TILE_ROWS):
        for column in range(0, columns, TILE_COLUMNS):
            tile = source[row : row + TILE_ROWS, column : column + TILE_COLUMNS]
            target[column : column + TILE_COLUMNS, row : row + TILE_ROWS] = tile.T


def _slabs(rows: int, row_size: int, num_values: int) -> Iterator[slice]:
    """Ranges that cover so many rows, of about `num_values` each."""
    step = max(1, num_values // row_size // CACHE_LINE_BYTES) * CACHE_LINE_BYTES  # whole cache lines when transposed
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
