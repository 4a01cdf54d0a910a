"""Small models on disk, shared by the tests of the runtime."""

import io
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import sentencepiece

from archwright.compiler.passes import lower
from archwright.compiler.weights.folder import weight_tensors, write_model_folder
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.runtime import build
from archwright.runtime.text.chat import TURN_BEGIN, TURN_END
from archwright.spec import load

SPEC = """\
version: 1
name: small
model:
  vocab_size: 400
  hidden_size: 32
  max_positions: 96
  layers: 2
  layer:
    norm: {kind: rmsnorm}
    attention: {kind: gqa, heads: 4, kv_heads: 2, head_dim: 8, mask: {kind: causal}, position: {kind: rope}}
    ffn: {kind: swiglu, hidden_size: 64}
  init: {kind: normal, std: 0.5}
"""


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece tokenizer of 384 tokens (so 16 rows of the models' vocabulary are not its own) with ChatML."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["the", "stop", "text", "model", "token", "naïve", "über", "日本", "of", "writes", "reads"]
    chooser = random.Random(0)
    lines = [" ".join(chooser.choices(words, k=12)) for _ in range(200)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=384,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        control_symbols=[TURN_BEGIN, TURN_END],
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="session")
def write_spec(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def write(text: str = SPEC) -> Path:
        path = tmp_path_factory.mktemp("spec") / "small.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="session")
def write_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Callable[..., Path]:
    """Make a model folder with initial weights."""

    def write(
        overrides: Mapping[str, object] | None = None,
        *,
        seed: int = 0,
        precision: str = "float32",
        tokenizer: bool = True,
    ) -> Path:
        folder = tmp_path_factory.mktemp("models")
        (folder / "small.yaml").write_text(SPEC)
        spec = load(folder / "small.yaml", overrides or {})
        program = lower(spec)
        tensors = weight_tensors(program, GeneratedWeights(params=program.params(), seed=seed), precision)
        files = [tokenizer_folder / "tokenizer.model"] if tokenizer else []
        write_model_folder(folder / "model", spec, tensors, files, details={})
        return folder / "model"

    return write


@pytest.fixture(scope="session")
def model_folder(write_model: Callable[..., Path]) -> Path:
    return write_model()


@pytest.fixture(scope="session")
def build_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Build a model folder into an artifact."""

    def build_one(model: Path, overrides: Mapping[str, object] | None = None) -> Path:
        out = tmp_path_factory.mktemp("artifacts") / "artifact"
        assert build(model, out, overrides=overrides or {}).ok
        return out

    return build_one


@pytest.fixture(scope="session")
def artifact(build_artifact: Callable[..., Path], model_folder: Path) -> Path:
    """One rank, float32. Shared: copy it before changing it."""
    return build_artifact(model_folder)


@pytest.fixture(scope="session")
def two_ranks(build_artifact: Callable[..., Path], model_folder: Path) -> Path:
    """The same model on two ranks. Shared: copy it before changing it."""
    return build_artifact(model_folder, {"build.parallel.tensor": 2})
