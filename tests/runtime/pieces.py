"""Prompts that are computed in pieces, each row at a place of its own. B batch, S sequence, V vocabulary."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archwright.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend

Array = NDArray[Any]


def pieces(backend: OnnxRuntimeBackend, sizes: Sequence[int]) -> Iterator[tuple[Array, Array, float]]:
    """Of pieces of these sizes behind each row's own prompt the logits [B, S, V], what whole sequences give there, and
    the largest magnitude of all that these give. The caches stay where they are, and are filled.
    """
    ids_BS = np.random.default_rng(0).integers(0, 400, (3, 40))
    expected_BSV, starts_B = backend.whole(ids_BS), np.array([0, 9, 24])
    cache = backend.new_cache(3, 40)
    pointers = cache.pointers()
    backend.prefill(cache, ids_BS[:, :24], starts_B.clip(1))
    for size in sizes:
        rows_BS = starts_B[:, None] + np.arange(size)
        part_BS = np.take_along_axis(ids_BS, rows_BS, axis=1)
        actual_BSV = backend.forward(cache, part_BS, rows_BS, starts_B, int(starts_B.max()) + size)
        yield actual_BSV, np.take_along_axis(expected_BSV, rows_BS[:, :, None], axis=1), np.abs(expected_BSV).max()
        starts_B = starts_B + size
    assert cache.pointers() == pointers
    assert all(value.numpy().any() for value in cache.values.values())
