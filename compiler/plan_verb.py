"""`archwright plan`."""

import json

from archwright.compiler.machines import GPUS
from archwright.compiler.passes import PASSES
from archwright.compiler.planner import PlanReport, total_bytes
from archwright.compiler.planner import plan as make_plan
from archwright.spec import load
from archwright.spec.cli import add_output_format, add_set, parser

_BAR = 40
"""Columns of a full memory."""


def plan(arguments: list[str]) -> int:
    """Prints what a spec takes; exit status 1 where it does not fit the GPUs."""
    args = parser("plan", "Count parameters, FLOPs, KV-cache bytes and memory on each rank, before anything runs.")
    args.add_argument("spec", metavar="SPEC", help="a YAML file, or preset:NAME")
    args.add_argument("--gpus", metavar="COUNTxGPU", help=f"the machine, e.g. 8xH100; known: {', '.join(GPUS)}")
    args.add_argument("--dump-after", metavar="PASS", choices=[item.name for item in PASSES],
                      help="print the Program after this pass instead")  # fmt: skip
    add_set(args)
    add_output_format(args, ("text", "json"))
    chosen = args.parse_args(arguments)
    spec = load(chosen.spec, chosen.overrides)
    report = make_plan(spec, gpus=chosen.gpus, dump_after=chosen.dump_after)
    if chosen.dump_after is None:
        print(json.dumps(report.to_json(), indent=2) if chosen.output_format == "json" else as_text(report))
    return 1 if report.fits is False else 0


def as_text(report: PlanReport) -> str:
    """The report for people, the memory of a rank drawn as bars."""
    flops, memory = report.flops, vars(report.memory[0])
    total = total_bytes(report.memory[0])
    full = max(total, report.cluster.gpu.memory_bytes if report.cluster else 0)
    mesh = " x ".join(f"{axis} {degree}" for axis, degree in report.degrees.items())
    replicas = f", {report.replicas} replicas" if report.replicas > 1 else ""
    lines = [
        f"{report.name}: {report.kind}, {mesh}{replicas}",
        "",
        f"  parameters      {report.num_params:,}; {report.num_params_per_rank:,} on each rank",
        f"  FLOPs per token {flops.training:.4g} to train at {flops.sequence} tokens ({flops.training_causal:.4g} "
        f"causal), {flops.forward:.4g} forward ({flops.forward_causal:.4g} causal)",
        f"  KV cache        {report.kv_bytes_per_token:,} bytes per token ({report.kv_precision})",
        "",
        f"  memory of each of {len(report.memory)} rank{'s' if len(report.memory) > 1 else ''}",
        *(_bar(name.removesuffix("_bytes").replace("_", " "), size, full) for name, size in memory.items()),
        _bar("total", total, full),
    ]
    if report.cluster is not None:
        gpu = report.cluster.gpu
        lines += [
            _bar(report.cluster.name, gpu.memory_bytes, full),
            "",
            f"  step            at least {report.step_s:.3g} s ({report.step}; roofline of published peaks)",
            f"  fits            {'yes' if report.fits else 'no'}: {total / 1e9:.1f} of {gpu.memory_bytes / 1e9:.0f} GB",
        ]
    return "\n".join([*lines, *(f"  note            {note}" for note in report.notes)])


def _bar(name: str, size_bytes: int, full_bytes: int) -> str:
    return f"    {name:<16}{size_bytes / 1e9:10.3f} GB  {'█' * round(_BAR * size_bytes / full_bytes)}".rstrip()
