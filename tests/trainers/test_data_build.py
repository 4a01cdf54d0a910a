"""`data build` and `open_data`: the bytes on disk, masks, determinism, interruption, and what opening refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archwright.runtime.text import open_chat_template, open_tokenizer
from archwright.spec import ArchwrightError, Spec
from archwright.spec.cli import main
from archwright.spec.manifest import check_manifest
from archwright.trainers import data_build
from archwright.trainers.data_build import build_data
from archwright.trainers.dataset import open_data

MakeSpec = Callable[..., Spec]
CHATS = [
    {"prompt": f"What is {number} plus one?", "response": f"It is {number + 1}.\nAnd <|im_end|> is text."}
    for number in range(40)
]


def code_of(call: Callable[..., object], *args: Any, **options: Any) -> str:
    with pytest.raises(ArchwrightError) as caught:
        call(*args, **options)
    return caught.value.code


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.bin"))}


@pytest.fixture(scope="module")
def text_spec(make_spec: MakeSpec, trained_tokenizer: Path) -> Spec:
    return make_spec({"tokenizer.path": str(trained_tokenizer), "data.shard_tokens": 30_000})


@pytest.fixture(scope="module")
def text_data(text_spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "text"
    build_data(text_spec, folder, workers=1)
    return folder


@pytest.fixture
def mixed_spec(make_spec: MakeSpec, trained_tokenizer: Path, stdlib_files: list[Path], tmp_path: Path) -> Spec:
    """A text and chats."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    sources = [{"kind": "text", "path": str(stdlib_files[0])}, {"kind": "pairs", "path": str(pairs)}]
    return make_spec(
        {"tokenizer.path": str(trained_tokenizer), "data.sources": sources, "data.validation_fraction": 0.1}
    )


def test_documents_are_begin_text_end_in_order(
    text_data: Path, stdlib_files: list[Path], trained_tokenizer: Path
) -> None:
    tokenizer = open_tokenizer(trained_tokenizer)
    data = open_data(text_data)
    read = [[split.document(i).tolist() for i in range(split.num_documents)] for split in (data.train, data.validation)]
    expected = [[1, *tokenizer.encode(file.read_text(encoding="utf-8")), 2] for file in stdlib_files]
    assert read[0] == [document for document in expected if document in read[0]], "the order of the sources"
    assert sorted(read[0] + read[1]) == sorted(expected)
    assert read[1], "some document is held out"
    assert data.train.num_bytes + data.validation.num_bytes == sum(file.stat().st_size for file in stdlib_files)


def test_shards_read_as_one_stream(text_data: Path) -> None:
    train = open_data(text_data).train
    shards = sorted(text_data.glob("train-*.tokens.bin"))
    assert len(shards) >= 3, "several shards, or this test tests nothing"
    whole = np.concatenate([np.fromfile(shard, "<u2") for shard in shards])
    assert [shard.stat().st_size for shard in shards[:-1]] == [60_000] * (len(shards) - 1)
    assert np.array_equal(train.tokens(0, train.num_tokens), whole)
    for start, stop in ((0, 0), (29_990, 30_010), (10, 20), (29_999, 60_001), (train.num_tokens, train.num_tokens)):
        assert np.array_equal(train.tokens(start, stop), whole[start:stop])
    assert train.tokens(0, 5).dtype == np.dtype("<u2")
    assert not train.masked
    assert train.mask(5, 9).tolist() == [1, 1, 1, 1]
    assert train.document_offsets.tolist()[-1] == train.num_tokens == train.num_loss_tokens
    for start, stop in ((-1, 2), (5, 4), (0, train.num_tokens + 1)):
        with pytest.raises(IndexError):
            train.tokens(start, stop)


def test_masks_of_chats_and_texts(mixed_spec: Spec, tmp_path: Path, stdlib_files: list[Path]) -> None:
    build_data(mixed_spec, tmp_path / "mixed", workers=1)
    data = open_data(tmp_path / "mixed")
    assert mixed_spec.tokenizer is not None
    template = open_chat_template(open_tokenizer(str(mixed_spec.tokenizer.path)))
    roles = {"prompt": "user", "response": "assistant"}
    chats = [[{"role": roles[name], "content": text} for name, text in chat.items()] for chat in CHATS]
    expected = [template.encode_masked(chat) for chat in chats]
    found = 0
    said_bytes = text_bytes = 0
    for split in (data.train, data.validation):
        for i in range(split.num_documents):
            ids, mask = split.document(i).tolist(), split.mask(*split.bounds(i)).tolist()
            if (ids, mask) in expected:
                found += 1
                said_bytes += len(CHATS[expected.index((ids, mask))]["response"].encode())
            else:
                assert mask == [0] + [1] * (len(ids) - 1), "a text counts, but for its first token"
                text_bytes += stdlib_files[0].stat().st_size
    assert found == len(CHATS)
    assert data.train.num_bytes + data.validation.num_bytes == said_bytes + text_bytes
    assert data.train.num_loss_tokens == int(data.train.mask(0, data.train.num_tokens).sum())


def test_workers_do_not_change_a_byte(mixed_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_build, "_BATCH_BYTES", 500)
    done: list[int] = []
    one = build_data(mixed_spec, tmp_path / "one", workers=1)
    two = build_data(mixed_spec, tmp_path / "two", workers=2, advance=done.append)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one.details == two.details
    assert len(done) > 4, "several batches, or this test tests nothing"


