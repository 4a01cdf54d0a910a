"""`data.sources` → documents, in a fixed order, with every mistake located as file:line."""

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from archwright.runtime.text.base import check_unicode
from archwright.runtime.text.chat import check_messages
from archwright.spec.errors import ArchwrightError
from archwright.spec.models.text import Data, JsonlSource, MessagesSource, PairsSource, Source, TextSource

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """One text, or one chat (then `text` is empty and `messages` is not)."""

    text: str
    messages: tuple[Mapping[str, Any], ...]
    where: str
    """`file:line` of its beginning."""

    @cached_property
    def key(self) -> bytes:
        """SHA-256 of the content: equal documents have equal keys, wherever they stand."""
        content = json.dumps(self.messages, sort_keys=True, ensure_ascii=False) if self.messages else self.text
        return hashlib.sha256((b"chat\0" if self.messages else b"text\0") + content.encode()).digest()

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all that it says."""
        return sum(len(text.encode()) for text in self.texts())

    def texts(self) -> list[str]:
        """What a tokenizer may learn from: the text, or what each message says."""
        return [message["content"] for message in self.messages] if self.messages else [self.text]


@dataclass
class Tally:
    """What became of one source's documents: read = duplicates + empty + too_short + train + validation."""

    kind: str
    path: str
    documents: int = 0
    duplicates: int = 0
    empty: int = 0
    too_short: int = 0
    train: int = 0
    validation: int = 0


@dataclass
class Selection:
    """The documents that are kept, in the order of the sources, and the counts of all others.

    A document goes to the validation split by its hash alone, so that it stays there whatever else is read, in
    whatever order.
    """

    data: Data
    tallies: list[Tally] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Document, bool]]:
        """Pairs (document, it is for validation). Raises DATA001 to DATA009 for what cannot be read."""
        if not self.data.sources:
            raise ArchwrightError("DATA001", "`data.sources` is empty: nothing to read", help="name a source there")
        seen: set[bytes] = set()
        for source in self.data.sources:
            tally = Tally(source.kind, source.path)
            self.tallies.append(tally)
            for document in read_source(source):
                if self._keep(document, tally, seen):
                    held_out = share_of(document.key, "validation") < self.data.validation_fraction
                    tally.validation += held_out
                    tally.train += not held_out
                    yield document, held_out

    def _keep(self, document: Document, tally: Tally, seen: set[bytes]) -> bool:
        tally.documents += 1
        if not document.messages and not document.text.strip():
            tally.empty += 1
            return False
        if not document.messages and len(document.text.encode()) < self.data.min_bytes:
            tally.too_short += 1
            return False
        if self.data.deduplicate == "exact":
            if document.key in seen:
                tally.duplicates += 1
                return False
            seen.add(document.key)
        return True


def share_of(key: bytes, purpose: str) -> float:
    """A number in [0, 1) that depends on a document's content and on the purpose, and on nothing else."""
    # 53 bits are what a float holds: more would round up to 1.
    return (int.from_bytes(hashlib.sha256(f"{purpose}\0".encode() + key).digest()[:8], "big") >> 11) / 2**53


def total_bytes(sources: Sequence[Source]) -> int:
    """Size of all files to read."""
    return sum(file.stat().st_size for source in sources for file in source_files(source))


def source_files(source: Source) -> list[Path]:
    """The files of a source: itself, those of a folder (in JSON sources `*.jsonl`), or what a glob finds; sorted.

    Names that begin with a dot are left out, except where the path spells them. Raises DATA002 when there are none.
    """
    pattern = source.path
    if os.path.isdir(pattern):
        name = "*" if isinstance(source, TextSource) else "*.jsonl"
        pattern = os.path.join(glob.escape(pattern), "**", name)
    found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    files = sorted(Path(name) for name in found if os.path.isfile(name))
    if not files:
        files_of = "files" if isinstance(source, TextSource) else ".jsonl files"
        raise ArchwrightError(
            "DATA002",
            f"no file to read for the source `{source.path}`",
            help=f"give a file, a folder with {files_of} in it, or a glob",
        )
    return files


def read_source(source: Source) -> Iterator[Document]:
    """The documents of one source, all of them."""
    for file in source_files(source):
        if isinstance(source, TextSource):
            yield Document(_decode(file.read_bytes().removeprefix(_BOM), file, 1), (), f"{file}:1")
        else:
            for where, record in _records(file):
                yield _document(source, record, where)


def _document(source: JsonlSource | MessagesSource | PairsSource, record: dict[str, Any], where: str) -> Document:
    if isinstance(source, JsonlSource):
        return Document(_text(record, source.text, where), (), where)
    if isinstance(source, PairsSource):
        prompt, response = _text(record, source.prompt, where), _text(record, source.response, where)
        messages: Any = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
        return Document("", messages, where)
    messages = _field(record, "messages", where)
    try:
        check_messages(messages)
    except ArchwrightError as error:
        raise ArchwrightError("DATA008", error.message, where=where, help=error.help) from error
    for message in messages:
        _check_unicode(message["content"], where)
    if not any(message["role"] == "assistant" for message in messages):
        raise ArchwrightError("DATA009", "the chat has no message of the assistant: nothing to learn", where=where)
    return Document("", tuple(messages), where)


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file with their places; blank lines are passed over."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                record = json.loads(_decode(line.rstrip(b"\r\n"), file, number))
            except json.JSONDecodeError as error:
                raise ArchwrightError("DATA004", f"not JSON: {error.msg}", where=f"{where}:{error.colno}") from error
            except RecursionError as error:
                raise ArchwrightError("DATA004", "JSON nested too deeply", where=where) from error
            if not isinstance(record, dict):
                found = type(record).__name__
                raise ArchwrightError("DATA005", f"each line must hold one JSON object, not a {found}", where=where)
            yield where, record


def _decode(content: bytes, file: Path, line: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise ArchwrightError(
            "DATA003",
            f"byte 0x{content[error.start]:02X} is not UTF-8",
            where=f"{file}:{line}",
            help="convert the file to UTF-8, or name only text files (a glob such as `folder/**/*.txt`)",
        ) from error


def _field(record: dict[str, Any], name: str, where: str) -> Any:
    if name not in record:
        close = get_close_matches(name, list(record), n=1)
        near = f"`{close[0]}` is the nearest of its fields" if close else "name another field in the source"
        known = f"{near}; the object has: {', '.join(record) or 'none'}"
        raise ArchwrightError("DATA006", f"the field `{name}` is missing", where=where, help=known)
    return record[name]


def _text(record: dict[str, Any], name: str, where: str) -> str:
    value = _field(record, name, where)
    if not isinstance(value, str):
        found = "null" if value is None else type(value).__name__
        raise ArchwrightError("DATA007", f"`{name}` must be a string, not {found}", where=where)
    return _check_unicode(value, where)


def _check_unicode(text: str, where: str) -> str:
    try:
        return check_unicode(text)
    except ArchwrightError as error:
        raise ArchwrightError("DATA003", error.message, where=where) from error
