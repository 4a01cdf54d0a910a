"""Sources: what is read in which order, what is left out, and mistakes located as file:line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archwright.spec import ArchwrightError
from archwright.spec.models.text import Data, JsonlSource, MessagesSource, PairsSource, Source, TextSource
from archwright.trainers.sources import Document, Selection, read_source, share_of


def documents(source: Source) -> list[Document]:
    return list(read_source(source))


def error_of(source: Source) -> ArchwrightError:
    with pytest.raises(ArchwrightError) as caught:
        documents(source)
    return caught.value


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes lines (objects, or text as it stands) and gives the path."""

    def write(*lines: object) -> str:
        file = tmp_path / "data.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        file.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        return str(file)

    return write


def test_text_from_a_file_a_folder_and_a_glob(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("c.txt", "b/a.txt", "a.md", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    texts = [document.text for document in documents(TextSource(kind="text", path=str(tmp_path)))]
    assert texts == ["a.md", "b/a.txt", "c.txt"]
    globbed = documents(TextSource(kind="text", path=str(tmp_path / "**" / "*.txt")))
    assert [document.text for document in globbed] == ["b/a.txt", "c.txt"]
    assert globbed[0].where == f"{tmp_path}/b/a.txt:1"
    hidden = documents(TextSource(kind="text", path=str(tmp_path / ".hidden.txt")))
    assert [document.text for document in hidden] == [".hidden.txt"]


def test_text_is_kept_byte_for_byte_but_for_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf a\r\nb\tc \r\n\n")
    assert documents(TextSource(kind="text", path=str(file)))[0].text == " a\r\nb\tc \r\n\n"


def test_json_lines(jsonl: Callable[..., str]) -> None:
    path = jsonl({"body": "one"}, "", {"body": "zwei é", "other": 1})
    read = documents(JsonlSource(kind="jsonl", path=path, text="body"))
    assert [(document.text, document.where) for document in read] == [("one", f"{path}:1"), ("zwei é", f"{path}:3")]


def test_pairs_and_messages_are_chats(jsonl: Callable[..., str]) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = jsonl({"question": "q", "answer": "a", "messages": messages})
    pair = documents(PairsSource(kind="pairs", path=path, prompt="question", response="answer"))[0]
    chat = documents(MessagesSource(kind="messages", path=path))[0]
    assert list(pair.messages) == list(chat.messages) == messages
    assert pair.key == chat.key, "a pair and the same chat are duplicates"
    assert chat.key != Document("", ({"role": "user", "content": "q"},), "").key
    assert chat.texts() == ["q", "a"]


@pytest.mark.parametrize(
    ("line", "code", "place"),
    [
        ('{"text": "a"', "DATA004", ":2:13"),
        ("[1]", "DATA005", ":2"),
        ('{"txet": "a"}', "DATA006", ":2"),
        ('{"text": 7}', "DATA007", ":2"),
        ('{"text": null}', "DATA007", ":2"),
        ('{"text": "\\ud800"}', "DATA003", ":2"),
        ("[" * 200_000, "DATA004", ":2"),
    ],
)
def test_mistakes_in_json_lines_are_located(jsonl: Callable[..., str], line: str, code: str, place: str) -> None:
    path = jsonl({"text": "fine"}, line)
    error = error_of(JsonlSource(kind="jsonl", path=path))
    assert error.code == code
    assert error.where is not None
    assert error.where.startswith(path + place)


def test_a_missing_field_suggests_the_nearest(jsonl: Callable[..., str]) -> None:
    help = error_of(JsonlSource(kind="jsonl", path=jsonl({"id": 1, "texts": "a"}))).help
    assert help == "`texts` is the nearest of its fields; the object has: id, texts"
    pairs = PairsSource(kind="pairs", path=jsonl({"prompt": "a", "answer": "b"}))
    assert "prompt, answer" in (error_of(pairs).help or "")


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ("hi", "DATA008"),
        ([], "DATA008"),
        (["hi"], "DATA008"),
        ([{"role": "robot", "content": "hi"}], "DATA008"),
        ([{"role": ["user"], "content": "hi"}], "DATA008"),
        ([{"role": "assistant", "content": None}], "DATA008"),
        ([{"role": "user", "content": "hi"}], "DATA009"),
        ([{"role": "assistant", "content": "\ud800"}], "DATA003"),
    ],
)
def test_mistakes_in_messages_are_located(jsonl: Callable[..., str], messages: Any, code: str) -> None:
    good = [{"role": "assistant", "content": "x"}]
    path = jsonl({"messages": good}, {"messages": messages})
    error = error_of(MessagesSource(kind="messages", path=path))
    assert (error.code, error.where) == (code, f"{path}:2")


def test_bytes_that_are_no_utf8_are_located(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"one\ntwo\nthr\xe9e\n")
    assert error_of(TextSource(kind="text", path=str(file))).where == f"{file}:3"
    file.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    error = error_of(JsonlSource(kind="jsonl", path=str(file)))
    assert (error.code, error.where) == ("DATA003", f"{file}:2")


def test_a_source_without_files_is_an_error(tmp_path: Path) -> None:
    for path in ("absent.txt", "*.txt", "."):
        assert error_of(TextSource(kind="text", path=str(tmp_path / path))).code == "DATA002"


def test_selection_counts_what_it_leaves_out(jsonl: Callable[..., str], tmp_path: Path) -> None:
    path = jsonl(*({"text": text} for text in ("twice", " \n", "twice", "tiny", "", "other")))
    again = tmp_path / "again.txt"
    again.write_text("other")
    sources = (JsonlSource(kind="jsonl", path=path), TextSource(kind="text", path=str(again)))
    selection = Selection(Data(sources=sources, min_bytes=5, validation_fraction=0.0))
    assert [document.text for document, _ in selection] == ["twice", "other"]
    first, second = selection.tallies
    assert (first.documents, first.duplicates, first.empty, first.too_short, first.train) == (6, 1, 2, 1, 2)
    assert (second.documents, second.duplicates, second.train) == (1, 1, 0)
    every = Selection(Data(sources=sources, deduplicate="none", validation_fraction=0.0))
    assert len(list(every)) == 5


def test_split_depends_on_the_text_alone(jsonl: Callable[..., str]) -> None:
    def split(texts: list[str], fraction: float) -> dict[str, bool]:
        source = JsonlSource(kind="jsonl", path=jsonl(*({"text": text} for text in texts)))
        selection = Selection(Data(sources=(source,), validation_fraction=fraction))
        return {document.text: held_out for document, held_out in selection}

    texts = [f"document {number}" for number in range(1000)]
    forward = split(texts, 0.1)
    assert all(forward[text] == held for text, held in split(texts[::-1][:500], 0.1).items())
    assert 70 < sum(forward.values()) < 130
    more = split(texts, 0.2)
    assert all(more[text] for text, held in forward.items() if held), "a larger share adds documents, and moves none"


def test_shares_are_uniform_and_differ_by_purpose() -> None:
    keys = [number.to_bytes(4, "big") for number in range(2000)]
    shares = [share_of(key, "validation") for key in keys]
    assert all(0 <= share < 1 for share in shares)
    assert 0.45 < sum(shares) / len(shares) < 0.55
    assert share_of(keys[0], "validation") != share_of(keys[0], "tokenizer")
