"""A chat that goes on: messages, answers, and what is forgotten when the cache is too small for all of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from archwright.runtime.generation import Piece
from archwright.runtime.model import Model

Message = dict[str, str]


@dataclass(kw_only=True)
class Conversation:
    """Questions and answers so far, after an optional system message.

    options: arguments of `Model.stream`, max_tokens among them.
    forgotten: questions that were dropped with their answers. The oldest go first, until the rest leaves room for
    an answer of max_tokens or half the capacity, whichever is less; the system message and the newest question stay.
    """

    model: Model
    options: Mapping[str, Any]
    system: str | None = None
    turns: list[Message] = field(default_factory=list[Message])
    forgotten: int = 0

    def ask(self, question: str) -> Iterator[Piece]:
        """The pieces of the answer. The question and its answer join the chat once the last piece has been taken.

        Raises ArchwrightError RUN033 where the newest question alone is over the capacity, TOK010 without a chat
        template, and what `Model.stream` raises.
        """
        turns = [*self.turns, {"role": "user", "content": question}]
        ids = self._encode(turns)
        forgotten = 0
        limit = self.model.capacity - min(self.options["max_tokens"], self.model.capacity // 2)
        while len(turns) > 1 and len(ids) > limit:
            turns = turns[2:]
            forgotten += 1
            ids = self._encode(turns)
        pieces = self.model.stream([ids], **self.options)
        self.forgotten += forgotten
        for piece in pieces:
            if piece.answer is not None:
                self.turns = [*turns, {"role": "assistant", "content": piece.answer.text}]
            yield piece

    def _encode(self, turns: list[Message]) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.model.chat.encode([*system, *turns], generation_prompt=True)
