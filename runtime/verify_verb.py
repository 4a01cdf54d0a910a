"""`archwright verify`."""

import json
import sys
from pathlib import Path

from archwright.spec.cli import add_output_format, parser


def verify(arguments: list[str]) -> int:
    """Prints what the checks of an artifact found; exit status 1 when one failed or could not be done."""
    args = parser("verify", "Check an artifact: files, graphs, weights, and its numbers against the float64 oracle.")
    args.add_argument("path", metavar="PATH", type=Path, help="a folder written by `archwright build`")
    bisect_help = "name the first operation that differs from the oracle; also of a model folder or a run"
    how = args.add_mutually_exclusive_group()
    how.add_argument("--bisect", action="store_true", help=bisect_help)
    target_help = "run the engines here, on all ranks, and compare them with the values that the artifact brings along"
    how.add_argument("--on-target", action="store_true", help=target_help)
    add_output_format(args, ("text", "json"))
    chosen = args.parse_args(arguments)
    # After parsing, so that --help is quick.
    if chosen.bisect:
        from archwright.runtime.bisection import bisect as check
    elif chosen.on_target:
        from archwright.runtime.on_target import verify_on_target as check
    else:
        from archwright.runtime.verification import verify as check

    report = check(chosen.path, lambda message: print(f"verify: {message}", file=sys.stderr, flush=True))
    print(json.dumps(report.as_json(), indent=2) if chosen.output_format == "json" else report.as_text())
    for problem in report.problems():
        print(f"{chosen.path}: {problem}", file=sys.stderr)
    return 0 if report.ok else 1
