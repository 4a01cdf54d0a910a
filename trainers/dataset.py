"""Built data, opened: token streams that lie in memory-mapped files.

    manifest.json                     kind "data"; `details` describes what follows
    train-00000.tokens.bin ...        token ids, uint16 or uint32, little-endian; every shard but the last is full
    train-00000.mask.bin ...          uint8, one a token, only where a source is a chat: 1 = the loss is on this token
    train.documents.bin               int64, little-endian: where each document begins, and the number of tokens
    validation-...                    the same

A document of text is `[bos] text eos`; a chat is what its template renders. Documents follow each other without gaps.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archwright.spec.errors import ArchwrightError
from archwright.spec.manifest import Manifest, read_manifest

FORMAT = 1
SPLITS = ("train", "validation")
DOCUMENTS_DTYPE = np.dtype("<i8")
MASK_DTYPE = np.dtype("u1")
TOKEN_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class Stream:
    """One-dimensional arrays in files, seen as one; a slice reads only what it covers."""

    def __init__(self, files: Sequence[Path], dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._parts = [np.memmap(file, dtype=dtype, mode="r") for file in files if file.stat().st_size > 0]
        self._starts = [0, *np.cumsum([len(part) for part in self._parts]).tolist()]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Elements start ≤ i < stop. A view of the file where they lie in one (do not write to it), else a copy."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"[{start}, {stop}) of {len(self)} elements")
        pieces: list[NDArray[Any]] = []
        while start < stop:
            i = bisect_right(self._starts, start) - 1
            end = min(stop, self._starts[i + 1])
            pieces.append(self._parts[i][start - self._starts[i] : end - self._starts[i]])
            start = end
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self._dtype)


@dataclass(frozen=True)
class Split:
    """The training or the validation part of a dataset."""

    name: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the text that the loss counts: whole texts, and in chats what the assistant says. The
    denominator of bits per byte = summed loss in nats / (ln 2 · num_bytes)."""
    num_loss_tokens: int
    """Tokens whose mask is 1; all of them where there is no mask."""
    _tokens: Stream
    _mask: Stream | None
    _documents: Stream

    @property
    def masked(self) -> bool:
        """Whether some tokens are context only."""
        return self._mask is not None

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Ids of tokens start ≤ i < stop, uint16 or uint32; may be a read-only view of a file."""
        return self._tokens.read(start, stop)

    def mask(self, start: int, stop: int) -> NDArray[np.uint8]:
        """1 where the loss is on the token; all ones where the data have no mask."""
        if self._mask is None:
            return np.ones(len(self.tokens(start, stop)), MASK_DTYPE)
        return self._mask.read(start, stop)

    @property
    def document_offsets(self) -> NDArray[np.int64]:
        """Where each document begins, and last the number of tokens: `num_documents + 1` values."""
        return self._documents.read(0, len(self._documents))

    def bounds(self, document: int) -> tuple[int, int]:
        """First token of a document, and the one after its last."""
        start, stop = self._documents.read(document, document + 2).tolist()
        return start, stop

    def document(self, document: int) -> NDArray[Any]:
        """Ids of one document."""
        return self.tokens(*self.bounds(document))


@dataclass(frozen=True)
class Dataset:
    """A data folder."""

    folder: Path
    train: Split
    validation: Split
    tokenizer_digest: str
    vocab_size: int
    manifest: Manifest


def open_data(folder: str | Path, *, tokenizer_digest: str | None = None) -> Dataset:
    """Opens what `data build` wrote; nothing is read before it is asked for.

    Raises DATA012 when the folder is not built data of this format or a file does not have its listed size, and DATA013
    when `tokenizer_digest` is given and the tokens were made by another tokenizer.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise _unreadable(folder, "no manifest.json there")
    manifest = read_manifest(folder)
    details = manifest.details
    if manifest.kind != "data" or details.get("format") != FORMAT:
        found = f"kind `{manifest.kind}`, format {details.get('format')}"
        raise _unreadable(folder, f"data of format {FORMAT} are needed, this is {found}")
    for name, entry in manifest.files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry.bytes:
            raise _unreadable(folder, f"{name} has {size or 'no'} bytes, the manifest says {entry.bytes}")
    if tokenizer_digest is not None and tokenizer_digest != details["tokenizer_digest"]:
        raise ArchwrightError(
            "DATA013",
            "the data were tokenized by another tokenizer than the one in use",
            where=str(folder),
            help="run `archwright data build` again, or set `tokenizer.path` to the tokenizer that made the data",
        )
    train, validation = (_split(folder, name, details) for name in SPLITS)
    return Dataset(folder, train, validation, details["tokenizer_digest"], details["vocab_size"], manifest)


def _split(folder: Path, name: str, details: dict[str, Any]) -> Split:
    facts = details["splits"][name]
    shards = range(facts["shards"])
    masks = [folder / shard_name(name, i, "mask") for i in shards]
    return Split(
        name=name,
        num_tokens=facts["tokens"],
        num_documents=facts["documents"],
        num_bytes=facts["bytes"],
        num_loss_tokens=facts["loss_tokens"],
        _tokens=Stream([folder / shard_name(name, i, "tokens") for i in shards], TOKEN_DTYPES[details["dtype"]]),
        _mask=Stream(masks, MASK_DTYPE) if details["masked"] else None,
        _documents=Stream([folder / documents_name(name)], DOCUMENTS_DTYPE),
    )


def shard_name(split: str, shard: int, content: str) -> str:
    """File of one shard; `content` is `tokens` or `mask`."""
    return f"{split}-{shard:05d}.{content}.bin"


def documents_name(split: str) -> str:
    return f"{split}.documents.bin"


def _unreadable(folder: Path, found: str) -> ArchwrightError:
    return ArchwrightError(
        "DATA012", found, where=str(folder), help="`data.path` must name a folder written by `archwright data build`"
    )
