"""A model that runs: logits, answers, streams. B batch, S sequence, V vocabulary."""

import operator
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from archwright.compiler.weights.folder import open_folder
from archwright.runtime.artifact import is_artifact, open_artifact
from archwright.runtime.backends import AnyBackend, open_backend
from archwright.runtime.generation import Answer, Options, Piece, stream_answers
from archwright.runtime.sampling import Logits, Sampling
from archwright.runtime.text.chat import ChatTemplate, open_chat_template
from archwright.runtime.text.tokenizer import Tokenizer, open_tokenizer
from archwright.spec import ArchwrightError, Spec

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Model:
    """A model on a back end, with its tokenizer if it has one. Made by `open_model`."""

    path: Path
    spec: Spec
    backend: AnyBackend
    tokenizer: Tokenizer | None

    @property
    def capacity(self) -> int:
        """Tokens that prompt and answer have together at most (the last one needs no room)."""
        return self.backend.capacity

    @cached_property
    def chat(self) -> ChatTemplate:
        """Raises ArchwrightError RUN020 without a tokenizer, TOK010 where it has no chat template."""
        return open_chat_template(self._need_tokenizer("a chat"))

    def describe(self) -> str:
        """What computes: library and version, precision, device."""
        return self.backend.description

    def logits(self, token_ids: Any) -> Logits:
        """float32 logits [B, S, V] of int64 token ids [B, S]. Raises ArchwrightError RUN030 to RUN034."""
        array = np.asarray(token_ids)
        if array.ndim != 2 or array.dtype.kind not in "iu" or 0 in array.shape:
            found = f"an array of {array.dtype} {list(array.shape)}"
            help = "give integers of shape [batch, sequence]"
            raise ArchwrightError("RUN030", f"token ids are {found}", help=help)
        ids_BS = array.astype(np.int64)
        for row_S in ids_BS:
            self._check_prompt(row_S.tolist())
        size = self.backend.max_batch or len(ids_BS)
        parts = [self.backend.whole(ids_BS[start : start + size]) for start in range(0, len(ids_BS), size)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> list[Answer]:
        """One answer a prompt, in their order. Arguments and errors are those of `stream`."""
        pieces = self.stream(
            prompts, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop
        )
        answers = {piece.index: piece.answer for piece in pieces if piece.answer is not None}
        return [answers[index] for index in sorted(answers)]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Pieces of the answers as they are made; each piece's text is whole characters and never part of a stop
        string.

        prompts: a text, a list of token ids, or a list of either. A text is encoded after the begin-of-text token,
        where the tokenizer has one; ids are taken as they are. temperature, top_k, top_p: see `Sampling`. seed: None
        draws one; an answer depends on the seed and its own prompt, not on its neighbours. stop: strings that end an
        answer. Raises ArchwrightError RUN020 and RUN030 to RUN034, before anything is computed.
        """
        encoded = [self._encode(prompt) for prompt in _as_list(prompts)]
        limits = [self.backend.vocab_size, *([self.tokenizer.vocab_size] if self.tokenizer else [])]
        options = Options(
            max_tokens=_positive("max_tokens", max_tokens),
            sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
            seed=secrets.randbits(64) if seed is None else _seed(seed),
            stop=self._stops(stop),
            stop_ids=self.tokenizer.stop_ids if self.tokenizer else frozenset(),
            token_limit=min(limits),
        )
        return stream_answers(self.backend, self.tokenizer, encoded, options)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            tokenizer = self._need_tokenizer("a text prompt")
            ids = tokenizer.encode(prompt, bos=True) if prompt else []
        else:
            try:
                ids = [operator.index(item) for item in prompt]
            except TypeError as error:
                message = f"a prompt is neither a text nor token ids: {error}"
                help = "give texts, lists of integers, or a list of either"
                raise ArchwrightError("RUN030", message, help=help) from error
        self._check_prompt(ids)
        return ids

    def _check_prompt(self, ids: Sequence[int]) -> None:
        if not ids:
            raise ArchwrightError("RUN030", "a prompt is empty", help="give at least one token")
        if len(ids) > self.capacity:
            raise ArchwrightError(
                "RUN033",
                f"a prompt of {len(ids)} tokens is over the capacity of {self.capacity}",
                help="shorten it, or build with a larger build.max_positions (at most model.max_positions)",
            )
        vocab_size = self.backend.vocab_size
        wrong = next((item for item in ids if not 0 <= item < vocab_size), None)
        if wrong is not None:
            help = f"use ids from 0 to {vocab_size - 1}"
            raise ArchwrightError("RUN034", f"token id {wrong} is outside the vocabulary", help=help)

    def _stops(self, stop: str | Sequence[str]) -> tuple[str, ...]:
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if any(not isinstance(item, str) or not item for item in stops):
            help = "give texts of one character or more"
            raise ArchwrightError("RUN031", "a stop string is empty or not a text", help=help)
        if stops:
            self._need_tokenizer("a stop string")
        return stops

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ArchwrightError(
                "RUN020",
                f"{what} needs a tokenizer, and there is none",
                where=str(self.path),
                help="give token ids, or put tokenizer.model or tokenizer.json into the folder",
            )
        return self.tokenizer


def open_model(path: str | Path, backend: str = "auto", device: str = "auto", *, precision: str = "auto") -> Model:
    """Open a run (its newest checkpoint), a model folder, or an artifact.

    backend: auto | torch (runs and model folders) | onnxruntime, tensorrt (artifacts); auto takes an artifact's engines
    where they can run, and `Model.describe` says what was taken and why. device: auto | cpu | cuda | cuda:N.
    precision: of PyTorch's computation; auto is float32 on a CPU and the weights' own on a GPU.
    Raises ArchwrightError RUN010 to RUN023 and RUN040 to RUN048 where path, back end or device do not serve.
    """
    path = Path(path)
    opened = open_artifact(path) if is_artifact(path) else open_folder(path)
    running = open_backend(opened, backend=backend, device=device, precision=precision)
    folder = opened.tokenizer
    tokenizer = None if folder is None else open_tokenizer(folder)
    if tokenizer is not None and tokenizer.vocab_size > running.vocab_size:
        raise ArchwrightError(
            "RUN024",
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {running.vocab_size}",
            where=str(path),
            help="use the tokenizer that the model was trained with",
        )
    return Model(path=opened.path, spec=opened.spec, backend=running, tokenizer=tokenizer)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single text or a single list of ids becomes a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    if not items:
        raise ArchwrightError("RUN030", "there is no prompt", help="give at least one")
    if any(isinstance(item, int | np.integer) for item in items):
        return [items]
    return items


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ArchwrightError("RUN031", f"{name} is {value!r}", help=f"{name} must be an integer ≥ 1")
    return int(value)


def _seed(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        help = "seed must be an integer ≥ 0; leave it out to draw one"
        raise ArchwrightError("RUN031", f"seed is {value!r}", help=help)
    return int(value)
