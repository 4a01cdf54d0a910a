import json
from pathlib import Path

import pytest

from archwright.spec import ArchwrightError, load, spec_digest
from archwright.spec.manifest import MANIFEST, FileEntry, check_manifest, read_manifest, write_manifest


def make(folder: Path) -> Path:
    (folder / "rank0").mkdir(parents=True)
    (folder / "rank0" / "weights").write_bytes(b"weights")
    (folder / "spec.yaml").write_text("spec")
    write_manifest(folder, kind="model", spec=load("preset:tiny"), details={"a": None}, measured={"error": 1e-7})
    return folder


def test_a_manifest_lists_every_file_and_comes_back(tmp_path: Path):
    manifest = read_manifest(make(tmp_path))
    assert manifest.files.keys() == {"rank0/weights", "spec.yaml"}
    assert manifest.files["rank0/weights"].bytes == 7
    assert (manifest.kind, manifest.details, manifest.measured) == ("model", {"a": None}, {"error": 1e-7})
    assert manifest.spec_digest == spec_digest(load("preset:tiny"))
    assert check_manifest(tmp_path) == []
    assert json.loads((tmp_path / MANIFEST).read_text())["format"] == "archwright"


def test_equal_content_gives_equal_bytes(tmp_path: Path):
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert (first / MANIFEST).read_bytes() == (second / MANIFEST).read_bytes()


def test_hashes_that_the_writer_knows_are_taken(tmp_path: Path):
    (tmp_path / "known").write_bytes(b"weights")
    entry = FileEntry(sha256="of what was written", bytes=7)
    manifest = write_manifest(tmp_path, kind="model", spec=None, details={}, known={tmp_path / "known": entry})
    assert manifest.files == {"known": entry}
    assert check_manifest(tmp_path) == ["known: its SHA-256 differs from manifest.json"], "verify reads the file"
    (tmp_path / "known").write_bytes(b"more weights")
    with pytest.raises(AssertionError, match="known has 12 bytes, 7 were written"):
        write_manifest(tmp_path, kind="model", spec=None, details={}, known={tmp_path / "known": entry})


def test_every_difference_is_named(tmp_path: Path):
    make(tmp_path)
    (tmp_path / "rank0" / "weights").write_bytes(b"weightz")
    (tmp_path / "spec.yaml").unlink()
    (tmp_path / "extra").touch()
    assert check_manifest(tmp_path) == [
        "extra: not listed in manifest.json",
        "rank0/weights: its SHA-256 differs from manifest.json",
        "spec.yaml: missing",
    ]
    (tmp_path / "rank0" / "weights").write_bytes(b"w")
    assert "rank0/weights: has 1 bytes, manifest.json says 7" in check_manifest(tmp_path)


def test_a_path_out_of_the_folder_is_not_followed(tmp_path: Path):
    make(tmp_path / "model")
    (tmp_path / "secret").write_text("secret")
    content = json.loads((tmp_path / "model" / MANIFEST).read_text())
    content["files"]["../secret"] = content["files"]["spec.yaml"]
    (tmp_path / "model" / MANIFEST).write_text(json.dumps(content))
    assert check_manifest(tmp_path / "model") == ["../secret: points outside the folder"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no readable manifest"),
        ("{", "not a manifest"),
        ('{"format": "archwright", "version": 2}', "not a manifest"),
        ('{"kind": "data", "spec_digest": null, "files": {}, "details": {"a": [NaN]}, "measured": {}}', "not JSON"),
        ('{"kind": "data", "spec_digest": null, "files": {}, "details": {}, "measured": {"a": 1e999}}', "not JSON"),
    ],
)
def test_no_manifest_or_another_one(tmp_path: Path, text: str | None, message: str):
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ArchwrightError, match=message) as error:
        check_manifest(tmp_path)
    assert error.value.code == "SPEC091" and error.value.help
