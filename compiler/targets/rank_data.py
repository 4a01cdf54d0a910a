"""The weights of all ranks, written beside their graphs in one pass over the model's weights.

Each parameter is read once, some rows at a time. What is in memory: a few slabs of rows, and of a matrix that is stored
transposed the whole, in the precision of the files.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from os import cpu_count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from archwright.compiler.interpreters.onnx_ops import NUMPY_DTYPES, External
from archwright.compiler.ir import Param, Program
from archwright.compiler.weights.streaming import Weights, write_array

Array = NDArray[Any]

SLAB_VALUES = 1 << 24
"""Values that are read at once where rows are written as they come."""
TILE_VALUES = 1 << 20
"""Values that a thread reads at once where rows are transposed."""
TILE_COLUMNS = 256
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
        return prod(self.shape) * self.dtype.itemsize


def write_rank_data(paths: Sequence[Path], layout: Sequence[Placed], program: Program, weights: Weights) -> None:
    """Write the data file of every rank.

    program: the global one, whose parameters say how they are split.
    """
    params = program.params()
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for placed in layout:
            for file in files:
                file.write(bytes(placed.offset - file.tell()))
            source = placed.external.source
            if not isinstance(source, str):
                table = source()
                for file in files:
                    write_array(file, table, placed.dtype, placed.shape, placed.name)
            elif placed.external.transposed:
                _write_transposed(files, placed.dtype, params[source], weights, source)
            else:
                _write_rows(files, placed.dtype, params[source], weights, source)


def _write_rows(files: Sequence[BinaryIO], dtype: np.dtype[Any], param: Param, weights: Weights, name: str) -> None:
    """Append each rank's part as it is stored, [out, in]."""
    parts = [_slices(param, rank) for rank in range(len(files))]
    for rows in _slabs(param, SLAB_VALUES):
        slab = weights.read(name, (rows, *_all(param)[1:]))
        for file, (own, *inner) in zip(files, parts, strict=True):
            first, stop, _ = own.indices(param.shape[0])
            mine = slice(max(first, rows.start) - rows.start, max(0, min(stop, rows.stop) - rows.start))
            part = slab[(mine, *inner)]
            write_array(file, part, dtype, part.shape, name)


def _write_transposed(
    files: Sequence[BinaryIO], dtype: np.dtype[Any], param: Param, weights: Weights, name: str
) -> None:
    """Append each rank's part as [in, out]."""
    whole = np.empty(param.shape[::-1], dtype)

    def fill(rows: slice) -> None:
        _transpose(weights.read(name, (rows, *_all(param)[1:])), whole[:, rows])

    with ThreadPoolExecutor(cpu_count()) as pool:
        for _ in pool.map(fill, _slabs(param, TILE_VALUES)):
            pass
    for rank, file in enumerate(files):
        part = whole[_slices(param, rank)[::-1]]
        write_array(file, part, dtype, part.shape, name)


def _transpose(source: Array, target: Array) -> None:
    """target = sourceᵀ, in tiles: what is read and what is written both stay in the processor's cache, and a tile's
    rows fill whole cache lines. Ten times faster than NumPy's own copy of a transposed array.
    """
    source = source.astype(target.dtype, copy=False)
    if target.dtype.itemsize == 2:  # NumPy is slow at copying bfloat16, which it does not know
        source, target = source.view(np.uint16), target.view(np.uint16)
    rows, columns = source.shape
    tile_rows = CACHE_LINE_BYTES // target.dtype.itemsize
    for row in range(0, rows, tile_rows):
        for column in range(0, columns, TILE_COLUMNS):
            tile = source[row : row + tile_rows, column : column + TILE_COLUMNS]
            target[column : column + TILE_COLUMNS, row : row + tile_rows] = tile.T


def _slabs(param: Param, num_values: int) -> Iterator[slice]:
    """Ranges of rows that cover the parameter, of about `num_values` each."""
    rows, row_size = param.shape[0], prod(param.shape[1:])
    step = max(1, num_values // row_size)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _slices(param: Param, rank: int) -> tuple[slice, ...]:
    return _all(param) if param.split is None else param.split.slices(param.shape, rank)


def _all(param: Param) -> tuple[slice, ...]:
    return tuple(slice(None) for _ in param.shape)
