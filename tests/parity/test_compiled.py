"""torch.compile and torch's own ONNX exporter against the oracle.

aot_eager traces, derives the backward and runs the result op by op: it finds what the tracer cannot follow in the time
that 200 specs have, every second of them in `make test`. Inductor, which also writes and compiles C++, does four.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch._dynamo.utils import counters

from archwright.compiler.tolerances import TOLERANCES, largest_error
from archwright.spec import Spec
from tests.parity.comparisons import Subject, beyond_tolerance, compiled, measure
from tests.parity.conftest import Record
from tests.parity.ranks import Ranks
from tests.parity.shrinking import explain
from tests.parity.strategies import Tree, load_tree, random_spec, random_tree
from tests.parity.targets import torch_module
from tests.parity.test_differential import NUM_SPECS, SEEDS

pytestmark = [
    # torch's own, of what it does itself while it compiles.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

ODD = range(1, NUM_SPECS, 2)
ROPE = {"kind": "rope", "theta": 1000.0}
LLAMA3 = {**ROPE, "scaling": {"kind": "llama3", "original_max_positions": 32}}


def _layer(norm: Tree, ffn: Tree, **attention: Any) -> Tree:
    return {"norm": norm, "attention": {"kind": "gqa", "heads": 4, "head_dim": 10, **attention}, "ffn": ffn}


RMSNORM, SWIGLU = {"kind": "rmsnorm", "eps": 1e-3}, {"kind": "swiglu", "hidden_size": 44}
FIXED: dict[str, Tree] = {
    "llama": {"layer": _layer(RMSNORM, SWIGLU, kv_heads=2, position=LLAMA3), "tied_embeddings": True},
    "mistral": {"layer": _layer(RMSNORM, SWIGLU, kv_heads=1, position=ROPE, mask={"kind": "window", "size": 5})},
    "qwen2": {"layer": _layer(RMSNORM, SWIGLU, kv_heads=2, position=ROPE, bias="qkv")},
    "gpt2": {
        "positions": {"kind": "learned"},
        "layer": _layer(
            {"kind": "layernorm", "eps": 1e-3},
            {"kind": "gelu", "hidden_size": 44, "approximation": "tanh"},
            position={"kind": "none"},
            bias="all",
        ),
        "tied_embeddings": True,
    },
}


def fixed_spec(name: str, folder: Path) -> Spec:
    sizes = {"vocab_size": 61, "hidden_size": 33, "max_positions": 64, "layers": 2}
    return load_tree({"version": 1, "name": name, "model": sizes | FIXED[name]}, folder / f"{name}.yaml")


@pytest.mark.parametrize("seed", [*SEEDS[::2], *(pytest.param(seed, marks=pytest.mark.slow) for seed in ODD)])
def test_compiled_layers_agree_with_the_oracle(seed: int, tmp_path: Path, ranks: Ranks, record: Record) -> None:
    subject = Subject(spec=random_spec(seed, tmp_path), seed=seed, folder=tmp_path)
    errors = measure(subject, [compiled(seed)], ranks)
    for name, error in errors.items():
        record(f"error: {name}", error)
    if wrong := beyond_tolerance(errors):
        pytest.fail(explain(random_tree(seed), seed, wrong, tmp_path, ranks))


@pytest.fixture
def cpp_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        pytest.skip(f"inductor needs a C++ compiler, and there is none: {error}")


@pytest.mark.heavy
@pytest.mark.parametrize("name", FIXED)
def test_inductor_agrees_with_the_oracle(
    name: str, tmp_path: Path, ranks: Ranks, record: Record, cpp_compiler: None
) -> None:
    subject = Subject(spec=fixed_spec(name, tmp_path), seed=0, folder=tmp_path)
    errors = measure(subject, ["compiled, inductor"], ranks)
    record("error: compiled, inductor", errors["compiled, inductor"])
    assert not beyond_tolerance(errors)


@pytest.mark.heavy
@pytest.mark.parametrize("name", FIXED)
def test_torchs_own_exporter_agrees_with_the_oracle(name: str, tmp_path: Path, record: Record) -> None:
    """A graph that shares no line with ours: traced from the module, written by torch, run at another length."""
    subject = Subject(spec=fixed_spec(name, tmp_path), seed=0, folder=tmp_path)
    module = torch_module(subject.case, torch.float32).eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    example_BS = torch.zeros(3, 7, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its use of what it has deprecated
        program = torch.onnx.export(module, (example_BS,), dynamo=True, dynamic_shapes=(sizes,), verbose=False)
    path = tmp_path / "traced.onnx"
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (ids,) = session.get_inputs()
    (whole_BSV,) = session.run(None, {ids.name: subject.case.ids_BS})
    error = largest_error(np.asarray(whole_BSV, np.float64), subject.expected.whole_BSV)
    record("error: torch.onnx.export, ONNX Runtime", error)
    assert error <= TOLERANCES["onnxruntime", "float32"]


@pytest.mark.heavy
def test_a_mixed_stack_compiles_once_a_kind_and_for_every_shape_of_a_training(tmp_path: Path) -> None:
    """Three kinds that differ in numbers alone, at lengths and batches of one and more, with and without gradients:
    more than the 8 recompilations that torch allows to one piece of code."""
    kinds = [
        {"repeat": 2, "layer": _layer({"kind": "rmsnorm", "eps": eps}, SWIGLU, position={**ROPE, "theta": theta})}
        for eps, theta in ((1e-3, 100.0), (1e-4, 1000.0), (1e-5, 5000.0))
    ]
    model = {"vocab_size": 61, "hidden_size": 33, "max_positions": 64, "layers": kinds}
    subject = Subject(
        spec=load_tree({"version": 1, "name": "mixed", "model": model}, tmp_path / "mixed.yaml"),
        seed=0,
        folder=tmp_path,
    )
    plain, module = (torch_module(subject.case, torch.float32) for _ in range(2))
    torch.compiler.reset()
    counters.clear()
    module.compile_layers(backend="eager")
    for batch, length in ((2, 32), (2, 48), (1, 48)):
        ids_BS = torch.arange(batch * length).reshape(batch, length) % 61
        module(ids_BS, ids_BS)[0].backward()
        if length == 32:
            assert counters["stats"]["unique_graphs"] == len(kinds) + 1  # and the final norm
        with torch.no_grad():
            torch.testing.assert_close(module(ids_BS), plain(ids_BS), rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] > 8
