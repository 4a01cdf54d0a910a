"""All that Archwright writes, as operations that a fault can hit, on the smallest inputs that take every path."""

import json
import random
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from threading import Event
from typing import Any

import torch

# All that an operation imports when it needs it is here before the first fork.
import archwright.runtime.build_verb
import archwright.runtime.building
import archwright.trainers.data_verb
import archwright.trainers.training
from archwright.compiler.ir import Degrees
from archwright.compiler.targets import tensorrt_engine
from archwright.compiler.weights.folder import checkpoints, newest_checkpoint
from archwright.runtime.backends.onnxruntime_sessions import load_onnxruntime
from archwright.runtime.text.tokenizer import open_tokenizer
from archwright.spec import ArchwrightError, files, load
from archwright.spec.cli import main as archwright
from archwright.spec.cli import parse_overrides
from archwright.spec.files import sha256_file
from archwright.spec.manifest import MANIFEST, check_manifest, read_manifest, write_manifest
from archwright.trainers.checkpoints import Progress
from archwright.trainers.loop import launch_step, make_trainer, save
from archwright.trainers.metrics import METRICS, read_metrics
from archwright.trainers.run_folder import Inputs, Start, open_inputs, write_model

SPEC = """\
version: 1
name: small
model:
  vocab_size: 320
  hidden_size: 16
  max_positions: 32
  layers: 1
  layer:
    norm: {kind: rmsnorm}
    attention: {kind: gqa, heads: 2, kv_heads: 2, head_dim: 8, mask: {kind: causal}, position: {kind: rope}}
    ffn: {kind: swiglu, hidden_size: 32}
tokenizer: {kind: sentencepiece, algorithm: bpe, vocab_size: 320}
data:
  sources: [{kind: text, path: texts}, {kind: pairs, path: pairs.jsonl}]
  shard_tokens: 1024
  validation_fraction: 0.2
train:
  kind: pretrain
  steps: 4
  batch_size: 2
  sequence_length: 16
  precision: float32
  log_every: 1
  evaluate: {every: 2, batches: 1}
  checkpoint: {every: 2, keep: 1}
build: {target: portable, precision: float32, parallel: {tensor: 2}, max_positions: 16, max_batch: 2}
"""
CARELESS = "careless"
ENGINE = "artifact with engine"
Contents = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Something that writes. All functions take a folder that is the operation's alone.

    before: makes what is there at first. run: the operation, returns an exit status. again: what a user does after a
    fault, in the end with the same result. contents: a digest of the result, empty where there is none yet. problems:
    what is half true. says: text that `again` must print, given the state after the fault. refuses: text with which
    `again` refuses a result that is there. stages: whether states between the old and the new are whole, too. journal:
    name of a file that is on the disk before a folder that relies on it.
    """

    name: str
    before: Callable[[Path], object]
    run: Callable[[Path], int]
    again: Callable[[Path], int]
    contents: Callable[[Path], Contents]
    problems: Callable[[Path], list[str]]
    says: Callable[[Path], str] = lambda root: ""
    refuses: str = ""
    stages: bool = False
    journal: str = ""


def write_inputs(folder: Path) -> None:
    """A spec with its sources, a tokenizer, data, a model and a straight training, in `folder`."""
    (folder / "texts").mkdir(parents=True)
    chooser = random.Random(0)
    words = ["the", "stop", "text", "model", "token", "naïve", "über", "日本", "of", "writes", "reads", "\n"]
    for number in range(12):
        (folder / "texts" / f"{number}.txt").write_text(" ".join(chooser.choices(words, k=120)), encoding="utf-8")
    pairs = [{"prompt": f"Count to {n}.", "response": " ".join(map(str, range(1, n + 1)))} for n in range(1, 21)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    spec = folder / "small.yaml"
    spec.write_text(SPEC)
    _run_quietly(["tokenizer", "train", str(spec), "-o", str(folder / "tokenizer")])
    _run_quietly(["data", "build", str(spec), "-o", str(folder / "data"), _set("tokenizer.path", folder / "tokenizer")])
    _run_quietly(["train", str(spec), "-o", str(folder / "straight"), *_paths(folder), "--set=train.checkpoint.keep=2"])


def warm_up(folder: Path) -> Path:
    """Make this a process to fork: one thread, and everything imported. Returns the folder of the inputs."""
    load_onnxruntime()
    torch.set_num_threads(1)
    inputs = folder / "inputs"
    if not inputs.exists():
        write_inputs(inputs)
    return inputs


def operations(inputs: Path) -> list[Operation]:
    """Those that faults hit at every point; `inputs` is the folder of `write_inputs`."""
    spec, model = str(inputs / "small.yaml"), str(inputs / "straight" / "model")
    runs = _Runs(inputs)
    return [
        _folder("tokenizer", ["tokenizer", "train", spec]),
        _folder("data shards", ["data", "build", spec, *_paths(inputs)]),
        _folder("artifact", ["build", model, "--to", "onnx"]),
        _engine(model, inputs / "engine"),
        _checkpoint("checkpoint", runs, step=2),
        _checkpoint("checkpoint, written again", runs, step=4),
        _checkpoint("checkpoint, two renames", runs, step=4, exchange=False),
        _model("model folder", runs, runs.write_checkpoints_only),
        _model("model folder, more steps", runs, runs.write_with_older_model),
        _careless(),
        _training("training", inputs, lambda root: None),
        _training("training, resumed", inputs, runs.write_killed),
    ]


def longer_operations(inputs: Path) -> list[Operation]:
    """Those that are killed at random moments."""
    chosen = {operation.name: operation for operation in operations(inputs)}
    more = ["train.steps=60", "train.checkpoint.every=4", "train.log_every=10"]
    training = _training("training of 60 steps", inputs, lambda root: None, *(f"--set={change}" for change in more))
    return [chosen["tokenizer"], chosen["data shards"], chosen["artifact"], training]


def _is_tensorrts(name: str) -> bool:
    """Engines and their logs, which TensorRT gives differently in each build."""
    return re.search(r"rank\d+/stage\d+\.(engine|log)$", name) is not None


def contents_of(folder: Path) -> Contents:
    """SHA-256 by name, without what another run gives differently: measurements, engines and their logs."""
    if not folder.is_dir():
        return {}
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    contents: Contents = {}
    for name, path in found.items():
        if path.name == MANIFEST:
            manifest = read_manifest(path.parent)
            hashes = {file: entry.sha256 for file, entry in manifest.files.items() if not _is_tensorrts(file)}
            contents[name] = json.dumps([manifest.kind, manifest.spec_digest, hashes, manifest.details], sort_keys=True)
        else:
            contents[name] = "an engine" if _is_tensorrts(name) else sha256_file(path)
    return contents


def check_folder(folder: Path) -> list[str]:
    """What a folder that exists says that is not so."""
    try:
        return check_manifest(folder) if folder.exists() else []
    except ArchwrightError as error:
        return [str(error)]


def _set(path: str, value: object) -> str:
    return f"--set={path}={value}"


def _paths(inputs: Path) -> list[str]:
    return [_set("tokenizer.path", inputs / "tokenizer"), _set("data.path", inputs / "data")]


def _run_quietly(command: list[str]) -> None:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        assert archwright(command) == 0


def _folder(name: str, command: list[str]) -> Operation:
    """A verb that writes a folder where none may be."""

    def run(root: Path) -> int:
        return archwright([*command, "-o", str(root / "out")])

    return Operation(
        name=name,
        before=lambda root: None,
        run=run,
        again=run,
        contents=lambda root: contents_of(root / "out"),
        problems=lambda root: check_folder(root / "out"),
        refuses="SPEC090",
    )


def _engine(model: str, kept: Path) -> Operation:
    """A build with an engine that TensorRT computes once, in the run without a fault, into the file `kept`.

    The runs with faults parse the graph, check the network and write these same bytes: no fault falls into TensorRT's
    computing, which takes longer than all else.
    """
    plain = _folder(ENGINE, ["build", model, "--to", "engine", _set("build.parallel.tensor", 1)])

    def run(root: Path) -> int:
        original = tensorrt_engine.interruptible

        def compute_once(call: Callable[[], Any], stop: Event) -> bytes:
            if not kept.exists():
                kept.write_bytes(original(call, stop))
            return kept.read_bytes()

        tensorrt_engine.interruptible = compute_once
        try:
            return plain.run(root)
        finally:
            tensorrt_engine.interruptible = original

    return replace(plain, run=run, again=run)


def _careless() -> Operation:
    """A writer as it must not be, which the sweep has to find out."""

    def run(root: Path) -> int:
        out = root / "out"
        out.mkdir()
        for name in ("first", "second"):
            (out / name).write_text("whole")
        write_manifest(out, kind="data", spec=None, details={})
        return 0

    return Operation(
        name=CARELESS,
        before=lambda root: None,
        run=run,
        again=run,
        contents=lambda root: contents_of(root / "out"),
        problems=lambda root: check_folder(root / "out"),
    )


class _Runs:
    """A trained module to write, and run folders to begin with."""

    def __init__(self, inputs: Path) -> None:
        self._straight = inputs / "straight"
        self.spec = load(inputs / "small.yaml", {"tokenizer.path": str(inputs / "tokenizer")})
        self.inputs: Inputs = open_inputs(load(self._straight / "spec.yaml", {}))
        progress = Progress(step=0, tokens=0, data_digest=self.inputs.data_digest)
        start = Start(checkpoint=None, progress=progress)
        self._trainer = make_trainer(self.spec, self.inputs, start, Degrees(), torch.device("cpu"))
        launch_step(self._trainer, 0)

    def save(self, root: Path) -> int:
        """What a training writes after step 4."""
        progress = Progress(step=4, tokens=0, data_digest=self.inputs.data_digest)
        save(self._trainer, root / "run", progress, main=True)
        return 0

    def write_with_checkpoints(self, root: Path, *steps: int) -> None:
        """A run with a model and these checkpoints."""
        shutil.copytree(self._straight, root / "run")
        for step, folder in checkpoints(root / "run").items():
            if step not in steps:
                shutil.rmtree(folder)

    def write_checkpoints_only(self, root: Path) -> None:
        """A run whose model is to be written."""
        self.write_with_checkpoints(root, 4)
        shutil.rmtree(root / "run" / "model")

    def write_with_older_model(self, root: Path) -> None:
        """A run that went on: its model is that of step 2, its checkpoint that of step 4."""
        self.write_with_checkpoints(root, 2)
        shutil.rmtree(root / "run" / "model")
        self.write_model(root)
        shutil.rmtree(root / "run" / "checkpoints")
        shutil.copytree(self._straight / "checkpoints", root / "run" / "checkpoints")

    def write_model(self, root: Path) -> int:
        step, checkpoint = newest_checkpoint(root / "run")
        write_model(root / "run", self.spec, self.inputs, checkpoint, step)
        return 0

    def write_killed(self, root: Path) -> None:
        """A training that was killed in step 4."""
        self.write_with_checkpoints(root, 2)
        shutil.rmtree(root / "run" / "model")


def _newest(root: Path) -> Path:
    """Of the run's checkpoints; else one that waits to be brought back, or a path that is not there."""
    run = root / "run"
    return [run / "no checkpoint", *run.glob("checkpoints/.step-*.old"), *checkpoints(run).values()][-1]


