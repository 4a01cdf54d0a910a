"""What the graphs compute, against the float64 oracle. B batch, S sequence, T = prompt and decoded tokens, V
vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archwright.compiler.interpreters.numpy_ops import FollowingNumpyOps, NumpyOps, make_cache, run_numpy
from archwright.compiler.ir import Program, Step
from archwright.compiler.tolerances import TOLERANCES, largest_error
from archwright.compiler.weights.streaming import Weights
from archwright.runtime.backends.base import AnyBackend
from archwright.runtime.backends.exposing import ExposingBackend

Array = NDArray[Any]

PROMPT = 24
DECODE_STEPS = 64
ROWS = 3
END_TOKENS = 8
ROUNDING = 3
"""How many times torch's error in the same precision a graph's may be: sums are taken in another order."""


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


def compare(
    backend: AnyBackend, program: Program, weights: Weights, precision: str = "float32"
) -> Iterator[Comparison]:
    """Run a back end and the oracle on the same tokens: whole sequences; prefill and decode steps at uneven lengths
    in one batch; and the last rows of the cache, where positions are longest and a write one row too far would be
    lost.

    The oracle computes whole sequences without a cache, so it shares no cache logic with what it judges. precision:
    that the back end computes in; on a CPU float32, whatever the weights are (`targets.retype`). Where
    inputs are rounded to 8-bit floats, a last bit decides between two neighbours: there the oracle takes the target's
    choice where it is as near, and the back end must be an `ExposingBackend`.
    """
    oracle = _Oracle(program, weights, backend, precision)
    rows = min(ROWS, backend.max_batch or ROWS)
    total = min(PROMPT + DECODE_STEPS, backend.capacity)
    ids_BT = np.random.default_rng(0).integers(0, program.vocab_size, (rows, total))
    oracle.begin()
    actual_BTV = backend.whole(ids_BT)
    expected_BTV = oracle.whole(ids_BT)
    error = largest_error(actual_BTV, expected_BTV)
    oracle.allow_for_rounding(error, ids_BT, expected_BTV)
    yield Comparison(
        name="whole sequences",
        error=error,
        tolerance=oracle.tolerance,
        detail=f"{rows} x {total} tokens{oracle.note}",
    )
    yield _prefill_and_decode(backend, ids_BT, oracle, expected_BTV)
    yield _end_of_cache(backend, oracle)


class _Oracle:
    """The oracle beside a back end, whose rounding to 8-bit floats it follows where there is any."""

    def __init__(self, program: Program, weights: Weights, backend: AnyBackend, precision: str) -> None:
        self.program = program
        self.tolerance = TOLERANCES["onnxruntime", precision]
        self._precision = precision
        self.note = ""
        self._arrays = {name: weights.read(name) for name in program.params()}
        self._backend = backend if isinstance(backend, ExposingBackend) else None

    @property
    def follows(self) -> bool:
        return self._backend is not None

    def allow_for_rounding(self, error: float, ids_BT: Array, expected_BTV: Array) -> None:
        """Some models turn rounding into larger errors than others. Where the error is more than the tolerance, it is
        held against what torch, which shares no code with the back end, makes of the same sequences in the same
        precision: ROUNDING times that is allowed, if torch's float64 is the oracle's, so that the difference is
        rounding alone. Not where the oracle follows a target's rounding.
        """
        if error <= self.tolerance or self.follows or not np.isfinite(error):
            return
        exact, rounded = (
            torch_error(self.program, self._arrays, ids_BT, expected_BTV, p) for p in ("float64", self._precision)
        )
        if exact <= TOLERANCES["torch", "float64"] and ROUNDING * rounded > self.tolerance:
            self.tolerance = ROUNDING * rounded
            self.note = f", where torch in {self._precision} is off by {rounded:.1e}"

    def begin(self) -> None:
        """Before the calls whose rounded values the next run follows."""
        if self._backend is not None:
            self._backend.begin()

    def whole(self, ids_BT: Array) -> Array:
        """Logits of whole sequences, without a cache."""
        rounded = [] if self._backend is None else self._backend.rounded.gathered(ids_BT.shape[1])
        return run_numpy(self.program, self._arrays, ids_BT, ops=self._ops(None, rounded))

    def cached(self, ids_BS: Array, step: Step[Array], capacity: int) -> Array:
        """Logits of the last tokens that a cache has room for, the others being zeros."""
        cache = make_cache(self.program, batch=len(ids_BS), positions=capacity)
        rounded = [] if self._backend is None else self._backend.rounded.gathered(capacity)
        rounded = [values_BTD[:, capacity - ids_BS.shape[1] :] for values_BTD in rounded]
        return run_numpy(self.program, self._arrays, ids_BS, step=step, ops=self._ops(cache, rounded))

    def _ops(self, cache: dict[tuple[str, str], Array] | None, rounded: list[Array]) -> NumpyOps:
        if self._backend is None:
            return NumpyOps(self._arrays, cache)
        return FollowingNumpyOps(self._arrays, cache, rounded, self.tolerance)


def _prefill_and_decode(backend: AnyBackend, ids_BT: Array, oracle: _Oracle, expected_BTV: Array) -> Comparison:
    """expected_BTV: what the oracle gave for whole sequences, which serves again where it follows nothing."""
    rows, total = ids_BT.shape
    steps = min(DECODE_STEPS, total - 1)
    longest = total - steps
    lengths_B = np.array([max(1, longest * (rows - row) // rows) for row in range(rows)])
    row_B = np.arange(rows)
    prompts_BS = np.where(np.arange(longest) < lengths_B[:, None], ids_BT[:, :longest], 0)
    oracle.begin()
    cache = backend.new_cache(rows, total)
    actual = [backend.prefill(cache, prompts_BS, lengths_B)]
    for step in range(steps):
        at_B = lengths_B + step
        actual.append(backend.decode(cache, ids_BT[row_B, at_B], at_B))
    if oracle.follows:
        expected_BTV = oracle.whole(ids_BT)
    expected = [expected_BTV[row_B, lengths_B - 1 + step] for step in range(steps + 1)]
    found_TBV, wanted_TBV = np.stack(actual), np.stack(expected)
    return Comparison(
        name="prefill and decode",
        error=largest_error(found_TBV, wanted_TBV),
        tolerance=oracle.tolerance,
        detail=f"prompts of {', '.join(map(str, lengths_B))} tokens, {steps} steps, {_greedy(found_TBV, wanted_TBV)}",
    )


def torch_error(
    program: Program, arrays: Mapping[str, Array], ids_BT: Array, expected_BTV: Array, precision: str
) -> float:
    """Of whole sequences through PyTorch."""
    import torch

    from archwright.compiler.module import DTYPES, as_torch, build_module

    module = build_module(program, dtype=DTYPES[precision], device="cpu").eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(as_torch(arrays[name]))
        return largest_error(module(torch.from_numpy(ids_BT)).double().numpy(), expected_BTV)


def _greedy(found_TBV: Array, wanted_TBV: Array) -> str:
    """Whether the tokens with the largest logits are the oracle's, and by how little those that are not were chosen."""
    found_TB, wanted_TB = found_TBV.argmax(-1), wanted_TBV.argmax(-1)
    others = np.nonzero(found_TB != wanted_TB)
    if not others[0].size:
        return "greedy tokens equal"
    margin = wanted_TBV[(*others, wanted_TB[others])] - wanted_TBV[(*others, found_TB[others])]
    share = margin.max() / np.abs(wanted_TBV).max()
    return f"{others[0].size} of {found_TB.size} greedy tokens differ, by {share:.1e} of the largest logit at most"


def _end_of_cache(backend: AnyBackend, oracle: _Oracle) -> Comparison:
    capacity = backend.capacity
    count = min(END_TOKENS, capacity)
    start = capacity - count
    ids_BS = np.random.default_rng(1).integers(0, oracle.program.vocab_size, (1, count))
    positions_BS = np.arange(start, capacity)[None]
    write_index_B = np.array([start])
    step = Step(positions_BS=positions_BS, write_index_B=write_index_B, kv_positions_L=np.arange(capacity))
    oracle.begin()
    actual_BSV = backend.forward(backend.new_cache(1, capacity), ids_BS, positions_BS, write_index_B, capacity)
    expected_BSV = oracle.cached(ids_BS, step, capacity)
    return Comparison(
        name="end of the cache",
        error=largest_error(actual_BSV, expected_BSV),
        tolerance=oracle.tolerance,
        detail=f"positions {start} to {capacity - 1}",
    )
