"""Documents → tokens, on all cores, into the files that `dataset` describes.

    main process:  read, deduplicate, split ──batches──▶  workers: tokenize  ──in the same order──▶  main: write shards

The order of everything written is the order of reading, so the bytes do not depend on the number of workers.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from archwright.runtime.text import ChatTemplate, Tokenizer, open_chat_template, open_tokenizer
from archwright.spec import ArchwrightError, Spec
from archwright.spec.files import atomic_folder
from archwright.spec.manifest import Manifest, write_manifest
from archwright.trainers.dataset import (
    DOCUMENTS_DTYPE,
    FORMAT,
    MASK_DTYPE,
    SPLITS,
    TOKEN_DTYPES,
    documents_name,
    shard_name,
)
from archwright.trainers.sources import Document, Selection, total_bytes

# Text in one task of a worker: large against the cost of handing it over, small against a data set.
_BATCH_BYTES = 1 << 20
# A worker takes about half a second to start, in which it would tokenize about this much text.
_BYTES_A_WORKER = 4 << 20
# Tasks handed out ahead of the one whose result is awaited, a worker: bounds memory, keeps all of them busy.
_AHEAD = 3

_Batch = list[tuple[Document, bool]]
"""Documents, and whether each is for validation."""

Advance = Callable[[int], None]
"""Is told the number of source bytes that are done."""


@dataclass(frozen=True)
class _Encoded:
    """The tokens of one document."""

    tokens: NDArray[Any]
    mask: NDArray[np.uint8] | None
    num_bytes: int
    held_out: bool


class _Encoder:
    """Tokenizes batches; one in each process."""

    def __init__(self, tokenizer_path: str, masked: bool) -> None:
        self._tokenizer = open_tokenizer(tokenizer_path)
        self._template = open_chat_template(self._tokenizer) if masked else None
        self._dtype = token_dtype(self._tokenizer)

    def __call__(self, batch: _Batch) -> list[_Encoded]:
        texts = [document.text for document, _ in batch if not document.messages]
        ids = iter(self._tokenizer.encode_batch(texts))
        return [
            self._chat(document, held_out) if document.messages else self._text(document, next(ids), held_out)
            for document, held_out in batch
        ]

    def _text(self, document: Document, ids: list[int], held_out: bool) -> _Encoded:
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        # Where one token both begins and ends a text, the end of one document is the beginning of the next.
        start = [] if bos is None or bos == eos else [bos]
        tokens = np.array([*start, *ids, eos], self._dtype)
        mask = None
        if self._template is not None:
            mask = np.ones(len(tokens), MASK_DTYPE)
            mask[: len(start)] = 0
        return _Encoded(tokens, mask, len(document.text.encode()), held_out)

    def _chat(self, document: Document, held_out: bool) -> _Encoded:
        assert isinstance(self._template, ChatTemplate)
        try:
            ids, mask = self._template.encode_masked(document.messages)
        except ArchwrightError as error:
            if error.code == "TOK012":
                raise
            raise ArchwrightError(error.code, error.message, where=document.where, help=error.help) from error
        said = self._tokenizer.decode(token_id for token_id, on in zip(ids, mask, strict=True) if on)
        return _Encoded(np.array(ids, self._dtype), np.array(mask, MASK_DTYPE), len(said.encode()), held_out)


def build_data(spec: Spec, out: Path, *, workers: int | None = None, advance: Advance | None = None) -> Manifest:
    """Reads `spec.data.sources`, tokenizes them and writes the data folder `out`, complete or not at all.

    `workers` is the number of processes (default: as many as there are cores and the text is worth). They are spawned,
    so a script that calls this needs the usual `if __name__ == "__main__":`.

    Raises DATA001 to DATA009 (sources), DATA010 (nothing left to train on), DATA011 (no tokenizer), TOK codes.
    """
    started = time.perf_counter()
    data = spec.data
    if data is None or not data.sources:
        raise ArchwrightError("DATA001", "the spec has no `data.sources`: nothing to read", help="name a source there")
    path = tokenizer_path(spec)
    tokenizer = open_tokenizer(path)
    check_vocabulary(tokenizer, spec)
    masked = any(source.kind in ("messages", "pairs") for source in data.sources)
    if masked:
        open_chat_template(tokenizer).require_generation()
    selection = Selection(data)
    size = total_bytes(data.sources)
    count = max(1, min(num_cores(), size // _BYTES_A_WORKER)) if workers is None else workers
    with atomic_folder(out) as folder:
        with ExitStack() as stack:
            writers = [stack.enter_context(_SplitWriter(folder, name, data.shard_tokens, masked)) for name in SPLITS]
            stream = _encode_all(_batches(selection), path, masked, count, advance or _ignore)
            for encoded in stack.enter_context(closing(stream)):
                writers[encoded.held_out].write(encoded)
        if writers[0].documents == 0:
            raise ArchwrightError(
                "DATA010",
                f"no document is left to train on, of {sum(tally.documents for tally in selection.tallies)} read",
                help="see that the sources hold text, and lower data.validation_fraction or data.min_bytes",
            )
        details = {
            "format": FORMAT,
            "dtype": token_dtype(tokenizer).name,
            "masked": masked,
            "tokenizer_digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "splits": {writer.name: writer.facts() for writer in writers},
            "sources": [asdict(tally) for tally in selection.tallies],
        }
        return write_manifest(folder, kind="data", spec=spec, details=details, measured=_measured(started, size, count))


def tokenizer_path(spec: Spec) -> str:
    """Raises DATA011 unless the spec names a tokenizer."""
    if spec.tokenizer is None or spec.tokenizer.path is None:
        raise ArchwrightError(
            "DATA011",
            "`tokenizer.path` is not set",
            help="train one (`archwright tokenizer train SPEC -o DIR`) and give it: --set tokenizer.path=DIR",
        )
    return spec.tokenizer.path


def check_vocabulary(tokenizer: Tokenizer, spec: Spec) -> None:
    """Raises TOK025 when the tokenizer has more tokens than the model has rows for (fewer are fine)."""
    if tokenizer.vocab_size > spec.model.vocab_size:
        raise ArchwrightError(
            "TOK025",
            f"the tokenizer has {tokenizer.vocab_size} tokens, `model.vocab_size` is {spec.model.vocab_size}",
            where=str(tokenizer.folder),
            help=f"set model.vocab_size to {tokenizer.vocab_size} or more",
        )


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smaller type that holds every id."""
    return TOKEN_DTYPES["uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"]


