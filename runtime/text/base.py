"""What every tokenizer shares: decoding by table, and encoding that never turns a user's text into a special token."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from archwright.runtime.text.byte_table import ByteTable, StreamDecoder
from archwright.runtime.text.special_tokens import CONFIG, GENERATION_CONFIG, SPECIAL_TOKENS_MAP, SpecialTokens
from archwright.spec.errors import ArchwrightError

CHAT_TEMPLATE = "chat_template.jinja"

Prefix = Literal["never", "first", "always"]
"""Where a tokenizer puts a space of its own: nowhere, before a text, or before each text between special tokens."""


class BaseTokenizer(ABC):
    """One vocabulary. Ids are Python integers; see the protocol `Tokenizer` for what each member promises."""

    def __init__(
        self, model_file: Path, *, table: ByteTable, special: SpecialTokens, unknown_id: int | None, prefix: Prefix
    ) -> None:
        self._model_file = model_file
        self._table = table
        self._special = special
        self._forbidden = frozenset(special.ids.values()) - {unknown_id}
        self.prefix: Prefix = prefix
        self.digest = _digest(model_file, special)

    @property
    def folder(self) -> Path:
        return self._model_file.parent

    @property
    def vocab_size(self) -> int:
        return len(self._table)

    @property
    def bos_id(self) -> int | None:
        return self._special.bos_id

    @property
    def eos_id(self) -> int:
        return self._special.eos_id

    @property
    def stop_ids(self) -> frozenset[int]:
        return self._special.stop_ids

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._special.ids

    def encode(self, text: str, *, bos: bool = False, continuation: bool = False) -> list[int]:
        """Ids of `text` as ordinary text: no special token comes out of it, whatever it spells.

        `bos` puts the begin-of-text token first, if there is one; a `continuation` goes on after other tokens, so a
        tokenizer that puts a space before a text does not. Raises TOK005 for a text that is no Unicode.
        """
        start = [self.bos_id] if bos and self.bos_id is not None else []
        return start + self._guarded(text, self._encode(check_unicode(text), continuation), continuation)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, faster."""
        batch = self._encode_batch([check_unicode(text) for text in texts])
        return [self._guarded(text, ids, False) for text, ids in zip(texts, batch, strict=True)]

    def decode(self, ids: Iterable[int], *, continuation: bool = False) -> str:
        """Text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD.

        A `continuation` goes on after other text and keeps its leading space.
        """
        return self._table.decode(ids, continuation=continuation)

    def stream(self, *, continuation: bool = False) -> StreamDecoder:
        """Decodes id by id; the joined pieces equal `decode(ids)`."""
        return StreamDecoder(self._table, continuation=continuation)

    def files(self) -> list[Path]:
        """The files to copy beside a model, so that the copy opens as the same tokenizer."""
        names = (CONFIG, SPECIAL_TOKENS_MAP, GENERATION_CONFIG, CHAT_TEMPLATE)
        return [self._model_file, *(self.folder / name for name in names if (self.folder / name).is_file())]

    @abstractmethod
    def _encode(self, text: str, continuation: bool) -> list[int]: ...

    @abstractmethod
    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def _guarded(self, text: str, ids: list[int], continuation: bool) -> list[int]:
        """`ids`, unless the tokenizer saw a special token in `text`: then the ids of the text cut inside its names.

        sentencepiece never makes a control symbol out of text, and `tokenizers` can be told not to look for special
        tokens; but both still find one whose name is an ordinary entry of the vocabulary.
        """
        if self._forbidden.isdisjoint(ids):
            return ids
        cuts = [i + 1 for i in range(len(text)) if any(text.startswith(name, i) for name in self.special_tokens)]
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if a < b]
        ids = self._encode(parts[0], continuation)
        for part in parts[1:]:
            ids += self._encode(part, True)
        if not self._forbidden.isdisjoint(ids):
            token_id = min(self._forbidden.intersection(ids))
            found = f"special token {token_id} came out of ordinary text"
            raise ArchwrightError("TOK006", found, where=str(self._model_file))
        return ids


_SURROGATE = re.compile("[\ud800-\udfff]")


def check_unicode(text: str) -> str:
    """`text` itself. Raises TOK005 for a lone surrogate, half of a character, which no UTF-8 can hold."""
    match = _SURROGATE.search(text)
    if match:
        found = f"character {match.start()} is U+{ord(match.group()):04X}, half of a surrogate pair"
        raise ArchwrightError("TOK005", f"{found}: not Unicode text")
    return text


def _digest(model_file: Path, special: SpecialTokens) -> str:
    """SHA-256 of what maps text to ids: the model file and the tokens that begin and end a text."""
    ends = json.dumps({"bos": special.bos_id, "eos": special.eos_id}).encode()
    return hashlib.sha256(hashlib.sha256(model_file.read_bytes()).digest() + ends).hexdigest()
