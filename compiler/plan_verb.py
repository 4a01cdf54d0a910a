"""`archwright plan`."""

import json
from pathlib import Path

from archwright.compiler.passes import PASSES
from archwright.compiler.planning.machine_file import read_machines
from archwright.compiler.planning.machines import GPUS, parse_cluster
from archwright.compiler.planning.plan_file import write_plan
from archwright.compiler.planning.planner import plan as make_plan
from archwright.compiler.planning.text import as_text
from archwright.spec import load
from archwright.spec.cli import add_output_format, add_set, parser
from archwright.spec.files import atomic_write


def plan(arguments: list[str]) -> int:
    """Prints what a spec takes; exit status 1 where it does not fit the GPUs."""
    args = parser("plan", "What a spec takes before anything runs: memory of each rank, time, communication, fit.")
    args.add_argument("spec", metavar="SPEC", help="a YAML file, or preset:NAME")
    args.add_argument("--gpus", metavar="COUNTxGPU", help=f"the machine, e.g. 8xH100; known: {', '.join(GPUS)}")
    args.add_argument("--machines", type=Path, metavar="FILE", help="YAML with further GPUs and other constants")
    args.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the plan, for train and build --plan")
    args.add_argument("--html", type=Path, metavar="FILE", help="write a page: mesh, memory, timeline, numbers")
    args.add_argument("--dump-after", metavar="PASS", choices=[item.name for item in PASSES],
                      help="print the Program after this pass instead")  # fmt: skip
    add_set(args)
    add_output_format(args, ("text", "json"))
    chosen = args.parse_args(arguments)
    gpus, constants = read_machines(chosen.machines)
    spec = load(chosen.spec, chosen.overrides)
    cluster = None if chosen.gpus is None else parse_cluster(chosen.gpus, gpus, constants)
    report = make_plan(spec, gpus=cluster, dump_after=chosen.dump_after)
    if chosen.dump_after is None:
        print(json.dumps(report.to_json(), indent=2) if chosen.output_format == "json" else as_text(report))
    if chosen.output is not None:
        write_plan(chosen.output, report, spec)
    if chosen.html is not None:
        from archwright.compiler.planning.page import as_html

        # A name may hold half a surrogate pair, which no UTF-8 can.
        atomic_write(chosen.html, as_html(report).encode(errors="xmlcharrefreplace"))
    return 1 if report.fits is False else 0
