"""Quantized models on every target: random specs whose matrices are of few bits, and bugs that must show.

The oracle has the stored values and scales from `QuantizedWeights` itself, never from a file, so that a slip in writing
or reading one shows. Inputs that are rounded to 8-bit floats: torch is compared in float64, where no last bit decides;
for ONNX Runtime the oracle follows its choice where it is as near (`runtime.numerics`).
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from archwright.compiler.interpreters.numpy_ops import run_numpy
from archwright.compiler.interpreters.onnx_dialects import ALL, PORTABLE, Dialect
from archwright.compiler.interpreters.onnx_ops import OnnxOps
from archwright.compiler.interpreters.torch_module import TorchProgram
from archwright.compiler.interpreters.torch_ops import TorchOps
from archwright.compiler.ir import Program
from archwright.compiler.module import as_torch
from archwright.compiler.passes import build_plan, build_program, lower
from archwright.compiler.passes import fuse as fuse_pass
from archwright.compiler.passes.fuse import fuse
from archwright.compiler.passes.quantize import INPUT_SCALE, rounds_inputs
from archwright.compiler.targets import rank_data
from archwright.compiler.targets.onnx_graph import export_graphs
from archwright.compiler.targets.stages import GraphOptions
from archwright.compiler.tolerances import TOLERANCES, largest_error
from archwright.compiler.weights.fused import FusedWeights
from archwright.compiler.weights.quantized import QuantizedWeights, _KnownScales
from archwright.compiler.weights.streaming import PRECISIONS
from archwright.runtime.backends.exposing import ExposingBackend
from archwright.runtime.backends.onnxruntime_backend import open_graphs
from archwright.runtime.numerics import compare
from archwright.spec import Spec
from tests.parity.cases import TestWeights, make_case
from tests.parity.comparisons import FUSED
from tests.parity.conftest import Record
from tests.parity.strategies import Tree, load_tree, random_tree

NUM_QUICK, NUM_HEAVY, NUM_SPECS = 3, 12, 50
"""A quarter of those of the differential suite; most of them in `make test-slow`."""
SEEDS = [
    *range(NUM_QUICK),
    *(pytest.param(seed, marks=pytest.mark.heavy) for seed in range(NUM_QUICK, NUM_HEAVY)),
    *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(NUM_HEAVY, NUM_SPECS)),
]
HEAD_DIM, GROUP = 32, 32


def quantized_tree(seed: int) -> Tree:
    """The random spec of a seed with sizes that groups divide on two ranks, and rules for its matrices."""
    tree, rng = random_tree(seed), random.Random(f"quantized {seed}")
    model = tree["model"]
    model["hidden_size"] = rng.choice((32, 64))
    runs = model["layers"] if isinstance(model["layers"], list) else [model]
    for run in runs:
        attention, ffn = run["layer"]["attention"], run["layer"]["ffn"]
        attention["head_dim"], ffn["hidden_size"] = HEAD_DIM, 2 * GROUP
        if ffn.get("shared"):
            ffn["shared"]["hidden_size"] = 4 * GROUP
    int4: Tree = {"kind": "int4", "group_size": GROUP}
    rules: list[Tree] = []
    if rng.random() < 0.5:
        rules.append({**rng.choice((int4, {"kind": "int8"})), "match": "model.embed_tokens"})
    if not model["tied_embeddings"] and rng.random() < 0.5:
        rules.append({**rng.choice((int4, {"kind": "int8"}, {"kind": "fp8"})), "match": "lm_head"})
    rules.append({"kind": rng.choice(("int8", "keep", "fp8")), "match": "*.o_proj"})
    rules.append(rng.choice((int4, {"kind": "int8"})))
    tree["build"]["quantize"] = {"rules": rules}
    tree["build"]["precision"] = rng.choice(("float32", "bfloat16", "float16"))
    return tree


class Subject:
    """A quantized model with its stored values: names → arrays, as the oracle takes them."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        folder.mkdir(exist_ok=True)
        self.spec: Spec = load_tree(quantized_tree(seed), folder / "spec.yaml")
        self.program: Program = build_program(self.spec)
        self.base = make_case(lower(self.spec), seed)
        self.arrays = {name: np.array(self.weights().read(name)) for name in self.program.params()}

    def fused(self) -> tuple[Program, dict[str, Any]]:
        """The Program with joined matrices, and its stored values."""
        done = fuse(self.program, ALL)
        weights = FusedWeights(
            weights=TestWeights(tensors=self.arrays), params=done.program.params(), parts=done.weights
        )
        return done.program, {name: weights.read(name) for name in weights.names()}

    def weights(self) -> QuantizedWeights:
        """As `build` has them. Values in the build's precision, so that writing them rounds nothing."""
        dtype, rng = PRECISIONS[self.spec.build.precision], random.Random(self.seed)
        tensors = {name: array.astype(dtype) for name, array in self.base.weights.tensors.items()}
        names = [name for name in self.program.params() if name.endswith(INPUT_SCALE)]
        return QuantizedWeights(
            program=self.program, base=TestWeights(tensors=tensors), precision=self.spec.build.precision,
            input_scales={name: rng.choice((0.002, 0.01, 0.05)) for name in names},
        )  # fmt: skip


