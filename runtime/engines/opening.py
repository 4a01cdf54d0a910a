"""Which engines an artifact has, and whether they may be loaded here. An engine is native code: nothing is loaded that
is not, byte for byte, what was built, for this library and this GPU.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import onnx
from pydantic import Field, TypeAdapter, ValidationError

from archwright.compiler.targets.gpus import Gpu
from archwright.compiler.targets.structural_hash import structural_hash
from archwright.compiler.targets.tensorrt_loader import tensorrt_flavor, tensorrt_title
from archwright.runtime.artifact import Artifact, escapes, external_data, read_artifact_manifest
from archwright.spec import ArchwrightError
from archwright.spec.manifest import MANIFEST, Manifest
from archwright.spec.models import Node, Profile

ALL_REDUCE_CAPABILITY = 8.0
"""TensorRT's collectives need this compute capability."""


@dataclass(frozen=True, kw_only=True)
class EngineFile:
    """The engine of a rank, with what the manifest says of it."""

    rank: int
    graph: Path
    path: Path
    sha256: str
    facts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Engines:
    """The engines of an artifact, one a rank in the order of the ranks. stages: of the pipeline."""

    artifact: Artifact
    files: tuple[EngineFile, ...]
    stages: int

    @property
    def per_stage(self) -> int:
        return len(self.files) // self.stages

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is the same for all engines."""
        return self.files[0].facts

    @property
    def profiles(self) -> tuple[Profile, ...]:
        return tuple(Profile.model_validate(profile) for profile in self.facts["profiles"])


class _GpuFacts(Node):
    name: str
    compute_capability: str


class _EngineFacts(Node):
    """What `EngineBuilder.build` says of an engine; a manifest may come from anywhere."""

    library: str
    version: str
    compute_capabilities: list[str]
    gpu: _GpuFacts | None
    profiles: Annotated[list[Profile], Field(min_length=1)]
    flags: list[str]
    hardware_compatibility: str
    optimization_level: int
    workspace_gib: float
    structural_hash: str
    layers: dict[str, int]


_LISTED = TypeAdapter(dict[str, _EngineFacts])


def rebuild(artifact: Artifact) -> str:
    """The command that builds the engines anew."""
    build = artifact.spec.build
    given = {"precision": build.precision, **{f"parallel.{a}": d for a, d in build.parallel.model_dump().items()}}
    usual = type(build)()
    default = {"precision": usual.precision, **{f"parallel.{a}": 1 for a in build.parallel.model_dump()}}
    sets = "".join(f" --set build.{key}={value}" for key, value in given.items() if value != default[key])
    return f"archwright build MODEL_OR_RUN --to engine -o OUT{sets}"


def has_engines(artifact: Artifact) -> bool:
    """Whether the manifest lists engines."""
    return bool(read_artifact_manifest(artifact.path).details.get("engines"))


def listed_engines(artifact: Artifact, manifest: Manifest) -> Mapping[str, Mapping[str, Any]]:
    """File of an engine → what the manifest says of it. Raises ArchwrightError RUN044 for what no build wrote."""
    listed = manifest.details.get("engines", {})
    try:
        _LISTED.validate_python(listed)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, ("engines", *first["loc"])))
        raise _changed(artifact, f"{MANIFEST}: `{place}` is not what `build` wrote: {first['msg']}") from error
    return listed


def find_engines(artifact: Artifact) -> Engines:
    """Raises ArchwrightError RUN040 where there are none, RUN044 where one is missing, not listed in the manifest or of
    another graph, or something in the folder reaches out of it.
    """
    manifest = read_artifact_manifest(artifact.path)
    listed = listed_engines(artifact, manifest)
    if not listed:
        message = "the artifact holds graphs and no engines"
        raise ArchwrightError("RUN040", message, where=str(artifact.path), help=rebuild(artifact))
    for problem in (*escapes(artifact.path), *external_data(artifact.path)):
        raise _changed(artifact, problem)
    files: list[EngineFile] = []
    for rank, graph in enumerate(artifact.graphs):
        path = graph.with_suffix(".engine")
        name = path.relative_to(artifact.path).as_posix()
        if name not in listed or name not in manifest.files or not path.is_file():
            raise _changed(artifact, f"{name} is missing: each of the {len(artifact.graphs)} ranks has an engine")
        if not _belongs(graph, listed[name]):
            raise _changed(artifact, f"{name} was not built from {graph.name}: their structural hashes differ")
        sha256 = manifest.files[name].sha256
        files.append(EngineFile(rank=rank, graph=graph, path=path, sha256=sha256, facts=listed[name]))
    return Engines(artifact=artifact, files=tuple(files), stages=artifact.spec.build.parallel.pipeline)


def _belongs(graph: Path, facts: Mapping[str, Any]) -> bool:
    """Whether an engine was built from a graph of this structure, with what the manifest says of it."""
    config = {key: value for key, value in facts.items() if key not in ("structural_hash", "layers")}
    return structural_hash(onnx.load(graph, load_external_data=False), config) == facts["structural_hash"]


def _changed(artifact: Artifact, problem: str) -> ArchwrightError:
    return ArchwrightError("RUN044", problem, where=str(artifact.path), help=rebuild(artifact))


def read_engine(path: Path, sha256: str, help: str) -> bytes:
    """The bytes whose hash was compared, so that nobody can put others in between.

    Raises ArchwrightError RUN044 where they are not those that were built.
    """
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        message = "the engine is not the file that was built, and is not loaded: an engine is native code"
        raise ArchwrightError("RUN044", message, where=f"{path.parent.name}/{path.name}", help=help)
    return content


def check_machine(engines: Engines, library: ModuleType, gpus: Sequence[Gpu]) -> None:
    """Raises ArchwrightError RUN043 where the engines are another TensorRT's, RUN041 where GPUs are lacking, RUN042
    where they are not those that the engines were built for.
    """
    _check_library(engines, library)
    world = len(engines.files)
    if len(gpus) < world:
        here = "none is" if not gpus else f"{len(gpus)} {'is' if len(gpus) == 1 else 'are'}"
        message = f"the engines need {world} NVIDIA GPU{'s' if world > 1 else ''}, and {here} here"
        help = f"run on a machine with {_wanted(engines.facts)}; ONNX Runtime (backend onnxruntime) runs the graphs"
        raise ArchwrightError("RUN041", message, where=str(engines.artifact.path), help=help)
    for file, gpu in zip(engines.files, gpus, strict=False):
        if (reason := _unserved(file.facts, gpu, world)) is not None:
            message = f"rank {file.rank} would run on {gpu}, and {reason}"
            raise ArchwrightError("RUN042", message, where=str(engines.artifact.path), help=rebuild(engines.artifact))


def carries_host_code(facts: Mapping[str, Any]) -> bool:
    """Whether an engine brings TensorRT's lean runtime along, which runs on the host."""
    return "VERSION_COMPATIBLE" in facts["flags"] and "EXCLUDE_LEAN_RUNTIME" not in facts["flags"]


