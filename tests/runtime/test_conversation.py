"""What a chat remembers, and what it forgets first."""

from pathlib import Path

import pytest

from archwright.runtime import open_model
from archwright.runtime.conversation import Conversation
from archwright.runtime.model import Model
from archwright.spec import ArchwrightError


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Model:
    return open_model(model_folder)


def say(conversation: Conversation, question: str) -> str:
    return "".join(piece.text for piece in conversation.ask(question))


def test_questions_and_answers_join_the_chat(model: Model) -> None:
    conversation = Conversation(model=model, options={"max_tokens": 3}, system="text")
    answers = [say(conversation, question) for question in ("the", "stop")]
    contents = [(turn["role"], turn["content"]) for turn in conversation.turns]
    assert contents == [("user", "the"), ("assistant", answers[0]), ("user", "stop"), ("assistant", answers[1])]
    assert conversation.forgotten == 0


def test_the_oldest_questions_are_forgotten_and_the_system_message_never(model: Model) -> None:
    conversation = Conversation(model=model, options={"max_tokens": 10}, system="text")
    for number in range(8):
        say(conversation, f"the stop {number}")
        messages = [{"role": "system", "content": "text"}, *conversation.turns[:-1]]
        prompt = model.chat.encode(messages, generation_prompt=True)
        assert len(prompt) + 10 <= model.capacity, "an answer has room"
        assert conversation.turns[-2]["content"] == f"the stop {number}"
        kept = len(conversation.turns) // 2
        assert kept + conversation.forgotten == number + 1
    assert conversation.forgotten > 0 and conversation.turns[0]["role"] == "user"


def test_nothing_is_forgotten_without_need(model: Model) -> None:
    """One question less forgotten, and there would be no room."""
    conversation = Conversation(model=model, options={"max_tokens": 10})
    before: list[dict[str, str]] = []
    while conversation.forgotten == 0:
        before = conversation.turns
        say(conversation, "the stop of the text")
    messages = [*before, {"role": "user", "content": "the stop of the text"}]
    messages = messages[2 * (conversation.forgotten - 1) :]
    assert len(model.chat.encode(messages, generation_prompt=True)) + 10 > model.capacity


def test_a_question_that_fails_leaves_the_chat_as_it_was(model: Model) -> None:
    conversation = Conversation(model=model, options={"max_tokens": 3})
    say(conversation, "the")
    turns = list(conversation.turns)
    with pytest.raises(ArchwrightError, match="RUN033"):
        say(conversation, "the stop " * 40)
    assert conversation.turns == turns and conversation.forgotten == 0
    assert say(conversation, "text") == say_after(model, turns, "text")


def say_after(model: Model, turns: list[dict[str, str]], question: str) -> str:
    ids = model.chat.encode([*turns, {"role": "user", "content": question}], generation_prompt=True)
    return model.generate([ids], max_tokens=3)[0].text


def test_more_tokens_than_the_model_can_hold_do_not_cost_the_memory(model: Model) -> None:
    """At most half the capacity is kept free for an answer."""
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    conversation = Conversation(model=model, options={"max_tokens": 500}, turns=short)
    say(conversation, "c")
    assert conversation.forgotten == 0 and len(conversation.turns) == 4
    say(conversation, "d")
    assert conversation.forgotten == 2, "the answer to c filled the cache"
    assert [turn["content"] for turn in conversation.turns[::2]] == ["d"]
