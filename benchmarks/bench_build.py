"""How long `archwright build` takes and what memory it needs, beside a plain write of the same bytes to the same disk.

The default is the 8B shape on two ranks in bfloat16 with generated weights, 18 GB; with --from-model they are read from
a model folder, which is written first. The aim is at most twice the plain write, and at most 2 GiB beyond the page
cache. Memory is RssAnon + RssShmem of the building process, sampled: mapped files are the page cache's. Both writers
flush to the disk, idle before each; they alternate. Repeated builds must give the same bytes.

A plain write is made twice, and the second counts: blocks that a virtual disk has never held, and memory that a
virtual machine has given back to its host (after some seconds of being free), are slow at their first use. The build is
then measured as it comes; most of what it writes does not go through the page cache.

    python benchmarks/bench_build.py [--preset llama3.1-8b] [--tensor 2] [--repeats 2] [--from-model] [--folder PLACE]
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from importlib import metadata
from pathlib import Path

from archwright.compiler.passes import lower
from archwright.compiler.weights.folder import weight_tensors, write_model_folder
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.spec import load

RESULTS = Path(__file__).resolve().parent / "results"
ARCHWRIGHT = Path(sys.executable).parent / "archwright"
SAMPLE_S = 0.02
CHUNK_BYTES = 64 << 20


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is not backed by files; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return sum(int(fields.get(name, "0 kB").split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


def measured(command: list[str]) -> tuple[float, float, int]:
    """Seconds, seconds of processor time and peak anonymous bytes of a command.

    Raises CalledProcessError where it fails.
    """
    os.sync()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak_bytes, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak_bytes
        while not ended.wait(SAMPLE_S):
            peak_bytes = max(peak_bytes, anonymous_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    if status:
        raise subprocess.CalledProcessError(status, command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu_s, peak_bytes


def plain_write(folder: Path, sizes: list[int]) -> float:
    """Seconds to write files of these sizes and flush them. They are removed."""
    content = memoryview(os.urandom(CHUNK_BYTES))
    os.sync()
    started = time.perf_counter()
    for number, size in enumerate(sizes):
        with (folder / f"plain{number}").open("wb", buffering=0) as file:
            for start in range(0, size, CHUNK_BYTES):
                file.write(content[: min(CHUNK_BYTES, size - start)])
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    for file in folder.glob("plain*"):
        file.unlink()
    return round(seconds, 4)


def build_settings(tensor: int, *, generated: bool = True) -> list[str]:
    values: dict[str, object] = {"precision": "bfloat16", "parallel.tensor": tensor}
    values |= {"weights.kind": "generated"} if generated else {}
    return [word for name, value in values.items() for word in ("--set", f"build.{name}={value}")]


def planned_sizes(preset: str, tensor: int) -> list[int]:
    """Bytes of each rank's weights, before anything is built."""
    command = [str(ARCHWRIGHT), "plan", f"preset:{preset}", *build_settings(tensor), "--output-format", "json"]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [rank["weights_bytes"] for rank in json.loads(answer)["memory"]["per_rank"]]


def write_model(path: Path, preset: str) -> Path:
    """A model folder of the preset's initial weights in bfloat16."""
    spec = load(f"preset:{preset}")
    program = lower(spec)
    weights = GeneratedWeights(params=program.params(), seed=0, precision="bfloat16")
    write_model_folder(path, spec, weight_tensors(program, weights, "bfloat16"), [], details={})
    return path


def build_once(folder: Path, source: str, settings: list[str]) -> dict[str, float | int | str]:
    """One build, and the artifact's bytes; it is removed. settings: words of the command line."""
    out = folder / "artifact"
    build_s, cpu_s, peak_bytes = measured([str(ARCHWRIGHT), "build", source, "--to", "onnx", "-o", str(out), *settings])
    manifest = json.loads((out / "manifest.json").read_text())
    measurements = manifest["measured"]
    num_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    shutil.rmtree(out)
    return {
        "parameters": manifest["details"]["num_parameters"],
        "build_s": round(build_s, 2),
        "processor_s": round(cpu_s, 2),
        "export_s": round(measurements["export_s"], 2),
        "verify_s": round(measurements["verify_s"], 2),
        "peak_anonymous_bytes": peak_bytes,
        "artifact_bytes": num_bytes,
        "files_sha256": hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest(),
    }


def hardware() -> dict[str, object]:
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory_kib = int(meminfo.read_text().split()[1]) if meminfo.exists() else 0
    return {
        "processor": f"{names[0]} x {len(names)}" if names else platform.processor(),
        "memory_gib": round(memory_kib / (1 << 20), 1),
        "load_average": os.getloadavg(),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--preset", default="llama3.1-8b")
    arguments.add_argument("--tensor", type=int, default=2)
    arguments.add_argument("--repeats", type=int, default=2)
    arguments.add_argument("--from-model", action="store_true", help="build from a model folder")
    arguments.add_argument("--folder", type=Path, help="where to write; its file system is what is measured")
    chosen = arguments.parse_args()
    machine = hardware()  # before we are the load
    with tempfile.TemporaryDirectory(prefix="archwright-build-", dir=chosen.folder) as name:
        folder = Path(name)
        sizes = planned_sizes(chosen.preset, chosen.tensor)
        first_writes_s: list[float] = []
        writes_s: list[float] = []
        runs: list[dict[str, float | int | str]] = []
        source = f"preset:{chosen.preset}"
        if chosen.from_model:
            source = str(write_model(folder / "model", chosen.preset))
        for _ in range(chosen.repeats):
            first_writes_s.append(plain_write(folder, sizes))
            writes_s.append(plain_write(folder, sizes))
            runs.append(build_once(folder, source, build_settings(chosen.tensor, generated=not chosen.from_model)))
    record = {
        "date": date.today().isoformat(),
        "command": f"bench_build.py --preset {chosen.preset} --tensor {chosen.tensor} --repeats {chosen.repeats}"
        + (" --from-model" if chosen.from_model else ""),
        "hardware": machine,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("archwright", "numpy", "onnx", "onnx-ir", "onnxruntime")},
        "plain_write_bytes": sum(sizes),
        "first_plain_write_s": first_writes_s,
        "plain_write_s": writes_s,
        "builds": runs,
        "ratio_of_medians": round(
            statistics.median(float(run["build_s"]) for run in runs) / statistics.median(writes_s), 3
        ),
        "byte_equal": len({run["files_sha256"] for run in runs}) == 1,
    }
    RESULTS.mkdir(exist_ok=True)
    kind = "-from-model" if chosen.from_model else ""
    path = RESULTS / f"{record['date']}-build-{chosen.preset}-tensor{chosen.tensor}{kind}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    peak = max(int(run["peak_anonymous_bytes"]) for run in runs)
    print(f"build: {record['ratio_of_medians']} x a plain write (aim 2), {peak / (1 << 30):.2f} GiB (aim 2); {path}")
    if not record["byte_equal"]:
        raise SystemExit("bench_build: two builds of one model differ")


if __name__ == "__main__":
    main()