def _checkpoint(name: str, runs: _Runs, step: int, exchange: bool = True) -> Operation:
    """The checkpoint of step 4, in a run with that of `step`, of other weights."""

    def run(root: Path) -> int:
        original = files._exchange
        if not exchange:
            files._exchange = lambda first, second: False
        try:
            return runs.save(root)
        finally:
            files._exchange = original

    return Operation(
        name=name,
        before=lambda root: runs.write_with_checkpoints(root, step),
        run=run,
        again=run,
        contents=lambda root: contents_of(_newest(root)),
        problems=lambda root: check_folder(_newest(root)),
    )


def _model(name: str, runs: _Runs, before: Callable[[Path], object]) -> Operation:
    """The model folder of a run after its last step."""
    return Operation(
        name=name,
        before=before,
        run=runs.write_model,
        again=runs.write_model,
        contents=lambda root: contents_of(root / "run" / "model"),
        problems=lambda root: check_folder(root / "run" / "model"),
    )


def _training(name: str, inputs: Path, before: Callable[[Path], object], *changes: str) -> Operation:
    """`train --resume`, from wherever it is to the model folder; training is whole at each of its checkpoints."""
    spec = str(inputs / "small.yaml")
    steps = load(spec, parse_overrides([change.removeprefix("--set=") for change in changes])).train.steps

    def run(root: Path) -> int:
        return archwright(["train", spec, "-o", str(root / "run"), "--resume", *_paths(inputs), *changes])

    def contents(root: Path) -> Contents:
        records = [{**record, "tokens_per_s": 0} for record in read_metrics(root / "run")]
        parts = {"metrics": json.dumps(records)}
        for folder in (_newest(root), root / "run" / "model"):
            parts |= {f"{folder.name}/{file}": digest for file, digest in contents_of(folder).items()}
        return parts

    def says(root: Path) -> str:
        found = checkpoints(root / "run")
        if steps in found:
            return f"complete, {steps} steps"
        return f"going on after step {max(found)}" if found else ""

    return Operation(
        name=name,
        before=before,
        run=run,
        again=run,
        contents=contents,
        problems=lambda root: _problems_of_run(root / "run"),
        says=says,
        stages=True,
        journal=METRICS,
    )


def _problems_of_run(run: Path) -> list[str]:
    """A run opens, each of its checkpoints and its model is whole, and the metrics reach the newest checkpoint."""
    if not run.exists():
        return []
    found = checkpoints(run)
    problems = [line for folder in (*found.values(), run / "model") for line in check_folder(folder)]
    steps = [record["step"] for record in read_metrics(run)]
    if steps != list(range(1, len(steps) + 1)) or len(steps) < max(found, default=0):
        problems.append(f"checkpoints {list(found)}, but metrics of steps {steps}")
    try:
        load(run / "spec.yaml")
        open_tokenizer(run)
    except ArchwrightError as error:
        problems.append(str(error))
    return problems
