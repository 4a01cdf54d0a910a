"""Which tokens a step sees."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archwright.spec import ArchwrightError
from archwright.trainers.batches import (
    IGNORED,
    Batch,
    Conversations,
    Share,
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
    seen = np.concatenate([training_batch(windows, 3, step, 4, Share()).ids_BS for step in range(5)])
    first, second = seen[:10, 0], seen[10:, 0]
    assert sorted(first) == list(range(0, 100, 10))
    assert len(set(second.tolist())) == 10
    assert first.tolist() != sorted(first)


def test_the_order_is_fixed() -> None:
    """Values of Philox, so that no NumPy changes what a seed means."""
    assert _order(0, 0, 8).tolist() == [1, 3, 4, 7, 6, 0, 5, 2]
    assert _order(0, 1, 8).tolist() != _order(0, 0, 8).tolist() != _order(1, 0, 8).tolist()


def test_a_step_does_not_depend_on_the_steps_before(counting: Split) -> None:
    forward = [training_batch(Windows(counting, 10, 3), 3, step, 3, Share()).ids_BS for step in range(9)]
    backward = [training_batch(Windows(counting, 10, 3), 3, step, 3, Share()).ids_BS for step in reversed(range(9))]
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


shares = st.tuples(st.integers(1, 4), st.integers(1, 4))
"""Ranks and micro-batches."""


def shares_of(ranks: int, micro_batches: int) -> list[Share]:
    return [Share(rank=rank, ranks=ranks, micro_batches=micro_batches) for rank in range(ranks)]


@settings(max_examples=50, deadline=None)
@given(shares=shares, size=st.integers(1, 5))
def test_shares_hold_each_row_once(shares: tuple[int, int], size: int) -> None:
    """And the ranks' parts of a micro-batch are together that of one rank."""
    ranks, micro_batches = shares
    rows = size * ranks * micro_batches
    parts = [share.rows(rows).reshape(micro_batches, -1) for share in shares_of(*shares)]
    assert all(share.size(rows) == size for share in shares_of(*shares))
    assert np.array_equal(np.concatenate(parts, axis=1), np.arange(rows).reshape(micro_batches, -1))


def test_the_shares_of_two_ranks() -> None:
    first, second = shares_of(2, 2)
    assert first.rows(8).tolist() == [0, 1, 4, 5] and second.rows(8).tolist() == [2, 3, 6, 7]
    assert Share().rows(5).tolist() == [0, 1, 2, 3, 4]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shares=shares, step=st.integers(0, 9), seed=st.integers(0, 5))
def test_a_step_sees_the_same_rows_however_they_are_shared(
    counting: Split, shares: tuple[int, int], step: int, seed: int
) -> None:
    ranks, micro_batches = shares
    rows, windows = 2 * ranks * micro_batches, Windows(counting, 10, seed)
    whole = training_batch(windows, seed, step, rows, Share())
    for share in shares_of(*shares):
        own = training_batch(windows, seed, step, rows, share)
        assert np.array_equal(own.ids_BS, whole.ids_BS[share.rows(rows)])
        assert np.array_equal(own.targets_BS, whole.targets_BS[share.rows(rows)])


def test_a_batch_is_filled_with_rows_that_do_not_count() -> None:
    ids_BS = np.arange(1, 7).reshape(2, 3)
    batch = Batch(ids_BS=ids_BS, targets_BS=ids_BS + 1)
    assert batch.filled(2) is batch
    filled = batch.filled(5)
    assert filled.ids_BS.shape == filled.targets_BS.shape == (5, 3)
    assert np.array_equal(filled.ids_BS[:2], ids_BS) and np.array_equal(filled.targets_BS[:2], ids_BS + 1)
    assert (filled.targets_BS[2:] == IGNORED).all() and filled.num_targets == 6
    assert (filled.ids_BS[2:] >= 0).all(), "ids that every table has"


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shares=shares, batch_size=st.integers(1, 9), number=st.integers(1, 4))
def test_an_evaluation_counts_each_row_once(
    counting: Split, shares: tuple[int, int], batch_size: int, number: int
) -> None:
    """Also the last batch, which is short: every rank gets as many batches of one size, filled up."""
    windows = Windows(counting, 10, seed=3)
    rows = [list(evaluation_batches(windows, number, batch_size, share)) for share in shares_of(*shares)]
    assert len({len(batches) for batches in rows}) == 1
    size = shares_of(*shares)[0].size(batch_size) * shares[1]
    assert {batch.ids_BS.shape for batches in rows for batch in batches} == {(size, 10)}
    counted = [
        targets.tolist()
        for batches in rows
        for batch in batches
        for targets in batch.targets_BS
        if (targets != IGNORED).any()
    ]
    whole = [targets.tolist() for batch in evaluation_batches(windows, number, batch_size, Share())
             for targets in batch.targets_BS if (targets != IGNORED).any()]  # fmt: skip
    assert sorted(counted) == sorted(whole) and len(whole) == min(10, number * batch_size)
    assert sum(batch.num_targets for batches in rows for batch in batches) == 10 * len(whole)


def test_conversations_may_be_padded_to_lengths_that_ranks_share(tmp_path: Path) -> None:
    lengths = (3, 64, 65, 66, 140)
    split = make_split(tmp_path, [range(n) for n in lengths], [[1] * n for n in lengths])
    shared = make_samples("sft", split, 144, 0, multiple=12)
    assert [shared.batch(np.array([row]), 0).ids_BS.shape[1] for row in range(4)] == [144, 144, 144, 144]
    assert all(
        make_samples("sft", split, 720, 0, multiple=multiple).batch(np.array([4]), 0).ids_BS.shape[1] % multiple == 0
        for multiple in (1, 2, 3, 12, 16)
    )
    full = make_samples("sft", split, 130, 0, full=True)
    assert [full.batch(np.array([row]), 0).ids_BS.shape[1] for row in range(5)] == [130] * 5


def test_evaluation_is_spread_and_always_the_same(counting: Split) -> None:
    windows = Windows(counting, 10, seed=3)
    first, second = (np.concatenate([b.ids_BS for b in evaluation_batches(windows, 2, 2, Share())]) for _ in range(2))
    assert np.array_equal(first, second)
    assert first[:, 0].tolist() == [0, 20, 50, 70]
    assert (
        sum((batch.targets_BS != IGNORED).any(1).sum() for batch in evaluation_batches(windows, 100, 3, Share())) == 10
    )
