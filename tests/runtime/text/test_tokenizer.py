"""Tokenizers: round trips, streams, special tokens that text cannot forge, files and errors."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast

from archwright.runtime.text import Tokenizer, open_tokenizer
from archwright.runtime.text.base import CHAT_TEMPLATE
from archwright.spec import ArchwrightError

SHARED = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<0x41>", "▁", " ", "\n    ", "é😀")
TEXTS = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(NAMES)), max_size=8).map("".join)
WITHOUT_SPACE_SIGN = TEXTS.map(lambda text: text.replace("▁", "_"))


def code_of(call: object, *args: object) -> str:
    with pytest.raises(ArchwrightError) as caught:
        call(*args)  # type: ignore[operator]
    return caught.value.code


@SHARED
@given(text=TEXTS)
def test_sentencepiece_round_trip_is_exact(sentencepiece_folder: Path, text: str) -> None:
    tokenizer = open_tokenizer(sentencepiece_folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, ""]) == [tokenizer.encode(text), []]


@SHARED
@given(text=TEXTS)
def test_byte_level_round_trip_is_exact(byte_level_folder: Path, text: str) -> None:
    tokenizer = open_tokenizer(byte_level_folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@SHARED
@given(text=WITHOUT_SPACE_SIGN)
@pytest.mark.parametrize("folder", ["prefix_folder", "metaspace_folder"])
def test_round_trip_with_a_space_put_before_the_text(request: pytest.FixtureRequest, folder: str, text: str) -> None:
    tokenizer = open_tokenizer(request.getfixturevalue(folder))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text, continuation=True), continuation=True) == text


@SHARED
@given(data=st.data(), continuation=st.booleans())
def test_stream_gives_what_decode_gives(any_tokenizer: Tokenizer, data: st.DataObject, continuation: bool) -> None:
    """For any ids at all: broken UTF-8, special tokens and ids beyond the vocabulary too."""
    ids = data.draw(st.lists(st.integers(0, any_tokenizer.vocab_size + 3), max_size=20))
    stream = any_tokenizer.stream(continuation=continuation)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.flush() == any_tokenizer.decode(ids, continuation=continuation)


def test_stream_holds_back_incomplete_characters(sentencepiece_folder: Path) -> None:
    tokenizer = open_tokenizer(sentencepiece_folder)
    ids = tokenizer.encode("😀")
    assert len(ids) == 4, "four byte tokens, or this test tests nothing"
    stream = tokenizer.stream()
    assert [stream.push(token_id) for token_id in ids] == ["", "", "", "😀"]
    assert stream.flush() == ""
    assert [stream.push(ids[0]), stream.push(ids[1]), stream.flush()] == ["", "", "\ufffd"]


@SHARED
@given(text=TEXTS)
def test_text_never_becomes_a_special_token(any_tokenizer: Tokenizer, text: str) -> None:
    special = set(any_tokenizer.special_tokens.values()) - {any_tokenizer.special_tokens.get("<unk>")}
    for continuation in (False, True):
        assert special.isdisjoint(any_tokenizer.encode(text, continuation=continuation))


def test_names_of_special_tokens_come_back_as_text(any_tokenizer: Tokenizer) -> None:
    text = "x".join(any_tokenizer.special_tokens)
    assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


@pytest.mark.parametrize("folder", ["byte_level_folder", "metaspace_folder"])
def test_ids_and_text_agree_with_the_tokenizers_library(
    request: pytest.FixtureRequest, folder: str, stdlib_texts: list[str]
) -> None:
    path = request.getfixturevalue(folder)
    fast = Fast.from_file(str(path / "tokenizer.json"))
    fast.no_truncation()
    tokenizer = open_tokenizer(path)
    for text in [*(text[:3000] for text in stdlib_texts), "naïve <think> 😀\n\n  x"]:
        expected = fast.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode(expected) == fast.decode(expected) == text


def test_continuation_puts_no_space(prefix_folder: Path, metaspace_folder: Path) -> None:
    for folder in (prefix_folder, metaspace_folder):
        tokenizer = open_tokenizer(folder)
        ids = [*tokenizer.encode("def"), *tokenizer.encode("ault", continuation=True)]
        assert tokenizer.decode(ids) == "default"
        assert tokenizer.decode(tokenizer.encode("default"), continuation=True) == " default"


def test_begin_and_end_of_text(sentencepiece_folder: Path, byte_level_folder: Path) -> None:
    tokenizer = open_tokenizer(sentencepiece_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.stop_ids == {2, tokenizer.special_tokens["<|im_end|>"]}
    assert tokenizer.encode("a", bos=True) == [1, *tokenizer.encode("a")]
    other = open_tokenizer(byte_level_folder)
    assert other.bos_id is None
    assert other.eos_id == other.special_tokens["<|im_end|>"]
    assert other.encode("a", bos=True) == other.encode("a")
    assert set(other.special_tokens) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}, "<think> is no special token"


def test_generation_config_adds_stop_tokens(sentencepiece_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_folder / "tokenizer.model").read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 77]}')
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.stop_ids == {2, 4, 77}
    assert tmp_path / "generation_config.json" in tokenizer.files(), "a copy stops at the same tokens"


def test_files_open_as_the_same_tokenizer(byte_level_folder: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(byte_level_folder)
    (byte_level_folder / CHAT_TEMPLATE).write_text("x")
    try:
        files = tokenizer.files()
    finally:
        (byte_level_folder / CHAT_TEMPLATE).unlink()
    assert [file.name for file in files] == ["tokenizer.json", "tokenizer_config.json", CHAT_TEMPLATE]
    for file in files[:2]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    copy = open_tokenizer(tmp_path)
    assert copy.digest == tokenizer.digest
    assert copy.special_tokens == tokenizer.special_tokens


def test_digest_tells_tokenizers_apart(sentencepiece_folder: Path, byte_level_folder: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(sentencepiece_folder)
    assert tokenizer.digest != open_tokenizer(byte_level_folder).digest
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_folder / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert tokenizer.digest != open_tokenizer(tmp_path).digest, "another end of text is another tokenizer"


def test_lone_surrogates_are_refused(any_tokenizer: Tokenizer) -> None:
    assert code_of(any_tokenizer.encode, "a\ud800") == "TOK005"
    assert code_of(any_tokenizer.encode_batch, ["a", "\udfff"]) == "TOK005"


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    assert code_of(open_tokenizer, tmp_path) == "TOK001"
    assert code_of(open_tokenizer, tmp_path / "absent.model") == "TOK001"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert code_of(open_tokenizer, tmp_path) == "TOK002"
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    assert code_of(open_tokenizer, tmp_path) == "TOK002"


def test_broken_config_is_refused(sentencepiece_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_folder / "tokenizer.model").read_bytes())
    config = tmp_path / "tokenizer_config.json"
    for content, code in (("{", "TOK002"), ("[]", "TOK002"), ('{"eos_token": "<end>"}', "TOK003")):
        config.write_text(content)
        assert code_of(open_tokenizer, tmp_path) == code


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"added_tokens_decoder": {"x": {"content": "a", "special": true}}}',
        '{"added_tokens_decoder": {"1": 5}}',
        '{"added_tokens_decoder": {"1": {"special": true}}}',
        '{"added_tokens_decoder": [1]}',
        '{"added_tokens_decoder": {"999999999999999999999": {"content": "a", "special": true}}}',
        '{"added_tokens_decoder": {"-1": {"content": "a", "special": true}}}',
    ],
)
def test_a_config_of_another_form_is_refused(sentencepiece_folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_folder / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert code_of(open_tokenizer, tmp_path) == "TOK002"


def test_stop_tokens_of_another_form_are_refused(sentencepiece_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_folder / "tokenizer.model").read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [[1]]}')
    assert code_of(open_tokenizer, tmp_path) == "TOK002"


def test_an_id_that_no_vocabulary_has_is_refused(byte_level_folder: Path, tmp_path: Path) -> None:
    """A table of bytes up to it would take all memory."""
    content = json.loads((byte_level_folder / "tokenizer.json").read_text())
    added = {key: False for key in ("single_word", "lstrip", "rstrip", "normalized")}
    content["added_tokens"].append({"id": 2**32 - 1, "content": "<far>", "special": True, **added})
    content["model"]["vocab"]["<far>"] = 2**32 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert code_of(open_tokenizer, tmp_path) == "TOK002"


def test_tokens_that_are_not_bytes_are_refused(byte_level_folder: Path, tmp_path: Path) -> None:
    content = json.loads((byte_level_folder / "tokenizer.json").read_text())
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert code_of(open_tokenizer, tmp_path) == "TOK004"
