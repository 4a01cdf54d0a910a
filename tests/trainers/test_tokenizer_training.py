"""`tokenizer train`: what it learns from, reproducibility, the check, and errors that name the nearest legal value."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archwright.runtime.text import open_chat_template, open_tokenizer
from archwright.spec import ArchwrightError, Spec
from archwright.spec.cli import main
from archwright.spec.manifest import check_manifest
from archwright.trainers import tokenizer_training
from archwright.trainers.tokenizer_training import chunks, train_tokenizer

MakeSpec = Callable[..., Spec]


def code_of(call: Callable[..., object], *args: object) -> ArchwrightError:
    with pytest.raises(ArchwrightError) as caught:
        call(*args)
    return caught.value


def test_folder_opens_and_round_trips(trained_tokenizer: Path, stdlib_files: list[Path]) -> None:
    tokenizer = open_tokenizer(trained_tokenizer)
    assert tokenizer.vocab_size == 1024
    assert {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4} == dict(tokenizer.special_tokens)
    for file in stdlib_files:
        text = file.read_text(encoding="utf-8")
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert open_chat_template(tokenizer).has_generation
    assert check_manifest(trained_tokenizer) == []


def test_line_ends_and_indentation_are_cheap(trained_tokenizer: Path) -> None:
    """The reason to learn from whole text: line by line, `:`, the line end and each level cost a token."""
    tokenizer = open_tokenizer(trained_tokenizer)
    assert len(tokenizer.encode("):\n        return")) <= 4
    assert len(tokenizer.encode("\n\n")) == 1


def test_digits_are_split(trained_tokenizer: Path) -> None:
    assert len(open_tokenizer(trained_tokenizer).encode("2048")) == 4


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_equal_sources_give_equal_files(make_spec: MakeSpec, tmp_path: Path, algorithm: str) -> None:
    spec = make_spec({"tokenizer.vocab_size": 600, "tokenizer.algorithm": algorithm})
    first, second = (train_tokenizer(spec, tmp_path / name) for name in ("a", "b"))
    assert first.files == second.files
    assert first.details == second.details


def test_report_measures_held_out_documents(trained_tokenizer: Path) -> None:
    report = json.loads((trained_tokenizer / "report.json").read_text())
    assert report["checked_on"] == "held-out documents"
    assert report["round_trip"] == "exact"
    assert 2.0 < report["bytes_per_token"] < 4.0
    assert 300 < report["tokens_used"] <= 1024


def test_without_held_out_documents_it_says_so(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec({"data.validation_fraction": 0.0, "tokenizer.vocab_size": 600})
    report = train_tokenizer(spec, tmp_path / "t").details["report"]
    assert report["checked_on"].startswith("training documents")
    assert report["checked_documents"] > 0


@given(text=st.text(alphabet="ab \n\u2581\u2585é", max_size=60))
def test_chunks_keep_all_but_the_reserved_characters(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_training, "_CHUNK_CHARACTERS", 7)
        pieces = list(chunks(text))
    assert "".join(pieces) == text.replace("\u2581", "").replace("\u2585", "")
    assert all(0 < len(piece) <= 7 for piece in pieces)


def test_long_lines_and_reserved_characters_are_not_dropped(make_spec: MakeSpec, tmp_path: Path) -> None:
    """sentencepiece drops both without a word: then `zebra` would not be learned."""
    for number, text in enumerate([" zebra" * 50_000, "\u2585 zebra zebra\n" * 2000]):
        source = tmp_path / f"{number}.txt"
        source.write_text(text + "plain words and more\n" * 20, encoding="utf-8")
        sources = [{"kind": "text", "path": str(source)}]
        spec = make_spec({"data.sources": sources, "data.validation_fraction": 0.0, "tokenizer.vocab_size": 290})
        train_tokenizer(spec, tmp_path / f"t{number}")
        assert len(open_tokenizer(tmp_path / f"t{number}").encode(" zebra")) == 1


def test_vocabulary_too_large_for_the_text(make_spec: MakeSpec, tmp_path: Path) -> None:
    source = tmp_path / "small.txt"
    source.write_text("a few words of text, a few words\n" * 3)
    changes = {"data.sources": [{"kind": "text", "path": str(source)}], "data.validation_fraction": 0.0}
    error = code_of(train_tokenizer, make_spec({**changes, "tokenizer.vocab_size": 900}), tmp_path / "t")
    assert error.code == "TOK021"
    assert error.help is not None
    largest = int(error.help.split("at most ")[1].split(",")[0])
    train_tokenizer(make_spec({**changes, "tokenizer.vocab_size": largest}), tmp_path / "t")
    assert open_tokenizer(tmp_path / "t").vocab_size == largest


def test_vocabulary_too_small_for_the_bytes(make_spec: MakeSpec, tmp_path: Path) -> None:
    error = code_of(train_tokenizer, make_spec({"tokenizer.vocab_size": 100}), tmp_path / "t")
    assert error.code == "TOK021"
    assert error.help is not None
    smallest = int(error.help.split("at least ")[1])
    train_tokenizer(make_spec({"tokenizer.vocab_size": smallest}), tmp_path / "t")
    assert not list(tmp_path.glob(".*")), "nothing is left of the failure"


def test_what_cannot_be_trained(make_spec: MakeSpec, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    cases = {
        "TOK020": {"tokenizer": {"kind": "huggingface"}},
        "TOK025": {"tokenizer.vocab_size": 4096},
        "DATA001": {"data.sources": []},
        "TOK023": {"data.sources": [{"kind": "text", "path": str(empty)}]},
        "TOK011": {"tokenizer.chat_template": str(tmp_path / "absent.jinja")},
    }
    for code, changes in cases.items():
        try:
            spec = make_spec(changes)
        except ArchwrightError as error:
            assert error.code.startswith("SPEC"), "the language itself may refuse it earlier"
            continue
        assert code_of(train_tokenizer, spec, tmp_path / "t").code == code
    assert not (tmp_path / "t").exists()


def test_text_that_does_not_come_back_is_an_error(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archwright.runtime.text.base.BaseTokenizer.decode", lambda self, ids: "something else")
    error = code_of(train_tokenizer, make_spec({"tokenizer.vocab_size": 600}), tmp_path / "t")
    assert error.code == "TOK022"
    assert not (tmp_path / "t").exists()


def test_own_chat_template_is_put_beside_the_tokenizer(make_spec: MakeSpec, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    train_tokenizer(make_spec({"tokenizer.chat_template": str(template), "tokenizer.vocab_size": 600}), tmp_path / "t")
    assert open_chat_template(open_tokenizer(tmp_path / "t")).source == template.read_text()


def test_transformers_reads_the_folder(trained_tokenizer: Path, stdlib_files: list[Path]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(trained_tokenizer)
    ours = open_tokenizer(trained_tokenizer)
    for file in stdlib_files[:3]:
        text = file.read_text(encoding="utf-8")[:20_000]
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert theirs.apply_chat_template(chat, tokenize=True)["input_ids"] == open_chat_template(ours).encode(chat)


def test_the_verb(spec_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tokenizer", "train", str(spec_file), "-o", str(tmp_path / "t"), "--set", "tokenizer.vocab_size=600"]
    assert main([*arguments, "--output-format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 600
    assert main(arguments) == 1, "a folder that exists is refused"
    assert "SPEC090" in capsys.readouterr().err
    assert main(["tokenizer", "fly", str(spec_file), "-o", "x"]) == 2
