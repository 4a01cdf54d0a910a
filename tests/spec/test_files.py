import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from archwright.spec import ArchwrightError, files
from archwright.spec.files import atomic_folder, atomic_write, sha256_file

KILLED_WRITER = """
import os, sys
from pathlib import Path
from archwright.spec.files import atomic_folder
with atomic_folder(Path(sys.argv[1]), exist="replace") as folder:
    (folder / "half").write_text("half")
    os._exit(9)
"""


def test_a_folder_appears_whole(tmp_path: Path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("text")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "inner" / "file").read_text() == "text"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_folder_vanishes(tmp_path: Path, error: type[BaseException]):
    with pytest.raises(error), atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("text")
        raise error
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_refused_or_replaced(tmp_path: Path):
    out = tmp_path / "out"
    with atomic_folder(out) as folder:
        (folder / "old").write_text("old")
    with pytest.raises(ArchwrightError, match="SPEC090"), atomic_folder(out):
        pytest.fail("entered")
    with atomic_folder(out, exist="replace") as folder:
        (folder / "new").write_text("new")
        assert (out / "old").is_file()
    assert os.listdir(out) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path):
    with pytest.raises(ArchwrightError, match="SPEC090"), atomic_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert os.listdir(tmp_path) == ["out"]


def test_replacing_without_an_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    test_an_existing_folder_is_refused_or_replaced(tmp_path)


def test_an_error_between_two_renames_undoes_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if target == out and not path.name.endswith(".old"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"), atomic_folder(out, exist="replace") as folder:
        (folder / "new").touch()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["old"]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    result = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(out)], check=False)
    assert result.returncode == 9
    left = [name for name in os.listdir(tmp_path) if name != "out"]
    assert len(left) == 1 and left[0].startswith(".out.tmp-")
    assert os.listdir(out) == ["old"]
    other_host = tmp_path / left[0].replace(f"-{files._HOST}-", "-00000000-")
    other_host.mkdir()
    with atomic_folder(out, exist="replace") as folder:
        (folder / "new").touch()
    assert sorted(os.listdir(tmp_path)) == [other_host.name, "out"]


def test_the_living_are_left_alone(tmp_path: Path):
    with atomic_folder(tmp_path / "out") as mine:
        theirs = tmp_path / mine.name.replace(f"-{os.getpid()}-", f"-{os.getppid()}-").replace(
            files._PROCESS, "abcdef01"
        )
        theirs.mkdir()
        with atomic_folder(tmp_path / "out"):
            assert mine.is_dir()
        (tmp_path / "out").rmdir()
    assert theirs.is_dir()


def test_a_recycled_process_id_is_not_taken_for_the_living(tmp_path: Path):
    stale = tmp_path / f".out.tmp-{os.getpid()}-{files._HOST}-00000000-0"
    stale.mkdir()
    atomic_write(tmp_path / "out", "text")
    assert os.listdir(tmp_path) == ["out"]


def test_a_writer_killed_between_two_renames_loses_nothing(tmp_path: Path):
    """Without an atomic exchange the old folder is away for a moment; the next write brings it back."""
    away = tmp_path / f".out.tmp-{os.getpid()}-{files._HOST}-00000000-0.old"
    away.mkdir()
    (away / "old").touch()
    with pytest.raises(ArchwrightError, match="SPEC090"), atomic_folder(tmp_path / "out"):
        pytest.fail("entered")
    assert os.listdir(tmp_path / "out") == ["old"]


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "deep" / "file"
    atomic_write(path, "für")
    assert path.read_bytes() == "für".encode()
    atomic_write(path, b"\0")
    assert path.read_bytes() == b"\0"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, "new")
    assert path.read_bytes() == b"\0"
    assert os.listdir(path.parent) == ["file"]


def test_sha256(tmp_path: Path):
    (tmp_path / "empty").touch()
    assert sha256_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