def torch_error(subject: Subject, *, fused: bool = False) -> float:
    program, arrays = subject.fused() if fused else (subject.program, subject.arrays)
    module = TorchProgram(program, TorchOps(dtype=torch.float64), dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(as_torch(np.array(arrays[name])))
        actual_BSV = module.eval()(torch.from_numpy(subject.base.ids_BS)).numpy()
    return largest_error(actual_BSV, run_numpy(subject.program, subject.arrays, subject.base.ids_BS))


def onnx_error(subject: Subject, degree: int, dialect: Dialect = PORTABLE) -> float:
    """Whole sequences, prefill and decode steps, the end of the cache; of two ranks as one joined graph."""
    folder = subject.folder / f"ranks{degree}-{len(list(subject.folder.iterdir()))}"
    parallel = subject.spec.build.parallel.model_copy(update={"tensor": degree})
    build = subject.spec.build.model_copy(update={"parallel": parallel})
    spec = subject.spec.model_copy(update={"build": build})
    plan, precision, capacity = build_plan(spec), build.precision, min(40, spec.model.max_positions)
    options = GraphOptions(dialect=dialect)
    export_graphs(plan, subject.weights(), folder, precision=precision, capacity=capacity, options=options)
    if rounds_inputs(subject.program):
        backend: Any = ExposingBackend(folder, plan, max_batch=None)
    else:
        backend = open_graphs(folder, ranks=degree, precision=precision)
    oracle = TestWeights(tensors=subject.arrays)
    return max(comparison.error for comparison in compare(backend, subject.program, oracle))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_target_runs_the_same_quantized_model(seed: int, tmp_path: Path, record: Record) -> None:
    subject = Subject(seed, tmp_path / "subject")
    error = torch_error(subject)
    record("error: torch float64, quantized", error)
    assert error < TOLERANCES["torch", "float64"]
    degree = 1 + seed % 2
    error = onnx_error(subject, degree)
    record("error: onnxruntime, quantized", error)
    assert error < TOLERANCES["onnxruntime", "float32"]


@pytest.mark.parametrize("seed", SEEDS)
def test_joined_matrices_are_the_same_quantized_model(seed: int, tmp_path: Path, record: Record) -> None:
    subject = Subject(seed, tmp_path / "subject")
    program, arrays = subject.fused()
    expected_BSV = run_numpy(subject.program, subject.arrays, subject.base.ids_BS)
    assert largest_error(run_numpy(program, arrays, subject.base.ids_BS), expected_BSV) < FUSED
    error = torch_error(subject, fused=True)
    record("error: torch float64, quantized, fused", error)
    assert error < TOLERANCES["torch", "float64"]
    target, degree = ("portable", "onnxruntime")[seed // 2 % 2], 1 + seed % 2
    error = onnx_error(subject, degree, Dialect(target=target, fusions=ALL))
    record("error: onnxruntime, quantized, fused", error)
    assert error < TOLERANCES["onnxruntime", "float32"]


def test_matmul_nbits_is_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's own operator, as a dialect selects it."""
    monkeypatch.setattr(OnnxOps, "matmul_nbits", True)
    for seed in (1, 7):
        subject = Subject(seed, tmp_path / f"subject{seed}")
        for degree in (1, 2):
            assert onnx_error(subject, degree) < TOLERANCES["onnxruntime", "float32"]
        graph = next(subject.folder.glob("ranks2-*/rank1/stage0.onnx"))
        nodes = onnx.load(graph, load_external_data=False).graph.node
        found = [node for node in nodes if node.op_type == "MatMulNBits"]
        assert found and all(node.domain == "com.microsoft" for node in found)


Patch = Callable[[pytest.MonkeyPatch], None]
FUSED_ONNX = Dialect(target="onnxruntime", fusions=("qkv", "gate_up"))


def _pack(change: Callable[[Any, Any], Any]) -> Patch:
    original = rank_data.pack
    return lambda patch: patch.setattr(rank_data, "pack", lambda values, packing: change(original, values))


def _note(patch: pytest.MonkeyPatch) -> None:
    original = _KnownScales.note
    patch.setattr(
        _KnownScales, "note", lambda self, name, param, rows, scale: original(
            self, name, param, rows, np.roll(scale, 1, axis=-1)
        ),
    )  # fmt: skip


def _parts(kind: str) -> Patch:
    """The parts of every fused parameter of a kind the other way round, where they are written and read."""
    original = fuse_pass._joined

    def joined(path: str, linears: Any, name: str, found: Any) -> Any:
        made = original(path, linears, name, found)
        if made is not None:
            found.weights[f"{path}.{name}.{kind}"] = found.weights[f"{path}.{name}.{kind}"][::-1]
        return made

    return lambda patch: patch.setattr(fuse_pass, "_joined", joined)


def _torch(name: str, change: Callable[..., Any]) -> Patch:
    return lambda patch: patch.setattr(TorchOps, name, change)


MUTATIONS: dict[str, tuple[str, Patch]] = {
    "the second value of a byte comes first": ("onnx", _pack(lambda pack, v: (p := pack(v, "int4")) << 4 | p >> 4)),
    "a zero point off by one": ("onnx", _pack(lambda pack, v: pack(np.clip(v + 1, -8, 7).astype(np.int8), "int4"))),
    "values packed with an offset": ("onnx", _pack(lambda pack, v: pack(v, "offset"))),
    "the scale of the neighbouring group, written": ("onnx", _note),
    "the scale of the neighbouring group, in torch": (
        "torch",
        _torch(
            "dequantize",
            lambda self, weight, scale: (
                weight.to(self.dtype).unflatten(-1, (scale.shape[-1], -1)) * scale.roll(1, -1)[..., None]
            ).flatten(-2),
        ),
    ),
    "parts of a joined matrix the other way round": ("fused", _parts("weight")),
    "scales of a joined matrix the other way round": ("fused", _parts("weight_scale")),
    "inputs beyond the largest value are not cut": (
        "torch",
        _torch(
            "round_to_float8",
            lambda self, x, scale: (
                torch.where((x / scale).abs() > 448, x / scale, (x / scale).to(torch.float8_e4m3fn).to(x.dtype)) * scale
            ),
        ),
    ),
    "inputs are not rounded": ("torch", _torch("round_to_float8", lambda self, x, scale: x)),
    "inputs are not rounded, in the graph": (
        "onnx",
        lambda patch: patch.setattr(
            OnnxOps, "round_to_float8", lambda self, x, scale: self.emit("Identity", [x], name="round_to_float8")
        ),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_turns_the_suite_red(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Record) -> None:
    target, mutate = MUTATIONS[name]
    dialect = FUSED_ONNX if target == "fused" else PORTABLE
    measure = torch_error if target == "torch" else lambda subject: onnx_error(subject, 2, dialect)
    tolerance = TOLERANCES["torch", "float64"] if target == "torch" else TOLERANCES["onnxruntime", "float32"]
    for seed in range(NUM_SPECS):
        subject = Subject(seed, tmp_path / str(seed))
        if name.startswith("inputs") and not rounds_inputs(subject.program):
            continue
        with monkeypatch.context() as patched:
            mutate(patched)
            error = measure(subject)
        if error > 10 * tolerance:
            record("mutation", (name, f"{target}, quantized", seed, error / tolerance))
            return
    pytest.fail(f"no spec turned red: {name}")
