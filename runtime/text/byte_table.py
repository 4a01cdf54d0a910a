"""Token ids → text, whole or as a stream, through one table of bytes.

Every token stands for a fixed string of bytes (nothing for a special token), and a text is the UTF-8 decoding of the
joined bytes. That holds for sentencepiece models with `byte_fallback` and for byte-level BPE, and makes streaming
exact: an incremental UTF-8 decoder over the same bytes gives the same characters.
"""

import codecs
from collections.abc import Iterable, Sequence


class ByteTable:
    """The bytes of every token. `strips_space`: the tokenizer puts a space before a text, and decoding removes it."""

    def __init__(self, tokens: Sequence[bytes], *, strips_space: bool) -> None:
        self._tokens = tuple(tokens)
        self.strips_space = strips_space

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, token_id: int) -> bytes:
        """Bytes of one token; ids beyond the table (a padded vocabulary) have none."""
        return self._tokens[token_id] if 0 <= token_id < len(self._tokens) else b""

    def decode(self, ids: Iterable[int], *, continuation: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. A `continuation` keeps its leading space."""
        joined = b"".join(self[token_id] for token_id in ids)
        if self.strips_space and not continuation:
            joined = joined.removeprefix(b" ")
        return joined.decode("utf-8", errors="replace")


class StreamDecoder:
    """Turns ids into text as they come; `"".join(push(id) ...) + flush()` equals `decode(ids)`.

    A token may end inside a character (byte tokens do): such bytes are held back until the character is complete.
    """

    def __init__(self, table: ByteTable, *, continuation: bool = False) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = table.strips_space and not continuation

    def push(self, token_id: int) -> str:
        """The characters that this token completes, maybe none."""
        piece = self._table[int(token_id)]
        if self._at_start and piece:
            piece = piece.removeprefix(b" ")
            self._at_start = False
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What was held back: U+FFFD for a character that never got complete. The stream may be used again."""
        return self._decoder.decode(b"", final=True)
