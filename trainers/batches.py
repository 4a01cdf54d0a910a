"""Which tokens each step sees: a pure function of (data, seed, step), the same for every plan and after every restart.

B batch, S sequence, I token index.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from archwright.spec import ArchwrightError
from archwright.trainers.dataset import Split

IGNORED = -100
"""The target of a position that does not count."""
_ROUND = 64  # padded lengths are multiples of this, so that a compiled model meets few shapes

Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token ids and, for each position, the id that should come next (-100: not counted)."""

    ids_BS: Ids
    targets_BS: Ids

    @property
    def num_targets(self) -> int:
        return int((self.targets_BS != IGNORED).sum())

    def filled(self, rows: int) -> "Batch":
        """With more rows, none of whose tokens count, so that there are `rows` of them."""
        missing = rows - len(self.ids_BS)
        if missing == 0:
            return self
        return Batch(
            ids_BS=np.pad(self.ids_BS, ((0, missing), (0, 0))),
            targets_BS=np.pad(self.targets_BS, ((0, missing), (0, 0)), constant_values=IGNORED),
        )


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one of `ranks` data ranks sees of a batch: of each of its micro-batches an equal part.

    2 ranks, 2 micro-batches of 4 rows    rank 0: rows 0 1   4 5    rank 1: rows 2 3   6 7
    """

    rank: int = 0
    ranks: int = 1
    micro_batches: int = 1

    def rows(self, batch_size: int) -> Ids:
        """Numbers of the rows, of a batch whose size all ranks and micro-batches divide."""
        numbers = np.arange(batch_size, dtype=np.int64).reshape(self.micro_batches, self.ranks, -1)
        return numbers[:, self.rank].reshape(-1)

    def size(self, batch_size: int) -> int:
        """Rows in each micro-batch of this rank, of a batch of any size."""
        return -(-batch_size // (self.ranks * self.micro_batches))


class Samples(Protocol):
    """Numbered training samples and how several become a batch."""

    def __len__(self) -> int: ...

    def batch(self, numbers: Ids, epoch: int) -> Batch: ...


def make_samples(
    kind: str, split: Split, sequence_length: int, seed: int, *, multiple: int = 1, full: bool = False
) -> "Windows | Conversations":
    """The samples of a training of `kind` (pretrain, sft).

    multiple: that padded lengths are made a multiple of. full: pad all to `sequence_length`.
    """
    if kind == "sft":
        return Conversations(split, sequence_length, sequence_length if full else math.lcm(_ROUND, multiple))
    return Windows(split, sequence_length, seed)


def evaluation_batches(samples: Samples, number: int, batch_size: int, share: Share) -> Iterator[Batch]:
    """A share of at most `number` batches, always the same, of samples spread evenly over the split.

    The last batch may be short: where nothing is left for a rank it gets rows that do not count.
    """
    count = min(len(samples), number * batch_size)
    chosen = np.arange(count, dtype=np.int64) * len(samples) // max(1, count)
    size = share.size(batch_size) * share.micro_batches
    for start in range(0, count, batch_size):
        batch = chosen[start : start + batch_size]
        own = batch[share.rank * size : (share.rank + 1) * size]
        some = samples.batch(own if len(own) else batch[:1], 0)
        if not len(own):
            some = Batch(ids_BS=some.ids_BS, targets_BS=np.full_like(some.targets_BS, IGNORED))
        yield some.filled(size)


def training_batch(samples: Samples, seed: int, step: int, batch_size: int, share: Share) -> Batch:
    """A share of the batch of a step.

    Sample j of the whole training is entry j mod n of the order of epoch j div n.
    """
    wanted = step * batch_size + share.rows(batch_size)
    epochs, places = np.divmod(wanted, len(samples))
    parts = [
        samples.batch(_order(seed, int(epoch), len(samples))[places[epochs == epoch]], int(epoch))
        for epoch in np.unique(epochs)
    ]
    return _join(parts)


class Windows:
    """Pretraining: the packed stream cut into windows of S + 1 tokens, each token a target once an epoch.

    Every epoch starts the first window elsewhere and goes round past the end, so that later epochs see other cuts.
    Documents follow each other in a window, with the end-of-text token between; attention crosses it.
    """

    def __init__(self, split: Split, sequence_length: int, seed: int) -> None:
        """Raises ArchwrightError TRAIN012 where the data is shorter than one window."""
        if split.num_tokens <= sequence_length:
            raise ArchwrightError(
                "TRAIN012",
                f"the training data has {split.num_tokens} tokens, a window needs {sequence_length + 1}",
                help="build more data, or lower train.sequence_length",
            )
        self._split = split
        self._length = sequence_length
        self._seed = seed

    def __len__(self) -> int:
        return self._split.num_tokens // self._length

    def batch(self, numbers: Ids, epoch: int) -> Batch:
        shift = int(_stream(self._seed, f"shift {epoch}").random_raw() % self._length) if epoch else 0
        rows = [self._window(int(number) * self._length + shift) for number in numbers]
        tokens_BI = np.stack(rows)
        return Batch(ids_BS=tokens_BI[:, :-1], targets_BS=tokens_BI[:, 1:])

    def _window(self, start: int) -> Ids:
        total = self._split.num_tokens
        start %= total
        stop = start + self._length + 1
        tokens = self._split.tokens(start, min(stop, total))
        if stop > total:
            tokens = np.concatenate([tokens, self._split.tokens(0, stop - total)])
        return tokens.astype(np.int64)


class Conversations:
    """Finetuning: one conversation a row, padded on the right; only tokens that the mask marks are targets.

    A conversation of more than S + 1 tokens loses its end; one without a target in what remains is left out.
    num_cut, num_left_out: how many.
    """

    def __init__(self, split: Split, sequence_length: int, multiple: int = _ROUND) -> None:
        """multiple: of which padded lengths are.

        Raises ArchwrightError TRAIN013 where the data has no mask, TRAIN014 where no conversation has a target."""
        if not split.masked:
            raise ArchwrightError(
                "TRAIN013",
                "the data has no mask of what to learn: it holds plain text only",
                help="build it from `messages` or `pairs` sources, or train with `kind: pretrain`",
            )
        self._split = split
        self._length, self._multiple = sequence_length, multiple
        lengths = np.diff(split.document_offsets)
        kept = [document for document in range(len(lengths)) if self._has_target(document)]
        self._kept = np.asarray(kept, dtype=np.int64)
        self.num_cut = int((lengths[self._kept] > sequence_length + 1).sum())
        self.num_left_out = len(lengths) - len(kept)
        if not kept:
            raise ArchwrightError(
                "TRAIN014",
                f"no conversation has a word of the assistant within its first {sequence_length + 1} tokens",
                help="raise train.sequence_length, or check the data",
            )

    def __len__(self) -> int:
        return len(self._kept)

    def batch(self, numbers: Ids, epoch: int = 0) -> Batch:
        rows = [self.row(int(number)) for number in numbers]
        longest = max(len(ids_S) for ids_S, _ in rows)
        width = min(self._length, -(-longest // self._multiple) * self._multiple)
        ids_BS = np.zeros((len(rows), width), np.int64)
        targets_BS = np.full((len(rows), width), IGNORED, np.int64)
        for place, (ids_S, targets_S) in enumerate(rows):
            ids_BS[place, : len(ids_S)] = ids_S
            targets_BS[place, : len(targets_S)] = targets_S
        return Batch(ids_BS=ids_BS, targets_BS=targets_BS)

    def row(self, number: int) -> tuple[Ids, Ids]:
        """Ids and targets of a kept conversation, not padded."""
        start, stop = self._bounds(int(self._kept[number]))
        tokens = self._split.tokens(start, stop).astype(np.int64)
        wanted = self._split.mask(start + 1, stop).astype(bool)
        return tokens[:-1], np.where(wanted, tokens[1:], IGNORED)

    def _bounds(self, document: int) -> tuple[int, int]:
        start, stop = self._split.bounds(document)
        return start, min(stop, start + self._length + 1)

    def _has_target(self, document: int) -> bool:
        start, stop = self._bounds(document)
        return stop - start > 1 and bool(self._split.mask(start + 1, stop).any())


def _join(parts: list[Batch]) -> Batch:
    width = max(part.ids_BS.shape[1] for part in parts)

    def widen(rows: Ids, filler: int) -> Ids:
        return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=filler)

    return Batch(
        ids_BS=np.concatenate([widen(part.ids_BS, 0) for part in parts]),
        targets_BS=np.concatenate([widen(part.targets_BS, IGNORED) for part in parts]),
    )


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, number: int) -> Ids:
    """A permutation of 0..number-1. The raw stream of Philox is fixed for all NumPy versions, `permutation` is not."""
    return np.argsort(_stream(seed, f"epoch {epoch}").random_raw(number), kind="stable")


def _stream(seed: int, name: str) -> np.random.Philox:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))
