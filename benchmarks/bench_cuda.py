"""Exported graphs through ONNX Runtime's CUDA provider, beside PyTorch on the same GPU and the same weights.

For each shape, target and precision: the logits of a prefill at uneven lengths with decode steps behind it, against
PyTorch in float32 on the same rounded weights, as are PyTorch's own in that precision; then the times of a prefill and
of decode steps. Both give the logits of last tokens alone. Back ends alternate, and each ratio is the median over the
passes. Caches are bound in place. Weights are drawn, and stored once for all targets of a precision.

    python benchmarks/bench_cuda.py [--shapes 1b,8b] [--only 'onnxruntime bfloat16'] [--passes 5] [--output FOLDER]

Needs a GPU and onnxruntime-gpu. `--shapes tiny --device cpu` runs the same on a CPU.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from bench_build import RESULTS
from measuring import environment
from numpy.typing import NDArray

from archwright.compiler.interpreters.onnx_dialects import Dialect
from archwright.compiler.interpreters.torch_module import TorchProgram
from archwright.compiler.ir import Plan
from archwright.compiler.module import DTYPES, as_torch, build_module
from archwright.compiler.passes import build_plan
from archwright.compiler.targets.onnx_graph import export_graphs, graph_path
from archwright.compiler.targets.stages import GraphOptions
from archwright.compiler.tolerances import TOLERANCES, largest_error
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.runtime.backends.base import AnyBackend
from archwright.runtime.backends.onnxruntime_backend import open_graphs
from archwright.runtime.backends.onnxruntime_sessions import CPU, Place
from archwright.runtime.backends.torch_backend import TorchBackend
from archwright.spec import ArchwrightError, load

Array = NDArray[Any]

PRESETS = {"1b": "preset:llama3.2-1b", "8b": "preset:llama3.1-8b", "tiny": "preset:tiny"}
CAPACITY = 2048
COMPARED, STEPS = (96, 61), 32
"""Tokens of the prompts whose logits are compared, and of the steps behind them."""
PROMPT, TIMED_STEPS = 512, 64


@dataclass(frozen=True, kw_only=True)
class Form:
    target: str
    precision: str
    tensor: int = 1

    def __str__(self) -> str:
        return f"{self.target} {self.precision}" + (f", {self.tensor} ranks joined" if self.tensor > 1 else "")


FORMS: Mapping[str, tuple[Form, ...]] = {
    "tiny": (Form(target="portable", precision="float32"), Form(target="onnxruntime", precision="float32")),
    "1b": (
        Form(target="portable", precision="bfloat16"),
        Form(target="onnxruntime", precision="bfloat16"),
        Form(target="tensorrt", precision="bfloat16"),
        Form(target="portable", precision="bfloat16", tensor=2),
        Form(target="portable", precision="float16"),
        Form(target="onnxruntime", precision="float16"),
        Form(target="portable", precision="float32"),
        Form(target="onnxruntime", precision="float32"),
    ),
    "8b": (Form(target="portable", precision="bfloat16"), Form(target="onnxruntime", precision="bfloat16")),
}


@dataclass(frozen=True)
class HeldWeights:
    """Drawn by all cores, then kept."""

    arrays: Mapping[str, Array]

    @classmethod
    def drawn(cls, plan: Plan, precision: str) -> "HeldWeights":
        source = GeneratedWeights(params=plan.program.params(), seed=0, precision=precision)
        names = list(source.names())
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return cls(dict(zip(names, pool.map(source.read, names), strict=True)))

    def names(self) -> Iterable[str]:
        return self.arrays

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Array:
        return self.arrays[name] if slices is None else self.arrays[name][slices]


def open_torch(plan: Plan, weights: HeldWeights, precision: str, device: str) -> TorchBackend:
    module: TorchProgram = build_module(plan.program, dtype=DTYPES[precision], device=torch.device(device))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(as_torch(weights.read(name)))
    return TorchBackend(module, f"PyTorch {torch.__version__}, {precision}")


def compared_logits(backend: AnyBackend, vocabulary: int) -> Array:
    """[steps + 1, B, V]"""
    generator = np.random.default_rng(0)
    lengths_B = np.array(COMPARED)
    ids_BT = generator.integers(0, vocabulary, (len(COMPARED), max(COMPARED) + STEPS))
    cache = backend.new_cache(len(COMPARED), ids_BT.shape[1])
    found = [backend.prefill(cache, ids_BT[:, : max(COMPARED)], lengths_B)]
    for step in range(STEPS):
        at_B = lengths_B + step
        found.append(backend.decode(cache, ids_BT[np.arange(len(COMPARED)), at_B], at_B))
    return np.stack(found)


def seconds(backend: AnyBackend, cache: Any, batch: int, vocabulary: int) -> tuple[float, float]:
    """Of a prefill of PROMPT tokens a row, and of a decode step: the median of TIMED_STEPS."""
    ids_BS = np.random.default_rng(1).integers(0, vocabulary, (batch, PROMPT))
    lengths_B = np.full(batch, PROMPT)
    start = time.perf_counter()
    logits_BV = backend.prefill(cache, ids_BS, lengths_B)
    prefill_s = time.perf_counter() - start
    steps_s: list[float] = []
    for step in range(TIMED_STEPS):
        ids_B = logits_BV.argmax(-1)
        start = time.perf_counter()
        logits_BV = backend.decode(cache, ids_B, lengths_B + step)
        steps_s.append(time.perf_counter() - start)
    return prefill_s, statistics.median(steps_s)


def timed(ours: AnyBackend, theirs: AnyBackend, vocabulary: int, passes: int) -> Iterator[tuple[str, Any]]:
    """Both alternately, after one pass that is not counted."""
    for batch in (1, 8):
        caches = [backend.new_cache(batch, CAPACITY) for backend in (ours, theirs)]
        raw: list[list[tuple[float, float]]] = []
        for _ in range(passes + 1):
            raw.append([seconds(b, cache, batch, vocabulary) for b, cache in zip((ours, theirs), caches, strict=True)])
        for index, name in enumerate(("prefill", "decode")):
            tokens = batch * (PROMPT if name == "prefill" else 1)
            own, other = ([row[side][index] for row in raw[1:]] for side in (0, 1))
            yield (
                f"{name}, batch {batch}",
                {
                    "ours_tokens_per_s": tokens / statistics.median(own),
                    "torch_tokens_per_s": tokens / statistics.median(other),
                    "ratio": statistics.median(b / a for a, b in zip(own, other, strict=True)),
                    "ours_s": own,
                    "torch_s": other,
                },
            )


def export(form: Form, shape: str, weights: HeldWeights, folder: Path, stored: Path | None) -> Path:
    """Write a form's graphs; where another of the same weights and degree is there, its data file serves both."""
    plan = plan_of(shape, form.tensor)
    options = GraphOptions(logits="last", dialect=Dialect(target=form.target))
    kept = weights if stored is None else None
    export_graphs(plan, kept, folder, precision=form.precision, capacity=CAPACITY, options=options)
    if stored is not None:
        for rank in range(form.tensor):
            os.link(graph_path(stored, rank).with_suffix(".data"), graph_path(folder, rank).with_suffix(".data"))
    return folder


