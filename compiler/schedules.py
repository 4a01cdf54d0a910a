"""Pipeline schedules: in which order a rank runs forwards and backwards. Plain Python: `plan` draws what training runs.

GPipe: all forwards, then all backwards (Huang et al. 2019). 1F1B: forwards until the pipeline is full, then one
forward and one backward in turn (Narayanan et al. 2019). Interleaved: 1F1B over several stages a rank, the bubble
divided by their number (Narayanan et al. 2021).

    1F1B, 2 ranks, 4 micro-batches
    rank 0  F0 F1 B0 F2 B1 F3 B2 .. B3
    rank 1  .. F0 B0 F1 B1 F2 B2 F3 B3
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Action:
    """A forward or a backward of one micro-batch through one stage."""

    backward: bool
    stage: int
    micro_batch: int


def schedule(kind: str, *, ranks: int, stages_per_rank: int, micro_batches: int, rank: int) -> tuple[Action, ...]:
    """The actions of a rank. kind: gpipe, 1f1b, interleaved (micro_batches a multiple of ranks)."""
    total = micro_batches * stages_per_rank
    forwards = [_action(False, number, ranks, stages_per_rank, rank) for number in range(total)]
    backwards = [_action(True, number, ranks, stages_per_rank, rank) for number in range(total)]
    if kind == "gpipe":
        warm = total
    elif kind == "1f1b":
        warm = min(ranks - rank - 1, total)
    else:
        warm = min(2 * (ranks - rank - 1) + (stages_per_rank - 1) * ranks, total)
    steady = [each for pair in zip(forwards[warm:], backwards, strict=False) for each in pair]
    return (*forwards[:warm], *steady, *backwards[total - warm :])


def _action(backward: bool, number: int, ranks: int, stages_per_rank: int, rank: int) -> Action:
    """The number-th forward or backward: `ranks` micro-batches through one stage, the same through the next one."""
    group, within = divmod(number, ranks * stages_per_rank)
    chunk, micro_batch = divmod(within, ranks)
    if stages_per_rank == 1:
        chunk, micro_batch, group = 0, number, 0
    if backward:
        chunk = stages_per_rank - 1 - chunk
    return Action(backward, chunk * ranks + rank, group * ranks + micro_batch)