def _check_library(engines: Engines, library: ModuleType) -> None:
    facts = engines.facts
    built, here = (facts["library"], facts["version"]), (tensorrt_flavor(library), library.__version__)
    newer = "VERSION_COMPATIBLE" in facts["flags"] and built[0] == here[0]
    newer = newer and _numbers(built[1])[:1] == _numbers(here[1])[:1] and _numbers(built[1]) <= _numbers(here[1])
    if built != here and not newer:
        message = f"the engines were built by {built[0]} {built[1]}, and {tensorrt_title(library)} ({here[0]}) is here"
        raise ArchwrightError("RUN043", message, where=str(engines.artifact.path), help=rebuild(engines.artifact))


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdecimal()]


def _unserved(facts: Mapping[str, Any], gpu: Gpu, world: int) -> str | None:
    """Why an engine does not run on a GPU."""
    if world > 1 and float(gpu.capability) < ALL_REDUCE_CAPABILITY:
        return f"TensorRT's collectives need SM {ALL_REDUCE_CAPABILITY} or later"
    level, built = facts["hardware_compatibility"], facts["gpu"]
    if level == "ampere_plus" and built is not None:
        return None if float(gpu.capability) >= 8 else "the engine was built for Ampere and later"
    if facts["library"] == "tensorrt_rtx" and gpu.capability == "9.0":
        return "TensorRT for RTX does not run on SM 9.0 (H100, H200): full TensorRT does"
    if gpu.capability not in facts["compute_capabilities"]:
        return f"the engine was built for {_wanted(facts)}"
    if built is not None and level == "none" and built["name"] != gpu.name:
        return f"the engine was built for {_wanted(facts)}"
    return None


def _wanted(facts: Mapping[str, Any]) -> str:
    if facts["gpu"] is not None and facts["hardware_compatibility"] == "none":
        return f"{facts['gpu']['name']} (SM {facts['gpu']['compute_capability']})"
    return "SM " + ", ".join(facts["compute_capabilities"])
