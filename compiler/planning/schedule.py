"""A pipeline's schedule, simulated: bubble, timeline, and how much is alive at once.

    GPipe, P = 3 ranks, M = 3 micro-batches         1F1B
    F0 F1 F2 .  .  .  .  B0 .. B1 .. B2              F0 F1 F2 .  .  .. B0 .. B1 .. B2
       F0 F1 F2 .  .  B0 .. B1 .. B2                    F0 F1 .  B0 .. F2 B1 .. B2
          F0 F1 F2 B0 .. B1 .. B2                          F0 B0 .. F1 B1 .. F2 B2

With equal stages both idle for (P - 1) / (M + P - 1) of the step (Huang et al. 2019); v stages a rank, interleaved,
divide the P - 1 by v (Narayanan et al. 2021).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from archwright.compiler.schedules import Action, schedule


@dataclass(slots=True)
class Task:
    """A stage's forward or backward of one micro-batch. Seconds from the beginning of the step."""

    rank: int
    stage: int
    micro_batch: int
    backward: bool
    start_s: float
    stop_s: float


Order = Sequence[Action]
"""What one rank does, in order."""


def orders(kind: str, ranks: int, micro_batches: int, stages_per_rank: int) -> list[Order]:
    """Of every rank, as training runs them."""
    return [
        schedule(kind, ranks=ranks, stages_per_rank=stages_per_rank, micro_batches=micro_batches, rank=rank)
        for rank in range(ranks)
    ]


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
                action = orders[rank][at[rank]]
                stage, micro, backward = action.stage, action.micro_batch, action.backward
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
    for action in order:
        now += -weights[action.stage] if action.backward else weights[action.stage]
        done = done or action.backward
        if now >= most:
            most, after = now, done
    return most, after
