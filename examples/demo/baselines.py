"""What the demo's model is measured against: two trigram models on the same tokens, and gzip."""

import gzip
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from archwright.runtime.text import open_tokenizer
from archwright.trainers.dataset import Dataset


def baselines(data: Dataset, tokenizer_folder: Path) -> dict[str, float]:
    """Bits per UTF-8 byte on the validation documents, by name."""
    train = data.train.tokens(0, data.train.num_tokens).tolist()
    held_out = data.validation.tokens(0, data.validation.num_tokens).tolist()
    counts = [Counter(_grams(train, order)) for order in (1, 2, 3)]
    num_bytes = data.validation.num_bytes
    tokenizer = open_tokenizer(tokenizer_folder)
    texts = [
        tokenizer.decode([int(token) for token in data.validation.document(document)]).encode()
        for document in range(data.validation.num_documents)
    ]
    return {
        "add-one trigram": _add_one(counts, held_out, data.vocab_size) / num_bytes,
        "Witten-Bell trigram": _witten_bell(counts, held_out, data.vocab_size) / num_bytes,
        "gzip -9 per file": 8 * sum(len(gzip.compress(text, 9)) for text in texts) / sum(map(len, texts)),
    }


def _grams(tokens: Sequence[int], order: int) -> Iterator[tuple[int, ...]]:
    return zip(*(tokens[start:] for start in range(order)), strict=False)


def _add_one(counts: list[Counter[tuple[int, ...]]], tokens: Sequence[int], vocab_size: int) -> float:
    """Bits of `tokens` under p(c | a, b) = (n(abc) + 1) / (n(ab) + V) (Laplace)."""
    _, pairs, triples = counts
    odds = [(triples[a, b, c] + 1) / (pairs[a, b] + vocab_size) for a, b, c in _grams(tokens, 3)]
    return -float(np.log2(odds).sum())


def _witten_bell(counts: list[Counter[tuple[int, ...]]], tokens: Sequence[int], vocab_size: int) -> float:
    """Bits of `tokens` under Witten-Bell interpolation (Witten & Bell 1991).

    p(w | h) = (n(hw) + t(h) · p(w | shorter h)) / (n(h) + t(h)), t(h) the number of different tokens seen after h; at
    the bottom stands the uniform distribution.
    """
    total = sum(counts[0].values())
    followers = [Counter(gram[:-1] for gram in table) for table in counts]
    bits = 0.0
    for a, b, c in _grams(tokens, 3):
        probability = 1 / vocab_size
        for order, history in enumerate([(), (b,), (a, b)]):
            seen = counts[order - 1][history] if order else total
            kinds = followers[order][history]
            if seen:
                probability = (counts[order][*history, c] + kinds * probability) / (seen + kinds)
        bits -= math.log2(probability)
    return bits
