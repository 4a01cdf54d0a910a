"""An artifact folder, as `build` writes it and `verify` and `open_model` read it.

    manifest.json  spec.yaml  tokenizer.*  rank0/stage0.onnx  rank0/stage0.data  rank1/stage0.onnx  ...
    with engines also   probe.safetensors  rank0/stage0.engine  rank0/stage0.log  ...

A rank has the graph of the pipeline stage that it belongs to: `rank2/stage1.onnx` in the second of two ranks each.

Its spec.yaml says what was built: precision, degrees and capacity stand in its `build` section.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from archwright.compiler.interpreters.onnx_dialects import Dialect, dialect_of
from archwright.compiler.ir import Plan, Program
from archwright.compiler.passes import build_plan, build_program
from archwright.compiler.targets.onnx_graph import graph_path
from archwright.compiler.targets.stages import GraphOptions, gathered_values, graph_options
from archwright.compiler.weights.folder import TOKENIZER_FILES
from archwright.compiler.weights.streaming import PRECISIONS
from archwright.spec import ArchwrightError, Spec, load
from archwright.spec.files import sha256_file
from archwright.spec.json_text import parse_json
from archwright.spec.manifest import MANIFEST, Manifest, read_manifest

SEAL = "seal"
_LARGE = (".data", ".engine")
_HELP = "build it again, or copy it again from where it was built"


@dataclass(frozen=True)
class Artifact:
    """An artifact folder and the spec that it was built from."""

    path: Path
    spec: Spec

    @property
    def precision(self) -> str:
        return self.spec.build.precision

    @property
    def capacity(self) -> int:
        """Rows of the KV caches."""
        return self.spec.build.max_positions or self.spec.model.max_positions

    @property
    def dialect(self) -> Dialect:
        return dialect_of(self.spec.build)

    @property
    def max_batch(self) -> int:
        return self.spec.build.max_batch

    @cached_property
    def plan(self) -> Plan:
        return build_plan(self.spec)

    @cached_property
    def program(self) -> Program:
        """What the graphs compute, of global sizes."""
        return build_program(self.spec)

    @property
    def options(self) -> GraphOptions:
        return graph_options(self.spec.build)

    @property
    def gathered_bytes(self) -> int:
        """What a call copies of experts' weights for each token, in float32, on all ranks together: each expert rank
        has every token."""
        return 4 * gathered_values(self.spec) * self.spec.build.parallel.expert

    @property
    def rank_gathered_bytes(self) -> int:
        """The same on one rank, in the precision of the build."""
        width = PRECISIONS[self.precision].itemsize
        return width * gathered_values(self.spec) // self.spec.build.parallel.tensor

    @property
    def num_stages(self) -> int:
        return len(self.plan.stages)

    def stage_of_rank(self, rank: int) -> int:
        return self.plan.coordinates(rank)["pipeline"]

    @property
    def graphs(self) -> list[Path]:
        """The graph of each rank."""
        return [graph_path(self.path, rank, self.stage_of_rank(rank)) for rank in range(self.plan.degrees.world)]

    @property
    def tokenizer(self) -> Path | None:
        """The folder that holds the tokenizer's files, None if there are none."""
        return self.path if any((self.path / name).is_file() for name in TOKENIZER_FILES[:2]) else None


def is_artifact(path: Path) -> bool:
    """Whether a folder says that it is an artifact, or looks like one whose manifest is broken."""
    try:
        return parse_json((path / MANIFEST).read_bytes())["kind"] == "artifact"
    except (OSError, ValueError, KeyError, TypeError):
        return (path / "rank0").is_dir()


def open_artifact(path: Path) -> Artifact:
    """Open an artifact to run it.

    Files and their sizes are checked, and the hashes of all but weights and engines, which `archwright verify` reads in
    full. An engine is native code: who loads one must compare its hash first.
    Raises ArchwrightError RUN014 where something is missing or differs, or SPEC091 without a manifest.
    """
    manifest = read_artifact_manifest(path)
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise ArchwrightError("RUN014", f"{name} is missing", where=str(path), help=_HELP)
        if file.stat().st_size != entry.bytes or (file.suffix not in _LARGE and sha256_file(file) != entry.sha256):
            raise ArchwrightError("RUN014", f"{name} is not the file that was built", where=str(path), help=_HELP)
    escaped = next(escapes(path), None)
    if escaped is not None:
        raise ArchwrightError("RUN014", escaped, where=str(path), help=_HELP)
    return Artifact(path, load(path / "spec.yaml"))


def read_artifact_manifest(path: Path) -> Manifest:
    """Raises ArchwrightError SPEC091 where there is no manifest, RUN015 where it is that of something else."""
    manifest = read_manifest(path)
    if manifest.kind != "artifact":
        help = "give a folder written by `archwright build`"
        raise ArchwrightError("RUN015", f"not an artifact but a {manifest.kind}", where=str(path), help=help)
    return manifest


def escapes(path: Path) -> Iterator[str]:
    """A sentence for each file that reaches out of the folder: what a graph reads must lie inside, as itself."""
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_symlink():
            yield f"{name} is a symbolic link"
        elif file.is_file() and file.stat().st_nlink > 1:
            yield f"{name} is a hard link: the file has another name, which may lie outside"
        elif not file.is_file() and not file.is_dir():
            yield f"{name} is neither a file nor a folder: whoever reads it may wait for ever"


def external_data(path: Path) -> Iterator[str]:
    """A sentence for each graph whose external data is not the file beside it."""
    for graph in sorted(path.glob("rank*/*.onnx")):
        name = graph.relative_to(path).as_posix()
        try:
            tensors = onnx.load(graph, load_external_data=False).graph.initializer
        except Exception as error:  # protobuf's DecodeError, and whatever a broken file may bring about
            yield f"{name}: not an ONNX graph ({type(error).__name__})"
            continue
        locations = {e.value for tensor in tensors for e in tensor.external_data if e.key == "location"}
        for place in sorted(locations):
            if Path(place).name != place or place in ("", "."):
                yield f"{name}: names `{place}`, which is not beside it"


def seal(details: Mapping[str, Any], measured: Mapping[str, Any], spec_digest: str | None) -> str:
    """SHA-256 of what the manifest says beside the files' hashes. It finds accidents, not forgers.

    It covers the measurements, so it stands among them, under SEAL: all else in a manifest is the same in every build.
    """
    numbers = {key: value for key, value in measured.items() if key != SEAL}
    text = json.dumps([details, numbers, spec_digest], sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
