"""How long `archwright plan` takes for 405B parameters on 1,024 GPUs, from a cold start; the aim is 2 s or less.

Each run is a new process, so that imports count. Two plans: one that fits, and one that does not and looks for the
cheapest change. The result goes to benchmarks/results/ with the machine and versions.

    python benchmarks/bench_plan.py [--runs 5]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
ARCHWRIGHT = Path(sys.executable).parent / "archwright"
TRAIN = "train={kind: pretrain, precision: bfloat16, batch_size: 512, micro_batches: 64, sequence_length: 8192}"
COMMAND = ["plan", "preset:llama3.1-405b", "--gpus", "1024xH100", "--output-format", "json", "--set", TRAIN]
PLANS: dict[str, list[str]] = {
    "fits": [
        "--set",
        "parallel={tensor: 8, pipeline: 16, sequence: true}",
        "--set",
        "train.activation_checkpointing={kind: full}",
    ],
    "does_not_fit": ["--set", "parallel={tensor: 8, pipeline: 16}", "--set", "train.micro_batches=16"],
}


def processor() -> str:
    """The model of the processor, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()


def measure(arguments: list[str], num_runs: int, *, expected: int) -> dict[str, object]:
    """Seconds of each run, from starting the process to its exit: on the wall, and of the processor alone."""
    wall_s: list[float] = []
    used_s: list[float] = []
    for _ in range(num_runs):
        before, started = os.times(), time.perf_counter()
        done = subprocess.run([ARCHWRIGHT, *COMMAND, *arguments], stdout=subprocess.DEVNULL, check=False)
        assert done.returncode == expected, done
        wall_s.append(round(time.perf_counter() - started, 3))
        after = os.times()
        used_s.append(
            round(after.children_user + after.children_system - before.children_user - before.children_system, 3)
        )
    return {"median_s": statistics.median(wall_s), "median_cpu_s": statistics.median(used_s), "wall_s": wall_s}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=5)
    num_runs = arguments.parse_args().runs
    results = {
        name: measure(more, num_runs, expected=int(name == "does_not_fit")) for name, more in PLANS.items()
    }  # fmt: skip
    record = {
        "date": date.today().isoformat(),
        "command": f"benchmarks/bench_plan.py --runs {num_runs}",
        "hardware": processor(),
        "platform": platform.platform(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("archwright", "pydantic", "ruamel.yaml")},
        "plans": results,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{record['date']}-plan.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    for name, result in results.items():
        print(f"plan, {name}: median {result['median_s']} s, {result['median_cpu_s']} s of processor (aim 2 s); {path}")


if __name__ == "__main__":
    main()
