"""The `{% generation %}` tag of chat templates, and the marks by which rendered text remembers where it came from.

A template renders to one string, in which it can no longer be seen which characters the assistant wrote, and whether
`<|im_start|>` was written by the template or by a user. So rendering puts marks into the string: single characters
that occur nowhere in the template or its inputs.

    <|im_start|>user\\nsay ⟨guard⟩<|im_end|> please<|im_end|>\\n<|im_start|>assistant\\n⟨begin⟩no<|im_end|>⟨end⟩\\n

`begin` and `end` stand around what `{% generation %}` enclosed; `guard` stands before text of a message that spells a
special token. `cut` reads the marks and removes them.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from archwright.spec.errors import ArchwrightError

# Code points that Unicode reserves for a program's own use ("noncharacters"), then the planes for private use.
_CANDIDATES = (*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))


@dataclass(frozen=True)
class Marks:
    """Three characters that occur in none of the texts they were chosen for."""

    begin: str
    end: str
    guard: str

    @classmethod
    def for_texts(cls, texts: Iterable[str]) -> "Marks":
        """The first three candidates that none of `texts` holds; the same for the same texts."""
        used = {ord(character) for character in set().union(*texts)}
        free = (chr(code) for code in _CANDIDATES if code not in used)
        try:
            return cls(begin=next(free), end=next(free), guard=next(free))
        except StopIteration:
            raise ArchwrightError("TOK005", "the messages hold every private character of Unicode") from None

    def protect(self, text: str, specials: Iterable[str]) -> str:
        """Puts a guard before each place where `text` spells a special token or ends in the beginning of one."""
        names = tuple(specials)
        beginnings = {name[:length] for name in names for length in range(1, len(name))}
        longest = max(map(len, beginnings), default=0)
        places = {match.start() for match in re.finditer(f"(?={_any_of(names)})", text)}
        places |= {i for i in range(max(0, len(text) - longest), len(text)) if text[i:] in beginnings}
        bounds = [0, *sorted(places), len(text)]
        return self.guard.join(text[a:b] for a, b in pairwise(bounds))


@dataclass(frozen=True)
class Piece:
    """A part of a rendered chat: a special token (`special`) or ordinary text, with the loss on it or not."""

    text: str
    special: bool
    generated: bool


def cut(rendered: str, marks: Marks, specials: Iterable[str]) -> list[Piece]:
    """The pieces of a marked text, in order; their joined texts are the text without marks.

    Only what no guard precedes is a special token. Cuts fall at special tokens and at the ends of what the assistant
    says, so that no token covers both a prompt and an answer: when the model is used, the answer starts a new token.
    """
    special = f"(?<!{marks.guard})({_any_of(specials)})"
    pieces: list[Piece] = []
    generated = False
    for section in re.split(f"([{marks.begin}{marks.end}])", rendered):
        if section in (marks.begin, marks.end):
            generated = section == marks.begin
            continue
        for i, text in enumerate(re.split(special, section)):
            text = text.replace(marks.guard, "")
            if text:
                pieces.append(Piece(text=text, special=i % 2 == 1, generated=generated))
    return pieces


def _any_of(names: Iterable[str]) -> str:
    """A pattern that finds the longest of `names`, or nothing when there are none."""
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`: renders its body between the marks that the context holds.

    transformers, which introduced the tag, notes the length of what was rendered before it; marks in the text also stay
    right where a template collects its output in a variable first.
    """

    tags = {"generation"}  # noqa: RUF012  (the attribute's form is jinja2's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: dict[str, object], caller: Callable[[], str]) -> str:
        marks = context["generation_marks"]
        assert isinstance(marks, Marks)
        return f"{marks.begin}{caller()}{marks.end}"


def strings(value: object) -> Iterator[str]:
    """Every string in nested lists and mappings, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)
