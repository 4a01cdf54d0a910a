"""Which tokens are special: what `tokenizer_config.json` and its relatives say, in the spellings found in the wild."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archwright.spec.errors import ArchwrightError
from archwright.spec.json_text import parse_json

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
COPY_AGAIN = "copy the tokenizer's files again; they are broken, cut short or something else"
TOKEN_IDS = range(1 << 24)
"""Those that a tokenizer may have; a table of bytes has a row for each."""

# Tried in this order where no file names the token that ends a text.
_END_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>")
# Tokens that close a turn of a chat in the known families: generation stops at them as at the end of the text.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>")


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of one tokenizer."""

    ids: Mapping[str, int]
    """Text of each special token → id. No text of a user is ever encoded to one of these ids."""
    bos_id: int | None
    eos_id: int
    stop_ids: frozenset[int]
    """Ends generation: the end of the text and the ends of a chat's turn."""


@dataclass(frozen=True)
class TokenizerConfig:
    """What the JSON files beside a tokenizer say; all empty where there are none."""

    bos: str | None = None
    eos: str | None = None
    names: frozenset[str] = frozenset()
    """Texts said to be special tokens."""
    added: Mapping[str, int] = field(default_factory=dict)
    """Special tokens given with their ids (`added_tokens_decoder`)."""
    stop_ids: frozenset[int] = frozenset()
    chat_template: str | None = None


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object; empty when there is no such file. Raises TOK002 for anything else."""
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ArchwrightError("TOK002", f"not readable as JSON: {error}", where=str(path), help=COPY_AGAIN) from error
    if not isinstance(content, dict):
        raise ArchwrightError("TOK002", "must hold a JSON object", where=str(path), help=COPY_AGAIN)
    return content


def read_config(folder: Path) -> TokenizerConfig:
    """Reads tokenizer_config.json, special_tokens_map.json and the stop tokens of generation_config.json.

    Raises TOK002 where one is not what transformers writes.
    """
    try:
        config = _read_config(folder)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        message = f"the files beside the tokenizer name its tokens in a way that is not known: {error}"
        raise ArchwrightError("TOK002", message, where=str(folder / CONFIG), help=COPY_AGAIN) from error
    check_ids(config.added, folder / CONFIG)
    return config


def check_ids(ids: Mapping[str, int], where: Path) -> None:
    """Raises TOK002 for an id that no vocabulary has."""
    wrong = next((name for name, token_id in ids.items() if token_id not in TOKEN_IDS), None)
    if wrong is not None:
        message = f"the token {wrong!r} has the id {ids[wrong]}, which is outside 0 to {TOKEN_IDS[-1]}"
        raise ArchwrightError("TOK002", message, where=str(where), help="use the ids of the model's vocabulary")


def _read_config(folder: Path) -> TokenizerConfig:
    config = {**read_json(folder / SPECIAL_TOKENS_MAP), **read_json(folder / CONFIG)}
    added = {
        entry["content"]: int(token_id)
        for token_id, entry in (config.get("added_tokens_decoder") or {}).items()
        if entry.get("special")
    }
    named = [config.get(f"{role}_token") for role in ("bos", "eos", "pad", "sep", "cls", "mask")]
    named += _texts(config.get("additional_special_tokens")) + _texts(config.get("extra_special_tokens"))
    stop = read_json(folder / GENERATION_CONFIG).get("eos_token_id")
    return TokenizerConfig(
        bos=_text(config.get("bos_token")),
        eos=_text(config.get("eos_token")),
        names=frozenset(text for text in map(_text, named) if text),
        added=added,
        stop_ids=frozenset([stop] if isinstance(stop, int) else stop or ()),
        chat_template=_default_template(config.get("chat_template")),
    )


def select(
    ids: Mapping[str, int], config: TokenizerConfig, *, bos: str | None, eos: str | None, where: Path
) -> SpecialTokens:
    """Finds bos, eos and the stop tokens among `ids`; `bos` and `eos` are what the model file itself says.

    Raises TOK003 when nothing says which token ends a text.
    """
    eos_text = config.eos or eos or next((text for text in _END_OF_TEXT if text in ids), None)
    if eos_text is None or eos_text not in ids:
        found = f"`{eos_text}` is named as the end of a text, but is no token" if eos_text else "no end-of-text token"
        help = f"name a token as `eos_token` in {CONFIG} beside it"
        raise ArchwrightError("TOK003", found, where=str(where), help=help)
    bos_text = config.bos or bos
    turn_ends = {ids[text] for text in _END_OF_TURN if text in ids}
    return SpecialTokens(
        ids=dict(sorted(ids.items(), key=lambda item: item[1])),
        bos_id=ids.get(bos_text) if bos_text else None,
        eos_id=ids[eos_text],
        stop_ids=frozenset({ids[eos_text], *turn_ends, *config.stop_ids}),
    )


def _text(token: object) -> str | None:
    """A token is written as a string or as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _texts(tokens: object) -> list[object]:
    if isinstance(tokens, dict):
        return list(tokens.values())
    return list(tokens) if isinstance(tokens, Iterable) and not isinstance(tokens, str) else []


def _default_template(template: object) -> str | None:
    """One template, or a list of named ones of which `default` is meant."""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
