"""`archwright build`."""

import json
import sys
from pathlib import Path

from archwright.spec.cli import add_output_format, add_set, parser


def build(arguments: list[str]) -> int:
    """Writes and checks an artifact; what it is doing goes to stderr, what its checks found to stdout."""
    args = parser("build", "Export a model as ONNX graphs, one a rank, or as TensorRT engines, and verify them.")
    args.add_argument("source", metavar="MODEL_OR_RUN_OR_SPEC", help="a spec needs --set build.weights.kind=generated")
    args.add_argument("--to", choices=("onnx", "engine"), required=True, help="graphs alone, or engines beside them")
    args.add_argument("-o", dest="out", metavar="OUT", type=Path, required=True, help="the artifact folder to write")
    args.add_argument("--plan", type=Path, metavar="FILE", help="refuse to build what this plan was not made for")
    add_set(args)
    add_output_format(args, ("text", "json"))
    chosen = args.parse_args(arguments)
    from archwright.runtime.build_progress import reporter_to  # after parsing, so that --help is quick
    from archwright.runtime.building import build as build_artifact

    with reporter_to(sys.stderr) as reporter:
        report = build_artifact(
            chosen.source, chosen.out, chosen.to, chosen.overrides, progress=reporter, plan=chosen.plan
        )
    print(json.dumps(report.as_json(), indent=2) if chosen.output_format == "json" else report.as_text())
    print(f"build: wrote {chosen.out}", file=sys.stderr)
    return 0
