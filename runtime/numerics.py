"""What the graphs compute, against the float64 oracle. B batch, S sequence, T = prompt and decoded tokens, V
vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archwright.compiler.interpreters.numpy_ops import make_cache, run_numpy
from archwright.compiler.ir import Program, Step
from archwright.compiler.tolerances import TOLERANCES, largest_error
from archwright.compiler.weights.streaming import Weights
from archwright.runtime.backends.base import AnyBackend

Array = NDArray[Any]

PROMPT = 24
DECODE_STEPS = 16
ROWS = 3
END_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One way of running the graphs, and its largest error (see `archwright.compiler.tolerances`)."""

    name: str
    error: float
    tolerance: float
    detail: str

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def compare(backend: AnyBackend, program: Program, weights: Weights) -> Iterator[Comparison]:
    """Run a back end and the oracle on the same tokens: whole sequences; prefill and decode steps at uneven lengths
    in one batch; and the last rows of the cache, where positions are longest and a write one row too far would be
    lost.

    The oracle computes whole sequences without a cache, so it shares no cache logic with what it judges. The graphs
    compute in float32 whatever their weights are (`targets.retype`), so one tolerance serves every precision.
    """
    tolerance = TOLERANCES["onnxruntime", "float32"]
    arrays = {name: weights.read(name) for name in program.params()}
    rows = min(ROWS, backend.max_batch or ROWS)
    total = min(PROMPT + DECODE_STEPS, backend.capacity)
    ids_BT = np.random.default_rng(0).integers(0, program.vocab_size, (rows, total))
    expected_BTV = run_numpy(program, arrays, ids_BT)
    yield Comparison(
        name="whole sequences",
        error=largest_error(backend.whole(ids_BT), expected_BTV),
        tolerance=tolerance,
        detail=f"{rows} x {total} tokens",
    )
    yield _prefill_and_decode(backend, ids_BT, expected_BTV, tolerance)
    yield _end_of_cache(backend, program, arrays, tolerance)


def _prefill_and_decode(backend: AnyBackend, ids_BT: Array, expected_BTV: Array, tolerance: float) -> Comparison:
    rows, total = ids_BT.shape
    steps = min(DECODE_STEPS, total - 1)
    longest = total - steps
    lengths_B = np.array([max(1, longest * (rows - row) // rows) for row in range(rows)])
    row_B = np.arange(rows)
    prompts_BS = np.where(np.arange(longest) < lengths_B[:, None], ids_BT[:, :longest], 0)
    cache = backend.new_cache(rows, total)
    actual = [backend.prefill(cache, prompts_BS, lengths_B)]
    expected = [expected_BTV[row_B, lengths_B - 1]]
    for step in range(steps):
        at_B = lengths_B + step
        actual.append(backend.decode(cache, ids_BT[row_B, at_B], at_B))
        expected.append(expected_BTV[row_B, at_B])
    return Comparison(
        name="prefill and decode",
        error=largest_error(np.stack(actual), np.stack(expected)),
        tolerance=tolerance,
        detail=f"prompts of {', '.join(map(str, lengths_B))} tokens, {steps} steps",
    )


def _end_of_cache(backend: AnyBackend, program: Program, arrays: dict[str, Array], tolerance: float) -> Comparison:
    capacity = backend.capacity
    count = min(END_TOKENS, capacity)
    start = capacity - count
    ids_BS = np.random.default_rng(1).integers(0, program.vocab_size, (1, count))
    positions_BS = np.arange(start, capacity)[None]
    write_index_B = np.array([start])
    cache = make_cache(program, batch=1, positions=capacity)
    step = Step(positions_BS=positions_BS, write_index_B=write_index_B, kv_positions_L=np.arange(capacity))
    expected_BSV = run_numpy(program, arrays, ids_BS, step=step, cache=cache)
    actual_BSV = backend.forward(backend.new_cache(1, capacity), ids_BS, positions_BS, write_index_B, capacity)
    return Comparison(
        name="end of the cache",
        error=largest_error(actual_BSV, expected_BSV),
        tolerance=tolerance,
        detail=f"positions {start} to {capacity - 1}",
    )
