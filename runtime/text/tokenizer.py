"""Text ↔ token ids: the protocol that everything else uses, and the way to open one."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from archwright.runtime.text.base import Prefix
from archwright.runtime.text.byte_table import StreamDecoder
from archwright.runtime.text.huggingface_tokenizer import HuggingFaceTokenizer
from archwright.runtime.text.sentencepiece_tokenizer import SentencePieceTokenizer
from archwright.spec.errors import ArchwrightError

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGINGFACE_FILE = "tokenizer.json"


class Tokenizer(Protocol):
    """One vocabulary; ids are 0 ≤ id < `vocab_size`."""

    prefix: Prefix
    """Where the tokenizer puts a space of its own before a text."""
    digest: str
    """SHA-256 of what maps text to ids; data and models made for one digest fit no other."""

    @property
    def folder(self) -> Path: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end generation: the end of the text, and the ends of a chat's turn."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Text of each special token → id."""
        ...

    def encode(self, text: str, *, bos: bool = False, continuation: bool = False) -> list[int]:
        """Ids of ordinary text: what the text spells never becomes a special token. Raises TOK005 for no Unicode."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Iterable[int], *, continuation: bool = False) -> str:
        """Text without special tokens; bytes that are no UTF-8 become U+FFFD."""
        ...

    def stream(self, *, continuation: bool = False) -> StreamDecoder:
        """Decodes id by id: `.push(id)` gives complete characters only, `.flush()` the rest."""
        ...

    def files(self) -> list[Path]:
        """What to copy beside a model."""
        ...


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a tokenizer folder, a model folder or an artifact, or one file of the two known formats.

    A folder with both files gives its `tokenizer.model`, which is the original wherever both exist.
    Raises `ArchwrightError` TOK001 (nothing there), TOK002 (unreadable), TOK003 (no end-of-text token), TOK004 (tokens
    that are not bytes).
    """
    path = Path(path)
    candidates = [path / SENTENCEPIECE_FILE, path / HUGGINGFACE_FILE] if path.is_dir() else [path]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise ArchwrightError(
            "TOK001",
            f"holds neither {SENTENCEPIECE_FILE} nor {HUGGINGFACE_FILE}" if path.is_dir() else "no such file or folder",
            where=str(path),
            help="give a folder written by `archwright tokenizer train`, or one with a tokenizer.json",
        )
    return HuggingFaceTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)
