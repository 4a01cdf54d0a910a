"""Pipeline schedules: what each rank does in which order, and that ranks which wait for each other come to an end."""

from collections import deque

import pytest

from archwright.compiler.schedules import Action, schedule

CASES = [
    *[("gpipe", ranks, 1, number) for ranks in (1, 2, 3, 4) for number in (1, 2, 3, 5, 8)],
    *[("1f1b", ranks, 1, number) for ranks in (1, 2, 3, 4) for number in (1, 2, 3, 5, 8)],
    *[("interleaved", ranks, chunks, ranks * turns) for ranks in (2, 3, 4) for chunks in (2, 3) for turns in (1, 2, 3)],
]
"""kind, ranks, stages a rank, micro-batches."""
every = pytest.mark.parametrize(("kind", "ranks", "chunks", "number"), CASES)


def schedules(kind: str, ranks: int, chunks: int, number: int) -> list[tuple[Action, ...]]:
    return [
        schedule(kind, ranks=ranks, stages_per_rank=chunks, micro_batches=number, rank=rank) for rank in range(ranks)
    ]


@every
def test_every_action_stands_once_in_its_rank(kind: str, ranks: int, chunks: int, number: int) -> None:
    for rank, actions in enumerate(schedules(kind, ranks, chunks, number)):
        expected = {
            Action(backward, chunk * ranks + rank, micro_batch)
            for backward in (False, True)
            for chunk in range(chunks)
            for micro_batch in range(number)
        }
        assert set(actions) == expected and len(actions) == len(expected)


@every
def test_every_forward_stands_before_its_backward(kind: str, ranks: int, chunks: int, number: int) -> None:
    for actions in schedules(kind, ranks, chunks, number):
        places = {action: place for place, action in enumerate(actions)}
        for action, place in places.items():
            if action.backward:
                assert places[Action(False, action.stage, action.micro_batch)] < place


def in_flight(actions: tuple[Action, ...]) -> int:
    """Most forwards whose activations wait for their backward."""
    most = now = 0
    for action in actions:
        now += -1 if action.backward else 1
        most = max(most, now)
    return most


@every
def test_activations_in_flight(kind: str, ranks: int, chunks: int, number: int) -> None:
    """GPipe holds all; 1F1B one for each rank from this one on (Narayanan et al. 2019); interleaved those of the warmup
    of Megatron-LM, 2 (p - r - 1) + (v - 1) p, and the one whose turn it is (Narayanan et al. 2021, section 2.2)."""
    for rank, actions in enumerate(schedules(kind, ranks, chunks, number)):
        bound = {
            "gpipe": number,
            "1f1b": min(number, ranks - rank),
            "interleaved": min(number * chunks, 2 * (ranks - rank - 1) + (chunks - 1) * ranks + 1),
        }[kind]
        assert in_flight(actions) == bound


@every
def test_one_forward_and_one_backward_take_turns(kind: str, ranks: int, chunks: int, number: int) -> None:
    for rank, actions in enumerate(schedules(kind, ranks, chunks, number)):
        warm = {"gpipe": number, "1f1b": ranks - rank - 1}.get(kind, 2 * (ranks - rank - 1) + (chunks - 1) * ranks)
        warm = min(warm, number * chunks)
        steady = actions[warm : len(actions) - warm]
        assert not any(action.backward for action in actions[:warm])
        assert [action.backward for action in steady] == [False, True] * (len(steady) // 2)
        assert all(action.backward for action in actions[len(actions) - warm :])


@pytest.mark.parametrize(("kind", "ranks", "chunks", "number"), [case for case in CASES if case[0] == "interleaved"])
def test_interleaved_order(kind: str, ranks: int, chunks: int, number: int) -> None:
    """Figure 4 of Narayanan et al. 2021: `ranks` micro-batches through a rank's first stage, the same ones through its
    next one, and so on; then the next micro-batches. Backwards go through the stages the other way."""
    for rank, actions in enumerate(schedules(kind, ranks, chunks, number)):
        groups = [range(start, start + ranks) for start in range(0, number, ranks)]
        forwards = [(chunk, batch) for group in groups for chunk in range(chunks) for batch in group]
        backwards = [(chunk, batch) for group in groups for chunk in reversed(range(chunks)) for batch in group]
        for backward, order in ((False, forwards), (True, backwards)):
            found = [(action.stage // ranks, action.micro_batch) for action in actions if action.backward is backward]
            assert found == order
            assert all(action.stage % ranks == rank for action in actions)


Message = tuple[bool, int, int]
"""backward, the stage that receives, micro-batch."""


def messages(actions: tuple[Action, ...], last: int) -> tuple[list[Message], list[Message]]:
    """What a rank receives and sends, in order. last: the number of the last stage."""
    received: list[Message] = []
    sent: list[Message] = []
    for action in actions:
        if action.backward:
            if action.stage < last:
                received.append((True, action.stage, action.micro_batch))
            if action.stage > 0:
                sent.append((True, action.stage - 1, action.micro_batch))
        else:
            if action.stage > 0:
                received.append((False, action.stage, action.micro_batch))
            if action.stage < last:
                sent.append((False, action.stage + 1, action.micro_batch))
    return received, sent


@every
def test_messages_arrive_in_the_order_they_are_read(kind: str, ranks: int, chunks: int, number: int) -> None:
    """A channel to one neighbour in one direction is a queue without labels."""
    last = ranks * chunks - 1
    of_rank = [messages(actions, last) for actions in schedules(kind, ranks, chunks, number)]
    for rank in range(ranks):
        for backward, neighbour in ((False, (rank + 1) % ranks), (True, (rank - 1) % ranks)):
            sent = [message for message in of_rank[rank][1] if message[0] is backward]
            received = [message for message in of_rank[neighbour][0] if message[0] is backward]
            assert sent == received


@every
def test_no_rank_waits_for_ever(kind: str, ranks: int, chunks: int, number: int) -> None:
    """Ranks step by step: a receive waits until the message is there, a send does not wait. Where every action takes
    one unit of time, the bubble is the papers': GPipe and 1F1B 2 (p - 1), interleaved 2 (p - 1) / v of a rank's whole
    stage, in units of an action of one of v stages."""
    last = ranks * chunks - 1
    waiting = [deque(actions) for actions in schedules(kind, ranks, chunks, number)]
    arrived: set[Message] = set()
    clock = 0
    while any(waiting):
        done: list[Action] = []
        for actions in waiting:
            if not actions:
                continue
            received, _ = messages((actions[0],), last)
            if all(message in arrived for message in received):
                done.append(actions.popleft())
        assert done, f"all wait: {[actions[0] for actions in waiting if actions]}"
        for action in done:
            arrived.update(messages((action,), last)[1])
        clock += 1
    assert clock == 2 * number * chunks + 2 * (ranks - 1)
