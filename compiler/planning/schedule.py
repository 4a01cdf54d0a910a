"""In which order a pipeline's ranks do their micro-batches, simulated: bubble, timeline, and how much is alive at once.

    GPipe, P = 3 ranks, M = 4 micro-batches        1F1B
    F0 F1 F2 F3 .  .  .  .  B3 B2 B1 B0             F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
       F0 F1 F2 F3 .  .  B3 B2 B1 B0                   F0 F1 .  B0 F2 B1 F3 B2 .  B3
          F0 F1 F2 F3 B3 B2 B1 B0                         F0 B0 F1 B1 F2 B2 F3 B3

With equal stages both idle for (P - 1) / (M + P - 1) of the step (Huang et al. 2019); v stages a rank, interleaved,
divide the P - 1 by v (Narayanan et al. 2021).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Task:
    """A stage's forward or backward of one micro-batch. Seconds from the beginning of the step."""

    rank: int
    stage: int
    micro_batch: int
    backward: bool
    start_s: float
    stop_s: float


Order = list[tuple[int, int, bool]]
"""(stage, micro-batch, whether backward) of one rank, in order."""


def gpipe(rank: int, ranks: int, micro_batches: int) -> Order:
    forwards = [(rank, micro, False) for micro in range(micro_batches)]
    return forwards + [(rank, micro, True) for micro in reversed(range(micro_batches))]


def one_forward_one_backward(rank: int, ranks: int, micro_batches: int) -> Order:
    """ranks - rank - 1 forwards, then a forward and a backward by turns, then the backwards that are left."""
    forwards = [(rank, micro, False) for micro in range(micro_batches)]
    backwards = [(rank, micro, True) for micro in range(micro_batches)]
    return _by_turns(forwards, backwards, min(ranks - rank - 1, micro_batches))


def interleaved(rank: int, ranks: int, micro_batches: int, stages_per_rank: int) -> Order:
    """As Megatron-LM: groups of `ranks` micro-batches pass through each of the rank's stages before the next group."""

    def units(order: Sequence[int]) -> list[tuple[int, int]]:
        return [
            (turn * ranks + rank, micro)
            for group in range(0, micro_batches, ranks)
            for turn in order
            for micro in range(group, min(group + ranks, micro_batches))
        ]

    turns = range(stages_per_rank)
    forwards = [(stage, micro, False) for stage, micro in units(turns)]
    backwards = [(stage, micro, True) for stage, micro in units(turns[::-1])]
    ahead = min(2 * (ranks - rank - 1) + (stages_per_rank - 1) * ranks, len(forwards))
    return _by_turns(forwards, backwards, ahead)


def _by_turns(forwards: Order, backwards: Order, ahead: int) -> Order:
    order, rest = forwards[:ahead], forwards[ahead:]
    for index, backward in enumerate(backwards):
        order += [*rest[index : index + 1], backward]
    return order


def orders(kind: str, ranks: int, micro_batches: int, stages_per_rank: int) -> list[Order]:
    """Of every rank."""
    if kind == "interleaved" and stages_per_rank > 1:
        return [interleaved(rank, ranks, micro_batches, stages_per_rank) for rank in range(ranks)]
    make: Callable[[int, int, int], Order] = gpipe if kind == "gpipe" else one_forward_one_backward
    return [make(rank, ranks, micro_batches) for rank in range(ranks)]


def simulate(
    orders: Sequence[Order], forward_s: Sequence[float], backward_s: Sequence[float], send_s: float
) -> list[Task]:
    """Every task with its times, each begun as soon as its rank is free and what it needs has arrived.

    forward_s, backward_s: of each stage. send_s: for a hand-off between stages; the sender goes on meanwhile.
    """
    ranks, last = len(orders), len(forward_s) - 1
    done: dict[tuple[int, int, bool], float] = {}
    free, at, tasks = [0.0] * ranks, [0] * ranks, list[Task]()
    waiting = set(range(ranks))
    while waiting:
        before = len(tasks)
        for rank in sorted(waiting):
            while at[rank] < len(orders[rank]):
                stage, micro, backward = orders[rank][at[rank]]
                need = _needed(stage, micro, backward, last)
                if need is not None and need not in done:
                    break
                delay_s = send_s if need is not None and need[0] != stage else 0.0
                start_s = max(free[rank], 0.0 if need is None else done[need] + delay_s)
                stop_s = start_s + (backward_s if backward else forward_s)[stage]
                done[stage, micro, backward] = free[rank] = stop_s
                tasks.append(Task(rank, stage, micro, backward, start_s, stop_s))
                at[rank] += 1
            if at[rank] == len(orders[rank]):
                waiting.discard(rank)
        assert len(tasks) > before or not waiting, "a schedule that waits for itself"
    return tasks


def _needed(stage: int, micro: int, backward: bool, last: int) -> tuple[int, int, bool] | None:
    if not backward:
        return (stage - 1, micro, False) if stage else None
    return (stage + 1, micro, True) if stage < last else (stage, micro, False)


def alive(order: Order, weights: Sequence[float]) -> tuple[float, bool]:
    """(the most that forwards of a rank hold at once, where stage s holds `weights[s]` until its backward; whether a
    backward has been done by then)."""
    now, most, after, done = 0.0, 0.0, False, False
    for stage, _, backward in order:
        now += -weights[stage] if backward else weights[stage]
        done = done or backward
        if now >= most:
            most, after = now, done
    return most, after
