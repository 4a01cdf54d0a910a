"""Graphs in every dialect, with fused matrices and without, and the fused Program by itself, against the oracle."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch

from archwright.compiler.interpreters.numpy_ops import run_numpy
from archwright.compiler.interpreters.onnx_dialects import ALL, Dialect
from archwright.compiler.ir import Degrees
from archwright.compiler.passes import run_passes
from archwright.compiler.passes.fuse import Fusion, fuse
from archwright.compiler.targets.stages import GraphOptions
from archwright.compiler.tolerances import largest_error
from archwright.compiler.weights.fused import FusedWeights
from tests.parity.cases import Case, TestWeights, oracle
from tests.parity.targets import compare, run_onnx, run_torch, torch_module

if TYPE_CHECKING:
    from tests.parity.comparisons import Subject

Measure = Callable[["Subject", Any], float]
ROUND: Mapping[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def in_dialect(
    target: str, *, fusions: tuple[Fusion, ...] = (), degree: int = 1, precision: str = "float32"
) -> Measure:
    """ONNX Runtime on the graphs of a dialect; those in half precision against the oracle with rounded weights."""
    return partial(_graphs, dialect=Dialect(target=target, fusions=fusions), degree=degree, precision=precision)


def _graphs(subject: "Subject", _: Any, *, dialect: Dialect, degree: int, precision: str) -> float:
    case, expected = subject.case, None
    if precision in ROUND:
        tensors = {n: t.astype(ROUND[precision]).astype(np.float32) for n, t in case.weights.tensors.items()}
        case = replace(case, weights=TestWeights(tensors=tensors))
        expected = oracle(case)
    folder = subject.folder / f"{dialect.target}-{len(dialect.fusions)}-{degree}-{precision}"
    found = run_onnx(
        case, run_passes(subject.spec, Degrees(tensor=degree)), folder, precision, GraphOptions(dialect=dialect)
    )
    return compare(found, subject.expected if expected is None else expected)


def fused_case(case: Case) -> Case:
    """The case with its Program fused, and its weights by the map that this gave."""
    fused = fuse(case.program, ALL)
    weights = FusedWeights(weights=case.weights, params=fused.program.params(), parts=fused.weights)
    tensors = {name: weights.read(name) for name in weights.names()}
    return replace(case, program=fused.program, weights=TestWeights(tensors=tensors))


def fused_oracle(subject: "Subject", _: Any) -> float:
    case = fused_case(subject.case)
    return largest_error(run_numpy(case.program, case.weights.tensors, case.ids_BS), subject.expected.whole_BSV)


def fused_torch(subject: "Subject", _: Any) -> float:
    case = fused_case(subject.case)
    return compare(run_torch(case, torch_module(case, torch.float64)), subject.expected)


TENSORRT, OWN = "ONNX, tensorrt dialect", "ONNX, own dialect"
TENSORRT_HALF, OWN_HALF = f"{TENSORRT}, bfloat16", f"{OWN}, float16, fused"
FUSED, TENSORRT_RANKS, OWN_RANKS = (f"{name}, 2 ranks, fused" for name in ("ONNX", TENSORRT, OWN))
MEASURES: Mapping[str, Measure] = {
    TENSORRT: in_dialect("tensorrt"),
    TENSORRT_HALF: in_dialect("tensorrt", precision="bfloat16"),
    TENSORRT_RANKS: in_dialect("tensorrt", fusions=ALL, degree=2),
    OWN: in_dialect("onnxruntime"),
    OWN_HALF: in_dialect("onnxruntime", fusions=("qkv", "gate_up"), precision="float16"),
    OWN_RANKS: in_dialect("onnxruntime", fusions=ALL, degree=2),
    FUSED: in_dialect("portable", fusions=ALL, degree=2),
}
SOMETIMES = {"fused, oracle": 2, "fused, torch": 7}
"""Each for one spec in eight, by the remainder of its seed."""
