"""Our ONNX export beside the model builder of onnxruntime-genai: the same small Llama, the same ONNX Runtime.

Compared are the seconds and the peak memory of making the graph, its size, and the tokens that ONNX Runtime decodes a
second through it: one row, greedy, caches of as many rows bound in place, on all cores. Each pass decodes with every
contestant, in an order of its own; the ratio is the median over the passes of (ours / theirs), and beside it that of
the fastest passes, which other work on the machine disturbs least. Ours is there twice: as `build.fuse: auto` has it,
and with no matrices joined. Archwright's build verifies what it wrote, which the other does not: both its whole time
and its export alone are given.

    python -m pip install onnxruntime-genai      # beside Archwright; --genai names another folder it is installed in
    python benchmarks/bench_exporters.py [--genai FOLDER] [--passes 5] [--target onnxruntime] [--precision int4]

The two must also agree: the logits of the prompt are compared. With int4 they round weights in other ways, so only
float32 says something. Products of int4 are asked for in float32, as Archwright has them: by default the other rounds
activations to 8 bits, which takes about a third of the time for a single row and is not the same model.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from bench_build import ARCHWRIGHT, RESULTS, hardware, measured
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from archwright.compiler.passes import lower
from archwright.compiler.weights.folder import weight_tensors, write_model_folder
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.spec import load

Array = NDArray[Any]

SHAPE: dict[str, object] = {
    "model.vocab_size": 8192,
    "model.hidden_size": 768,
    "model.layers": 12,
    "model.max_positions": 2048,
    "model.layer.attention.heads": 12,
    "model.layer.attention.kv_heads": 4,
    "model.layer.ffn.hidden_size": 2048,
    "model.tied_embeddings": False,
    "tokenizer.vocab_size": 8192,
}
PROMPT, TOKENS = 64, 128
INT4 = "{kind: int4, group_size: 32, match: '%s'}"
SETTINGS: dict[str, list[str]] = {
    "float32": [],
    "int4": ["--set", f"build.quantize={{rules: [{INT4 % '*_proj'}, {INT4 % 'lm_head'}]}}"],
}
"""Of ours, by the precision that the other is asked for."""


THEIRS = "onnxruntime-genai"
OURS = {"archwright": "auto", "archwright, unfused": "none"}
"""Contestant → its `build.fuse`."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A graph that is open. prefill: ids [1, S] → logits [S, V]; step: (id, position) → logits [V]."""

    name: str
    prefill: Callable[[Array], Array]
    step: Callable[[int, int], Array]


def size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def build_ours(model: Path, out: Path, target: str, precision: str, fuse: str) -> dict[str, Any]:
    command = [
        str(ARCHWRIGHT),
        "build",
        str(model),
        "--to",
        "onnx",
        "-o",
        str(out),
        *("--set", f"build.target={target}", "--set", f"build.fuse={fuse}"),
        *("--set", f"build.max_positions={PROMPT + TOKENS}"),
    ]
    seconds, cpu_s, peak_bytes = measured([*command, *SETTINGS[precision]])
    export_s = json.loads((out / "manifest.json").read_text())["measured"]["export_s"]
    return {
        "seconds": seconds, "export_s": export_s, "processor_s": cpu_s, "peak_anonymous_bytes": peak_bytes,
        "bytes": size_bytes(out),
    }  # fmt: skip


def build_theirs(model: Path, out: Path, precision: str, genai: Path | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out)]
    command += ["-p", {"float32": "fp32"}.get(precision, precision), "-e", "cpu", "-c", str(out / "cache")]
    if precision == "int4":
        command += ["--extra_options", "accuracy_level=1"]
    if genai is not None:
        os.environ["PYTHONPATH"] = str(genai)
    seconds, cpu_s, peak_bytes = measured(command)
    os.environ.pop("PYTHONPATH", None)
    return {"seconds": seconds, "processor_s": cpu_s, "peak_anonymous_bytes": peak_bytes, "bytes": size_bytes(out)}


def open_ours(name: str, out: Path) -> Contestant:
    from archwright.runtime import open_model

    backend = open_model(out, backend="onnxruntime").backend
    cache = backend.new_cache(1, PROMPT + TOKENS)

    def prefill(ids_1S: Array) -> Array:
        positions_1S = np.arange(ids_1S.shape[1])[None]
        return backend.forward(cache, ids_1S, positions_1S, np.zeros(1, np.int64), ids_1S.shape[1])[0]

    def step(token: int, position: int) -> Array:
        return backend.decode(cache, np.array([token]), np.array([position]))[0]

    return Contestant(name=name, prefill=prefill, step=step)


