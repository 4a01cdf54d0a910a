"""From logits to the next token. V vocabulary."""

import math
import operator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from archwright.spec import ArchwrightError

Logits = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 is greedy (the most likely token, the lowest id of equals); otherwise p = softmax(logits /
    temperature). top_k: only the k most likely tokens. top_p: of what is left, renormalised, the fewest tokens whose
    probabilities sum to at least top_p (Holtzman et al. 2020). Both off when None; equal tokens rank by id.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Raises ArchwrightError RUN031."""
        if not (_is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise _illegal("temperature", self.temperature, "a number ≥ 0; 0 takes the most likely token")
        if self.top_k is not None and not (_is_integer(self.top_k) and self.top_k >= 1):
            raise _illegal("top_k", self.top_k, "an integer ≥ 1; leave it out for all tokens")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise _illegal("top_p", self.top_p, "a number with 0 < top_p ≤ 1; 1 keeps all tokens")


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float | np.integer | np.floating)


def _is_integer(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | np.integer)


def _illegal(name: str, value: object, rule: str) -> ArchwrightError:
    return ArchwrightError("RUN031", f"{name} is {value!r}", help=f"{name} must be {rule}")


def random_stream(seed: int, copy: int) -> np.random.Generator:
    """The uniform numbers of one row, one a token, from Philox (Salmon et al. 2011) keyed by (seed, copy).

    copy: how many rows before it have the same prompt. So a row's text depends on its prompt and the seed and not on
    the rest of the batch, and equal prompts still give different texts.
    """
    entropy = np.random.SeedSequence(operator.index(seed), spawn_key=(copy,))
    return np.random.Generator(np.random.Philox(entropy))


def probabilities(logits_V: Logits, sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids (ascending) and probabilities (float64, sum 1) of the tokens that `sampling` leaves; temperature > 0."""
    ids = np.arange(len(logits_V)) if sampling.top_k is None else _largest(logits_V, sampling.top_k)
    chosen = logits_V[ids].astype(np.float64)
    # The largest is subtracted first: a tiny temperature would overflow otherwise.
    weights = np.exp((chosen - chosen.max()) / sampling.temperature)
    weights /= weights.sum()
    if sampling.top_p is not None and sampling.top_p < 1:
        order = np.argsort(-chosen, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        kept = np.sort(order[before < sampling.top_p])
        ids, weights = ids[kept], weights[kept] / weights[kept].sum()
    return ids, weights


def _largest(logits_V: Logits, count: int) -> NDArray[np.int64]:
    """Ids of the `count` largest logits, ascending; of equal ones the lowest ids."""
    if count >= len(logits_V):
        return np.arange(len(logits_V))
    threshold = np.partition(logits_V, len(logits_V) - count)[len(logits_V) - count]
    above = np.flatnonzero(logits_V > threshold)
    equal = np.flatnonzero(logits_V == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def choose(logits_V: Logits, sampling: Sampling, stream: np.random.Generator) -> int:
    """The next token. Raises ArchwrightError RUN032 where the logits are not finite: the model is broken."""
    if not np.isfinite(logits_V).all():
        raise ArchwrightError(
            "RUN032",
            "the model's logits are not finite numbers",
            help="the weights are broken or overflow in this precision; try float32",
        )
    if sampling.temperature == 0:
        return int(np.argmax(logits_V))
    ids, weights = probabilities(logits_V, sampling)
    index = np.searchsorted(np.cumsum(weights), stream.random(), side="right")
    return int(ids[min(index, len(ids) - 1)])
