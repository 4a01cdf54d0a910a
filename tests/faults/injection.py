"""A disk that fails at a chosen moment: Python's own file-system calls, replaced while a `Disk` is entered.

Every change below the disk's root is a point, numbered in the order in which they come. One of them can fail in three
ways, which are what a full disk and a killed process look like from inside:

    error   this one call raises ENOSPC, and whatever is tried later succeeds
    full    from this call on nothing that takes space succeeds; a write is cut in the middle first
    kill    SIGKILL before the call; a write is cut in the middle first

Files that native code would write without Python are not seen; `unseen` finds them.
"""

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal

from archwright.spec import files

Mode = Literal["error", "full", "kill"]
MODES: tuple[Mode, ...] = ("error", "full", "kill")
SPACE = frozenset({"open", "write", "mkdir", "sync"})
"""Kinds of points that a full disk refuses; it still renames and removes."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CALLS = {
    "mkdir": "mkdir",
    "rmdir": "remove",
    "unlink": "remove",
    "remove": "remove",
    "truncate": "write",
    "link": "open",
    "symlink": "open",
}


@dataclass(frozen=True)
class Point:
    """One change. kind: open, write, sync, mkdir, rename, exchange or remove. target: the new name of a rename."""

    kind: str
    path: str
    target: str = ""


@dataclass(frozen=True)
class Fault:
    """What happens at the point with this number (from 0)."""

    number: int
    mode: Mode


class Disk:
    """A context manager: notes the points below `root`, and lets the fault happen."""

    def __init__(self, root: Path, fault: Fault | None = None) -> None:
        self.points: list[Point] = []
        self._root = f"{root.resolve()}{os.sep}"
        self._fault = fault
        self._full = False
        self._replaced: list[tuple[ModuleType, str, Any]] = []

    def __enter__(self) -> "Disk":
        self._original_open = builtins.open
        for module in (builtins, io):
            self._replace(module, "open", self._open)
        for name, kind in _CALLS.items():
            self._replace(os, name, self._by_path(kind, getattr(os, name)))
        for name in ("rename", "replace"):
            self._replace(os, name, self._by_two_paths("rename", getattr(os, name)))
        for name in ("fsync", "fdatasync"):
            self._replace(os, name, self._by_descriptor("sync", getattr(os, name)))
        self._replace(os, "open", self._os_open(os.open))
        self._replace(os, "write", self._os_write(os.write))
        self._replace(os, "sendfile", self._os_sendfile(os.sendfile))
        self._replace(files, "_exchange", self._by_two_paths("exchange", files._exchange))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, name, original in reversed(self._replaced):
            setattr(module, name, original)
        self._replaced.clear()

    def repair(self) -> None:
        """No fault from now on."""
        self._fault, self._full = None, False

    def _replace(self, module: ModuleType, name: str, function: Callable[..., Any]) -> None:
        self._replaced.append((module, name, getattr(module, name)))
        setattr(module, name, function)

    def _reach(self, kind: str, path: str, target: str = "") -> bool:
        """Note a point. True where a write is to be cut; otherwise a fault of this point has happened here."""
        if not f"{path}{os.sep}".startswith(self._root) and not target.startswith(self._root):
            return False
        number = len(self.points)
        self.points.append(Point(kind, path, target))
        if self._full and kind in SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if self._fault is None or self._fault.number != number:
            return False
        self._full = self._fault.mode == "full"
        if kind == "write" and self._fault.mode != "error":
            return True
        if self._fault.mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def write(self, path: str, size: int, write: Callable[[int], int]) -> int:
        """A write of `size` bytes, of which `write(n)` does the first n."""
        if not self._reach("write", path):
            return write(size)
        done = write(size // 2)
        assert self._fault is not None
        if self._fault.mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    def _open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        """`open`, whose files write through `_File`."""
        if isinstance(file, int) or not set(mode) & set("wxa+"):
            return self._original_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        path = _absolute(file)
        self._reach("open", path)
        raw = _File(self, path, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffer
        return io.TextIOWrapper(buffer, encoding, errors, newline, line_buffering=buffering == 1)

    def _by_path(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(path: Any, *more: Any, dir_fd: int | None = None, **named: Any) -> Any:
            if isinstance(path, int) or (kind == "mkdir" and os.path.isdir(path)):
                return call(path, *more, **named)  # a folder that is there already is no change
            self._reach(kind, _absolute(path, dir_fd))
            return call(path, *more, **named) if dir_fd is None else call(path, *more, dir_fd=dir_fd, **named)

        return guarded

    def _by_two_paths(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(path: Any, target: Any, **named: Any) -> Any:
            self._reach(kind, _absolute(path), _absolute(target))
            return call(path, target, **named)

        return guarded

    def _by_descriptor(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(descriptor: int) -> Any:
            self._reach(kind, _path_of(descriptor))
            return call(descriptor)

        return guarded

    def _os_open(self, call: Callable[..., int]) -> Callable[..., int]:
        def guarded(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if flags & _WRITING:
                self._reach("open", _absolute(path, dir_fd))
            return call(path, flags, mode, dir_fd=dir_fd)

        return guarded

    def _os_write(self, call: Callable[..., int]) -> Callable[..., int]:
        def guarded(descriptor: int, data: Any) -> int:
            return self.write(_path_of(descriptor), len(data), lambda size: call(descriptor, data[:size]))

        return guarded

    def _os_sendfile(self, call: Callable[..., int]) -> Callable[..., int]:
        def guarded(out_fd: int, in_fd: int, offset: int, count: int) -> int:
            left = max(0, min(count, os.fstat(in_fd).st_size - offset))
            if left == 0:
                return 0
            return self.write(_path_of(out_fd), left, lambda size: call(out_fd, in_fd, offset, size) if size else 0)

        return guarded


class _File(io.FileIO):
    """An open file whose writes are points."""

    def __init__(self, disk: Disk, path: str, mode: str) -> None:
        super().__init__(path, mode)
        self._disk = disk
        self._path = path

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        plain = super().write
        return self._disk.write(self._path, len(view), lambda size: plain(view[:size]))


def _absolute(path: Any, dir_fd: int | None = None) -> str:
    name = os.fsdecode(path)
    return os.path.abspath(name if dir_fd is None else os.path.join(_path_of(dir_fd), name))


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def unseen(points: Iterable[Point], root: Path) -> set[str]:
    """Names of files below `root` that were opened for writing by no point: a way of writing that is not replaced."""
    opened = {Path(point.path).name for point in points if point.kind == "open"}
    renamed = {Path(point.target).name for point in points if point.kind == "rename"}
    return {path.name for path in root.rglob("*") if path.is_file()} - opened - renamed


def unflushed(points: Iterable[Point], journal: str = "") -> list[str]:
    """What a power cut could lose of something that has its final name; each as a sentence.

    A file must be flushed between its last write and the rename that publishes it or its folder, and the folder that
    holds the new name afterwards. journal: name of a file that must be flushed whenever a folder is published.
    """
    problems: list[str] = []
    dirty_files, dirty_folders, made = set[str](), set[str](), set[str]()
    for point in points:
        if point.kind == "write":
            dirty_files.add(point.path)
        elif point.kind in ("open", "mkdir"):
            dirty_folders.add(os.path.dirname(point.path))
            made |= {point.path} if point.kind == "mkdir" else set()
        elif point.kind in ("sync", "remove"):
            dirty_files.discard(point.path)
            dirty_folders.discard(point.path)
        elif point.kind in ("rename", "exchange"):
            late = {path for path in dirty_files | dirty_folders if f"{path}/".startswith(f"{point.path}/")}
            if point.path in made:
                late |= {path for path in dirty_files if os.path.basename(path) == journal}
            folder = os.path.dirname(point.target)
            if folder in made and os.path.dirname(folder) in dirty_folders and ".tmp-" not in folder:
                late.add(os.path.dirname(folder))
            problems += [f"{path} is not flushed when {point.target} appears" for path in sorted(late)]
            dirty_files, dirty_folders = dirty_files - late, dirty_folders - late | {os.path.dirname(point.target)}
    left = sorted(path for path in dirty_folders if os.path.isdir(path))
    return problems + [f"the entries of {path} are not flushed" for path in left]