def open_theirs(out: Path) -> Contestant:
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    decoder = json.loads((out / "genai_config.json").read_text())["model"]["decoder"]
    shape = (1, decoder["num_key_value_heads"], PROMPT + TOKENS, decoder["head_size"])
    binding, caches = session.io_binding(), {}
    for item in session.get_inputs():
        if item.name.startswith("past_key_values"):
            caches[item.name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            binding.bind_ortvalue_input(item.name, caches[item.name])
    named = {item.name for item in session.get_inputs()}

    def run(ids_1S: Array, start: int) -> Array:
        feeds = {
            "input_ids": ids_1S,
            "attention_mask": np.ones((1, start + ids_1S.shape[1]), np.int64),
            "position_ids": np.arange(start, start + ids_1S.shape[1])[None],
        }
        for name in named & feeds.keys():
            binding.bind_cpu_input(name, np.ascontiguousarray(feeds[name], np.int64))
        binding.clear_binding_outputs()
        binding.bind_output("logits")
        for name, value in caches.items():
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()[0]

    def step(token: int, position: int) -> Array:
        return run(np.array([[token]]), position)[-1]

    return Contestant(name=THEIRS, prefill=lambda ids_1S: run(ids_1S, 0), step=step)


def timed(contestant: Contestant, ids_1S: Array) -> tuple[float, float, Array]:
    """(prefill tokens/s, decoded tokens/s, logits of the prompt)."""
    started = time.perf_counter()
    logits_SV = contestant.prefill(ids_1S)
    prefilled = time.perf_counter()
    token = int(logits_SV[-1].argmax())
    for position in range(PROMPT, PROMPT + TOKENS):
        token = int(contestant.step(token, position).argmax())
    return PROMPT / (prefilled - started), TOKENS / (time.perf_counter() - prefilled), logits_SV


def write_model(folder: Path) -> Path:
    """A model folder of initial weights, which `transformers` loads as a Llama."""
    spec = load("preset:tiny", SHAPE)
    program = lower(spec)
    weights = GeneratedWeights(params=program.params(), seed=0)
    write_model_folder(folder, spec, weight_tensors(program, weights, "float32"), [], details={})
    return folder


def with_tokenizer(model: Path, folder: Path) -> Path:
    """The model's files and a tokenizer of one word, without which the other builder does not begin."""
    folder.mkdir()
    for file in (*model.glob("*.safetensors"), model / "config.json"):
        (folder / file.name).symlink_to(file)
    Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--genai", type=Path, help="folder that holds onnxruntime_genai, where it is not installed")
    arguments.add_argument("--passes", type=int, default=5)
    arguments.add_argument("--target", default="onnxruntime")
    arguments.add_argument("--precision", default="float32", choices=sorted(SETTINGS))
    chosen = arguments.parse_args()
    machine, order = hardware(), random.Random(0)
    ids_1S = np.random.default_rng(0).integers(0, 8192, (1, PROMPT))
    with tempfile.TemporaryDirectory(prefix="archwright-exporters-") as place:
        folder = Path(place)
        model = write_model(folder / "model")
        theirs = folder / "theirs"
        made = {THEIRS: build_theirs(with_tokenizer(model, folder / "other"), theirs, chosen.precision, chosen.genai)}
        contestants = [open_theirs(theirs)]
        for name, fuse in OURS.items():
            made[name] = build_ours(model, folder / fuse, chosen.target, chosen.precision, fuse)
            contestants.append(open_ours(name, folder / fuse))
        passes: list[dict[str, Any]] = []
        for number in range(chosen.passes + 1):
            order.shuffle(contestants)
            found = {each.name: timed(each, ids_1S) for each in contestants}
            if number == 0:  # the first one opens files and finds its threads
                mine, other = (found[name][2] for name in ("archwright", THEIRS))
                error = float(np.abs(mine - other).max() / np.abs(other).max())
                continue
            passes.append({name: {"prefill": pre, "decode": dec} for name, (pre, dec, _) in found.items()})
    record = {
        "date": date.today().isoformat(),
        "command": "bench_exporters.py "
        + " ".join(f"--{name} {getattr(chosen, name)}" for name in ("target", "precision", "passes")),
        "hardware": machine,
        "versions": {each: metadata.version(each) for each in ("archwright", "onnxruntime", "onnx-ir", "transformers")}
        | {"onnxruntime-genai": genai_version(chosen.genai)},
        "model": SHAPE, "prompt_tokens": PROMPT, "decoded_tokens": TOKENS,
        "made": made, "tokens_per_s": passes, "ratio_of_tokens_per_s": {name: ratios(passes, name) for name in OURS},
        "difference_of_logits": error,
    }  # fmt: skip
    path = RESULTS / f"{record['date']}-exporters-{chosen.target}-{chosen.precision}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({key: record[key] for key in ("made", "ratio_of_tokens_per_s", "difference_of_logits")}, indent=2))


def ratios(passes: list[dict[str, Any]], name: str) -> dict[str, dict[str, float]]:
    """A contestant's tokens/s over the other builder's, for prefill and decode."""
    found: dict[str, dict[str, float]] = {}
    for kind in ("prefill", "decode"):
        mine, other = ([each[contestant][kind] for each in passes] for contestant in (name, THEIRS))
        median = statistics.median(a / b for a, b in zip(mine, other, strict=True))
        found[kind] = {"median": median, "fastest": max(mine) / max(other)}
    return found


def genai_version(folder: Path | None) -> str:
    found = metadata.distributions(name="onnxruntime-genai", **({} if folder is None else {"path": [str(folder)]}))
    return next(iter(found)).version


if __name__ == "__main__":
    main()
