"""The run folder: made once, and checked before a training goes on in it."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archwright.compiler.passes import lower
from archwright.compiler.weights.folder import checkpoints, weight_tensors, write_model_folder
from archwright.compiler.weights.streaming import SafetensorsWeights
from archwright.runtime.text.tokenizer import Tokenizer, open_tokenizer
from archwright.spec import ArchwrightError, Spec, dump, load
from archwright.spec.files import atomic_folder, atomic_write, recover, sha256_file
from archwright.spec.manifest import MANIFEST, read_manifest
from archwright.spec.models import Pretrain, Sft
from archwright.trainers.checkpoints import Progress, read_progress
from archwright.trainers.dataset import Dataset, open_data

FREE = frozenset({"steps", "micro_batches", "log_every", "evaluate", "checkpoint", "compile"})
"""Fields of `train` that may change between a run and its continuation; steps may only grow."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a spec names on disk, opened and found to belong together."""

    train: Pretrain | Sft
    data: Dataset
    tokenizer: Tokenizer

    @property
    def data_digest(self) -> str:
        return sha256_file(self.data.folder / MANIFEST)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where training begins: None and step 0 at the beginning, else the newest checkpoint."""

    checkpoint: Path | None
    progress: Progress


def open_inputs(spec: Spec) -> Inputs:
    """Raises ArchwrightError TRAIN001 to TRAIN003 for what the spec does not name, TRAIN008 for too many tokens."""
    if spec.train is None:
        raise _missing("TRAIN001", "train", "train: {kind: pretrain, steps: 1000}")
    if spec.data is None or spec.data.path is None:
        raise _missing("TRAIN002", "data.path", "`archwright data build SPEC -o DIR`, then --set data.path=DIR")
    if spec.tokenizer is None or spec.tokenizer.path is None:
        raise _missing(
            "TRAIN003", "tokenizer.path", "`archwright tokenizer train SPEC -o DIR`, then --set tokenizer.path=DIR"
        )
    tokenizer = open_tokenizer(spec.tokenizer.path)
    data = open_data(spec.data.path, tokenizer_digest=tokenizer.digest)
    if data.vocab_size > spec.model.vocab_size:
        raise ArchwrightError(
            "TRAIN008",
            f"the tokenizer has {data.vocab_size} tokens, the model {spec.model.vocab_size}",
            where="model.vocab_size",
            help=f"use vocab_size: {data.vocab_size} or more, or train a smaller tokenizer",
        )
    return Inputs(train=spec.train, data=data, tokenizer=tokenizer)


def _missing(code: str, field: str, example: str) -> ArchwrightError:
    return ArchwrightError(code, f"the spec has no `{field}`, and `train` needs it", help=example)


def prepare_run(run: Path, spec: Spec, inputs: Inputs, *, resume: bool) -> Start:
    """Make the run folder, or check that this spec continues the one that is there.

    Raises ArchwrightError TRAIN004 (it exists and `resume` is not asked for), TRAIN005 (another spec), TRAIN006 (not a
    run), TRAIN011 (other data).
    """
    beginning = Start(checkpoint=None, progress=Progress(step=0, tokens=0, data_digest=inputs.data_digest))
    if not run.exists():
        _create(run, spec, inputs.tokenizer)
        return beginning
    if not resume:
        raise ArchwrightError(
            "TRAIN004",
            "the run folder exists already",
            where=str(run),
            help="add --resume to go on in it, or name another",
        )
    if not (run / "spec.yaml").is_file():
        raise ArchwrightError(
            "TRAIN006", "not a run: it holds no spec.yaml", where=str(run), help="name another folder"
        )
    found = checkpoints(run)
    start = beginning
    if found:
        newest = found[max(found)]
        start = Start(checkpoint=newest, progress=read_progress(newest))
    _check_same(run, spec, inputs, start)
    atomic_write(run / "spec.yaml", dump(_own_tokenizer(spec)))
    return start


def _create(run: Path, spec: Spec, tokenizer: Tokenizer) -> None:
    with atomic_folder(run) as folder:
        (folder / "spec.yaml").write_text(dump(_own_tokenizer(spec)))
        first, *rest = tokenizer.files()
        shutil.copyfile(first, folder / f"tokenizer{first.suffix}")
        for file in rest:
            shutil.copyfile(file, folder / file.name)


def _own_tokenizer(spec: Spec) -> Spec:
    """The spec of a folder that holds its tokenizer."""
    assert spec.tokenizer is not None
    return spec.model_copy(update={"tokenizer": spec.tokenizer.model_copy(update={"path": "."})})


def _check_same(run: Path, spec: Spec, inputs: Inputs, start: Start) -> None:
    old = load(run / "spec.yaml")
    if start.progress.data_digest != inputs.data_digest:
        raise ArchwrightError(
            "TRAIN011",
            "the data are not those that the run was trained on so far",
            where=str(inputs.data.folder),
            help="set data.path to the data of the run, or start a new run with train.base",
        )
    for section, free in (("model", frozenset[str]()), ("train", FREE)):
        before, now = _fields(old, section, free), _fields(spec, section, free)
        for path in before.keys() | now.keys():
            if before.get(path) != now.get(path):
                raise _different(run, path, before.get(path), now.get(path))
    old_steps = old.train.steps if old.train else 0
    if inputs.train.steps < max(start.progress.step, old_steps):
        raise _different(run, "train.steps", old_steps, inputs.train.steps)
    if open_tokenizer(run).digest != inputs.tokenizer.digest:
        raise _different(run, "tokenizer.path", "its own tokenizer", "another one")


def _fields(spec: Spec, section: str, free: frozenset[str]) -> dict[str, Any]:
    """Dotted path → value of every leaf."""
    leaves: dict[str, Any] = {}

    def visit(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, sub in value.items():
                visit(f"{path}.{name}", sub)
        else:
            leaves[path] = value

    dumped = getattr(spec, section).model_dump(mode="json")
    visit(section, {name: value for name, value in dumped.items() if name not in free})
    return leaves


def _different(run: Path, path: str, before: object, now: object) -> ArchwrightError:
    return ArchwrightError(
        "TRAIN005",
        f"`{path}` is {now}, the run was started with {before}",
        where=str(run),
        help="set it back to go on; or start a new run, with train.base to begin with these weights",
    )


def write_model(run: Path, spec: Spec, inputs: Inputs, checkpoint: Path, step: int) -> Path:
    """Make `run/model`, the model folder of the last step, if it is not there yet."""
    path = run / "model"
    recover(path)
    if path.is_dir() and read_manifest(path).details.get("step") == step:
        return path
    program = lower(spec)
    precision = master_precision(inputs.train.precision)
    write_model_folder(
        path,
        _own_tokenizer(spec),
        weight_tensors(program, SafetensorsWeights(checkpoint), precision),
        open_tokenizer(run).files(),
        details={"step": step, "train": inputs.train.kind, "data_digest": inputs.data_digest},
        exist="replace",  # that of a shorter training, which this run continued
    )
    return path


def master_precision(precision: str) -> str:
    """Precision of the parameters of a training that computes in `precision`."""
    return "float64" if precision == "float64" else "float32"
