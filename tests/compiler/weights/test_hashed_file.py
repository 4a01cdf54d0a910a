"""Bytes and hash of files that are written past the page cache, where writes fail as well."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from archwright.compiler.weights import hashed_file
from archwright.compiler.weights.hashed_file import NUM_PIECES, PIECE_BYTES, HashedFile

SIZES = [0, 1, 4096, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, (NUM_PIECES + 2) * PIECE_BYTES + 777]


def content(size: int) -> bytes:
    return np.random.default_rng(0).bytes(size)


def written(path: Path, data: bytes, step: int) -> HashedFile:
    with HashedFile(path) as file:
        for start in range(0, len(data), step):
            file.write(data[start : start + step])
            file.write(b"")
    return file


def whole(file: HashedFile, path: Path, data: bytes) -> bool:
    return (file.sha256, file.num_bytes) == (hashlib.sha256(data).hexdigest(), len(data)) and path.read_bytes() == data


@pytest.mark.parametrize("step", [99_991, 3 * PIECE_BYTES])
@pytest.mark.parametrize("size", SIZES)
def test_bytes_hash_and_size(tmp_path: Path, size: int, step: int) -> None:
    (tmp_path / "data").write_bytes(b"of an earlier file")
    data = content(size)
    assert whole(written(tmp_path / "data", data, step), tmp_path / "data", data)


def test_arrays_are_written_as_they_lie_in_memory(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    with HashedFile(tmp_path / "data") as file:
        file.write(array.view(np.uint8).data)
        file.write(np.empty((0, 4), np.uint8).data)
    assert whole(file, tmp_path / "data", array.tobytes())


def test_a_file_system_without_direct_writes_is_written_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = hashed_file.fcntl.fcntl

    def refusing(descriptor: int, command: int, flags: int = 0) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(descriptor, command, flags)

    monkeypatch.setattr(hashed_file.fcntl, "fcntl", refusing)
    data = content(SIZES[-1])
    assert whole(written(tmp_path / "data", data, PIECE_BYTES), tmp_path / "data", data)


def replaced_write(monkeypatch: pytest.MonkeyPatch, answer: Callable[[int, int], int]) -> None:
    """`answer(number of the write, size)` says how much of it is done, or raises."""
    original, sizes = os.write, list[int]()

    def write(descriptor: int, data: memoryview) -> int:
        sizes.append(len(data))
        return original(descriptor, data[: answer(len(sizes), len(data))])

    monkeypatch.setattr(hashed_file.os, "write", write)


@pytest.mark.parametrize("cut", [512 * 9, 1001])
def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    """Behind 1001 bytes no direct write is possible: its place is not a multiple of the disk's block."""
    replaced_write(monkeypatch, lambda number, size: min(size, cut) if number == 2 else size)
    data = content(SIZES[-1])
    assert whole(written(tmp_path / "data", data, PIECE_BYTES), tmp_path / "data", data)


@pytest.mark.parametrize("failing", [1, 3, NUM_PIECES + 3])
def test_an_error_of_the_disk_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    def answer(number: int, size: int) -> int:
        if number >= failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return size

    replaced_write(monkeypatch, answer)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "data", content(SIZES[-1]), PIECE_BYTES)


def test_what_is_written_is_on_the_disk_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pieces go out directly where the file system can; the tests' may not be able to."""
    flags: list[int] = []
    original = os.write

    def write(descriptor: int, data: memoryview) -> int:
        flags.append(hashed_file.fcntl.fcntl(descriptor, hashed_file.fcntl.F_GETFL) & os.O_DIRECT)
        return original(descriptor, data)

    monkeypatch.setattr(hashed_file.os, "write", write)
    probe = tmp_path / "probe"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct writes")
    written(tmp_path / "data", content(2 * PIECE_BYTES + 5), PIECE_BYTES)
    assert flags == [os.O_DIRECT, os.O_DIRECT, 0]
