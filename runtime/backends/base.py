"""What runs a model step by step: one class that every back end fills in.

B batch, S sequence, L visible cache positions, V vocabulary.
"""

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
CacheT = TypeVar("CacheT")

PREFILL_CHUNK = 512
"""Most tokens of a row that one prefill call computes."""
CALL_BYTES = 256 << 20
"""Most memory for what a prefill call makes of every token: logits, of which only those after a prompt's last are
wanted, and what else `token_bytes` counts."""


class Backend(ABC, Generic[CacheT]):
    """A model with its weights on a device.

    vocab_size: columns of the logits. capacity: tokens that a cache row holds at most. max_batch: rows that one cache
    has at most, None where nothing limits them. description: what computes, in which precision, on which device.
    """

    vocab_size: int
    capacity: int
    max_batch: int | None
    description: str

    @property
    def token_bytes(self) -> int:
        """Memory that a call takes for each of its tokens: the logits, where it makes those of all."""
        return 4 * self.vocab_size

    def call_tokens(self, batch: int) -> int:
        """Tokens of a row that one prefill call computes."""
        most = CALL_BYTES // (batch * self.token_bytes) if self.token_bytes else PREFILL_CHUNK
        return min(PREFILL_CHUNK, max(1, most))

    @abstractmethod
    def new_cache(self, batch: int, positions: int) -> CacheT:
        """Room for `batch` rows of at least `positions` tokens (≤ capacity), which `forward` updates in place."""

    @abstractmethod
    def forward(self, cache: CacheT, ids_BS: Ids, positions_BS: Ids, write_index_B: Ids, visible: int) -> Logits:
        """Logits [B, S, V] of S more tokens a row.

        Their keys and values go to the cache rows write_index .. write_index + S - 1; a token at position p attends to
        the rows ≤ p among the first `visible` ones. The caller keeps write_index + S and `visible` within the cache:
        a write outside it would be lost without a word.
        """

    def forward_last(
        self, cache: CacheT, ids_BS: Ids, positions_BS: Ids, write_index_B: Ids, visible: int, index_B: Ids
    ) -> Logits:
        """The same, but the logits [B, V] of one token a row alone, the `index`th of its S."""
        logits_BSV = self.forward(cache, ids_BS, positions_BS, write_index_B, visible)
        return logits_BSV[np.arange(len(index_B)), index_B]

    def prefill(self, cache: CacheT, ids_BS: Ids, lengths_B: Ids) -> Logits:
        """Fill the cache with right-padded prompts; the logits [B, V] after the last token of each.

        The padding is computed too. It does no harm: no real token attends to a later row, and the first token that is
        decoded overwrites the row that follows its prompt.
        """
        batch, longest = ids_BS.shape
        last_BV = np.empty((batch, self.vocab_size), np.float32)
        size = self.call_tokens(batch)
        for start in range(0, longest, size):
            part_BS = ids_BS[:, start : start + size]
            stop = start + part_BS.shape[1]
            positions_BS = np.broadcast_to(np.arange(start, stop), part_BS.shape)
            index_B = np.clip(lengths_B - 1 - start, 0, stop - start - 1)
            logits_BV = self.forward_last(cache, part_BS, positions_BS, np.full(batch, start), stop, index_B)
            rows = np.flatnonzero((start < lengths_B) & (lengths_B <= stop))
            last_BV[rows] = logits_BV[rows]
        return last_BV

    def decode(self, cache: CacheT, ids_B: Ids, lengths_B: Ids) -> Logits:
        """One more token a row, standing at position `lengths_B`; the logits [B, V] after it."""
        return self.forward(cache, ids_B[:, None], lengths_B[:, None], lengths_B, int(lengths_B.max()) + 1)[:, 0]

    def whole(self, ids_BS: Ids) -> Logits:
        """Logits [B, S, V] of whole sequences, through a fresh cache."""
        batch, length = ids_BS.shape
        positions_BS = np.broadcast_to(np.arange(length), ids_BS.shape)
        return self.forward(self.new_cache(batch, length), ids_BS, positions_BS, np.zeros(batch, np.int64), length)

    def in_pieces(
        self, cache: CacheT, ids_BS: Ids, positions_BS: Ids, write_index_B: Ids, visible: int, size: int
    ) -> Logits:
        """What `forward` gives, by calls of `size` tokens a row: exact, since no token sees later cache rows."""
        pieces = [
            self.forward(
                cache,
                ids_BS[:, start : start + size],
                positions_BS[:, start : start + size],
                write_index_B + start,
                visible,
            )
            for start in range(0, ids_BS.shape[1], size)
        ]
        return np.concatenate(pieces, axis=1)


AnyBackend = Backend[Any]
