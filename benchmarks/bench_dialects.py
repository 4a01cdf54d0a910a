"""How fast ONNX Runtime runs the graphs of each dialect on a CPU, with fused matrices and without.

One model, every form of it in sessions of one thread, called in turn in one process. Times are the thread's own, so
that what else the machine does counts little; what matters is the ratio to the portable form without fusions in the
same round. Forms whose graphs are equal are measured as well: what these differ by is noise. Decode: one token in each
row behind a prompt; prefill: the prompt. The result goes to benchmarks/results/ with the machine and versions.

    python benchmarks/bench_dialects.py [--rounds 15] [--hidden 512] [--layers 8] [--batch 1] [--prompt 256]
                                        [--weights float32]
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from bench_plan import RESULTS, processor

from archwright.compiler.interpreters.onnx_dialects import ALL, PORTABLE, Dialect
from archwright.compiler.ir import Plan
from archwright.compiler.passes import build_plan, lower
from archwright.compiler.passes.fuse import Fusion
from archwright.compiler.targets.onnx_graph import export_graphs, graph_path
from archwright.compiler.targets.stages import GraphOptions
from archwright.compiler.weights.quantized import built_weights
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend, session_options
from archwright.spec import Spec

FUSIONS: dict[str, tuple[Fusion, ...]] = {
    "none": (), "scale": ("scale",), "qkv": ("qkv",), "gate_up": ("gate_up",), "all": ALL
}  # fmt: skip
RULES: dict[str, list[dict[str, object]]] = {
    "float32": [],
    "int8": [{"kind": "int8"}],
    "int4": [{"kind": "int4", "group_size": 32}],
}
DECODE_STEPS = 48
VOCABULARY = 4096


def make_spec(hidden: int, layers: int, positions: int, weights: str) -> Spec:
    """A small Llama: heads of 64, four query heads to each key/value head. weights: of its layers."""
    attention = {"kind": "gqa", "heads": hidden // 64, "kv_heads": max(1, hidden // 256), "head_dim": 64}
    layer = {"attention": attention, "ffn": {"kind": "swiglu", "hidden_size": 4 * hidden}}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": hidden, "max_positions": positions, "layers": layers}
    build = {"quantize": {"rules": RULES[weights]}} if RULES[weights] else {}
    return Spec.model_validate({"version": 1, "name": "benchmark", "model": {**sizes, "layer": layer}, "build": build})


def forms() -> Iterator[tuple[str, Dialect]]:
    """tensorrt's graphs are for TensorRT alone; their matrices are those of the portable ones."""
    for target in ("portable", "onnxruntime"):
        for name, fusions in FUSIONS.items():
            yield f"{target}, {name}", Dialect(target=target, fusions=fusions)


def open_form(spec: Spec, plan: Plan, dialect: Dialect, folder: Path) -> OnnxRuntimeBackend:
    weights = built_weights(spec, GeneratedWeights(params=lower(spec).params(), seed=0))
    capacity = spec.model.max_positions
    export_graphs(plan, weights, folder, precision="float32", capacity=capacity, options=GraphOptions(dialect=dialect))
    options = session_options()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph_path(folder, 0), options, providers=["CPUExecutionProvider"])
    grouped = dialect.target == "onnxruntime"
    return OnnxRuntimeBackend([session], max_batch=None, description="benchmark", grouped=grouped)


def run(backend: OnnxRuntimeBackend, prompts_BS: np.ndarray[Any, Any], cache: Any) -> tuple[float, float]:
    """Seconds of this thread: of the prefill, and the median of the decode steps behind it."""
    batch, length = prompts_BS.shape
    positions_BS = np.broadcast_to(np.arange(length), prompts_BS.shape)
    start = time.thread_time()
    backend.forward(cache, prompts_BS, positions_BS, np.zeros(batch, np.int64), length)
    prefilled = time.thread_time()
    steps_s: list[float] = []
    for step in range(DECODE_STEPS):
        began = time.thread_time()
        backend.decode(cache, prompts_BS[:, step % length], np.full(batch, length + step))
        steps_s.append(time.thread_time() - began)
    return prefilled - start, statistics.median(steps_s)


def measure(rounds: int, hidden: int, layers: int, batch: int, prompt: int, weights: str) -> dict[str, Any]:
    capacity = prompt + DECODE_STEPS
    spec = make_spec(hidden, layers, capacity, weights)
    plan = build_plan(spec)
    prompts_BS = np.random.default_rng(0).integers(0, VOCABULARY, (batch, prompt))
    with tempfile.TemporaryDirectory() as name:
        opened = {
            title: open_form(spec, plan, dialect, Path(name) / str(number))
            for number, (title, dialect) in enumerate(forms())
        }
        caches = {title: backend.new_cache(batch, capacity) for title, backend in opened.items()}
        times: dict[str, list[tuple[float, float]]] = {title: [] for title in opened}
        for number in range(rounds + 1):
            titles = list(opened)
            shift = number % len(titles)
            for title in titles[shift:] + titles[:shift]:
                times[title].append(run(opened[title], prompts_BS, caches[title]))
    return {title: _summary([pair for pair in found[1:]], times[_BASE][1:]) for title, found in times.items()}


_BASE = f"{PORTABLE.target}, none"


def _summary(found: list[tuple[float, float]], base: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians over the rounds; ratio: the portable form's time in the same round over this one's."""
    summary: dict[str, Any] = {}
    for index, kind in enumerate(("prefill", "decode")):
        ratios = [reference[index] / pair[index] for pair, reference in zip(found, base, strict=True)]
        summary[kind] = {
            "median_ms": round(1e3 * statistics.median(pair[index] for pair in found), 3),
            "median_speed_ratio": round(statistics.median(ratios), 3),
            "speed_ratios": [round(ratio, 3) for ratio in ratios],
        }
    return summary


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rounds", 15), ("hidden", 512), ("layers", 8), ("batch", 1), ("prompt", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--weights", default="float32", choices=RULES)
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = vars(parser.parse_args(argv))
    output: Path = chosen.pop("output")
    record = {
        "date": date.today().isoformat(),
        "command": "bench_dialects.py " + " ".join(f"--{name} {value}" for name, value in chosen.items()),
        "hardware": processor(),
        "platform": platform.platform(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("archwright", "numpy", "onnxruntime")},
        "model": {"parameters": lower(
            make_spec(chosen["hidden"], chosen["layers"], chosen["prompt"], chosen["weights"])
        ).num_params()},
        "decode_steps": DECODE_STEPS,
        "forms": measure(**chosen),
    }  # fmt: skip
    output.mkdir(exist_ok=True)
    stored = "" if chosen["weights"] == "float32" else f"-{chosen['weights']}"
    sizes = f"{chosen['hidden']}x{chosen['layers']}-batch{chosen['batch']}"
    path = output / f"{record['date']}-dialects-{sizes}{stored}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    for title, found in record["forms"].items():
        speeds = ", ".join(
            f"{kind} {each['median_ms']} ms (x{each['median_speed_ratio']})" for kind, each in found.items()
        )
        print(f"{title}: {speeds}")
    print(path)


if __name__ == "__main__":
    main()
