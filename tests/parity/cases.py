"""What is computed for a spec, by every target: whole sequences, the loss, and a generation through the cache.

B batch, S sequence, V vocabulary, R rows that count.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archwright.compiler.interpreters.numpy_ops import make_cache, run_numpy
from archwright.compiler.ir import Ones, Param, Program, Step, Zeros

Array = NDArray[Any]
Forward = Callable[[Array, Array, Array, int], Array]
"""(ids, positions, write_index, visible) → logits, through a cache that the callee keeps."""

NUM_STEPS = 16


@dataclass(frozen=True, kw_only=True)
class TestWeights:
    """Weights in memory, by canonical name."""

    __test__ = False

    tensors: Mapping[str, Array]

    def names(self) -> Iterable[str]:
        return self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Array:
        return self.tensors[name] if slices is None else self.tensors[name][slices]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs for one spec. ids_BS, targets_BS: whole sequences; -100 marks targets that do not count.

    prompts_BS: the rows of the generation, of `lengths` tokens and NUM_STEPS forced ones; what follows is padding.
    capacity: rows of its cache, which may be more than are ever visible.
    """

    program: Program
    weights: TestWeights
    ids_BS: Array
    targets_BS: Array
    prompts_BS: Array
    lengths: tuple[int, ...]
    capacity: int


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """whole_BSV: logits. loss_sum, num_tokens: None where a target has no loss. cached_RV: the logits of every real
    token of the generation."""

    whole_BSV: Array
    loss_sum: float | None
    num_tokens: int | None
    cached_RV: Array


def make_case(program: Program, seed: int) -> Case:
    """Weights large enough that attention is sharp, every norm differs from 1 and every bias from 0; uneven prompts."""
    rng = np.random.default_rng(seed)
    tensors = {name: _values(rng, param).astype(np.float32) for name, param in program.params().items()}
    vocab, limit = program.vocab_size, program.max_positions
    ids_BS = rng.integers(0, vocab, (2, int(rng.integers(5, 30))))
    targets_BS = rng.integers(0, vocab, ids_BS.shape)
    targets_BS[rng.random(ids_BS.shape) < 0.3] = -100
    targets_BS[0, 0] = 1
    lengths = tuple(int(n) for n in rng.permutation([1, rng.integers(2, 9), rng.integers(9, 20)]))
    longest = max(lengths) + NUM_STEPS
    prompts_BS = rng.integers(0, vocab, (3, longest))
    capacity = int(rng.integers(max(longest, ids_BS.shape[1]), limit + 1))
    return Case(
        program=program,
        weights=TestWeights(tensors=tensors),
        ids_BS=ids_BS,
        targets_BS=targets_BS,
        prompts_BS=prompts_BS,
        lengths=lengths,
        capacity=capacity,
    )


def _values(rng: np.random.Generator, param: Param) -> Array:
    value = rng.standard_normal(param.shape)
    if isinstance(param.init, Ones):
        return 1 + 0.3 * value
    return 0.5 * value if isinstance(param.init, Zeros) else value * 1.5 / np.sqrt(param.shape[-1])


def oracle(case: Case) -> Outputs:
    """NumPy in float64, without any cache: the generation's rows are read as whole sequences."""
    weights = case.weights.tensors
    loss_sum, num_tokens = _oracle_loss(case)
    full_BSV = run_numpy(case.program, weights, case.prompts_BS)
    return Outputs(
        whole_BSV=run_numpy(case.program, weights, case.ids_BS),
        loss_sum=float(loss_sum),
        num_tokens=int(num_tokens),
        cached_RV=np.concatenate([full_BSV[row, : length + NUM_STEPS] for row, length in enumerate(case.lengths)]),
    )


def oracle_through_cache(case: Case) -> Outputs:
    """The same through the oracle's own cache."""
    loss_sum, num_tokens = _oracle_loss(case)

    def forward_through(cache: dict[tuple[str, str], Array]) -> Forward:
        def forward(ids_BS: Array, positions_BS: Array, write_index_B: Array, visible: int) -> Array:
            step = Step(positions_BS=positions_BS, write_index_B=write_index_B, kv_positions_L=np.arange(visible))
            return run_numpy(case.program, case.weights.tensors, ids_BS, step=step, cache=cache)

        return forward

    def new_forward(batch: int) -> Forward:
        return forward_through(make_cache(case.program, batch=batch, positions=case.capacity))

    return Outputs(
        whole_BSV=run_whole(case, new_forward(len(case.ids_BS))),
        loss_sum=float(loss_sum),
        num_tokens=int(num_tokens),
        cached_RV=run_generation(case, new_forward(len(case.lengths))),
    )


def _oracle_loss(case: Case, tensors: Mapping[str, Array] | None = None) -> tuple[Any, int]:
    positions_BS = np.broadcast_to(np.arange(case.ids_BS.shape[1]), case.ids_BS.shape)
    step = Step(positions_BS=positions_BS, targets_BS=case.targets_BS)
    return run_numpy(case.program, case.weights.tensors if tensors is None else tensors, case.ids_BS, step=step)


def oracle_slope(case: Case, direction: Mapping[str, Array], size: float) -> float:
    """The loss's slope along a direction of all weights, by central difference."""
    ends = [
        {name: tensor + sign * size * direction[name] for name, tensor in case.weights.tensors.items()}
        for sign in (-1.0, 1.0)
    ]
    (low, _), (high, _) = (_oracle_loss(case, tensors) for tensors in ends)
    return float(high - low) / (2 * size)


def run_whole(case: Case, forward: Forward) -> Array:
    """Logits [B, S, V] of the whole sequences in one call of a forward that has a cache."""
    batch, length = case.ids_BS.shape
    positions_BS = np.broadcast_to(np.arange(length), (batch, length))
    return forward(case.ids_BS, positions_BS, np.zeros(batch, np.int64), length)


def run_generation(case: Case, forward: Forward) -> Array:
    """Prefill all prompts as one padded batch, then NUM_STEPS decode steps, each row at its own position.

    The padding's keys lie in the cache behind a short prompt's end until the decode steps overwrite them.
    """
    lengths = np.array(case.lengths)
    batch, longest = len(lengths), int(lengths.max())
    positions_BS = np.broadcast_to(np.arange(longest), (batch, longest))
    prefill_BSV = forward(case.prompts_BS[:, :longest], positions_BS, np.zeros(batch, np.int64), longest)
    rows = [list(prefill_BSV[row, :length]) for row, length in enumerate(lengths)]
    for step in range(NUM_STEPS):
        index_B = lengths + step
        ids_B1 = np.take_along_axis(case.prompts_BS, index_B[:, None], axis=1)
        logits_B1V = forward(ids_B1, index_B[:, None], index_B, int(index_B.max()) + 1)
        for row in range(batch):
            rows[row].append(logits_B1V[row, 0])
    return np.stack([logits_V for row in rows for logits_V in row])
