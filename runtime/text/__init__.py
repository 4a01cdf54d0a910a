"""Tokenizers and chat templates: text ↔ token ids."""

from archwright.runtime.text.byte_table import StreamDecoder
from archwright.runtime.text.chat import ChatTemplate, open_chat_template
from archwright.runtime.text.tokenizer import Tokenizer, open_tokenizer

__all__ = ["ChatTemplate", "StreamDecoder", "Tokenizer", "open_chat_template", "open_tokenizer"]
