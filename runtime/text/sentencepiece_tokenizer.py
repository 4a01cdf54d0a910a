"""Tokenizers in the sentencepiece format (`tokenizer.model`)."""

import re
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from archwright.runtime.text.base import BaseTokenizer
from archwright.runtime.text.byte_table import ByteTable
from archwright.runtime.text.special_tokens import COPY_AGAIN, TokenizerConfig, read_config, select
from archwright.spec.errors import ArchwrightError

# sentencepiece writes a space as U+2581 and cannot tell it from a U+2581 that stands in the text.
_SPACE = "\u2581"
# Never in a vocabulary, so nothing merges with it: what follows is encoded as if it stood inside a text.
_ANCHOR = "\ufdd0"
_UNKNOWN = "\ufffd".encode()


class SentencePieceTokenizer(BaseTokenizer):
    """A sentencepiece model with its JSON files beside it (all optional).

    Differs from `SentencePieceProcessor` in two points. A U+2581 in the text is encoded as its three bytes where the
    model has byte tokens, so that it comes back (sentencepiece returns a space). And a text never becomes a special
    token, also where a model made on another system lists its chat tokens as user-defined symbols.
    """

    def __init__(self, model_file: Path) -> None:
        """Raises TOK002 when the file is no sentencepiece model, TOK003 when it has no end-of-text token."""
        try:
            processor = SentencePieceProcessor(model_proto=model_file.read_bytes())
        except (RuntimeError, OSError) as error:
            message = "not readable as a sentencepiece model"
            raise ArchwrightError("TOK002", message, where=str(model_file), help=COPY_AGAIN) from error
        self._processor = processor
        config = read_config(model_file.parent)
        pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
        ids = _special_ids(processor, pieces, config)
        special = select(
            ids,
            config,
            bos=pieces[processor.bos_id()] if processor.bos_id() >= 0 else None,
            eos=pieces[processor.eos_id()] if processor.eos_id() >= 0 else None,
            where=model_file,
        )
        has_prefix = processor.encode_as_pieces("a")[0].startswith(_SPACE)
        table = ByteTable(_bytes(processor, pieces, ids), strips_space=has_prefix)
        prefix = "always" if has_prefix else "never"
        super().__init__(model_file, table=table, special=special, unknown_id=processor.unk_id(), prefix=prefix)
        byte_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._space_ids = byte_ids if all(map(processor.is_byte, byte_ids)) else None
        self._anchor_ids = processor.encode(_ANCHOR)

    def _encode(self, text: str, continuation: bool) -> list[int]:
        if _SPACE not in text or self._space_ids is None:
            return self._plain(text, continuation)
        first, *rest = text.split(_SPACE)
        ids = self._plain(first, continuation)
        for part in rest:
            ids += [*self._space_ids, *self._plain(part, True)]
        return ids

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if any(_SPACE in text for text in texts):
            return [self._encode(text, False) for text in texts]
        return self._processor.encode(list(texts))

    def _plain(self, text: str, continuation: bool) -> list[int]:
        if self.prefix == "never" or not continuation:
            return self._processor.encode(text)
        ids = self._processor.encode(_ANCHOR + text)
        assert ids[: len(self._anchor_ids)] == self._anchor_ids, "the anchor merged with what follows it"
        return ids[len(self._anchor_ids) :]


def _special_ids(processor: SentencePieceProcessor, pieces: list[str], config: TokenizerConfig) -> dict[str, int]:
    """Control symbols, the unknown token, and what the JSON files call special."""
    named = {piece: i for i, piece in enumerate(pieces) if piece in config.names}
    control = {piece: i for i, piece in enumerate(pieces) if processor.is_control(i) or processor.is_unknown(i)}
    return control | named | dict(config.added)


def _bytes(processor: SentencePieceProcessor, pieces: list[str], special: dict[str, int]) -> list[bytes]:
    """The bytes of each token: of a byte token its byte, of a special token none, of another one its text."""
    table = [piece.replace(_SPACE, " ").encode() for piece in pieces]
    table += [b""] * (max(special.values(), default=-1) + 1 - len(table))
    for token_id, piece in enumerate(pieces):
        if processor.is_byte(token_id):
            table[token_id] = bytes([int(_byte_name(piece), 16)])
    for token_id in special.values():
        table[token_id] = b""
    table[processor.unk_id()] = _UNKNOWN
    return table


def _byte_name(piece: str) -> str:
    match = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    assert match, piece
    return match[1]
