"""What every run of the tests shares.

Golden files: `pytest --update-golden` writes what the tests now give; read the difference before you commit it.
"""

from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden("name.txt", text)` compares the text with `golden/name.txt` beside the test."""

    def compare(name: str, text: str) -> None:
        path = request.path.parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path.name} does not exist; write it with --update-golden"
        assert text == path.read_text(encoding="utf-8")

    return compare


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, so that messages show names without a path."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests record for the reader: the largest error that each comparison met (properties `error: NAME`), lists of
    what they did (`listed: TITLE`, one line each), rows (dicts) of tables (`table: TITLE`), and the seeded bugs with
    what noticed them (`mutation`).

    Here and not beside the tests: with pytest-xdist only this conftest is read by the process that prints.
    """
    errors: dict[str, list[float]] = {}
    lists: dict[str, list[str]] = {}
    tables: dict[str, list[dict[str, object]]] = {}
    mutations: list[tuple[str, str, int, float]] = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                for name, value in report.user_properties:
                    if name.startswith("error: "):
                        errors.setdefault(name.removeprefix("error: "), []).append(value)
                    elif name.startswith("listed: "):
                        lists.setdefault(name.removeprefix("listed: "), []).extend(value.splitlines())
                    elif name.startswith("table: "):
                        tables.setdefault(name.removeprefix("table: "), []).append(value)
                    elif name == "mutation":
                        mutations.append(tuple(value))
    if errors:
        terminalreporter.section("largest errors, relative to the oracle's largest value")
        for name, values in errors.items():
            terminalreporter.line(f"{name:<40} {max(values):.1e} in {len(values)} comparisons")
    if mutations:
        terminalreporter.section("seeded bugs, and what turned red")
        for bug, comparison, seed, error in mutations:
            terminalreporter.line(f"{bug:<48} {comparison:<32} spec {seed:<3} {error:.0f} times the tolerance")
    lists |= {title: _table(rows) for title, rows in tables.items()}
    for title, lines in lists.items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.line(line)


def _table(rows: list[dict[str, object]]) -> list[str]:
    """The first column to the left, the others to the right; a row may lack some."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(more, widths[1:], strict=True))])
        for first, *more in cells
    ]
