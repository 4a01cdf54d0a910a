"""A pair of processes that breaks fails one comparison, not all that follow."""

from pathlib import Path

import numpy as np
import pytest

from archwright.compiler.ir import Degrees
from archwright.compiler.passes import run_passes
from tests.parity.comparisons import Subject
from tests.parity.ranks import Ranks
from tests.parity.strategies import random_spec


@pytest.mark.heavy
def test_a_broken_pair_is_replaced(tmp_path: Path) -> None:
    subject = Subject(spec=random_spec(0, tmp_path), seed=0, folder=tmp_path)
    plan = run_passes(subject.spec, Degrees(tensor=2))
    pair = Ranks(2, tmp_path)
    try:
        before = pair.run_local(subject.case, plan, dtype="float64")
        pair.processes[1].kill()
        pair.processes[1].wait()
        with pytest.raises((OSError, EOFError, RuntimeError)):
            pair.run_local(subject.case, plan, dtype="float64")
        after = pair.run_local(subject.case, plan, dtype="float64")
        np.testing.assert_array_equal(after.whole_BSV, before.whole_BSV)
    finally:
        pair.close()
