"""Chats → token ids, through a Jinja template, with the mask of the assistant's words for training.

A message is `{"role": ..., "content": ...}`. Templates are Hugging Face's: they see `messages`,
`add_generation_prompt`, `bos_token` and `eos_token`, and mark what the assistant says by `{% generation %}`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.nodes import CallBlock, ExtensionAttribute
from jinja2.sandbox import ImmutableSandboxedEnvironment

from archwright.runtime.text.base import CHAT_TEMPLATE
from archwright.runtime.text.generation_tag import GenerationTag, Marks, Piece, cut, strings
from archwright.runtime.text.special_tokens import CONFIG, read_config
from archwright.runtime.text.tokenizer import Tokenizer
from archwright.spec.errors import ArchwrightError

ROLES = ("system", "user", "assistant", "tool")
TURN_BEGIN, TURN_END = "<|im_start|>", "<|im_end|>"

CHATML = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""The template that `tokenizer train` writes: ChatML, after a begin-of-text token where there is one."""

Message = Mapping[str, Any]


class ChatTemplate:
    """A template for one tokenizer.

    A message cannot forge a special token: what it spells is kept apart from what the template writes (see
    `generation_tag`), and is encoded as ordinary text. Roles are not text: they must be one of `ROLES`.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, *, where: str = CHAT_TEMPLATE) -> None:
        """Raises TOK011 for a template that is not correct Jinja; `where` names it in messages."""
        self.source = source
        self.where = where
        self._tokenizer = tokenizer
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = self._refuse
        try:
            tags = environment.parse(source).find_all(CallBlock)
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ArchwrightError("TOK011", f"{error.message}", where=f"{where}:{error.lineno}") from error
        self.has_generation = any(_is_generation(tag) for tag in tags)
        by_id = {token_id: text for text, token_id in tokenizer.special_tokens.items()}
        self._bos = by_id.get(tokenizer.bos_id, "") if tokenizer.bos_id is not None else ""
        self._eos = by_id.get(tokenizer.eos_id, "")

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The chat as text, special tokens written out: to look at, not to encode (see `encode`)."""
        return "".join(piece.text for piece in self._pieces(messages, generation_prompt))

    def encode(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> list[int]:
        """Ids of the chat; with `generation_prompt` it ends where the assistant's next answer begins.

        Raises TOK013 when the template refuses the messages or fails on them, TOK015 when they are malformed.
        """
        ids = self._encode_pieces(self._pieces(messages, generation_prompt))
        return [token_id for piece_ids, _ in ids for token_id in piece_ids]

    def encode_masked(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Ids of a finished chat and, for each, 1 where the assistant speaks (the loss is there) or 0.

        Raises TOK012 when the template does not say where the assistant speaks, TOK014 when the mask is all 0 or all 1
        (the usual sign of a template that does not fit), and what `encode` raises.
        """
        self.require_generation()
        ids: list[int] = []
        mask: list[int] = []
        for piece_ids, generated in self._encode_pieces(self._pieces(messages, False)):
            ids += piece_ids
            mask += [int(generated)] * len(piece_ids)
        if not 0 < sum(mask) < len(mask):
            found = "no token is the assistant's" if sum(mask) == 0 else "every token is the assistant's"
            raise ArchwrightError("TOK014", f"{found}: there is nothing to learn from this mask", where=self.where)
        return ids, mask

    def require_generation(self) -> None:
        """Raises TOK012 unless the template marks the assistant's words."""
        if not self.has_generation:
            raise ArchwrightError(
                "TOK012",
                "the chat template does not mark what the assistant says",
                where=self.where,
                help="write {% generation %} and {% endgeneration %} around the assistant's content and the token "
                f"that ends its turn, in {CHAT_TEMPLATE} beside the tokenizer",
            )

    def _pieces(self, messages: Sequence[Message], generation_prompt: bool) -> list[Piece]:
        check_messages(messages)
        specials = self._tokenizer.special_tokens
        marks = Marks.for_texts(strings([self.source, *specials, list(messages)]))
        guarded = [_guard(message, marks, specials) for message in messages]
        try:
            rendered = self._template.render(
                messages=guarded,
                add_generation_prompt=generation_prompt,
                bos_token=self._bos,
                eos_token=self._eos,
                generation_marks=marks,
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise ArchwrightError("TOK013", f"the chat template fails: {error}", where=self.where) from error
        return cut(rendered, marks, specials)

    def _encode_pieces(self, pieces: Sequence[Piece]) -> Iterator[tuple[list[int], bool]]:
        """Ids of each piece. A tokenizer that puts a space before a text does so only where its own rule says."""
        before: Piece | None = None
        for piece in pieces:
            if piece.special:
                yield [self._tokenizer.special_tokens[piece.text]], piece.generated
            else:
                starts = before is None or (self._tokenizer.prefix == "always" and before.special)
                yield self._tokenizer.encode(piece.text, continuation=not starts), piece.generated
            before = piece

    def _refuse(self, message: object) -> NoReturn:
        raise ArchwrightError("TOK013", f"the chat template refuses the messages: {message}", where=self.where)


def open_chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The template beside a tokenizer: chat_template.jinja, else the one in tokenizer_config.json, else ChatML where
    the tokenizer has its tokens. Raises TOK010 when there is none.
    """
    file = tokenizer.folder / CHAT_TEMPLATE
    if file.is_file():
        return ChatTemplate(read_template(file), tokenizer, where=str(file))
    template = read_config(tokenizer.folder).chat_template
    if template is not None:
        return ChatTemplate(template, tokenizer, where=str(tokenizer.folder / CONFIG))
    if {TURN_BEGIN, TURN_END} <= tokenizer.special_tokens.keys():
        return ChatTemplate(CHATML, tokenizer, where="the default chat template")
    raise ArchwrightError(
        "TOK010",
        "the tokenizer has no chat template, and no tokens for the default one",
        where=str(tokenizer.folder),
        help=f"put a {CHAT_TEMPLATE} beside the tokenizer",
    )


def read_template(file: Path) -> str:
    """The text of a template file. Raises TOK011 when it cannot be read as UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArchwrightError("TOK011", f"not readable as UTF-8 text: {error}", where=str(file)) from error


def check_messages(messages: object) -> None:
    """Raises TOK015 unless this is a list of one or more messages with a known role and a text."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ArchwrightError("TOK015", "a chat is a list of one or more messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ArchwrightError("TOK015", f"message {i} is not an object with `role` and `content`")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            help = f"use one of: {', '.join(ROLES)}"
            raise ArchwrightError("TOK015", f"message {i} has the role {role!r}", help=help)
        if not isinstance(content, str):
            raise ArchwrightError("TOK015", f"the `content` of message {i} must be a string, not {_name(content)}")


def _guard(value: Any, marks: Marks, specials: Mapping[str, int], key: object = None) -> Any:
    """A copy of a message in which every text but the role is guarded."""
    if isinstance(value, str):
        return value if key == "role" else marks.protect(value, specials)
    if isinstance(value, Mapping):
        return {name: _guard(item, marks, specials, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_guard(item, marks, specials) for item in value]
    return value


def _is_generation(tag: CallBlock) -> bool:
    function = tag.call.node
    return isinstance(function, ExtensionAttribute) and function.identifier == GenerationTag.identifier


def _to_json(value: object, indent: int | None = None) -> str:
    # jinja2's own filter escapes <, > and & for HTML, which a model was never trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _name(value: object) -> str:
    return "missing" if value is None else type(value).__name__
