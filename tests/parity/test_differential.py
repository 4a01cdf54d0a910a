"""One spec, every target, one answer: random specs through the oracle, torch, tensor parallelism and ONNX Runtime.

The comparisons and their tolerances stand in `comparisons.py`. The largest error of each is printed at the end of the
run.
"""

from collections import Counter
from pathlib import Path

import pytest

from archwright.compiler.passes import lower
from archwright.spec.parameters import num_parameters
from tests.parity.comparisons import Subject, beyond_tolerance, interpreted, measure
from tests.parity.conftest import Record
from tests.parity.ranks import Ranks
from tests.parity.shrinking import explain
from tests.parity.strategies import features, random_spec, random_tree

NUM_QUICK, NUM_SPECS = 4, 200
SEEDS = [*range(NUM_QUICK), *(pytest.param(seed, marks=pytest.mark.heavy) for seed in range(NUM_QUICK, NUM_SPECS))]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_target_agrees_with_the_oracle(seed: int, tmp_path: Path, ranks: Ranks, record: Record) -> None:
    subject = Subject(spec=random_spec(seed, tmp_path), seed=seed, folder=tmp_path)
    errors = measure(subject, interpreted(seed), ranks)
    for name, error in errors.items():
        record(f"error: {name}", error)
    if wrong := beyond_tolerance(errors):
        pytest.fail(explain(random_tree(seed), seed, wrong, tmp_path, ranks))


def test_the_specs_are_200_and_cover_every_feature(tmp_path: Path) -> None:
    specs = [random_spec(seed, tmp_path) for seed in range(NUM_SPECS)]
    counts = Counter[str]()
    for spec in specs:
        counts.update({name: int(has) for name, has in features(spec).items()})
    assert len({spec.model for spec in specs}) == NUM_SPECS >= 200
    rare = {name: count for name, count in counts.items() if count < 10}
    assert not rare and all(spec.model.vocab_size % 2 for spec in specs)
    assert {1, 2, 3, 4} <= {spec.model.num_layers for spec in specs}


def test_the_language_counts_parameters_as_the_compiler_does(tmp_path: Path) -> None:
    for seed in range(NUM_SPECS):
        spec = random_spec(seed, tmp_path)
        assert num_parameters(spec) == lower(spec).num_params(), spec.model