def plan_of(shape: str, tensor: int) -> Plan:
    return build_plan(load(PRESETS[shape], {"build.parallel.tensor": tensor, "model.max_positions": CAPACITY}))


def measure(shape: str, chosen: list[Form], folder: Path, device: str, passes: int) -> Iterator[dict[str, Any]]:
    """One record a form, those of one precision on the same weights."""
    place = CPU if device == "cpu" else Place(gpu=0)
    for precision in dict.fromkeys(form.precision for form in chosen):
        plan = plan_of(shape, 1)
        vocabulary = plan.program.vocab_size
        weights = HeldWeights.drawn(plan, precision)
        exact = open_torch(plan, weights, "float32", device)
        expected = compared_logits(exact, vocabulary)
        theirs = exact if precision == "float32" else open_torch(plan, weights, precision, device)
        del exact
        torch.cuda.empty_cache()  # ONNX Runtime takes its memory elsewhere
        torch_error = largest_error(compared_logits(theirs, vocabulary), expected)
        stored: dict[int, Path] = {}
        for form in (form for form in chosen if form.precision == precision):
            record: dict[str, Any] = {"shape": shape, "form": str(form), "torch_error": torch_error}
            start = time.perf_counter()
            path = export(form, shape, weights, folder / f"{shape} {form}", stored.get(form.tensor))
            stored.setdefault(form.tensor, path)
            record["export_s"] = time.perf_counter() - start
            start = time.perf_counter()
            try:
                ours = open_graphs(path, ranks=form.tensor, precision=precision, target=form.target, place=place)
            except ArchwrightError as error:
                yield record | {"refused": f"{error.code} {error.message}"}
                continue
            record |= {"open_s": time.perf_counter() - start, "ran": ours.description}
            found = compared_logits(ours, vocabulary)
            record |= {
                "error": largest_error(found, expected),
                "allowed": TOLERANCES["onnxruntime", precision],
                "greedy_equal": float((found.argmax(-1) == expected.argmax(-1)).mean()),
            }
            record |= dict(timed(ours, theirs, vocabulary, passes))
            del ours
            yield record


def line(record: dict[str, Any]) -> str:
    if "refused" in record:
        return f"{record['shape']:<5}{record['form']:<38}{record['refused']}"
    times = [record[f"{kind}, batch {batch}"] for kind in ("prefill", "decode") for batch in (1, 8)]
    ratios = "  ".join(f"{each['ours_tokens_per_s']:9,.0f} {each['ratio']:5.2f}x" for each in times)
    return (
        f"{record['shape']:<5}{record['form']:<38}{record['error']:8.1e} {record['torch_error']:8.1e} "
        f"{record['greedy_equal']:6.1%}  {ratios}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--shapes", default="1b,8b")
    parser.add_argument("--only", help="the form of this name")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, help="where the graphs are written; default: a temporary folder")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    records: list[dict[str, Any]] = []
    header = f"{'':<43}{'error':>8} {'torch':>8} {'greedy':>6}  tokens/s and ratio to torch: prefill 1, 8; decode 1, 8"
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for shape in arguments.shapes.split(","):
            chosen = [form for form in FORMS[shape] if arguments.only in (None, str(form))]
            for record in measure(shape, chosen, Path(name), arguments.device, arguments.passes):
                records.append(record)
                print(line(record), flush=True)
    print("", header, *map(line, records), sep="\n")
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / f"{date.today()}-cuda-{'-'.join(arguments.shapes.split(','))}.json"
    machine = environment(torch.device(arguments.device)) | {"onnxruntime": onnxruntime.__version__}
    file.write_text(
        json.dumps({"machine": machine, "command": "benchmarks/bench_cuda.py", "records": records}, indent=1)
    )


if __name__ == "__main__":
    main()
