"""The sequences that a model is calibrated and judged on. N sequences, S tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError  # NumPy's, of a header with brackets that are not closed

import numpy as np
from numpy.typing import NDArray

from archwright.runtime.text.tokenizer import Tokenizer, open_tokenizer
from archwright.spec import ArchwrightError
from archwright.spec.json_text import parse_json
from archwright.spec.manifest import MANIFEST, read_manifest
from archwright.spec.models import Calibration

Ids = NDArray[np.int64]

_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_HELP = "give a folder of `archwright data build`, a .npy of token ids, or a .jsonl of `tokens` or `text`"


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """samples_NS: from the beginning, for statistics. evaluation_NS: from the end, which calibration never sees."""

    samples_NS: Ids
    evaluation_NS: Ids


def read_tokens(chosen: Calibration, *, vocab_size: int, tokenizer: Path | None) -> Tokens:
    """The sequences of a calibration file or folder.

    A flat stream of tokens is cut into sequences; documents are joined to one. tokenizer: the folder of the model's,
    for texts. Raises ArchwrightError BUILD062 where the tokens are missing, too few or outside the vocabulary.
    """
    path = Path(chosen.path)
    length, wanted = chosen.sequence_length, chosen.samples + chosen.evaluation
    try:
        stream = _stream(path, tokenizer)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, TokenError) as error:
        message = f"the calibration's tokens cannot be read: {error}"
        raise ArchwrightError("BUILD062", message, where=str(path), help=_HELP) from error
    found = len(stream) // length
    if found < wanted:
        left = found - chosen.evaluation
        raise ArchwrightError(
            "BUILD062",
            f"there are {found} sequences of {length} tokens, and {chosen.samples} samples and {chosen.evaluation} for "
            "evaluation are wanted",
            where=str(path),
            help="give more tokens" + (f", or set samples to {left}" if left > 0 else ""),
        )
    rows_NS = stream[: found * length].reshape(found, length)
    rows_NS = np.concatenate([rows_NS[: chosen.samples], rows_NS[found - chosen.evaluation :]]).astype(np.int64)
    wrong = rows_NS[(rows_NS < 0) | (rows_NS >= vocab_size)]
    if len(wrong):
        message = f"token id {wrong[0]} is outside the vocabulary of {vocab_size}"
        raise ArchwrightError("BUILD062", message, where=str(path), help="use the tokenizer of this model")
    return Tokens(samples_NS=rows_NS[: chosen.samples], evaluation_NS=rows_NS[chosen.samples :])


def _stream(path: Path, tokenizer: Path | None) -> NDArray[np.integer]:
    """All tokens of a source, one after the other."""
    if path.is_dir():
        return _built(path)
    if path.suffix == ".npy":
        array = np.lib.format.open_memmap(path, mode="r")  # `np.load` opens archives, too
        if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
            raise ValueError(f"an array of {array.dtype} {list(array.shape)}")
        return array.reshape(-1)
    if path.suffix != ".jsonl":
        raise ValueError("the name ends neither in .npy nor in .jsonl")
    return np.array([token for line in _lines(path, tokenizer) for token in line], np.int64)


def _built(path: Path) -> NDArray[np.integer]:
    """The training tokens of built data, with those held out behind them."""
    manifest = read_manifest(path)
    if manifest.kind != "data":
        raise ValueError(f"{MANIFEST} is that of a {manifest.kind}")
    dtype = _DTYPES[manifest.details["dtype"]]
    parts = [
        np.memmap(file, dtype, "r")
        for split in ("train", "validation")
        for file in sorted(path.glob(f"{split}-*.tokens.bin"))
        if file.stat().st_size
    ]
    if not parts:
        raise ValueError("it has no tokens")
    return np.concatenate(parts)


def _lines(path: Path, tokenizer: Path | None) -> Iterator[list[int]]:
    opened = None
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            item = parse_json(line)
            tokens = item.get("tokens") if isinstance(item, dict) else item
            if isinstance(item, dict) and isinstance(item.get("text"), str) and tokens is None:
                if tokenizer is None:
                    raise ValueError(f"line {number} is a text, and the model has no tokenizer")
                opened = opened or open_tokenizer(tokenizer)
                tokens = _encoded(opened, item["text"], number)
            if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
                raise ValueError(f"line {number} has neither `tokens` nor `text`")
            yield tokens


def _encoded(tokenizer: Tokenizer, text: str, line: int) -> list[int]:
    try:
        return tokenizer.encode(text, bos=True)
    except ArchwrightError as error:
        raise ValueError(f"line {line}: {error.message}") from error
