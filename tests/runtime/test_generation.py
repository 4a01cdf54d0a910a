"""Answers: batches, streams, stop strings, ends, errors; on PyTorch and on a back end that says what it is told."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from archwright.runtime import open_model
from archwright.runtime.backends import base
from archwright.runtime.backends.base import PREFILL_CHUNK, Backend
from archwright.runtime.backends.torch_backend import TorchBackend
from archwright.runtime.model import Model
from archwright.runtime.text.tokenizer import Tokenizer, open_tokenizer
from archwright.spec import ArchwrightError

PROMPTS = ["the stop", "naïve text of the model writes text", [5, 6, 7], "日本"]


class Scripted(Backend[dict[str, Any]]):
    """Says the script of each row, token by token, and then token 0 for ever.

    As a cache it keeps the tokens that were written, so that a wrong write index shows.
    """

    def __init__(self, scripts: list[list[int]], *, capacity: int = 64, vocab_size: int = 400) -> None:
        self.scripts = scripts
        self.capacity, self.vocab_size, self.max_batch = capacity, vocab_size, None
        self.description = "scripted"
        self.written: np.ndarray | None = None
        self.lengths: list[int] = []

    def new_cache(self, batch: int, positions: int) -> dict[str, Any]:
        self.written = np.full((batch, positions), -1)
        return {"tokens": self.written, "said": [0] * batch}

    def forward(self, cache, ids_BS, positions_BS, write_index_B, visible):  # type: ignore[override]
        batch, length = ids_BS.shape
        assert visible <= self.capacity and (positions_BS[:, 0] == write_index_B).all()
        for row, start in enumerate(write_index_B):
            assert start + length <= cache["tokens"].shape[1]
            cache["tokens"][row, start : start + length] = ids_BS[row]
        logits_BSV = np.zeros((batch, length, self.vocab_size), np.float32)
        for row in range(batch):
            script = self.scripts[row]
            said = cache["said"][row]
            logits_BSV[row, :, script[said] if said < len(script) else 0] = 1
            cache["said"][row] += 1
        return logits_BSV


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Model:
    return open_model(model_folder)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return open_tokenizer(tokenizer_folder)


def scripted(model: Model, scripts: list[list[int]], **arguments: Any) -> Model:
    return dataclasses.replace(model, backend=Scripted(scripts, **arguments))


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of one byte each: every border that a text can have."""
    ids = [tokenizer.encode(piece, continuation=True) for piece in text if piece.isascii()]
    assert all(len(item) == 1 for item in ids) and text.isascii()
    return [item[0] for item in ids]


