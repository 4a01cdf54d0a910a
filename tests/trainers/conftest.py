"""A spec over a few files of the standard library, and a tokenizer trained on them; shared by the tests of trainers."""

import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from archwright.spec import Spec, load
from archwright.trainers.tokenizer_training import train_tokenizer

SPEC = """\
version: 1
name: small
extends: preset:tiny
model: {vocab_size: 1024}
tokenizer: {kind: sentencepiece, algorithm: bpe, vocab_size: 1024}
data:
  sources:
    - {kind: text, path: texts}
  validation_fraction: 0.2
"""


@pytest.fixture(scope="session")
def stdlib_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """About 400 kB of Python in copies, so that a folder can be a source."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse", "ast", "calendar", "cmd", "copy", "difflib", "heapq", "random", "shutil", "textwrap", "uuid")
    copies = tmp_path_factory.mktemp("stdlib") / "texts"
    copies.mkdir()
    for name in names:
        (copies / f"{name}.py").write_bytes((folder / f"{name}.py").read_bytes())
    return sorted(copies.iterdir())


@pytest.fixture(scope="session")
def spec_file(stdlib_files: list[Path]) -> Path:
    """A spec file beside the folder of texts."""
    file = stdlib_files[0].parents[1] / "spec.yaml"
    file.write_text(SPEC)
    return file


@pytest.fixture(scope="session")
def make_spec(spec_file: Path) -> Callable[..., Spec]:
    """`make_spec({"tokenizer.vocab_size": 600})`: the spec with some values changed."""

    def make(changes: Mapping[str, object] | None = None) -> Spec:
        return load(spec_file, changes)

    return make


@pytest.fixture(scope="session")
def trained_tokenizer(make_spec: Callable[..., Spec], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder of 1,024 tokens."""
    folder = tmp_path_factory.mktemp("tokenizers") / "bpe"
    train_tokenizer(make_spec(), folder)
    return folder
