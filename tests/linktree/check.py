"""Run pyright through the link tree, and fail when it looked at fewer files than the four folders hold.

Pyright does not descend into a link that it was not told of, and then reports success about nothing; the count shows
it. Exit status: pyright's own, or 1 when files are missing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("spec", "compiler", "runtime", "trainers")


def count_files(root: Path) -> int:
    """The number of Python files that the four folders hold."""
    return sum(1 for folder in FOLDERS for _ in (root / folder).rglob("*.py"))


def missing_files(report: dict[str, Any], expected: int) -> int:
    """How many of the `expected` files pyright's JSON report does not cover."""
    return max(0, expected - int(report["summary"]["filesAnalyzed"]))


def print_report(report: dict[str, Any]) -> None:
    """One line per finding, in the form that editors and CI logs link to."""
    for finding in report["generalDiagnostics"]:
        start = finding["range"]["start"] if "range" in finding else {"line": 0, "character": 0}
        # The file itself, not the link that led to it.
        where = (
            f"{os.path.relpath(os.path.realpath(finding['file']), ROOT)}:{start['line'] + 1}:{start['character'] + 1}"
        )
        print(f"{where}: {finding['severity']}: {finding['message']} ({finding.get('rule', 'pyright')})")
    summary = report["summary"]
    counts = f"{summary['errorCount']} errors, {summary['warningCount']} warnings"
    print(f"pyright: {counts} in {summary['filesAnalyzed']} files")


def main() -> int:
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        report = json.loads(run.stdout)
    except json.JSONDecodeError:
        print(run.stdout or "pyright printed nothing", file=sys.stderr)
        return run.returncode or 1
    print_report(report)
    expected = count_files(ROOT)
    if missing := missing_files(report, expected):
        print(
            f"pyright looked at {missing} files fewer than the {expected} that {', '.join(FOLDERS)} hold",
            file=sys.stderr,
        )
        return 1
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
