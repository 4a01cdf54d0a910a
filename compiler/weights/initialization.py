"""Initial weights that do not depend on the plan.

Each parameter is a stream of blocks of 65,536 elements; block k of parameter n under seed s comes from the Philox
generator (Salmon et al. 2011) keyed by (s, n) at a counter of its own. An element takes 16 raw bits and looks its
normal quantile up in a table, so any slice of a tensor can be drawn alone, by any rank, and is the same numbers.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod
from os import cpu_count
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archwright.compiler.ir import Normal, Ones, Param

BLOCK = 1 << 16


@cache
def _quantiles() -> NDArray[np.float32]:
    """The 65,536 equally likely values of a standard normal, scaled to variance 1."""
    inverse = NormalDist().inv_cdf
    upper = np.array([inverse((i + 0.5) / BLOCK) for i in range(BLOCK // 2, BLOCK)])
    values = np.concatenate([-upper[::-1], upper])
    return (values / values.std()).astype(np.float32)


@cache
def _table(std: float, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The values that an element can have."""
    return (_quantiles() * np.float32(std)).astype(dtype)


def draw(
    param: Param, name: str, seed: int, slices: tuple[slice, ...] | None = None, *, dtype: Any = np.float32
) -> NDArray[Any]:
    """The initial value of parameter `name`, or of the part of it that `slices` names (unit steps).

    dtype: float32, or what these values are rounded to. Only the blocks that the part touches are drawn, on all cores.
    """
    shape = param.shape
    slices = slices or tuple(slice(None) for _ in shape)
    bounds = [part.indices(size)[:2] for part, size in zip(slices, shape, strict=True)]
    local = tuple(stop - start for start, stop in bounds)
    if not isinstance(param.init, Normal):
        return np.full(local, 1 if isinstance(param.init, Ones) else 0, dtype)
    out = np.empty(local, dtype)
    _draw_part(out, shape, bounds, 0, _key(seed, name), _table(param.init.std, np.dtype(dtype)))
    return out


def _draw_part(
    out: NDArray[Any],
    shape: tuple[int, ...],
    bounds: list[tuple[int, int]],
    offset: int,
    key: int,
    table: NDArray[Any],
) -> None:
    """The elements within `bounds` of a tensor of `shape`, which begins at element `offset` of the stream."""
    row_size = prod(shape[1:])
    if len(shape) > 2:  # a stack, matrix by matrix
        for index in range(*bounds[0]):
            _draw_part(out[index - bounds[0][0]], shape[1:], bounds[1:], offset + index * row_size, key, table)
        return
    local = out.shape
    first, last = bounds[0]
    rows_at_once = max(1, (16 * BLOCK) // row_size)
    inner = tuple(slice(start, stop) for start, stop in bounds[1:])

    def fill(start: int) -> None:
        stop = min(start + rows_at_once, last)
        part = out[start - first : stop - first]
        # Whole rows are drawn where they belong; of cut ones the rest is drawn and dropped.
        flat = part.reshape(-1) if local[1:] == shape[1:] else np.empty((stop - start) * row_size, out.dtype)
        _draw_into(flat, key, offset + start * row_size, table)
        if local[1:] != shape[1:]:
            part[:] = flat.reshape(stop - start, *shape[1:])[(slice(None), *inner)]

    starts = range(first, last, rows_at_once)
    if len(starts) == 1:  # by callers that have threads of their own
        fill(first)
    else:
        with ThreadPoolExecutor(cpu_count()) as pool:
            _drain(pool.map(fill, starts))


def _drain(results: Iterable[None]) -> None:
    for _ in results:
        pass


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")


def _draw_into(out: NDArray[Any], key: int, start: int, table: NDArray[Any]) -> None:
    """Elements start, start + 1, ... of the flattened parameter, looked up in the table of its 65,536 values."""
    # As integers of that size: NumPy is slow at copying types that it does not know, such as bfloat16.
    words, stop = f"u{table.itemsize}", start + len(out)
    for index in range(start // BLOCK, -(-stop // BLOCK)):
        begin, end = max(start, index * BLOCK), min(stop, (index + 1) * BLOCK)
        bits = _block(key, index)[begin - index * BLOCK : end - index * BLOCK]
        # Nothing wraps, 16 bits being what the table has; but with it `take` does not check each index first.
        np.take(table.view(words), bits, out=out[begin - start : end - start].view(words), mode="wrap")


def _block(key: int, index: int) -> NDArray[np.uint16]:
    # The counter's upper half numbers the block; its lower half, which the draws advance, starts at 0.
    generator = np.random.Generator(np.random.Philox(key=key, counter=index << 128))
    # The generator's raw words; `random_raw` gives the same, and keeps other threads waiting meanwhile.
    words = generator.integers(0, 1 << 64, BLOCK // 4, dtype=np.uint64)
    return words.astype("<u8", copy=False).view("<u2")