def test_counts_of_sources_are_in_the_manifest(mixed_spec: Spec, tmp_path: Path) -> None:
    details = build_data(mixed_spec, tmp_path / "mixed", workers=1).details
    text, pairs = details["sources"]
    assert (text["documents"], text["train"] + text["validation"]) == (1, 1)
    assert (pairs["documents"], pairs["duplicates"], pairs["train"] + pairs["validation"]) == (40, 0, 40)
    assert sum(details["splits"][name]["documents"] for name in ("train", "validation")) == 41
    assert check_manifest(tmp_path / "mixed") == []


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), RuntimeError("disk full")])
def test_an_interrupted_build_leaves_nothing(text_spec: Spec, tmp_path: Path, fault: BaseException) -> None:
    def stop(num_bytes: int) -> None:
        raise fault

    with pytest.raises(type(fault)):
        build_data(text_spec, tmp_path / "data", workers=1, advance=stop)
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_a_worker_is_located(
    mixed_spec: Spec, tmp_path: Path, trained_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template refuses one chat; the message names its line, also from another process."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(trained_tokenizer, folder)
    template = folder / "chat_template.jinja"
    check = "{%- if '7 plus' in messages[0].content %}{{ raise_exception('no sevens') }}{% endif %}"
    template.write_text(check + template.read_text())
    assert mixed_spec.tokenizer is not None
    spec = mixed_spec.model_copy(update={"tokenizer": mixed_spec.tokenizer.model_copy(update={"path": str(folder)})})
    for workers in (1, 2):
        with pytest.raises(ArchwrightError, match="no sevens") as caught:
            build_data(spec, tmp_path / "data", workers=workers)
        assert caught.value.where == f"{tmp_path}/pairs.jsonl:8"
        assert not (tmp_path / "data").exists()


def test_templates_without_generation_are_refused_at_once(
    mixed_spec: Spec, tmp_path: Path, trained_tokenizer: Path
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(trained_tokenizer, folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert mixed_spec.tokenizer is not None
    spec = mixed_spec.model_copy(update={"tokenizer": mixed_spec.tokenizer.model_copy(update={"path": str(folder)})})
    assert code_of(build_data, spec, tmp_path / "data") == "TOK012"


def test_what_cannot_be_built(make_spec: MakeSpec, trained_tokenizer: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    path = {"tokenizer.path": str(trained_tokenizer)}
    cases = {
        "DATA011": {},
        "DATA001": {**path, "data.sources": []},
        "DATA010": {**path, "data.sources": [{"kind": "text", "path": str(empty)}]},
        "TOK001": {"tokenizer.path": str(tmp_path / "absent")},
        "TOK025": {**path, "model.vocab_size": 1000, "tokenizer.vocab_size": 1000},
    }
    for code, changes in cases.items():
        try:
            spec = make_spec(changes)
        except ArchwrightError:
            continue  # the language itself refuses it earlier
        assert code_of(build_data, spec, tmp_path / "data", workers=1) == code
    assert not (tmp_path / "data").exists()


def test_nothing_held_out_is_an_empty_split(make_spec: MakeSpec, trained_tokenizer: Path, tmp_path: Path) -> None:
    spec = make_spec({"tokenizer.path": str(trained_tokenizer), "data.validation_fraction": 0.0})
    build_data(spec, tmp_path / "data", workers=1)
    validation = open_data(tmp_path / "data").validation
    assert (validation.num_tokens, validation.num_documents, validation.num_bytes) == (0, 0, 0)
    assert validation.tokens(0, 0).tolist() == []
    assert validation.document_offsets.tolist() == [0]


def test_open_data_refuses_what_does_not_fit(text_data: Path, trained_tokenizer: Path, tmp_path: Path) -> None:
    digest = open_tokenizer(trained_tokenizer).digest
    assert open_data(text_data, tokenizer_digest=digest).tokenizer_digest == digest
    assert code_of(open_data, text_data, tokenizer_digest="0" * 64) == "DATA013"
    assert code_of(open_data, tmp_path) == "DATA012"
    assert code_of(open_data, trained_tokenizer) == "DATA012", "another kind of folder"
    copy = tmp_path / "copy"
    shutil.copytree(text_data, copy)
    shard = copy / "train-00000.tokens.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert code_of(open_data, copy) == "DATA012"
    shard.unlink()
    assert code_of(open_data, copy) == "DATA012"
    manifest = json.loads((text_data / "manifest.json").read_text())
    manifest["details"]["format"] = 99
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert code_of(open_data, copy) == "DATA012"


def test_large_vocabularies_take_four_bytes(trained_tokenizer: Path) -> None:
    class Large:
        vocab_size = 65_537

    tokenizer = open_tokenizer(trained_tokenizer)
    assert data_build.token_dtype(tokenizer) == np.dtype("<u2")
    assert data_build.token_dtype(Large()) == np.dtype("<u4")  # type: ignore[arg-type]


def test_the_verb(spec_file: Path, trained_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = f"tokenizer.path={trained_tokenizer}"
    arguments = ["data", "build", str(spec_file), "-o", str(tmp_path / "d"), "--set", tokenizer]
    assert main(arguments) == 0
    assert "train: " in capsys.readouterr().out
    assert main([*arguments[:4], str(tmp_path / "e"), *arguments[5:], "--output-format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["documents"] > 0
    assert main(arguments) == 1, "a folder that exists is refused"
    assert main(arguments[:5]) == 1, "no tokenizer"
    assert "DATA011" in capsys.readouterr().err
