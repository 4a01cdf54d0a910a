"""Model folders and runs: `spec.yaml`, `model*.safetensors`, tokenizer files, `config.json`, `manifest.json`."""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from archwright.compiler.ir import Program
from archwright.compiler.passes import lower
from archwright.compiler.weights.huggingface import config_json
from archwright.compiler.weights.streaming import PRECISIONS, SafetensorsWeights, Tensor, Weights, write_weights
from archwright.spec import ArchwrightError, Spec, dump, load
from archwright.spec.files import atomic_folder
from archwright.spec.manifest import write_manifest

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CHECKPOINT = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """An opened model folder, or the newest checkpoint of a run.

    path: where the weights lie. tokenizer: the folder that holds its files, None if there are none.
    """

    path: Path
    spec: Spec
    program: Program
    weights: Weights
    tokenizer: Path | None
    step: int | None


def open_folder(path: Path) -> ModelFolder:
    """Open a model folder or a run.

    Raises ArchwrightError RUN011 to RUN013 where it is neither, is not complete, or does not fit its spec.
    """
    if not (path / "spec.yaml").is_file():
        raise ArchwrightError(
            "RUN011",
            "not a model folder or a run: it holds no spec.yaml",
            where=str(path),
            help="give a folder written by `archwright train`",
        )
    spec = load(path / "spec.yaml")
    place, step = path, None
    if (path / "checkpoints").is_dir():
        step, place = newest_checkpoint(path)
    program = lower(spec)
    weights = SafetensorsWeights(place)
    _check_fit(program, weights, place)
    has_tokenizer = any((path / name).is_file() for name in TOKENIZER_FILES[:2])
    return ModelFolder(
        path=place, spec=spec, program=program, weights=weights, tokenizer=path if has_tokenizer else None, step=step
    )


def checkpoints(run: Path) -> dict[int, Path]:
    """Complete checkpoints of a run by step, oldest first."""
    found = {
        int(match[1]): folder
        for folder in (run / "checkpoints").glob("step-*")
        if (match := CHECKPOINT.fullmatch(folder.name)) and (folder / "manifest.json").is_file()
    }
    return dict(sorted(found.items()))


def newest_checkpoint(run: Path) -> tuple[int, Path]:
    found = checkpoints(run)
    if not found:
        help = "train longer, or lower train.checkpoint.every"
        raise ArchwrightError("RUN012", "the run has no complete checkpoint yet", where=str(run), help=help)
    return max(found.items())


def _check_fit(program: Program, weights: Weights, path: Path) -> None:
    """The tensors on disk must be those of the Program; a tied head may be stored a second time."""
    params = program.params()
    present = set(weights.names())
    problems = [f"`{name}` is missing" for name in params if name not in present]
    places = program.sites()
    problems += [f"`{name}` is not in the spec's model" for name in sorted(present) if name not in places]
    problems += [
        f"`{name}` has shape {list(weights.shape(name))}, the spec says {list(param.shape)}"
        for name, param in params.items()
        if name in present and weights.shape(name) != param.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        help = "use the spec.yaml that the weights were trained with"
        raise ArchwrightError("RUN013", f"{problems[0]}{more}", where=str(path), help=help)


def weight_tensors(program: Program, weights: Weights, precision: str) -> dict[str, Tensor]:
    """The Program's parameters as tensors to write in `precision`."""
    dtype = PRECISIONS[precision]
    return {
        name: Tensor(shape=param.shape, dtype=dtype, produce=lambda name=name: weights.read(name))
        for name, param in program.params().items()
    }


def write_model_folder(
    path: Path,
    spec: Spec,
    tensors: Mapping[str, Tensor],
    tokenizer_files: Iterable[Path],
    *,
    details: dict[str, object],
    exist: Literal["refuse", "replace"] = "refuse",
) -> None:
    """Write a model folder, complete or not at all. It loads in `transformers` where the family is known to it."""
    with atomic_folder(path, exist=exist) as folder:
        (folder / "spec.yaml").write_text(dump(spec))
        write_weights(folder, tensors)
        for file in tokenizer_files:
            shutil.copyfile(file, folder / file.name)
        dtype = next(iter(tensors.values())).dtype.name
        config = config_json(spec, dtype)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_manifest(folder, kind="model", spec=spec, details=details)
