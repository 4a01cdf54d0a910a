"""Which tokens a step sees."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archwright.spec import ArchwrightError
from archwright.trainers.batches import (
    IGNORED,
    Batch,
    Conversations,
    Windows,
    _order,
    evaluation_batches,
    make_samples,
    training_batch,
)
from archwright.trainers.dataset import Split, Stream


def make_split(folder: Path, documents: Sequence[Sequence[int]], masks: Sequence[Sequence[int]] | None = None) -> Split:
    """A split whose files lie in `folder`; tokens in two shards."""
    tokens = np.concatenate([np.asarray(document, "<u2") for document in documents])
    offsets = np.cumsum([0, *map(len, documents)]).astype("<i8")
    middle = len(tokens) // 2
    tokens[:middle].tofile(folder / "a.bin")
    tokens[middle:].tofile(folder / "b.bin")
    offsets.tofile(folder / "documents.bin")
    mask = None
    if masks is not None:
        np.concatenate([np.asarray(row, "u1") for row in masks]).tofile(folder / "mask.bin")
        mask = Stream([folder / "mask.bin"], np.dtype("u1"))
    return Split(
        name="train",
        num_tokens=len(tokens),
        num_documents=len(documents),
        num_bytes=3 * len(tokens),
        num_loss_tokens=len(tokens) if masks is None else sum(map(sum, masks)),
        _tokens=Stream([folder / "a.bin", folder / "b.bin"], np.dtype("<u2")),
        _mask=mask,
        _documents=Stream([folder / "documents.bin"], np.dtype("<i8")),
    )


@pytest.fixture
def counting(tmp_path: Path) -> Split:
    """103 tokens, 0 to 102, in one document."""
    return make_split(tmp_path, [range(103)])


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_every_token_is_a_target_once_an_epoch(counting: Split, epoch: int) -> None:
    windows = Windows(counting, 10, seed=3)
    batch = windows.batch(np.arange(len(windows)), epoch)
    assert batch.ids_BS.shape == (10, 10)
    assert np.array_equal(batch.targets_BS, (batch.ids_BS + 1) % 103)
    assert len(np.unique(batch.targets_BS)) == 100


def test_later_epochs_cut_elsewhere(counting: Split) -> None:
    windows = Windows(counting, 10, seed=3)
    starts = [set(windows.batch(np.arange(10), epoch).ids_BS[:, 0].tolist()) for epoch in range(4)]
    assert starts[0] == set(range(0, 100, 10))
    assert len({frozenset(epoch) for epoch in starts}) > 1


def test_an_epoch_is_a_permutation_and_crosses_batches(counting: Split) -> None:
    windows = Windows(counting, 10, seed=3)
    seen = np.concatenate([training_batch(windows, 3, step, 4).ids_BS for step in range(5)])
    first, second = seen[:10, 0], seen[10:, 0]
    assert sorted(first) == list(range(0, 100, 10))
    assert len(set(second.tolist())) == 10
    assert first.tolist() != sorted(first)


def test_the_order_is_fixed() -> None:
    """Values of Philox, so that no NumPy changes what a seed means."""
    assert _order(0, 0, 8).tolist() == [1, 3, 4, 7, 6, 0, 5, 2]
    assert _order(0, 1, 8).tolist() != _order(0, 0, 8).tolist() != _order(1, 0, 8).tolist()


def test_a_step_does_not_depend_on_the_steps_before(counting: Split) -> None:
    forward = [training_batch(Windows(counting, 10, 3), 3, step, 3).ids_BS for step in range(9)]
    backward = [training_batch(Windows(counting, 10, 3), 3, step, 3).ids_BS for step in reversed(range(9))]
    assert all(np.array_equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))


def test_short_data_are_refused(tmp_path: Path) -> None:
    split = make_split(tmp_path, [range(10)])
    assert len(Windows(split, 9, 0)) == 1
    with pytest.raises(ArchwrightError) as caught:
        Windows(split, 10, 0)
    assert caught.value.code == "TRAIN012"


CHATS = ([1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16], [17, 18])
MASKS = ([0, 0, 1, 1, 1], [0, 0, 1], [0, 1, 0, 0, 0, 0, 0, 1], [0, 0])


def test_conversations_learn_the_marked_tokens_only(tmp_path: Path) -> None:
    rows = Conversations(make_split(tmp_path, CHATS, MASKS), 64)
    batch = rows.batch(np.array([0, 1]))
    assert batch.ids_BS.shape == (2, 64)
    assert batch.ids_BS[0, :5].tolist() == [1, 2, 3, 4, 0]
    assert batch.targets_BS[0, :5].tolist() == [IGNORED, 3, 4, 5, IGNORED]
    assert batch.targets_BS[1, :3].tolist() == [IGNORED, 8, IGNORED]
    assert batch.num_targets == 4
    assert (rows.num_cut, rows.num_left_out, len(rows)) == (0, 1, 3)


def test_long_conversations_lose_their_end(tmp_path: Path) -> None:
    rows = Conversations(make_split(tmp_path, CHATS, MASKS), 4)
    ids, targets = rows.row(2)
    assert (ids.tolist(), targets.tolist()) == ([9, 10, 11, 12], [10, IGNORED, IGNORED, IGNORED])
    assert (rows.num_cut, rows.num_left_out) == (1, 1)
    assert rows.batch(np.array([0])).ids_BS.shape == (1, 4)


def test_rows_are_padded_to_few_widths(tmp_path: Path) -> None:
    lengths = (3, 64, 65, 66, 140)
    split = make_split(tmp_path, [range(n) for n in lengths], [[1] * n for n in lengths])
    rows = Conversations(split, 130)
    assert [rows.batch(np.array([row])).ids_BS.shape[1] for row in range(5)] == [64, 64, 64, 128, 130]


def test_data_without_a_mask_or_a_target_are_refused(tmp_path: Path) -> None:
    for split, code in (
        (make_split(tmp_path, CHATS), "TRAIN013"),
        (make_split(tmp_path, CHATS, [[0] * len(chat) for chat in CHATS]), "TRAIN014"),
    ):
        with pytest.raises(ArchwrightError) as caught:
            make_samples("sft", split, 64, 0)
        assert caught.value.code == code


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 20), number=st.integers(1, 20))
def test_pieces_hold_each_row_once(rows: int, number: int) -> None:
    ids_BS = np.arange(rows * 3).reshape(rows, 3)
    pieces = list(Batch(ids_BS=ids_BS, targets_BS=ids_BS + 1).pieces(number))
    assert np.array_equal(np.concatenate([piece.ids_BS for piece in pieces]), ids_BS)
    assert len(pieces) == min(rows, number)


def test_evaluation_is_spread_and_always_the_same(counting: Split) -> None:
    windows = Windows(counting, 10, seed=3)
    first, second = (np.concatenate([b.ids_BS for b in evaluation_batches(windows, 2, 2)]) for _ in range(2))
    assert np.array_equal(first, second)
    assert first[:, 0].tolist() == [0, 20, 50, 70]
    assert sum(len(batch.ids_BS) for batch in evaluation_batches(windows, 100, 3)) == 10
