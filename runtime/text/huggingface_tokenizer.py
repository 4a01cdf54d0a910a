"""Tokenizers in Hugging Face's format (`tokenizer.json`), read by the `tokenizers` library."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from archwright.runtime.text.base import BaseTokenizer, Prefix
from archwright.runtime.text.byte_table import ByteTable
from archwright.runtime.text.special_tokens import COPY_AGAIN, TokenizerConfig, check_ids, read_config, select
from archwright.spec.errors import ArchwrightError

_SPACE = "\u2581"


class HuggingFaceTokenizer(BaseTokenizer):
    """A `tokenizer.json` whose tokens stand for fixed bytes: byte-level, or sentencepiece's pieces.

    Padding, truncation and the post-processor of the file are not used: `encode` gives all tokens of the text and no
    others. Decoding goes through the table of bytes, so invalid UTF-8 becomes U+FFFD as in `bytes.decode`.
    """

    def __init__(self, model_file: Path) -> None:
        """Raises TOK002 (no tokenizer), TOK003 (no end-of-text token) or TOK004 (tokens that are not bytes)."""
        try:
            content = json.loads(model_file.read_bytes())
            self._start = _ordinary(content)
            self._inside = _ordinary(_without_prefix(content))
        except Exception as error:  # `tokenizers` raises plain Exception for a file that it cannot read
            message = f"not readable as a tokenizer: {error}"
            raise ArchwrightError("TOK002", message, where=str(model_file), help=COPY_AGAIN) from error
        config = read_config(model_file.parent)
        vocab = self._start.get_vocab(with_added_tokens=True)
        check_ids(vocab, model_file)
        special_ids = _special_ids(content, vocab, config)
        special = select(special_ids, config, bos=None, eos=None, where=model_file)
        prefix = _prefix(content)
        table = ByteTable(_bytes(content, vocab, set(special_ids.values()), model_file), strips_space=prefix != "never")
        unknown = content["model"].get("unk_token")
        unknown_id = vocab.get(unknown) if unknown else content["model"].get("unk_id")
        super().__init__(model_file, table=table, special=special, unknown_id=unknown_id, prefix=prefix)

    def _encode(self, text: str, continuation: bool) -> list[int]:
        tokenizer = self._inside if continuation else self._start
        return tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._start.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def _ordinary(content: dict[str, Any]) -> Tokenizer:
    """The tokenizer, told to read the names of special tokens as ordinary text, and neither to pad nor to cut."""
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _special_ids(content: dict[str, Any], vocab: dict[str, int], config: TokenizerConfig) -> dict[str, int]:
    flagged = {entry["content"]: entry["id"] for entry in content.get("added_tokens", ()) if entry.get("special")}
    named = {name: vocab[name] for name in config.names if name in vocab}
    return flagged | named | {name: token_id for name, token_id in config.added.items() if name in vocab}


def _parts(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as a flat list of steps."""
    if component is None:
        return
    if component["type"] == "Sequence":
        for key in ("normalizers", "pretokenizers", "decoders"):
            for part in component.get(key, ()):
                yield from _parts(part)
    else:
        yield component


def _prefix(content: dict[str, Any]) -> Prefix:
    """Whether the tokenizer puts a space before a text, in the four spellings there are."""
    if any(part["type"] == "Prepend" for part in _parts(content.get("normalizer"))):
        return "always"
    for part in _parts(content.get("pre_tokenizer")):
        if part["type"] == "ByteLevel" and part.get("add_prefix_space"):
            return "always"
        if part["type"] == "Metaspace":
            scheme: Prefix = part.get("prepend_scheme") or ("always" if part.get("add_prefix_space", True) else "never")
            return scheme
    return "never"


def _without_prefix(content: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer for a text that goes on after other text: no space is put before it."""
    copy = json.loads(json.dumps(content))
    normalizer = copy.get("normalizer")
    if normalizer and normalizer["type"] == "Prepend":
        copy["normalizer"] = None
    elif normalizer and normalizer["type"] == "Sequence":
        normalizer["normalizers"] = [part for part in normalizer["normalizers"] if part["type"] != "Prepend"]
    for part in _parts(copy.get("pre_tokenizer")):
        if part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
            part.pop("add_prefix_space", None)
    return copy


def _bytes(content: dict[str, Any], vocab: dict[str, int], special: set[int], where: Path) -> list[bytes]:
    """The bytes of each token, by the kind of the file's decoder. Raises TOK004 for decoders that are not bytewise."""
    kinds = {part["type"] for part in _parts(content.get("decoder"))}
    byte_level = "ByteLevel" in kinds
    if not byte_level and not kinds & {"ByteFallback", "Metaspace"}:
        raise ArchwrightError(
            "TOK004",
            f"the decoder ({', '.join(sorted(kinds)) or 'none'}) does not give each token its own bytes",
            where=str(where),
            help="byte-level BPE and sentencepiece-like tokenizers (ByteFallback or Metaspace decoders) can be read",
        )
    table = [b""] * (max(vocab.values()) + 1)
    added = {entry["id"] for entry in content.get("added_tokens", ())}
    alphabet = _byte_alphabet()
    for piece, token_id in vocab.items():
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
        if token_id in special:
            continue
        if token_id in added:
            table[token_id] = piece.encode()
        elif byte_level and all(character in alphabet for character in piece):
            table[token_id] = bytes(alphabet[character] for character in piece)
        elif byte and "ByteFallback" in kinds:
            table[token_id] = bytes([int(byte[1], 16)])
        else:
            table[token_id] = piece.replace(_SPACE, " ").encode()
    return table


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes: the printable ones of Latin-1 as they are, the others,
    in order, from U+0100 on (Radford et al. 2019, the code of GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
