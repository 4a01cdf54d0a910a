"""`manifest.json`: what a folder is, and the SHA-256 of every file in it."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, NonNegativeInt, ValidationError

from archwright.spec.digest import spec_digest
from archwright.spec.errors import ArchwrightError
from archwright.spec.files import atomic_write, sha256_file
from archwright.spec.models import Node, Spec

MANIFEST = "manifest.json"

Kind = Literal["model", "artifact", "tokenizer", "data", "run"]


class FileEntry(Node):
    """Hash and size of one file."""

    sha256: str
    bytes: NonNegativeInt


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for NaN and infinity, which Python's JSON knows and JSON does not."""
    json.dumps(facts, allow_nan=False)
    return facts


Facts = Annotated[dict[str, Any], AfterValidator(_plain)]


class Manifest(Node):
    """The content of `manifest.json`."""

    format: Literal["archwright"] = "archwright"
    version: Literal[1] = 1
    kind: Kind
    spec_digest: str | None
    """Of the spec that the folder was made from (`archwright.spec.spec_digest`)."""
    files: dict[str, FileEntry]
    """By path relative to the folder, with `/`."""
    details: Facts
    """Facts that the same inputs give again."""
    measured: Facts | None
    """Numbers that another run may give differently."""


def write_manifest(
    folder: Path,
    *,
    kind: Kind,
    spec: Spec | None,
    details: dict[str, Any],
    measured: dict[str, Any] | None = None,
    known: Mapping[Path, FileEntry] | None = None,
) -> Manifest:
    """Hashes every file in `folder` and writes its manifest, byte-equal for equal files, details and measurements.

    known: entries of files whose writer hashed them on the way; these are not read again.
    """
    names = sorted(_file_names(folder))

    def entry_of(name: str) -> FileEntry:
        return (known or {}).get(folder / name) or _entry(folder / name)

    with ThreadPoolExecutor() as pool:
        entries = list(pool.map(entry_of, names))
    files = dict(zip(names, entries, strict=True))
    for name, entry in files.items():
        size = (folder / name).stat().st_size
        assert size == entry.bytes, f"{name} has {size} bytes, {entry.bytes} were written"
    digest = spec_digest(spec) if spec is not None else None
    manifest = Manifest(kind=kind, spec_digest=digest, files=files, details=details, measured=measured)
    content = manifest.model_dump(mode="json")
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    atomic_write(folder / MANIFEST, text + "\n")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Raises `ArchwrightError` (SPEC091) when there is no manifest or it is not one of this version."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArchwrightError(
            "SPEC091",
            f"`{folder}` holds no readable {MANIFEST} ({error.strerror or error})",
            help="give a folder written by archwright; one without a manifest was never finished",
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ArchwrightError(
            "SPEC091",
            f"not a manifest of this version: {place + ': ' if place else ''}{first['msg']}",
            where=str(path),
            help="write the folder again with this version of archwright",
        ) from error


def check_manifest(folder: Path) -> list[str]:
    """One line a file (`name: what is wrong`) that is missing, changed or not listed; empty when nothing is."""
    manifest = read_manifest(folder)
    present = _file_names(folder)
    problems = [f"{name}: not listed in {MANIFEST}" for name in sorted(present - manifest.files.keys())]
    for name, entry in sorted(manifest.files.items()):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            problems.append(f"{name}: points outside the folder")
        elif name not in present:
            problems.append(f"{name}: missing")
        elif (size := (folder / name).stat().st_size) != entry.bytes:
            problems.append(f"{name}: has {size} bytes, {MANIFEST} says {entry.bytes}")
        elif sha256_file(folder / name) != entry.sha256:
            problems.append(f"{name}: its SHA-256 differs from {MANIFEST}")
    return problems


def _entry(file: Path) -> FileEntry:
    return FileEntry(sha256=sha256_file(file), bytes=file.stat().st_size)


def _file_names(folder: Path) -> set[str]:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return names - {MANIFEST}
