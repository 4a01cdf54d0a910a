"""Schedules: bubbles and what is alive, by closed formulas."""

import itertools

import pytest

from archwright.compiler.planning.schedule import alive, orders, simulate

FORWARD_S, BACKWARD_S = 1.0, 2.0


def bubble(kind: str, ranks: int, micro_batches: int, stages_per_rank: int = 1) -> float:
    stages = ranks * stages_per_rank
    tasks = simulate(
        orders(kind, ranks, micro_batches, stages_per_rank),
        [FORWARD_S / stages_per_rank] * stages, [BACKWARD_S / stages_per_rank] * stages, 0.0,
    )  # fmt: skip
    return 1 - micro_batches * (FORWARD_S + BACKWARD_S) / max(task.stop_s for task in tasks)


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 3), (2, 2), (4, 4), (4, 13), (8, 32)])
def test_the_bubble_of_equal_stages(kind: str, ranks: int, micro_batches: int) -> None:
    """(P - 1) / (M + P - 1) of the step (Huang et al. 2019)."""
    assert bubble(kind, ranks, micro_batches) == pytest.approx((ranks - 1) / (micro_batches + ranks - 1))


@pytest.mark.parametrize("stages_per_rank", [2, 4])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 2), (4, 4), (4, 12), (8, 32)])
def test_interleaving_divides_the_bubble(ranks: int, micro_batches: int, stages_per_rank: int) -> None:
    """(P - 1) / v idle for M at work (Narayanan et al. 2021)."""
    idle = (ranks - 1) / stages_per_rank
    assert bubble("interleaved", ranks, micro_batches, stages_per_rank) == pytest.approx(idle / (micro_batches + idle))


@pytest.mark.parametrize(("kind", "stages_per_rank"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2)])
def test_each_stage_does_each_micro_batch_once_in_both_directions(kind: str, stages_per_rank: int) -> None:
    plans = orders(kind, 4, 8, stages_per_rank)
    for rank, order in enumerate(plans):
        stages = range(rank, 4 * stages_per_rank, 4)
        done = [(each.stage, each.micro_batch, each.backward) for each in order]
        assert sorted(done) == sorted((s, m, back) for s in stages for m in range(8) for back in (False, True))
    tasks = simulate(plans, [1.0] * 4 * stages_per_rank, [1.0] * 4 * stages_per_rank, 0.5)
    times = {(task.stage, task.micro_batch, task.backward): task for task in tasks}
    for (stage, micro, backward), task in times.items():
        before = times.get((stage + 1 if backward else stage - 1, micro, backward))
        assert before is None or task.start_s >= before.stop_s + 0.5
    for rank in range(4):
        mine = sorted((task for task in tasks if task.rank == rank), key=lambda task: task.start_s)
        assert all(a.stop_s <= b.start_s for a, b in itertools.pairwise(mine)), "one at a time"


def test_what_is_alive_at_once() -> None:
    """GPipe: all. 1F1B: P - rank. Interleaved: 2 (P - rank - 1) + (v - 1) P + 1 pieces of 1 / v."""
    assert [alive(order, [1.0] * 4)[0] for order in orders("gpipe", 4, 9, 1)] == [9, 9, 9, 9]
    assert [alive(order, [1.0] * 4)[0] for order in orders("1f1b", 4, 9, 1)] == [4, 3, 2, 1]
    assert [alive(order, [1.0] * 4)[0] for order in orders("1f1b", 4, 2, 1)] == [2, 2, 2, 1]
    assert [alive(order, [1.0] * 8)[0] for order in orders("interleaved", 4, 16, 2)] == [11, 9, 7, 5]
    assert alive(orders("gpipe", 2, 4, 1)[0], [1.0, 1.0]) == (4, False), "before any gradient"
    assert alive(orders("1f1b", 2, 4, 1)[0], [1.0, 1.0]) == (2, True)


def test_a_hand_off_delays_the_receiver() -> None:
    tasks = simulate(orders("gpipe", 2, 1, 1), [1.0, 1.0], [1.0, 1.0], 0.25)
    assert max(task.stop_s for task in tasks) == pytest.approx(4.5)
