"""How far `archwright plan` is off measured runs; fits its constants to them.

Input: JSON lines, one a measured configuration, of steps after warm-up, the slowest rank's median and the fullest
rank's peak:

    {"spec": "preset:llama3.2-1b", "set": {"train": {...}}, "gpus": "2xH100", "step_s": 0.31,
     "peak_allocated_bytes": 41000000000, "peak_device_bytes": 45000000000}

step_s, peak_allocated_bytes (torch.cuda.max_memory_allocated) and peak_device_bytes (what the driver says is in use at
the end: total - free of torch.cuda.mem_get_info) may each be left out.

The loss is Σ log²(planned / measured) + PULL · Σ log²(constant / the table's): constants that the runs do not determine
stay near the table's. Minimized one constant at a time, in steps that halve. Output: a table, and `constants:` for a
file of `archwright plan --machines`, from which the numbers go into compiler/planning/constants.py with their date.

    python benchmarks/fit_plan.py RUNS... [--free matmul_fraction,attention_fraction] [-o machines.yaml]

With `--compare` nothing is fitted: the result is measured, planned and deviation of each run, with the runs themselves,
so that it serves as RUNS again and later runs are appended by

    python benchmarks/fit_plan.py results/DATE-plan-truth.json MORE.jsonl --compare -o results/DATE-plan-truth.json
"""

import argparse
import json
import math
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from archwright.compiler.passes import degrees_of, lower
from archwright.compiler.planning.constants import DEFAULTS
from archwright.compiler.planning.layout import Layout, Layouts
from archwright.compiler.planning.machines import Cluster, parse_cluster
from archwright.compiler.planning.memory import total_bytes
from archwright.compiler.planning.training import estimate
from archwright.spec import Spec, load

