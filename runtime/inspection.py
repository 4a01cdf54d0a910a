"""What a folder is and what it holds: facts as plain JSON values, one function a kind."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from archwright.compiler.ir import Program
from archwright.compiler.passes import lower
from archwright.compiler.weights.folder import TOKENIZER_FILES, checkpoints, open_folder
from archwright.runtime.artifact import Artifact, is_artifact, read_artifact_manifest
from archwright.runtime.engines.opening import listed_engines
from archwright.runtime.rank_weights import RankWeights
from archwright.runtime.text.tokenizer import open_tokenizer
from archwright.spec import ArchwrightError, Spec, load
from archwright.spec.json_text import parse_json
from archwright.spec.manifest import MANIFEST, Manifest, read_manifest

Kind = Literal["artifact", "run", "model", "data", "tokenizer"]
Facts = dict[str, Any]


def inspect_folder(path: Path) -> Facts:
    """`kind`, `path`, the facts of that kind, and `files` (name → bytes).

    Weights are looked at, not read in full; nothing is verified. Raises ArchwrightError RUN017 where the folder is none
    of the kinds, and what opening it raises.
    """
    kind = kind_of(path)
    facts: Facts = {"kind": kind, "path": str(path)} | _DESCRIBE[kind](path)
    return facts | {"files": _files(path)}


def kind_of(path: Path) -> Kind:
    """Which kind of folder this is. Raises ArchwrightError RUN017."""
    if is_artifact(path):
        return "artifact"
    if (path / "checkpoints").is_dir():
        return "run"
    if (path / "spec.yaml").is_file() and any(path.glob("model*.safetensors")):
        return "model"
    if (path / MANIFEST).is_file() and read_manifest(path).kind == "data":
        return "data"
    if any((path / name).is_file() for name in TOKENIZER_FILES[:2]):
        return "tokenizer"
    help = "give a run, a model folder, an artifact, a tokenizer folder or a data folder"
    found = "no known kind of folder" if path.is_dir() else "no such folder"
    raise ArchwrightError("RUN017", found, where=str(path), help=help)


def _artifact(path: Path) -> Facts:
    manifest = read_artifact_manifest(path)
    artifact = Artifact(path, load(path / "spec.yaml"))
    weights = RankWeights(artifact)
    first = next(name for name, param in weights.params.items() if param.storage is None)
    return {
        "name": artifact.spec.name,
        "ranks": len(artifact.graphs),
        **_model_facts(artifact.spec),
        "precision": str(weights.held(first, weights.holders(first)[0]).dtype),
        "logits": artifact.options.logits,
        **{key: manifest.details.get(key) for key in ("target", "fusions", "unfused_layers", "portable_layers")},
        "weight_bytes": weights.stored_bytes(),
        "capacity": artifact.capacity,
        "max_batch": artifact.max_batch,
        "degrees": manifest.details.get("degrees"),
        "engines": {name: _engine_facts(facts) for name, facts in listed_engines(artifact, manifest).items()},
        "toolchain": manifest.details.get("toolchain"),
        "measured": manifest.measured,
        "tokenizer": _tokenizer_facts(artifact.tokenizer),
        "tensors": {name: list(weights.part(name, weights.holders(name)[0]).shape) for name in weights.names()},
    }


def _engine_facts(facts: Mapping[str, Any]) -> Facts:
    """What decides where an engine runs, and what is in it."""
    gpu = facts["gpu"]
    where = (
        f"{gpu['name']} (SM {gpu['compute_capability']})" if gpu else "SM " + ", ".join(facts["compute_capabilities"])
    )
    axes = ("batch", "sequence", "positions")
    profiles = [
        ", ".join(f"{axis} {profile[axis]['min']}..{profile[axis]['max']}" for axis in axes)
        for profile in facts["profiles"]
    ]
    return {
        "library": f"{facts['library']} {facts['version']}",
        "built_for": where,
        "flags": facts["flags"],
        "structural_hash": facts["structural_hash"],
        "layers": sum(facts["layers"].values()),
        "profiles": {str(number): profile for number, profile in enumerate(profiles)},
    }


def _model(path: Path) -> Facts:
    folder = open_folder(path)
    dtypes = sorted({str(folder.weights.read(name).dtype) for name in folder.program.params()})
    return {
        "name": folder.spec.name,
        **_model_facts(folder.spec),
        "precision": ", ".join(dtypes),
        "tokenizer": _tokenizer_facts(folder.tokenizer),
        "tensors": _shapes(folder.program),
    }


def _run(path: Path) -> Facts:
    facts: Facts = {"checkpoints": list(checkpoints(path)), "finished": (path / "model").is_dir()}
    last = _last_metrics(path / "metrics.jsonl")
    if last is not None:
        facts["last_metrics"] = last
    if facts["checkpoints"]:
        return facts | _model(path)
    spec = load(path / "spec.yaml")
    return facts | {"name": spec.name} | _model_facts(spec) | {"tensors": _shapes(lower(spec))}


def _data(path: Path) -> Facts:
    manifest: Manifest = read_manifest(path)
    return manifest.details


def _tokenizer(path: Path) -> Facts:
    return _tokenizer_facts(path) or {}


_DESCRIBE: Mapping[Kind, Callable[[Path], Facts]] = {
    "artifact": _artifact,
    "run": _run,
    "model": _model,
    "data": _data,
    "tokenizer": _tokenizer,
}


def _model_facts(spec: Spec) -> Facts:
    model = spec.model
    attentions = [run.layer.attention for run in model.runs]
    return {
        "parameters": lower(spec).num_params(),
        "layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "heads": _one_or_all([attention.heads for attention in attentions]),
        "kv_heads": _one_or_all([attention.kv_heads or attention.heads for attention in attentions]),
        "vocab_size": model.vocab_size,
        "max_positions": model.max_positions,
    }


def _one_or_all(values: list[int]) -> int | list[int]:
    """The value that all layers share, or those of the runs of a mixed stack."""
    return values[0] if len(set(values)) == 1 else values


def _tokenizer_facts(folder: Path | None) -> Facts | None:
    if folder is None:
        return None
    tokenizer = open_tokenizer(folder)
    return {
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "special_tokens": dict(tokenizer.special_tokens),
        "digest": tokenizer.digest,
    }


def _shapes(program: Program) -> dict[str, list[int]]:
    return {name: list(param.shape) for name, param in program.params().items()}


def _last_metrics(path: Path) -> Facts | None:
    """The last whole line of metrics.jsonl."""
    if not path.is_file():
        return None
    for line in reversed(path.read_text(errors="replace").splitlines()[-2:]):
        try:
            return parse_json(line)
        except ValueError:  # a run that is being written
            continue
    return None


def _files(path: Path) -> dict[str, int]:
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in files}
