"""Print the time of every test family against its share, from pytest's JUnit report.

A family is a top folder of tests/; its share stands in pyproject.toml under [tool.archwright.test-seconds]. A family's
time is the sum over its tests, whatever the number of workers. The table informs: a slow machine fails no test.

    python tests/shares.py .venv/tests.xml
"""

import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def read_shares(root: Path) -> dict[str, int]:
    """Seconds per family."""
    with (root / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["tool"]["archwright"]["test-seconds"]


def read_times(report: Path) -> dict[str, tuple[int, float]]:
    """Family -> (number of tests, their seconds), from a JUnit report."""
    times: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for case in ElementTree.parse(report).iter("testcase"):
        # `tests.runtime.test_doctor` -> `runtime`; a test that lies directly in tests/ is its own family.
        family = case.get("classname", "").removeprefix("tests.").split(".")[0]
        num_tests, seconds = times[family]
        times[family] = (num_tests + 1, seconds + float(case.get("time", 0)))
    return dict(times)


def table(times: dict[str, tuple[int, float]], shares: dict[str, int]) -> str:
    """The families, those over their share marked, and the sum."""
    lines = [f"{'family':<12} {'tests':>6} {'seconds':>8} {'share':>6}"]
    for family in sorted(times.keys() | shares.keys()):
        num_tests, seconds = times.get(family, (0, 0.0))
        share = shares.get(family)
        mark = "  no share" if share is None else f"  over by {seconds - share:.0f} s" if seconds > share else ""
        lines.append(f"{family:<12} {num_tests:>6} {seconds:>8.1f} {share or 0:>6}{mark}")
    num_tests = sum(number for number, _ in times.values())
    seconds = sum(time for _, time in times.values())
    lines.append(f"{'together':<12} {num_tests:>6} {seconds:>8.1f} {sum(shares.values()):>6}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: shares.py JUNIT.xml", file=sys.stderr)
        return 2
    report = Path(arguments[0])
    if not report.is_file():
        print(f"{report}: there is no report; did pytest start?", file=sys.stderr)
        return 1
    print(table(read_times(report), read_shares(ROOT)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
