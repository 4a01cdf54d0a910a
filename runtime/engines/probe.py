"""Values that an artifact brings along, for its engines to meet on the machine that runs them.

    probe.safetensors   ids [rows, T] int64; logits [rows, T, V] and hidden.{stage} [rows, T, D] float32

`hidden.{stage}` is what a stage hands to the next. All are the oracle's, in float64 with the weights that the artifact
holds, and then stored in float32. The oracle reads one parameter at a time, so a model of any size is probed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from archwright.compiler.interpreters.numpy_ops import NumpyOps
from archwright.compiler.ir import Plan, Step
from archwright.compiler.ir.program import instance_of
from archwright.compiler.weights.streaming import Weights
from archwright.spec import ArchwrightError
from archwright.spec.models import Model

Array = NDArray[Any]

PROBE = "probe.safetensors"
ROWS, TOKENS = 2, 12


@dataclass(frozen=True, kw_only=True)
class Probe:
    """outputs: what each stage gives, the last one logits."""

    ids_BT: Array
    outputs: tuple[Array, ...]


class _Streamed(Mapping[str, Array]):
    """Parameters that are read when they are used, and not kept."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Array:
        return self._weights.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights.names())

    def __len__(self) -> int:
        return sum(1 for _ in self._weights.names())


def make_probe(plan: Plan, weights: Weights, *, max_batch: int, capacity: int) -> Probe:
    """Run the stages of the global Program one after the other on a few random tokens."""
    program = plan.program
    shape = (min(ROWS, max_batch), min(TOKENS, capacity))
    ids_BT = np.random.default_rng(0).integers(0, program.vocab_size, shape)
    step = Step(positions_BS=np.broadcast_to(np.arange(shape[1]), shape))
    bind = instance_of(program, NumpyOps(_Streamed(weights)))
    outputs: list[Array] = []
    x: Any = ids_BT
    for start, stop in plan.stages:
        x = replace(program, segments=program.segments[start:stop]).run(bind, x, step)
        outputs.append(x.astype(np.float32))
    return Probe(ids_BT=ids_BT, outputs=tuple(outputs))


def write_probe(folder: Path, probe: Probe) -> None:
    """Byte-equal for equal probes."""
    *hidden, logits = probe.outputs
    named = {"ids": probe.ids_BT, "logits": logits} | {f"hidden.{stage}": x for stage, x in enumerate(hidden)}
    (folder / PROBE).write_bytes(save({name: np.ascontiguousarray(array) for name, array in sorted(named.items())}))


def read_probe(folder: Path, stages: int, model: Model) -> Probe:
    """Raises ArchwrightError VERIFY020 where the artifact has none, or one of another plan or model."""
    try:
        found = load((folder / PROBE).read_bytes())
        outputs = [*(found[f"hidden.{stage}"] for stage in range(stages - 1)), found["logits"]]
        probe = Probe(ids_BT=found["ids"], outputs=tuple(outputs))
        _check_fit(probe, model)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        message, help = f"there is no probe of {stages} stages: {error}", "build the engines again"
        raise ArchwrightError("VERIFY020", message, where=str(folder / PROBE), help=help) from error
    return probe


def _check_fit(probe: Probe, model: Model) -> None:
    """Raises ValueError for what engines of the model cannot be asked, or do not answer."""
    ids_BT, widths = probe.ids_BT, [model.hidden_size] * (len(probe.outputs) - 1) + [model.vocab_size]
    if ids_BT.ndim != 2 or not ids_BT.size or ids_BT.dtype.kind != "i":
        raise ValueError(f"its ids are {ids_BT.dtype} {list(ids_BT.shape)}")
    if ids_BT.min() < 0 or ids_BT.max() >= model.vocab_size:
        raise ValueError(f"it has a token outside the vocabulary of {model.vocab_size}")
    for output, width in zip(probe.outputs, widths, strict=True):
        if output.shape != (*ids_BT.shape, width):
            raise ValueError(f"it has values of {list(output.shape)} for ids of {list(ids_BT.shape)}")
