"""`eval`: every token once, with the right context, and the sums behind the numbers."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from archwright.compiler import compile_module
from archwright.runtime import open_model
from archwright.spec import ArchwrightError, Spec
from archwright.spec.cli import main
from archwright.trainers.dataset import open_data
from archwright.trainers.eval_verb import _cross_entropy, score_split, sliding_windows
from archwright.trainers.launch import World
from archwright.trainers.training import train_in_world

MakeSpec = Callable[..., Spec]
Overrides = dict[str, object]


@pytest.fixture(scope="module")
def run(make_spec: MakeSpec, training: Overrides, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_in_world(make_spec({**training, "train.steps": 6}), folder, World(), resume=False)
    return folder


@given(start=st.integers(0, 50), length=st.integers(0, 200), context=st.integers(1, 40))
def test_windows_score_every_token_but_the_first_once(start: int, length: int, context: int) -> None:
    stop = start + length
    windows = list(sliding_windows(start, stop, context))
    scored = [token for window in windows for token in range(window.fresh, window.stop)]
    assert scored == list(range(start + 1, stop))
    for number, window in enumerate(windows):
        assert start <= window.start < window.fresh < window.stop <= stop
        assert window.stop - 1 - window.start <= context
        if number:
            assert window.fresh - window.start > context // 2


def test_cross_entropy_is_that_of_torch() -> None:
    logits = torch.randn(7, 30, generator=torch.Generator().manual_seed(0)) * 20
    targets = torch.arange(7)
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    assert np.allclose(_cross_entropy(logits.numpy(), targets.numpy()), expected.numpy(), rtol=1e-6)
    assert len(_cross_entropy(logits.numpy()[:0], targets.numpy()[:0])) == 0


def test_text_is_scored_as_one_stream(run: Path, built_text: Path) -> None:
    """Against a loop that asks for one token at a time."""
    split = open_data(built_text).validation
    model = open_model(run)
    score = score_split(model, split, 32)
    assert score.tokens == split.num_tokens - 1
    assert score.bytes == split.num_bytes
    module = compile_module(run)
    tokens = torch.from_numpy(split.tokens(0, split.num_tokens).astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for window in sliding_windows(0, split.num_tokens, 32):
            logits = module(tokens[None, window.start : window.stop - 1])[0]
            for token in range(window.fresh, window.stop):
                total -= torch.log_softmax(logits[token - 1 - window.start], -1)[tokens[token]].item()
    assert score.loss == pytest.approx(total / score.tokens, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / split.num_bytes, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.loss))


def test_chats_are_scored_alone_and_where_they_are_marked(run: Path, built_chats: Path) -> None:
    split = open_data(built_chats).train
    model = open_model(run)
    score = score_split(model, split, 512)
    module = compile_module(run)
    total, count = 0.0, 0
    for document in range(split.num_documents):
        start, stop = split.bounds(document)
        ids = torch.from_numpy(split.tokens(start, stop).astype(np.int64))
        marked = torch.from_numpy(split.mask(start, stop).astype(bool))[1:]
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(module(ids[None, :-1])[0], ids[1:], reduction="none")
        total, count = total + losses[marked].sum().item(), count + int(marked.sum())
    assert score.tokens == count == split.num_loss_tokens
    assert score.loss == pytest.approx(total / count, rel=1e-5)


def test_the_verb_prints_json(run: Path, built_text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--output-format", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["context"] == 48
    assert answer["data"] == str(built_text)
    assert answer["bits_per_byte"] > 0
    assert main(["eval", str(run / "model"), "--set", "train.sequence_length=16"]) == 0
    assert "context 16" in capsys.readouterr().out


def test_data_of_another_tokenizer_are_refused(
    run: Path, built_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "data"
    other.mkdir()
    for file in built_text.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["details"]["tokenizer_digest"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert main(["eval", str(run), "--data", str(other)]) == 1
    assert "DATA013" in capsys.readouterr().err


def test_nothing_to_score_is_told(run: Path, built_text: Path) -> None:
    from dataclasses import replace

    split = replace(open_data(built_text).validation, num_tokens=1)
    with pytest.raises(ArchwrightError) as caught:
        score_split(open_model(run), split, 8)
    assert caught.value.code == "TRAIN016"
