"""How long `archwright validate` takes from a cold start; the aim is 0.5 s or less.

Each run is a new process, so that imports count. The result goes to benchmarks/results/ with the machine and versions.

    python benchmarks/bench_validate.py [--runs 20]
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
ARCHWRIGHT = Path(sys.executable).parent / "archwright"


def processor() -> str:
    """The model of the processor, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()


def measure(num_runs: int) -> list[float]:
    """Seconds of each run, from starting the process to its exit."""
    times_s: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder, "tiny.yaml")
        subprocess.run([ARCHWRIGHT, "init", "--preset", "tiny", "-o", spec], check=True, stdout=subprocess.DEVNULL)
        for _ in range(num_runs):
            started = time.perf_counter()
            subprocess.run([ARCHWRIGHT, "validate", spec], check=True, stdout=subprocess.DEVNULL)
            times_s.append(time.perf_counter() - started)
    return times_s


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=20)
    num_runs = arguments.parse_args().runs
    times_s = measure(num_runs)
    record = {
        "date": date.today().isoformat(),
        "command": f"benchmarks/bench_validate.py --runs {num_runs}",
        "hardware": processor(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("archwright", "pydantic", "ruamel.yaml")},
        "first_s": round(times_s[0], 4),
        "median_s": round(statistics.median(times_s), 4),
        "slowest_s": round(max(times_s), 4),
        "times_s": [round(seconds, 4) for seconds in times_s],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{record['date']}-validate.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"validate: median {record['median_s']} s, slowest {record['slowest_s']} s (aim 0.5 s); {path}")


if __name__ == "__main__":
    main()
