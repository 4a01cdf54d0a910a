"""`archwright eval`: loss, perplexity and bits per byte of a model on held-out tokens.

Every token that the loss counts is scored exactly once. B batch, S sequence, V vocabulary, P scored positions.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from archwright.spec import ArchwrightError, Spec, load
from archwright.spec.cli import add_output_format, add_set, parser
from archwright.trainers.dataset import Split, open_data

if TYPE_CHECKING:
    from archwright.runtime.model import Model

_LOGITS_AT_ONCE = 1 << 26

DESCRIPTION = """\
Measure loss, perplexity and bits per byte on the validation part of built data.

Text is scored as one stream, as it was trained on: documents follow each other, end-of-text tokens between them.
A window of the context length moves over it by half its length, so every token but the first of all is scored once,
with at least half a context before it (less only within the first window). Chats are scored one by one, the
assistant's tokens only. Bits per byte = summed loss / ln 2 / UTF-8 bytes of the text that is scored.
The context is train.sequence_length where the spec has it, and never more than the model's capacity."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """loss: nats per token. perplexity: exp(loss). tokens, bytes: what was scored. context: tokens seen at most."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    bytes: int
    documents: int
    context: int


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens start ≤ i < stop go in (all but the last as input); those from `fresh` on are scored here."""

    start: int
    stop: int
    fresh: int


def evaluate(arguments: list[str]) -> int:
    """Scores a run, a model folder or an artifact."""
    args = parser("eval", DESCRIPTION)
    args.formatter_class = argparse.RawDescriptionHelpFormatter
    args.add_argument("path", metavar="PATH", type=Path, help="a run, a model folder or an artifact")
    args.add_argument("--data", type=Path, metavar="DIR", help="built data; default: data.path of PATH's spec")
    add_set(args)
    add_output_format(args, ("text", "json"))
    chosen = args.parse_args(arguments)
    from archwright.runtime.model import open_model  # after parsing, so that --help is quick

    model = open_model(chosen.path)
    spec = load(chosen.path / "spec.yaml", chosen.overrides) if chosen.overrides else model.spec
    folder = chosen.data or _data_path(spec)
    data = open_data(folder, tokenizer_digest=model.tokenizer.digest if model.tokenizer else None)
    started = time.perf_counter()
    score = score_split(model, data.validation, _context(spec, model.capacity))
    seconds = time.perf_counter() - started
    if chosen.output_format == "json":
        print(
            json.dumps({"path": str(chosen.path), "data": str(folder), **asdict(score), "seconds": seconds}, indent=2)
        )
    else:
        print(_text(score, seconds))
    return 0


def _data_path(spec: Spec) -> Path:
    if spec.data is None or spec.data.path is None:
        help = "add --data DIR, a folder written by `archwright data build`"
        raise ArchwrightError("TRAIN002", "the spec has no `data.path`, and `eval` needs data", help=help)
    return Path(spec.data.path)


def _context(spec: Spec, capacity: int) -> int:
    return min(capacity, spec.train.sequence_length) if spec.train else capacity


def score_split(model: "Model", split: Split, context: int) -> Score:
    """Score every token of `split` that the loss counts and that has a token before it.

    context: tokens that the model sees at most. Raises ArchwrightError TRAIN016 where nothing can be scored.
    """
    windows = _all_windows(split, context)
    rows = max(1, _LOGITS_AT_ONCE // (context * model.spec.model.vocab_size))
    loss, tokens = 0.0, 0
    while batch := list(islice(windows, rows)):
        part_loss, part_tokens = _score_batch(model, split, batch)
        loss, tokens = loss + part_loss, tokens + part_tokens
    if tokens == 0:
        raise ArchwrightError(
            "TRAIN016",
            f"the {split.name} part of the data holds no token to score",
            help="build the data with a larger data.validation_fraction",
        )
    mean = loss / tokens
    return Score(
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)),
        bits_per_byte=loss / math.log(2) / split.num_bytes if split.num_bytes else None,
        tokens=tokens,
        bytes=split.num_bytes,
        documents=split.num_documents,
        context=context,
    )


def _all_windows(split: Split, context: int) -> Iterator[Window]:
    if not split.masked:
        return sliding_windows(0, split.num_tokens, context)
    bounds = (split.bounds(document) for document in range(split.num_documents))
    return (window for start, stop in bounds for window in sliding_windows(start, stop, context))


def sliding_windows(start: int, stop: int, context: int) -> Iterator[Window]:
    """Windows of at most context + 1 tokens over start ≤ i < stop that score each token but the first once.

    ├───────────────┤            first window: all is fresh
            ├───────┼───────┤    then the second half
                ├───────────┼───┤   the last one ends with the text
    """
    fresh = start + 1
    while fresh < stop:
        begin = start if fresh == start + 1 else fresh - 1 - context // 2
        end = min(begin + context + 1, stop)
        begin = max(start, end - context - 1)
        yield Window(start=begin, stop=end, fresh=fresh)
        fresh = end


def _score_batch(model: "Model", split: Split, windows: list[Window]) -> tuple[float, int]:
    """Summed loss in nats, and the number of scored tokens. Shorter windows are padded on the right."""
    tokens = [split.tokens(window.start, window.stop).astype(np.int64) for window in windows]
    ids_BS = np.zeros((len(windows), max(map(len, tokens)) - 1), np.int64)
    for row_S, ids in zip(ids_BS, tokens, strict=True):
        row_S[: len(ids) - 1] = ids[:-1]
    logits_BSV = model.logits(ids_BS)
    loss, count = 0.0, 0
    for logits_SV, ids, window in zip(logits_BSV, tokens, windows, strict=True):
        scored_P = np.flatnonzero(split.mask(window.fresh, window.stop)) + window.fresh - window.start
        loss += float(_cross_entropy(logits_SV[scored_P - 1], ids[scored_P]).sum())
        count += len(scored_P)
    return loss, count


def _cross_entropy(logits_PV: NDArray[Any], targets_P: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log softmax(logits)[target] of each position, added up in float64."""
    highest_P1 = logits_PV.max(axis=-1, keepdims=True) if len(logits_PV) else logits_PV[:, :1]
    log_sum_P = np.log(np.exp(logits_PV - highest_P1).sum(axis=-1, dtype=np.float64)) + highest_P1[:, 0]
    return log_sum_P - logits_PV[np.arange(len(targets_P)), targets_P]


def _text(score: Score, seconds: float) -> str:
    bits = "" if score.bits_per_byte is None else f"bits per byte  {score.bits_per_byte:.4f}\n"
    return (
        f"loss           {score.loss:.4f} nats per token\n"
        f"perplexity     {score.perplexity:.2f}\n{bits}"
        f"scored         {score.tokens:,} tokens, {score.bytes:,} bytes, {score.documents:,} documents, "
        f"context {score.context}, {seconds:.1f} s"
    )
