"""Sampling: what is left of a distribution, and how often each token of it comes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archwright.runtime.sampling import Sampling, choose, probabilities, random_stream
from archwright.spec import ArchwrightError

logits_strategy = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40).map(
    lambda values: np.array(values, np.float32)
)


def softmax(logits_V: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits_V.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


@given(logits_strategy, st.floats(0.1, 5), st.integers(1, 50), st.floats(0.01, 1))
def test_filters_keep_the_most_likely_tokens(logits_V, temperature, top_k, top_p) -> None:
    ids, weights = probabilities(logits_V, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    # By hand: rank by (probability, id), cut to k, renormalise, take tokens until their sum reaches p.
    order = sorted(range(len(logits_V)), key=lambda i: (-logits_V[i], i))[:top_k]
    weight = softmax(logits_V, temperature)[order]
    weight /= weight.sum()
    sums = [0.0, *np.cumsum(weight)]
    # Where a sum hits top_p within rounding, one token more or less is right too.
    counts = [n for n in range(1, len(sums)) if sums[n - 1] < top_p + 1e-12 and sums[n] > top_p - 1e-12]
    assert math.isclose(weights.sum(), 1)
    assert (np.diff(ids) > 0).all()
    assert set(ids.tolist()) in [set(order[:n]) for n in counts]
    assert np.allclose(weights, softmax(logits_V[ids], temperature))


def test_equal_logits_rank_by_id() -> None:
    logits_V = np.array([1, 3, 3, 3, 0], np.float32)
    assert probabilities(logits_V, Sampling(temperature=1, top_k=2))[0].tolist() == [1, 2]
    assert probabilities(logits_V, Sampling(temperature=1, top_p=0.01))[0].tolist() == [1]
    assert choose(logits_V, Sampling(), random_stream(0, 0)) == 1


def test_top_p_one_keeps_everything() -> None:
    logits_V = np.array([50, 0, -50], np.float32)
    assert len(probabilities(logits_V, Sampling(temperature=1, top_p=1.0))[0]) == 3


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.7), Sampling(temperature=1.5, top_k=4, top_p=0.9)])
def test_frequencies_are_the_probabilities(sampling: Sampling) -> None:
    logits_V = np.array([0.3, -1, 2, 1.5, 0, 1.9], np.float32)
    ids, weights = probabilities(logits_V, sampling)
    stream, draws = random_stream(3, 0), 20_000
    counts = np.bincount([choose(logits_V, sampling, stream) for _ in range(draws)], minlength=6)
    assert counts[np.setdiff1d(np.arange(6), ids)].sum() == 0
    # Pearson's chi-squared; five degrees of freedom exceed 30 once in 70,000 seeds, and the seed is fixed.
    assert (((counts[ids] - draws * weights) ** 2) / (draws * weights)).sum() < 30


@settings(max_examples=300)
@given(logits_strategy)
def test_a_tiny_temperature_is_greedy(logits_V) -> None:
    chosen = choose(logits_V, Sampling(temperature=1e-30), random_stream(0, 0))
    assert logits_V.max() - logits_V[chosen] < 1e-28, "within some hundred temperatures of the largest"


def test_streams_differ_by_seed_and_copy_and_repeat() -> None:
    draws = [tuple(random_stream(seed, copy).random(4)) for seed, copy in ((0, 0), (0, 1), (1, 0), (2**64, 0))]
    assert len(set(draws)) == 4
    assert tuple(random_stream(0, 1).random(4)) == draws[1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "1"},
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
    ],
)
def test_illegal_options(arguments) -> None:
    with pytest.raises(ArchwrightError) as caught:
        Sampling(**arguments)
    assert caught.value.code == "RUN031"
    assert next(iter(arguments)) in str(caught.value)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(broken: float, temperature: float) -> None:
    with pytest.raises(ArchwrightError, match="RUN032"):
        choose(np.array([0, broken, 1], np.float32), Sampling(temperature=temperature), random_stream(0, 0))