PULL = 0.002
MEASURED_ON = "H100 80GB HBM3, one or two of one host (NVLink), torch 2.11, layers compiled, bench_training.py"
TIME = ("backward_traffic", "context_attention", "overlap_cost", "step_overhead_s")
MEMORY = ("context_bytes", "nccl_bytes", "allocator_slack")
CEILINGS = {name: 1.0 for name in DEFAULTS if name.endswith("_fraction")}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measured configuration. given: as it was read. measured: by name, those that were given."""

    name: str
    given: Mapping[str, Any]
    spec: Spec
    cluster: Cluster
    layout: Layout
    measured: Mapping[str, float]

    def planned(self, constants: Mapping[str, float]) -> dict[str, float]:
        assert self.spec.train is not None
        cluster = replace(self.cluster, constants=constants)
        found = estimate(self.layout, self.spec.parallel, self.spec.train, cluster)
        assert found.time is not None
        fullest = max(found.memory, key=total_bytes)
        added = fullest.windows_bytes + fullest.context_bytes + fullest.nccl_bytes + fullest.allocator_bytes
        return {
            "step_s": found.time.step_s,
            "peak_allocated_bytes": total_bytes(fullest) - added,
            "peak_device_bytes": total_bytes(fullest),
        }


def read_run(line: str) -> Run:
    given: dict[str, Any] = json.loads(line)
    given = given.get("run", given)  # a whole record of bench_training.py will do
    spec, cluster = load(given["spec"], given.get("set", {})), parse_cluster(given["gpus"])
    assert spec.train is not None, "a measured run trains"
    layouts = Layouts(
        lower(spec), sequence=spec.train.sequence_length, muon=spec.train.optimizer.kind == "muon"
    )  # fmt: skip
    names = ("step_s", "peak_allocated_bytes", "peak_device_bytes")
    return Run(
        name=given.get("name", f"{given['gpus']} {json.dumps(given.get('set', {}))}"),
        given=given,
        spec=spec,
        cluster=cluster,
        layout=layouts.at(degrees_of(spec.parallel, cluster.count)),
        measured={name: float(given[name]) for name in names if name in given},
    )


def read_runs(paths: list[Path]) -> list[Run]:
    """Of files of lines, and of earlier comparisons."""
    return [read_run(line) for path in paths for line in _lines(path)]


def _lines(path: Path) -> Iterator[str]:
    if path.suffix == ".json":
        yield from (json.dumps(each["run"]) for each in json.loads(path.read_text())["runs"])
    else:
        yield from (line for line in path.read_text().splitlines() if line.strip())


def compare(runs: list[Run], measured_on: str) -> dict[str, Any]:
    """The result file. deviation: planned / measured - 1."""
    found: list[dict[str, Any]] = []
    for run in runs:
        planned = run.planned(DEFAULTS)
        values = {
            name: {
                "measured": value,
                "planned": round(planned[name], 6),
                "deviation": round(planned[name] / value - 1, 4),
            }
            for name, value in run.measured.items()
        }
        found.append({"name": run.name, "gpus": run.given["gpus"], **values, "run": run.given})
    return {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/fit_plan.py", *sys.argv[1:]]),
        "measured_on": measured_on,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), "archwright": metadata.version("archwright")},
        "constants": dict(DEFAULTS),
        "runs": found,
    }


def print_comparison(result: dict[str, Any]) -> None:
    print(f"{'':<26}{'measured':>16}{'planned':>16}{'off':>8}")
    for each in result["runs"]:
        print(each["name"])
        for name in (name for name in each if isinstance(each[name], dict) and name != "run"):
            value = each[name]
            print(f"  {name:<24}{value['measured']:16.5g}{value['planned']:16.5g}{value['deviation']:+8.1%}")


def loss(runs: list[Run], constants: Mapping[str, float]) -> float:
    total = PULL * sum(math.log(value / DEFAULTS[name]) ** 2 for name, value in constants.items())
    for run in runs:
        planned = run.planned(constants)
        total += sum(math.log(planned[name] / value) ** 2 for name, value in run.measured.items())
    return total


def fit(
    constants: Mapping[str, float], free: list[str], loss: Callable[[Mapping[str, float]], float]
) -> dict[str, float]:
    """Coordinate descent in logarithms: a step of 1.3 either way, then of its square root, until one of 0.1%."""
    best, lowest, step = dict(constants), loss(constants), 1.3
    while step > 1.001:
        improved = False
        for name in free:
            for factor in (step, 1 / step):
                value = min(best[name] * factor, CEILINGS.get(name, math.inf))
                if (found := loss({**best, name: value})) < lowest - 1e-12:
                    best[name], lowest, improved = value, found, True
        step = step if improved else math.sqrt(step)
    return best


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", type=Path, nargs="+", help="lines of JSON, or results of --compare (.json)")
    arguments.add_argument("--free", default=",".join(TIME + MEMORY), help="constants that may change")
    arguments.add_argument("--compare", action="store_true", help="fit nothing; write measured beside planned")
    arguments.add_argument(
        "--measured-on", default=MEASURED_ON, help="with --compare: hardware and versions of the runs"
    )
    arguments.add_argument("-o", "--output", type=Path, help="write the machine file, or the comparison, there")
    given = arguments.parse_args()
    runs = read_runs(given.runs)
    if given.compare:
        result = compare(runs, given.measured_on)
        print_comparison(result)
        if given.output:
            given.output.write_text(json.dumps(result, indent=2) + "\n")
        return
    fitted = fit(DEFAULTS, given.free.split(","), lambda constants: loss(runs, constants))
    print(f"{'measured':>42}{'planned before':>20}{'after':>18}")
    for run in runs:
        print(run.name)
        before, after = run.planned(DEFAULTS), run.planned(fitted)
        for name, value in run.measured.items():
            errors = [f"{planned:12.5g} {planned / value - 1:+6.1%}" for planned in (before[name], after[name])]
            print(f"  {name:<24}{value:16.5g}  {'  '.join(errors)}")
    changed = {name: value for name, value in fitted.items() if value != DEFAULTS[name]}
    text = "constants:\n" + "".join(f"  {name}: {value:.6g}\n" for name, value in changed.items())
    print(text, end="")
    if given.output:
        given.output.write_text(text)


if __name__ == "__main__":
    main()