def byte_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """The byte-fallback tokens of a text's UTF-8."""
    processor = SentencePieceProcessor(model_file=str(tokenizer.files()[0]))
    return [processor.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_batch_of_unequal_prompts_equals_each_alone(model: Model, temperature: float) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": temperature, "top_p": 0.95, "seed": 11}
    together = model.generate(PROMPTS, **options)
    assert len({len(answer.tokens) for answer in together} | {answer.num_prompt_tokens for answer in together}) > 1
    for prompt, answer in zip(PROMPTS, together, strict=True):
        alone = model.generate([prompt], **options)[0]
        assert (answer.tokens, answer.text, answer.finish_reason) == (alone.tokens, alone.text, alone.finish_reason)


@pytest.mark.parametrize("logits_bytes", [256 << 20, 3 * 400 * 4 * 100, 1])
def test_prefill_in_pieces_equals_one_call(
    write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, logits_bytes: int
) -> None:
    """By a back end that makes the logits of every token: their memory limits a piece."""
    monkeypatch.setattr(base, "CALL_BYTES", logits_bytes)
    monkeypatch.setattr(TorchBackend, "token_bytes", Backend.token_bytes)
    monkeypatch.setattr(TorchBackend, "forward_last", Backend.forward_last)
    model = open_model(write_model({"model.max_positions": PREFILL_CHUNK * 2}, tokenizer=False))
    ids_BS = np.random.default_rng(0).integers(0, 400, (3, PREFILL_CHUNK + 40))
    lengths_B = np.array([PREFILL_CHUNK + 40, PREFILL_CHUNK, 7])
    whole_BSV = model.backend.whole(ids_BS)
    forward, sizes = model.backend.forward, []
    monkeypatch.setattr(
        model.backend, "forward", lambda cache, ids, *rest: sizes.append(ids.shape[1]) or forward(cache, ids, *rest)
    )
    last_BV = model.backend.prefill(model.backend.new_cache(3, ids_BS.shape[1]), ids_BS, lengths_B)
    assert max(sizes) == min(PREFILL_CHUNK, max(1, logits_bytes // 4800)) and sum(sizes) == PREFILL_CHUNK + 40
    assert np.allclose(last_BV, whole_BSV[np.arange(3), lengths_B - 1], atol=1e-4)


def test_prefill_makes_the_logits_of_one_token_a_row(
    write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their memory limits nothing, and a prompt that ended in an earlier piece keeps those of its last token."""
    monkeypatch.setattr(base, "CALL_BYTES", 1)
    model = open_model(write_model({"model.max_positions": PREFILL_CHUNK * 2}, tokenizer=False))
    ids_BS = np.random.default_rng(0).integers(0, 400, (3, PREFILL_CHUNK + 40))
    lengths_B = np.array([PREFILL_CHUNK + 40, PREFILL_CHUNK, 7])
    whole_BSV = model.backend.whole(ids_BS)
    shapes: list[tuple[int, ...]] = []
    module = model.backend._module  # type: ignore[attr-defined]
    module.register_forward_hook(lambda _module, _inputs, logits: shapes.append(tuple(logits.shape)))
    last_BV = model.backend.prefill(model.backend.new_cache(3, ids_BS.shape[1]), ids_BS, lengths_B)
    assert shapes == [(3, 1, 400)] * 2
    assert np.allclose(last_BV, whole_BSV[np.arange(3), lengths_B - 1], atol=1e-4)


def test_greedy_decoding_follows_the_logits(model: Model) -> None:
    """Through the cache, step by step, as if each step computed the whole sequence."""
    prompt = [5, 6, 7, 300]
    answer = model.generate([prompt], max_tokens=12)[0]
    limit = model.tokenizer.vocab_size if model.tokenizer else 0
    ids = list(prompt)
    for token in answer.tokens:
        assert int(model.logits([ids])[0, -1, :limit].argmax()) == token
        ids.append(token)


def test_seeds(model: Model) -> None:
    def say(seed: int | None, prompts: Any = "the") -> list[list[int]]:
        return [a.tokens for a in model.generate(prompts, max_tokens=12, temperature=1.0, seed=seed)]

    assert say(1) == say(1) != say(2)
    assert say(None) != say(None)
    first, second = say(1, ["the", "the"])
    assert first != second, "equal prompts give different texts"
    assert say(1, ["stop", "the"])[1] == first, "and a prompt the same text in any batch"


def test_tokens_beyond_the_tokenizer_are_never_chosen(model: Model) -> None:
    assert model.tokenizer is not None and model.tokenizer.vocab_size < model.backend.vocab_size
    answers = model.generate([[i] for i in range(40)], max_tokens=40, temperature=5.0, seed=0)
    chosen = {token for answer in answers for token in answer.tokens}
    assert len(chosen) > 300 and max(chosen) < model.tokenizer.vocab_size


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_pieces_join_to_the_text(model: Model, temperature: float) -> None:
    options: dict[str, Any] = {"max_tokens": 30, "temperature": temperature, "seed": 4, "stop": ["te", "x"]}
    pieces = list(model.stream(PROMPTS, **options))
    answers = model.generate(PROMPTS, **options)
    for index, answer in enumerate(answers):
        mine = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in mine) == answer.text
        assert [piece.answer is not None for piece in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].answer is not None and mine[-1].answer.tokens == answer.tokens


@settings(max_examples=60, deadline=None)
@given(
    text=st.text("stope ", min_size=1, max_size=30),
    stops=st.lists(st.text("stope ", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_across_token_borders(model: Model, tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    for script in (spell(tokenizer, text), tokenizer.encode(text, continuation=True)):
        said = scripted(model, [[*script, tokenizer.eos_id]])
        answer = said.generate("the", max_tokens=50, stop=stops)[0]
        ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
        if ends:
            longest = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
            assert answer.text == text[: ends[0] - len(longest)]
        else:
            assert (answer.text, answer.tokens) == (text, script)
        assert answer.finish_reason == "stop"
        shown = "".join(piece.text for piece in said.stream("the", max_tokens=50, stop=stops))
        assert shown == answer.text


def test_characters_come_whole(model: Model, tokenizer: Tokenizer) -> None:
    script = byte_tokens(tokenizer, "é語")
    assert len(set(script)) == 5
    pieces = list(scripted(model, [[*script, tokenizer.eos_id]]).stream("the", max_tokens=9))
    assert [piece.text for piece in pieces] == ["", "é", "", "", "語", ""]
    cut = scripted(model, [script]).generate("the", max_tokens=4)[0]
    assert (cut.text, cut.finish_reason) == ("é\ufffd", "length")


def test_end_tokens_end_and_are_not_shown(model: Model, tokenizer: Tokenizer) -> None:
    for stop_id in tokenizer.stop_ids:
        answer = scripted(model, [[20, stop_id, 21]]).generate("the", max_tokens=9)[0]
        assert (answer.tokens, answer.finish_reason) == ([20], "stop")
        assert answer.text == tokenizer.decode([20], continuation=True)


def test_finished_rows_do_not_disturb_the_others(model: Model, tokenizer: Tokenizer) -> None:
    scripts = [[20, tokenizer.eos_id], [21, 22, 23, 24, tokenizer.eos_id], [tokenizer.eos_id]]
    said = scripted(model, scripts)
    answers = said.generate([[9, 9, 9, 9], [8], [7, 7]], max_tokens=9)
    assert [answer.tokens for answer in answers] == [[20], [21, 22, 23, 24], []]
    written = said.backend.written  # pyright: ignore[reportAttributeAccessIssue]
    assert written[1, :5].tolist() == [8, 21, 22, 23, 24]


def test_capacity_ends_an_answer(model: Model) -> None:
    said = scripted(model, [[20] * 99, [20] * 99], capacity=8)
    short, full = said.generate([[5] * 6, [5] * 8], max_tokens=50)
    # Two tokens fit behind six; one more needs no room, since nothing follows it.
    assert (short.finish_reason, len(short.tokens)) == ("capacity", 3)
    assert (full.finish_reason, len(full.tokens)) == ("capacity", 1)
    assert said.generate([[5] * 6], max_tokens=3)[0].finish_reason == "length"
    real = model.generate([[5] * 90], max_tokens=50)[0]
    assert real.finish_reason == "stop" or len(real.tokens) + 90 == model.capacity + 1


def test_more_prompts_than_max_batch(model: Model) -> None:
    prompts = [[5, 6], [7], [8, 9, 10], [11], [5, 6]]
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 1.0, "seed": 2}
    expected = [answer.tokens for answer in model.generate(prompts, **options)]
    narrow = open_model(model.path)
    narrow.backend.max_batch = 2
    assert [answer.tokens for answer in narrow.generate(prompts, **options)] == expected
    ids_BS = np.arange(5)[:, None] + np.arange(4)
    assert np.allclose(narrow.logits(ids_BS), model.logits(ids_BS), atol=1e-4)


def test_a_single_prompt_of_either_kind(model: Model) -> None:
    assert len(model.generate("the", max_tokens=2)) == 1
    assert model.generate([5, 6], max_tokens=2)[0].tokens == model.generate([[5, 6]], max_tokens=2)[0].tokens
    assert model.generate(np.array([5, 6]), max_tokens=2)[0].tokens == model.generate([[5, 6]], max_tokens=2)[0].tokens


def test_a_text_begins_with_the_begin_token(model: Model, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("the stop")]
    assert model.generate("the stop", max_tokens=4)[0].tokens == model.generate([ids], max_tokens=4)[0].tokens


@pytest.mark.parametrize(
    ("code", "prompts", "options"),
    [
        ("RUN030", [], {}),
        ("RUN030", "", {}),
        ("RUN030", [[]], {}),
        ("RUN030", [[1.5]], {}),
        ("RUN030", [None], {}),
        ("RUN033", [[5] * 97], {}),
        ("RUN034", [[400]], {}),
        ("RUN034", [[5], [-1]], {}),
        ("RUN031", "the", {"max_tokens": 0}),
        ("RUN031", "the", {"max_tokens": 1.0}),
        ("RUN031", "the", {"temperature": -1}),
        ("RUN031", "the", {"top_p": 0}),
        ("RUN031", "the", {"top_k": -1}),
        ("RUN031", "the", {"seed": -1}),
        ("RUN031", "the", {"stop": [""]}),
        ("RUN031", "the", {"stop": [5]}),
    ],
)
def test_errors_come_before_anything_is_computed(
    model: Model, code: str, prompts: Any, options: dict[str, Any]
) -> None:
    said = scripted(model, [[20]], capacity=96)
    for call in (said.generate, said.stream):
        with pytest.raises(ArchwrightError) as caught:
            call(prompts, **options)
        assert caught.value.code == code and caught.value.help
    assert said.backend.written is None  # pyright: ignore[reportAttributeAccessIssue]


def test_over_capacity_names_both_numbers(model: Model) -> None:
    with pytest.raises(ArchwrightError, match="100 tokens is over the capacity of 96"):
        model.generate([[5] * 100])


def test_without_a_tokenizer(write_model: Callable[..., Path]) -> None:
    bare = open_model(write_model(tokenizer=False))
    answer = bare.generate([[5, 6]], max_tokens=5)[0]
    assert (answer.text, len(answer.tokens), answer.finish_reason) == ("", 5, "length")
    for attempt in (lambda: bare.generate("text"), lambda: bare.generate([[5]], stop=["x"]), lambda: bare.chat):
        with pytest.raises(ArchwrightError, match="RUN020"):
            attempt()


def test_logits(model: Model) -> None:
    ids_BS = np.array([[5, 6, 7], [8, 9, 10]])
    logits_BSV = model.logits(ids_BS)
    assert logits_BSV.dtype == np.float32 and logits_BSV.shape == (2, 3, 400)
    assert np.allclose(model.logits(ids_BS[:, :2]), logits_BSV[:, :2], atol=1e-5), "no token sees a later one"
    for wrong, code in (
        ([5, 6], "RUN030"),
        ([[5.0]], "RUN030"),
        ([[]], "RUN030"),
        ([[400]], "RUN034"),
        ([[5] * 97], "RUN033"),
    ):
        with pytest.raises(ArchwrightError, match=code):
            model.logits(wrong)
