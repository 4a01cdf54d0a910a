"""Run a list of experiments on a machine that is there for a few minutes, so that none of them can use all of it.

    python3 benchmarks/gpu_session.py one --output OUT [--wheels FOLDER --site FOLDER] [--only NAME] [--budget-s 560]
    python3 benchmarks/gpu_session.py --unpack OUT/records.jsonl --output benchmarks/results

The first installs what the wheels hold and this checkout, runs the experiments of the group (experiments.toml), each
within its own limit, and leaves three files: log.txt (everything printed), records.jsonl (a result a line) and
table.txt, which it also prints last. The second makes dated result files of the lines. Standard library only.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MARK = "ARCHWRIGHT_EXPERIMENT"
GRACE_S = 5.0
LEAST_S = 25.0
STACKS_S = 12.0
SHOWN_LINES = 12
HEADER = ("experiment", "who", "ms/step", "tok/s/GPU", "MFU full", "causal", "GiB", "reserved", "plan", "loss", "speed")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    name: str
    arguments: str
    limit_s: float
    processes: int = 1

    def command(self, output: Path, limit_s: float) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        stacks = ["--dump-stacks-after", str(round(limit_s - STACKS_S, 1))] if limit_s > 2 * STACKS_S else []
        program = [str(HERE / "bench_training.py"), *shlex.split(self.arguments), "--label", self.name]
        return [sys.executable, *(launcher if self.processes > 1 else []), *program, *stacks, "--output", str(output)]


def read_experiments(group: str, only: Sequence[str]) -> list[Experiment]:
    with (HERE / "experiments.toml").open("rb") as file:
        groups = tomllib.load(file)
    if group not in groups or not set(only) <= set(groups[group]):
        raise SystemExit(f"gpu_session: there are { ({name: list(found) for name, found in groups.items()}) }")
    return [
        Experiment(name=f"{group}-{name}", **fields)
        for name, fields in groups[group].items()
        if not only or name in only
    ]


class Session:
    """One use of the machine: a log, the records so far, the time that is left."""

    def __init__(self, output: Path, budget_s: float) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.output = output
        self.ends = time.monotonic() + budget_s
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.lines: list[dict[str, Any]] = []

    @property
    def left_s(self) -> float:
        return self.ends - time.monotonic()

    def run(self, name: str, command: list[str], limit_s: float) -> str:
        """Run a command within a limit and log it; `ok`, or what went wrong. Nothing that it started outlives it."""
        started = time.monotonic()
        with (self.output / "log.txt").open("a") as log:
            log.write(f"\n===== {name}: {shlex.join(command)}\n")
            log.flush()
            begin = log.tell()
            mark = f"{name}-{os.getpid()}"  # another session's experiment of that name is none of ours
            variables = {**self.environment, MARK: mark}
            process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(limit_s)
                result = "ok" if status == 0 else f"exit {status}"
            except subprocess.TimeoutExpired:
                result = "timeout"
            finally:
                end_all(mark, process)
            log.write(f"===== {name}: {result} after {time.monotonic() - started:.1f} s\n")
        if result != "ok":
            text = (self.output / "log.txt").read_bytes()[begin:].decode(errors="replace")
            print(f"--- {name}: {result}", *text.splitlines()[-SHOWN_LINES:], sep="\n", flush=True)
        return result

    def install(self, wheels: Path | None, site: Path | None) -> None:
        """Missing packages into `site`, then this checkout; without an installation it runs through its links."""
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
        path = []
        if wheels is not None and site is not None:
            files = [str(file) for file in sorted(wheels.glob("*.whl"))]
            options = ["--no-index", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
            self.run("wheels", [*pip, *options, *files], 60)
            path.append(str(site))
        self._search(path)
        if self.run("checkout", [*pip, "--no-build-isolation", "--no-index", "-e", str(ROOT)], 60) != "ok":
            self._search([*path, str(ROOT / "tests" / "linktree")])

    def _search(self, path: Sequence[str]) -> None:
        parts = [*path, os.environ.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, parts))

    def measure(self, experiment: Experiment) -> None:
        limit_s = min(experiment.limit_s, self.left_s - GRACE_S)
        if limit_s < LEAST_S:
            self._keep({"experiment": experiment.name, "status": "no time left"})
            return
        # As `archwright train` starts its workers; torchrun would give each one thread.
        self.environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // experiment.processes))
        with TemporaryDirectory() as name:
            status = self.run(experiment.name, experiment.command(Path(name), limit_s), limit_s)
            found = list(Path(name).glob("*.json"))
            record = {"file": found[0].name, "record": json.loads(found[0].read_text())} if found else {}
        self._keep({"experiment": experiment.name, "status": status, **record})

    def _keep(self, line: dict[str, Any]) -> None:
        """Written at once: a session may be cut off."""
        self.lines.append(line)
        with (self.output / "records.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        (self.output / "table.txt").write_text(table(self.lines) + "\n")


def end_all(mark: str, process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started: workers of a launcher have sessions of their own, but its mark."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        marked = pids_of(mark)
        if process.poll() is not None and not marked:
            return
        for pid in {process.pid, *marked} if process.poll() is None else marked:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and (process.poll() is None or pids_of(mark)):
            time.sleep(0.1)


def pids_of(mark: str) -> set[int]:
    """Live processes that carry the mark of one experiment."""
    wanted, pids = f"{MARK}={mark}".encode(), set()
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in file.read_bytes().split(b"\0"):
                pids.add(int(file.parent.name))
        except OSError:
            continue
    return pids - {os.getpid()}


def table(lines: list[dict[str, Any]]) -> str:
    """One row a contestant. Memory: GiB, the largest of the ranks. speed: archwright's over the hand-written one's."""
    rows = [HEADER]
    for line in lines:
        record = line.get("record", {})
        contestants = [name for name in ("archwright", "handwritten") if name in record]
        rows += [_row(line, name) for name in contestants]
        if not contestants or line["status"] != "ok":
            rows.append((line["experiment"], line["status"], *[""] * (len(HEADER) - 2)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _row(line: dict[str, Any], name: str) -> tuple[str, ...]:
    record = line["record"]
    found = record[name]
    ranks = found.get("ranks") or [found["memory"]]

    def gib(key: str) -> str:
        largest = max(rank.get(key, 0) for rank in ranks)
        return f"{largest / 2**30:.1f}" if largest else "-"

    return (
        line["experiment"],
        name,
        f"{found['median_step_s'] * 1e3:.2f}",
        f"{found['tokens_per_s_per_gpu']:.0f}",
        f"{found['mfu_full']:.2%}",
        f"{found['mfu_causal']:.2%}",
        gib("peak_allocated_bytes"),
        gib("peak_reserved_bytes"),
        f"{record['plan']['memory_of_a_rank_bytes'] / 2**30:.1f}" if name == "archwright" else "-",
        f"{found['losses'][0]:.4f} {found['losses'][-1]:.4f}",
        str(record["pair"]["speed_ratio"]) if "pair" in record and name == "archwright" else "-",
    )


def unpack(lines: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for line in map(json.loads, lines.read_text().splitlines()):
        if "record" in line:
            (output / line["file"]).write_text(json.dumps(line["record"], indent=2) + "\n")
            print(output / line["file"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 where an experiment did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", nargs="?", help="of experiments.toml")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="may be repeated")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install into --site")
    parser.add_argument("--site", type=Path, help="folder for what the wheels hold")
    parser.add_argument("--no-install", action="store_true", help="everything is installed already")
    parser.add_argument("--budget-s", type=float, default=560.0, help="seconds for everything")
    parser.add_argument("--unpack", type=Path, metavar="RECORDS", help="make result files of a records.jsonl")
    chosen = parser.parse_args(arguments)
    if chosen.unpack:
        unpack(chosen.unpack, chosen.output)
        return 0
    experiments = read_experiments(chosen.group or "", chosen.only)
    session = Session(chosen.output.resolve(), chosen.budget_s)
    if not chosen.no_install:
        session.install(chosen.wheels, chosen.site)
    for experiment in experiments:
        session.measure(experiment)
    print(table(session.lines))
    return 0 if all(line["status"] == "ok" for line in session.lines) else 1


if __name__ == "__main__":
    sys.exit(main())
