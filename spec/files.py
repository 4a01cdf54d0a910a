"""Files and folders that are complete or absent, whatever happens while they are written.

Everything is written into a temporary sibling, `.{name}.tmp-{pid}-{host}-{process}-{number}`, flushed to the disk and
then renamed. What a killed process left behind is removed by the next write of the same name on the same host.
"""

import ctypes
import errno
import hashlib
import itertools
import os
import re
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from archwright.spec.errors import ArchwrightError

_HOST = hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]
# A process id can come back (in a container it usually does); with this it is known to be another process.
_PROCESS = secrets.token_hex(4)
_NUMBERS = itertools.count()
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def atomic_folder(path: Path, *, exist: Literal["refuse", "replace"] = "refuse") -> Generator[Path]:
    """Yields an empty temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    `replace` swaps the new folder with the old one in one step where the file system can (Linux), so that a reader
    finds the old or the new. Raises `ArchwrightError` (SPEC090) when `path` exists and `exist` is `refuse`.
    """
    path = Path(os.path.abspath(path))
    recover(path)
    if exist == "refuse":
        refuse_existing(path)
    _make_folder(path.parent)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        if exist == "refuse":
            refuse_existing(path)
        _move_into_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def atomic_write(path: Path, content: bytes | memoryview | str) -> None:
    """Writes a whole file (text as UTF-8), replacing one that exists; a reader finds the old or the new content."""
    path = Path(os.path.abspath(path))
    recover(path)
    _make_folder(path.parent)
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_existing(path: Path) -> None:
    """Raises `ArchwrightError` (SPEC090) where something stands in the way of a new file or folder."""
    if os.path.lexists(path):
        raise ArchwrightError(
            "SPEC090", f"`{path}` exists already", help="choose another name, or remove what is there first"
        )


def _make_folder(folder: Path) -> None:
    """Makes a folder and those above it that are not there, each flushed as an entry of the one above."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync(folder.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{_HOST}-{_PROCESS}-{next(_NUMBERS)}")


def recover(path: Path) -> None:
    """Removes what dead processes of this host left of `path`, as every write of it does first.

    A replaced folder whose successor never came goes back to its name.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.tmp-(\d+)-{_HOST}-([0-9a-f]+)-\d+(\.old)?")
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    for name in siblings:
        match = pattern.fullmatch(name)
        if match is None or _is_alive(int(match[1]), match[2]):
            continue
        stale = path.parent / name
        if match[3] and not os.path.lexists(path):
            stale.rename(path)
        elif stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)


def _is_alive(pid: int, process: str) -> bool:
    if pid == os.getpid():
        return process == _PROCESS
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _move_into_place(temporary: Path, path: Path) -> None:
    replaced = os.path.lexists(path)
    if not replaced:
        temporary.rename(path)
    elif not _exchange(temporary, path):
        _replace_in_two_steps(temporary, path)
    _sync(path.parent)  # before the old is removed, so that a power cut finds the old whole or the new in place
    if replaced:
        _remove(temporary)


def _replace_in_two_steps(temporary: Path, path: Path) -> None:
    """Swaps both. Killed in between, the old folder waits under its `.old` name, and `recover` brings it back."""
    old = temporary.with_name(temporary.name + ".old")
    path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        old.rename(path)
        raise
    old.rename(temporary)  # half removed under the name `.old`, it could be brought back one day


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step (Linux' renameat2); False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root, name)
            if file.is_file() and not file.is_symlink():
                _sync(file)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
