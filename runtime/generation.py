"""Batches of unequal prompts → tokens and text, as they come. B batch, S sequence, V vocabulary."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from archwright.runtime.backends.base import AnyBackend
from archwright.runtime.sampling import Logits, Sampling, choose, random_stream
from archwright.runtime.stopping import StopScanner
from archwright.runtime.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "capacity"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What ends an answer and how its tokens are chosen.

    stop_ids: tokens that end it; they are not part of the answer. stop: strings that end it; they and what follows
    are not part of its text. token_limit: only ids below it are chosen (the tokenizer may have fewer than the model's
    vocabulary).
    """

    max_tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    token_limit: int


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds that the back end computed while this answer was made; a batch shares them.

    tokens_per_s: this answer's tokens after the first, by decode_s; 0 where there are none.
    """

    prefill_s: float
    decode_s: float
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model says to one prompt.

    text: complete, without stop strings; empty without a tokenizer. tokens: the ids chosen, up to the one that
    completed a stop string, without a stop token. finish_reason: stop (a stop token or string), length (max_tokens),
    capacity (the cache is full).
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    num_prompt_tokens: int
    timings: Timings


@dataclass(frozen=True, kw_only=True)
class Piece:
    """New text of the answer to prompt `index`; with `answer` it is the last piece. Joined pieces are the answer's
    text.
    """

    index: int
    text: str
    answer: Answer | None = None


@dataclass(kw_only=True)
class _Clock:
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(kw_only=True)
class _Row:
    """One answer in the making."""

    index: int
    prompt: Sequence[int]
    stream: np.random.Generator
    scanner: StopScanner
    tokenizer: Tokenizer | None
    capacity: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    answer: Answer | None = None

    def __post_init__(self) -> None:
        self._decoder = None
        if self.tokenizer is not None:
            # A tokenizer that puts a space before each text puts one after a special token too; decoding drops it.
            starts = self.tokenizer.prefix == "always" and self.prompt[-1] in self.tokenizer.special_tokens.values()
            self._decoder = self.tokenizer.stream(continuation=not starts)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def accept(self, token: int, options: Options, clock: _Clock) -> Piece:
        """Take the next token in, and finish where it is the last."""
        if token in options.stop_ids:
            return self._finish("stop", "", clock)
        self.tokens.append(token)
        shown = self.scanner.push(self._decoder.push(token)) if self._decoder else ""
        if self.scanner.found is not None:
            return self._finish("stop", shown, clock)
        if len(self.tokens) == options.max_tokens:
            return self._finish("length", shown, clock)
        if self.length > self.capacity:
            return self._finish("capacity", shown, clock)
        self.text += shown
        return Piece(index=self.index, text=shown)

    def _finish(self, reason: FinishReason, shown: str, clock: _Clock) -> Piece:
        if self.scanner.found is None:
            shown += self.scanner.push(self._decoder.flush() if self._decoder else "")
            if self.scanner.found is not None:
                reason = "stop"
            shown += self.scanner.flush()
        self.text += shown
        rate = (len(self.tokens) - 1) / clock.decode_s if clock.decode_s and self.tokens else 0.0
        self.answer = Answer(
            text=self.text,
            tokens=self.tokens,
            finish_reason=reason,
            num_prompt_tokens=len(self.prompt),
            timings=Timings(prefill_s=clock.prefill_s, decode_s=clock.decode_s, tokens_per_s=rate),
        )
        return Piece(index=self.index, text=shown, answer=self.answer)


def stream_answers(
    backend: AnyBackend, tokenizer: Tokenizer | None, prompts: Sequence[Sequence[int]], options: Options
) -> Iterator[Piece]:
    """Answer prompts (each 1 to `capacity` known ids), at most `max_batch` at a time; the pieces of all in the order of
    their making, exactly one with an `answer` for each prompt."""
    seen: dict[tuple[int, ...], int] = {}
    rows: list[_Row] = []
    for index, prompt in enumerate(prompts):
        copy = seen.get(tuple(prompt), 0)
        seen[tuple(prompt)] = copy + 1
        rows.append(
            _Row(
                index=index,
                prompt=prompt,
                stream=random_stream(options.seed, copy),
                scanner=StopScanner(options.stop),
                tokenizer=tokenizer,
                capacity=backend.capacity,
            )
        )
    size = backend.max_batch or len(rows)
    for start in range(0, len(rows), size):
        yield from _stream_batch(backend, rows[start : start + size], options)


def _stream_batch(backend: AnyBackend, rows: Sequence[_Row], options: Options) -> Iterator[Piece]:
    lengths_B = np.array([len(row.prompt) for row in rows])
    longest = int(lengths_B.max())
    ids_BS = np.zeros((len(rows), longest), np.int64)
    for row, ids_S in zip(rows, ids_BS, strict=True):
        ids_S[: len(row.prompt)] = row.prompt
    clock = _Clock()
    start = time.perf_counter()
    cache = backend.new_cache(len(rows), min(backend.capacity, longest + options.max_tokens))
    logits_BV: Logits = backend.prefill(cache, ids_BS, lengths_B)
    clock.prefill_s = time.perf_counter() - start
    while True:
        for row, logits_V in zip(rows, logits_BV, strict=True):
            if row.answer is None:
                yield row.accept(choose(logits_V[: options.token_limit], options.sampling, row.stream), options, clock)
        if all(row.answer is not None for row in rows):
            return
        # A finished row computes on, as token 0 at position 0: nobody reads it, and it widens nothing.
        next_B = np.array([0 if row.answer else row.tokens[-1] for row in rows])
        at_B = np.array([0 if row.answer else row.length - 1 for row in rows])
        start = time.perf_counter()
        logits_BV = backend.decode(cache, next_B, at_B)
        clock.decode_s += time.perf_counter() - start
