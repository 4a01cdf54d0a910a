"""What every run of the tests shares."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The largest error that each comparison met, from the properties `error: NAME` that tests record.

    Here and not in tests/parity: with pytest-xdist only this conftest is read by the process that prints.
    """
    errors: dict[str, list[float]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                for name, value in report.user_properties:
                    if name.startswith("error: "):
                        errors.setdefault(name.removeprefix("error: "), []).append(value)
    if errors:
        terminalreporter.section("largest errors, relative to the oracle's largest value")
        for name, values in errors.items():
            terminalreporter.line(f"{name:<40} {max(values):.1e} in {len(values)} comparisons")
