"""The quantized model beside the unquantized one, layer by layer, in float32.

N sequences, S tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from archwright.compiler.ir import STORED_BITS, Program
from archwright.compiler.weights.streaming import Weights
from archwright.runtime.quantization.quality import LayerQuality, Quality
from archwright.runtime.quantization.segments import run_rows, segment_module

Progress = Callable[[str], None]


def measure(
    program: Program,
    weights: Weights,
    quantized: Program,
    quantized_weights: Weights,
    ids_NS: NDArray[np.int64],
    progress: Progress = lambda message: None,
) -> Quality:
    """Run both models on the sequences; the last token of each has no next one and is not scored."""
    before = after = torch.from_numpy(ids_NS)
    layers: list[LayerQuality] = []
    for number, segment in enumerate(program.segments):
        path = segment.path or "head"
        progress(f"measuring quality, {path}, {number + 1} of {len(program.segments)}")
        plain = segment_module(program, weights, number)
        few = segment_module(quantized, quantized_weights, number)
        bits = _bits(quantized, number)
        if number == len(program.segments) - 1:
            totals = sum(_scores(plain, few, before[row], after[row], ids_NS[row]) for row in range(len(ids_NS)))
            assert isinstance(totals, np.ndarray)
            layers.append(LayerQuality(path=path, bits=bits, own_error=_root(totals[4]), error=_root(totals[5])))
            return _quality(totals, ids_NS, layers)
        entered = before
        before, after = run_rows(plain, before), run_rows(few, after)
        own = before if number == 0 and bits is None else run_rows(few, entered)
        layers.append(LayerQuality(path=path, bits=bits, own_error=_error(own, before), error=_error(after, before)))
    raise AssertionError("a Program has a last segment")


def _scores(
    plain: Callable[..., Any], few: Callable[..., Any], before: Any, after: Any, ids_S: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Of one sequence: log-likelihoods before and after, KL, agreements, squared relative errors of the logits."""
    with torch.inference_mode():
        runs = ((plain, before), (few, after), (few, before))
        before_SV, after_SV, own_SV = (module(x[None])[0].double() for module, x in runs)
        p_SV, q_SV = before_SV.log_softmax(-1), after_SV.log_softmax(-1)
        next_S1 = torch.from_numpy(ids_S[1:, None])
        likelihoods = [float(log_SV[:-1].gather(1, next_S1).sum()) for log_SV in (p_SV, q_SV)]
        kl = float((p_SV.exp() * (p_SV - q_SV)).sum())
        agreed = float((p_SV.argmax(-1) == q_SV.argmax(-1)).sum())
        return np.array([*likelihoods, kl, agreed, *(_error(x, before_SV) ** 2 for x in (own_SV, after_SV))])


def _quality(totals: NDArray[np.float64], ids_NS: NDArray[np.int64], layers: list[LayerQuality]) -> Quality:
    rows, length = ids_NS.shape
    scored = rows * (length - 1)
    last = layers[-1]
    mean = LayerQuality(
        path=last.path, bits=last.bits, own_error=_root(totals[4] / rows), error=_root(totals[5] / rows)
    )
    return Quality(
        tokens=ids_NS.size,
        perplexity_before=float(np.exp(-totals[0] / scored)),
        perplexity=float(np.exp(-totals[1] / scored)),
        kl=float(totals[2] / ids_NS.size),
        agreement=float(totals[3] / ids_NS.size),
        layers=(*layers[:-1], mean),
    )


def _root(value: float) -> float:
    return math.sqrt(value)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).double().norm() / expected.double().norm().clamp_min(1e-30))


def _bits(quantized: Program, number: int) -> float | None:
    """Bits a weight of the quantized matrices of a segment, their scales of 16 bits among them."""
    params = [block.params() for _, block in _blocks(quantized, number)]
    stored = [p for each in params for p in each.values() if p.storage is not None]
    scales = sum(p.size for each in params for name, p in each.items() if name.endswith("_scale"))
    if not stored:
        return None
    return (sum(p.size * STORED_BITS[p.storage] for p in stored if p.storage) + 16 * scales) / sum(
        p.size for p in stored
    )


def _blocks(program: Program, number: int) -> Iterator[tuple[str, Any]]:
    return replace(program, segments=(program.segments[number],)).blocks()
