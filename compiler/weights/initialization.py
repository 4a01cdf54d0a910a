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


def draw(param: Param, name: str, seed: int, slices: tuple[slice, ...] | None = None) -> NDArray[np.float32]:
    """The initial value of parameter `name`, or of the part of it that `slices` names (unit steps), as float32.

    Only the blocks that the part touches are drawn, on all cores.
    """
    shape = param.shape
    slices = slices or tuple(slice(None) for _ in shape)
    bounds = [part.indices(size)[:2] for part, size in zip(slices, shape, strict=True)]
    local = tuple(stop - start for start, stop in bounds)
    if not isinstance(param.init, Normal):
        return np.full(local, 1 if isinstance(param.init, Ones) else 0, np.float32)
    out = np.empty(local, np.float32)
    row_size = prod(shape[1:])
    first, last = bounds[0]
    rows_at_once = max(1, (16 * BLOCK) // row_size)
    inner = tuple(slice(start, stop) for start, stop in bounds[1:])
    key, std = _key(seed, name), param.init.std

    def fill(start: int) -> None:
        stop = min(start + rows_at_once, last)
        flat = _stream(key, start * row_size, stop * row_size, std)
        out[start - first : stop - first] = flat.reshape(stop - start, *shape[1:])[(slice(None), *inner)]

    _quantiles()
    with ThreadPoolExecutor(cpu_count()) as pool:
        _drain(pool.map(fill, range(first, last, rows_at_once)))
    return out


def _drain(results: Iterable[None]) -> None:
    for _ in results:
        pass


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")


def _stream(key: int, start: int, stop: int, std: float) -> NDArray[np.float32]:
    """Elements start..stop of the flattened parameter."""
    first = start // BLOCK
    blocks = [_block(key, index) for index in range(first, -(-stop // BLOCK))]
    bits = np.concatenate(blocks)[start - first * BLOCK : stop - first * BLOCK]
    return _quantiles()[bits] * np.float32(std)


def _block(key: int, index: int) -> NDArray[np.uint16]:
    # The counter's upper half numbers the block; its lower half, which the draws advance, starts at 0.
    generator = np.random.Philox(key=key, counter=index << 128)
    return generator.random_raw(BLOCK // 4).astype("<u8").view("<u2")
