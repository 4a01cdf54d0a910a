"""A large file, written from its beginning to its end: hashed on the way, and past the page cache.

Through the page cache each byte is copied once more into memory that the system must find first, and hashing the file
afterwards reads all of it again. Here whole pieces go to the disk straight from the memory that they were hashed in
(O_DIRECT), where the file system can; what does not fill a piece, and so a small file as a whole, is written plainly.
"""

import errno
import fcntl
import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

PIECE_BYTES = 4 << 20
"""Of one write; a multiple of every disk's block size."""
NUM_PIECES = 4
"""One that is filled, and others that are hashed and written meanwhile, by a thread each."""
_DIRECT = getattr(os, "O_DIRECT", 0)


class HashedFile:
    """A context manager. `sha256`, in hexadecimal, and `num_bytes` are those of the whole file when it has ended well.

    What is written is what was hashed, so that `verify` later sees what a disk does to it; it is not flushed.
    Any call may raise the OSError of an earlier write.
    """

    def __init__(self, path: Path) -> None:
        self.num_bytes = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._hash = hashlib.sha256()
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._direct: bool | None = None
        self._pieces: list[NDArray[np.uint8]] = []
        self._busy: list[tuple[Future[None], ...]] = []
        self._current = -1
        self._filled = PIECE_BYTES

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: Any) -> None:
        """Append the bytes of a contiguous buffer."""
        if not memoryview(data).nbytes:  # NumPy refuses it
            return
        rest = np.frombuffer(data, np.uint8)
        self.num_bytes += len(rest)
        while len(rest):
            if self._filled == PIECE_BYTES:
                self._next_piece()
            count = min(len(rest), PIECE_BYTES - self._filled)
            self._pieces[self._current][self._filled : self._filled + count] = rest[:count]
            self._filled += count
            rest = rest[count:]
            if self._filled == PIECE_BYTES:
                self._hand_over()

    def _next_piece(self) -> None:
        """The piece that was handed over first, once it is hashed and written; at the beginning a new one."""
        self._filled = 0
        self._current = (self._current + 1) % NUM_PIECES
        if self._current < len(self._pieces):
            self._wait(self._current)
        else:
            self._pieces.append(np.frombuffer(mmap.mmap(-1, PIECE_BYTES), np.uint8))  # aligned to a page
            self._busy.append(())

    def _hand_over(self) -> None:
        if self._direct is None:
            self._direct = self._set_direct(True)
        piece = self._pieces[self._current]
        self._busy[self._current] = (
            self._hasher.submit(self._hash.update, piece.data),
            self._writer.submit(self._write_all, piece.data),
        )

    def _wait(self, index: int) -> None:
        for future in self._busy[index]:
            future.result()

    def _write_all(self, data: memoryview) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = self._set_direct(False)  # after a short write, or where blocks are very large

    def _set_direct(self, direct: bool) -> bool:
        """Have writes pass by the page cache, or not. Returns whether they do."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | _DIRECT if direct else flags & ~_DIRECT)
        except OSError:
            return False
        return direct and _DIRECT != 0

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._hasher.shutdown(cancel_futures=True)
            self._writer.shutdown(cancel_futures=True)
            os.close(self._descriptor)

    def _finish(self) -> None:
        for index in range(len(self._pieces)):
            self._wait(index)
        if self._filled < PIECE_BYTES:
            rest = self._pieces[self._current][: self._filled].data
            self._direct = self._set_direct(False)
            self._hash.update(rest)
            self._write_all(rest)