def _measured(started: float, size: int, workers: int) -> dict[str, Any]:
    return {"seconds": round(time.perf_counter() - started, 3), "source_bytes": size, "workers": workers}


def _ignore(num_bytes: int) -> None:
    pass


def _batches(selection: Iterable[tuple[Document, bool]]) -> Iterator[tuple[_Batch, int]]:
    """Documents in groups of about `_BATCH_BYTES`, with their size."""
    batch: _Batch = []
    size = 0
    for document, held_out in selection:
        batch.append((document, held_out))
        size += document.num_bytes
        if size >= _BATCH_BYTES:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def _encode_all(
    batches: Iterable[tuple[_Batch, int]], path: str, masked: bool, workers: int, advance: Advance
) -> Generator[_Encoded, None, None]:
    """The encoded documents of all batches, in order."""
    if workers == 1:
        encoder = _Encoder(path, masked)
        for batch, size in batches:
            yield from encoder(batch)
            advance(size)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    pending: deque[tuple[Future[list[_Encoded]], int]] = deque()
    try:
        for batch, size in batches:
            pending.append((pool.submit(_encode_in_worker, path, masked, batch), size))
            if len(pending) >= workers * _AHEAD:
                yield from _next_result(pending, advance)
        while pending:
            yield from _next_result(pending, advance)
    except BrokenProcessPool as error:
        raise ArchwrightError(
            "DATA014", "a worker process died, most likely for want of memory", help="free memory, or use fewer cores"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _next_result(pending: deque[tuple[Future[list[_Encoded]], int]], advance: Advance) -> list[_Encoded]:
    future, size = pending.popleft()
    result = future.result()
    advance(size)
    return result


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal; the main one ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="watch-parent", daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose main process was killed would wait for its next task for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@cache
def _encoder(path: str, masked: bool) -> _Encoder:
    """Opened once in each worker."""
    return _Encoder(path, masked)


def _encode_in_worker(path: str, masked: bool, batch: _Batch) -> list[_Encoded]:
    return _encoder(path, masked)(batch)


class _SplitWriter:
    """Appends documents to the shards of one split; a context manager that closes its files."""

    def __init__(self, folder: Path, name: str, shard_tokens: int, masked: bool) -> None:
        self.name = name
        self.documents = 0
        self._folder = folder
        self._shard_tokens = shard_tokens
        self._masked = masked
        self._tokens = self._loss_tokens = self._bytes = self._shards = 0
        self._files: list[BinaryIO] = []
        self._documents = (folder / documents_name(name)).open("wb")
        self._note_offset()

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in [*self._files, self._documents]:
            file.close()

    def write(self, encoded: _Encoded) -> None:
        start, count = 0, len(encoded.tokens)
        while start < count:
            room = self._shard_tokens - self._tokens % self._shard_tokens
            if room == self._shard_tokens:
                self._next_shard()
            stop = min(count, start + room)
            self._files[0].write(encoded.tokens[start:stop].tobytes())
            if encoded.mask is not None:
                self._files[1].write(encoded.mask[start:stop].tobytes())
            self._tokens += stop - start
            start = stop
        self._loss_tokens += count if encoded.mask is None else int(encoded.mask.sum())
        self._bytes += encoded.num_bytes
        self.documents += 1
        self._note_offset()

    def facts(self) -> dict[str, int]:
        return {
            "tokens": self._tokens,
            "loss_tokens": self._loss_tokens,
            "documents": self.documents,
            "bytes": self._bytes,
            "shards": self._shards,
        }

    def _note_offset(self) -> None:
        self._documents.write(np.array([self._tokens], DOCUMENTS_DTYPE).tobytes())

    def _next_shard(self) -> None:
        for file in self._files:
            file.close()
        contents = ("tokens", "mask") if self._masked else ("tokens",)
        self._files = [(self._folder / shard_name(self.name, self._shards, name)).open("wb") for name in contents]
        self._shards += 1
