"""What the differential suite shares."""

from collections.abc import Callable, Iterator

import pytest

from tests.parity.ranks import Ranks

Record = Callable[[str, object], None]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pair = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield pair
    pair.close()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """`record_property`, which refuses to work together with `--junit-xml`."""
    return lambda name, value: request.node.user_properties.append((name, value))
