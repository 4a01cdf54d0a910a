"""The differential suite can fail: each seeded bug turns one of its comparisons red, on one of its own specs.

Without the bug the same comparisons of the same specs are green: that is the suite. The table of bugs is printed at the
end of the run.
"""

from collections.abc import Callable
from functools import cache

import pytest

from tests.parity.comparisons import COMPARISONS, Subject
from tests.parity.conftest import Record
from tests.parity.ranks import Ranks
from tests.parity.seeded_bugs import ALL_MUTATIONS
from tests.parity.strategies import random_spec
from tests.parity.test_differential import NUM_SPECS

MARGIN = 10
"""Times the tolerance, so that a bug is told from rounding by a wide margin."""


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Subject]:
    """Seed → the suite's subject, its right answers computed before there is a bug."""
    folder = tmp_path_factory.mktemp("mutations")

    @cache
    def make(seed: int) -> Subject:
        subject = Subject(spec=random_spec(seed, folder), seed=seed, folder=folder / str(seed))
        assert subject.expected is not None and subject.gradients
        return subject

    return make


def excess(subject: Subject, comparison: str, ranks: Ranks) -> float:
    """The error in units of the tolerance; infinite where the target refuses the work."""
    item = COMPARISONS[comparison]
    try:
        return item.measure(subject, ranks) / item.tolerance
    except AssertionError:  # ranks that differ, the writer's check of shapes; anything else is a bug of the bug
        return float("inf")


@pytest.mark.parametrize("name", ALL_MUTATIONS)
def test_a_bug_turns_the_suite_red(
    name: str,
    subject_of: Callable[[int], Subject],
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    record: Record,
) -> None:
    mutation = ALL_MUTATIONS[name]
    for seed in range(NUM_SPECS):
        subject = subject_of(seed)
        if not COMPARISONS[mutation.comparison].applies(subject):
            continue
        with monkeypatch.context() as patched, ranks.mutated(name):
            mutation.patch(patched)
            error = excess(subject, mutation.comparison, ranks)
        if error > MARGIN:
            record("mutation", (name, mutation.comparison, seed, error))
            return
    pytest.fail(f"no spec turned red: {name}")
