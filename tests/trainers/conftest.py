"""A spec over a few files of the standard library, and a tokenizer trained on them; shared by the tests of trainers."""

import json
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from archwright.spec import Spec, load
from archwright.trainers.data_build import build_data
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


@pytest.fixture(scope="session")
def built_text(
    make_spec: Callable[..., Spec], trained_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Built data of the texts."""
    folder = tmp_path_factory.mktemp("built") / "text"
    build_data(make_spec({"tokenizer.path": str(trained_tokenizer)}), folder, workers=1)
    return folder


@pytest.fixture(scope="session")
def built_chats(
    make_spec: Callable[..., Spec], trained_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Built data of 60 questions and answers of unequal length."""
    folder = tmp_path_factory.mktemp("built") / "chats"
    pairs = folder.parent / "pairs.jsonl"
    chats = [{"prompt": f"Count to {n}.", "response": " ".join(map(str, range(1, n + 1)))} for n in range(1, 61)]
    pairs.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    changes = {"tokenizer.path": str(trained_tokenizer), "data.sources": [{"kind": "pairs", "path": str(pairs)}]}
    build_data(make_spec(changes), folder, workers=1)
    return folder


@pytest.fixture(scope="session")
def training(trained_tokenizer: Path, built_text: Path) -> dict[str, object]:
    """Overrides that make the spec one of a short training: 12 steps, a checkpoint every 3."""
    return {
        "tokenizer.path": str(trained_tokenizer),
        "data.path": str(built_text),
        "model.hidden_size": 32,
        "model.layer.ffn.hidden_size": 64,
        "train.steps": 12,
        "train.batch_size": 4,
        "train.sequence_length": 48,
        "train.optimizer.learning_rate": 1e-2,
        "train.evaluate": {"every": 5, "batches": 2},
        "train.checkpoint": {"every": 3, "keep": 10},
    }
