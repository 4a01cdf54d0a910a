"""`tokenizer:` and `data:` — from text to tokens."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from archwright.spec.models.base import Node


class SentencePieceTokenizer(Node):
    """A sentencepiece model, trained by `archwright tokenizer train` or brought along."""

    kind: Literal["sentencepiece"]
    path: str | None = None
    """Folder (or .model file) to read. Not needed by `tokenizer train`, which writes it."""
    algorithm: Literal["unigram", "bpe"] = "bpe"
    vocab_size: PositiveInt | None = None
    """Tokens to train, special ones included. Default: model.vocab_size."""
    split_digits: bool = True
    chat_template: str | None = None
    """Jinja file that `tokenizer train` puts beside the tokenizer. Default: ChatML."""


class HuggingFaceTokenizer(Node):
    """A `tokenizer.json` of Hugging Face's `tokenizers`, read as it is."""

    kind: Literal["huggingface"]
    path: str | None = None
    """Folder (or tokenizer.json file) to read."""


Tokenizer = Annotated[SentencePieceTokenizer | HuggingFaceTokenizer, Field(discriminator="kind")]


class TextSource(Node):
    """Plain UTF-8 text; one file is one document."""

    kind: Literal["text"]
    path: str
    """A file, a folder (read recursively) or a glob."""


class JsonlSource(Node):
    """One JSON object a line; the field `text` is a document."""

    kind: Literal["jsonl"]
    path: str
    text: str = "text"


class MessagesSource(Node):
    """One JSON object a line with `messages: [{role, content}, ...]`; the loss is on the assistant's words only."""

    kind: Literal["messages"]
    path: str


class PairsSource(Node):
    """One JSON object a line with a prompt and a response; the loss is on the response only."""

    kind: Literal["pairs"]
    path: str
    prompt: str = "prompt"
    response: str = "response"


Source = Annotated[TextSource | JsonlSource | MessagesSource | PairsSource, Field(discriminator="kind")]


class Data(Node):
    """What to read (`sources`, for `data build` and `tokenizer train`) and what was built (`path`, for `train`)."""

    path: str | None = None
    """A folder written by `archwright data build`."""
    sources: Annotated[tuple[Source, ...], Field(strict=False)] = ()
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of the documents held out, chosen by the hash of their text."""
    deduplicate: Literal["exact", "none"] = "exact"
    """Exact: of documents that are equal byte for byte, over all sources, the first is kept."""
    min_bytes: NonNegativeInt = 0
    """Text documents with fewer bytes of UTF-8 are left out."""
    shard_tokens: PositiveInt = 1 << 26
    """Tokens in one shard file."""
