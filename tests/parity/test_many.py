"""The differential suite over 5,000 more specs than `make test` has, in pieces of a few minutes."""

from pathlib import Path

import pytest

from tests.parity.comparisons import Subject, beyond_tolerance, compiled, interpreted, measure
from tests.parity.conftest import Record
from tests.parity.ranks import Ranks
from tests.parity.shrinking import explain
from tests.parity.strategies import random_spec, random_tree
from tests.parity.test_differential import NUM_SPECS

NUM_MANY, PIECE = 5000, 100
COMPILED_EVERY = 10


@pytest.mark.slow
@pytest.mark.parametrize("start", range(NUM_SPECS, NUM_SPECS + NUM_MANY, PIECE))
def test_every_target_agrees_with_the_oracle_on_many(start: int, tmp_path: Path, ranks: Ranks, record: Record) -> None:
    reports: list[str] = []
    for seed in range(start, start + PIECE):
        names = interpreted(seed) + ([compiled(seed)] if seed % COMPILED_EVERY == 0 else [])
        subject = Subject(spec=random_spec(seed, tmp_path), seed=seed, folder=tmp_path / str(seed))
        errors = measure(subject, names, ranks)
        for name, error in errors.items():
            record(f"error: {name}", error)
        if wrong := beyond_tolerance(errors):
            reports.append(explain(random_tree(seed), seed, wrong, tmp_path, ranks))
    assert not reports, "\n\n".join(reports)
