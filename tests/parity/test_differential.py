"""One spec, every target, one answer: random specs through the oracle, torch, tensor parallelism and ONNX Runtime.

Tolerances stand in `compiler/tolerances.py`. The largest error of each target is printed at the end of the run.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from archwright.compiler.ir import Degrees
from archwright.compiler.passes import lower, partition, run_passes
from archwright.compiler.tolerances import TOLERANCES, largest_error
from tests.parity.cases import Case, make_case, oracle, oracle_through_cache
from tests.parity.conftest import Ranks, Record
from tests.parity.strategies import legal_degrees, random_spec
from tests.parity.targets import compare, run_onnx, run_torch, torch_module

NUM_QUICK, NUM_SPECS = 4, 56
SEEDS = [*range(NUM_QUICK), *(pytest.param(seed, marks=pytest.mark.heavy) for seed in range(NUM_QUICK, NUM_SPECS))]
GRADIENT_TOLERANCE = 1e-11
"""Of float64 gradients, relative to the largest entry of each."""


@pytest.mark.parametrize("seed", SEEDS)
def test_targets_agree_with_the_oracle(seed: int, tmp_path: Path, ranks: Ranks, record: Record) -> None:
    spec = random_spec(seed, tmp_path)
    case = make_case(lower(spec), seed)
    expected = oracle(case)
    pair = run_passes(spec, Degrees(tensor=2))
    outputs = {
        ("oracle, cached", "torch", "float64"): oracle_through_cache(case),
        ("torch float64", "torch", "float64"): run_torch(case, torch_module(case, torch.float64)),
        ("torch float32", "torch", "float32"): run_torch(case, torch_module(case, torch.float32)),
        ("torch tensor 2, float64", "torch", "float64"): ranks.run_local(case, pair, dtype="float64"),
        ("torch tensor 2, float32", "torch", "float32"): ranks.run_local(case, pair, dtype="float32"),
    }
    for degree in legal_degrees(spec):
        name = "ONNX Runtime" if degree == 1 else f"ONNX Runtime, {degree} ranks joined"
        plan = run_passes(spec, Degrees(tensor=degree))
        outputs[name, "onnxruntime", "float32"] = run_onnx(case, plan, tmp_path / f"degree{degree}")
    errors = {key: compare(actual, expected) for key, actual in outputs.items()}
    for (name, _, _), error in errors.items():
        record(f"error: {name}", error)
    wrong = {name: error for (name, *key), error in errors.items() if not error <= TOLERANCES[tuple(key)]}
    assert not wrong, f"{wrong} for {spec.model}"


@pytest.mark.parametrize("seed", SEEDS)
def test_training_module_agrees_with_one_process(seed: int, tmp_path: Path, ranks: Ranks, record: Record) -> None:
    """Logits and loss against the oracle, gradients against one process; every rank gathers the same ones."""
    spec = random_spec(seed, tmp_path)
    case = make_case(lower(spec), seed)
    expected, gradients = oracle(case), one_process_gradients(case)
    plan = partition(case.program, Degrees(tensor=2))
    for whole_BSV, loss_sum, actual in ranks.run(case, plan, dtype=None):
        error = max(
            largest_error(whole_BSV, expected.whole_BSV),
            largest_error(np.array(loss_sum), np.array(expected.loss_sum)),
        )
        worst = max(largest_error(actual[name], gradient) for name, gradient in gradients.items())
        record("error: training module, tensor 2, float64", error)
        record("error: its gradients", worst)
        assert error <= TOLERANCES["torch", "float64"]
        assert actual.keys() == gradients.keys() and worst <= GRADIENT_TOLERANCE


def one_process_gradients(case: Case) -> dict[str, np.ndarray]:
    module = torch_module(case, torch.float64)
    loss_sum, _ = module(torch.from_numpy(case.ids_BS), torch.from_numpy(case.targets_BS))
    loss_sum.backward()
    return {name: parameter.grad.numpy() for name, parameter in module.named_parameters()}


def test_specs_differ_and_cover_what_they_claim(tmp_path: Path) -> None:
    specs = [random_spec(seed, tmp_path).model for seed in range(NUM_SPECS)]
    attentions = [spec.layer.attention for spec in specs]
    assert len(set(specs)) == NUM_SPECS >= 50
    assert {True, False} == {spec.tied_embeddings for spec in specs}
    assert {1, 2, 3} == {spec.layers for spec in specs}
    assert any(spec.hidden_size % 2 for spec in specs) and all(spec.vocab_size % 2 for spec in specs)
    assert any(a.kv_heads == 1 for a in attentions) and any(a.kv_heads in (None, a.heads) for a in attentions)
    assert any(1 < (a.kv_heads or a.heads) < a.heads for a in attentions)
    assert any((a.head_dim or 0) % 8 for a in attentions) and any(a.head_dim is None for a in attentions)
    assert any(a.position.scaling for a in attentions) and not all(a.position.scaling for a in attentions)
    assert sum(4 in legal_degrees(random_spec(seed, tmp_path)) for seed in range(NUM_SPECS)) >= 10
