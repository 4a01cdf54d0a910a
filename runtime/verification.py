"""Whether an artifact is what was built, and computes what its spec says.

The numbers of an artifact up to LARGE parameters are checked with its own weights: the oracle reads them back from
the ranks' data files, so the artifact proves itself, and `build` adds that they are the model's, rounded once. Above
that the oracle would take hours; then the same spec is built in small (`compiler.reduced`) and checked, and rows of
the real weights are sampled.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import onnx

from archwright.compiler.interpreters.onnx_dialects import dialect_of
from archwright.compiler.passes import build_program, lower
from archwright.compiler.passes.fuse import fuse
from archwright.compiler.passes.quantize import rounds_inputs
from archwright.compiler.reduced import reduced
from archwright.compiler.targets.linter import lint
from archwright.compiler.targets.merge import load_ranks, merge_ranks
from archwright.compiler.targets.onnx_graph import export_graphs
from archwright.compiler.weights.quantized import built_weights
from archwright.compiler.weights.streaming import GeneratedWeights, Weights
from archwright.runtime.artifact import SEAL, Artifact, escapes, external_data, read_artifact_manifest, seal
from archwright.runtime.backends.exposing import ExposingBackend
from archwright.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend, open_artifact_graphs
from archwright.runtime.backends.onnxruntime_sessions import Place, cuda_problem, load_onnxruntime
from archwright.runtime.engines.opening import find_engines, has_engines
from archwright.runtime.numerics import Comparison, compare
from archwright.runtime.quantization.quality import Quality
from archwright.runtime.rank_weights import RankWeights, Sample, differing_ranks, differing_source, not_finite
from archwright.spec import ArchwrightError, Spec, load, spec_digest
from archwright.spec.manifest import MANIFEST, Manifest, check_manifest

LARGE = 1 << 26
"""Parameters above which the numbers are those of the reduced spec: the oracle's arrays would take half a GiB and
more.
"""

Result = Literal["ok", "failed", "not done", "skipped"]
"""not done: since an earlier check failed. skipped: what this machine cannot do, with the reason."""
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of a report. error and tolerance: of the checks that compare numbers, relative."""

    name: str
    code: str
    result: Result
    problems: tuple[str, ...] = ()
    error: float | None = None
    tolerance: float | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `verify` found. quality: of a build that was quantized and measured."""

    path: Path
    checks: tuple[Check, ...]
    quality: Quality | None = None

    @property
    def ok(self) -> bool:
        return all(check.result in ("ok", "skipped") for check in self.checks)

    def problems(self) -> list[str]:
        """`CODE sentence` of everything that is wrong."""
        return [f"{check.code} {problem}" for check in self.checks for problem in check.problems]

    def as_text(self) -> str:
        """A table: check, result, largest error, tolerance."""
        width = max(len(check.name) for check in self.checks)
        lines = [f"{'check':<{width}}  {'result':<8}  {'error':>8}  {'allowed':>8}"]
        for check in self.checks:
            error, tolerance = ("" if x is None else f"{x:.1e}" for x in (check.error, check.tolerance))
            line = f"{check.name:<{width}}  {check.result:<8}  {error:>8}  {tolerance:>8}  {check.detail}"
            lines += [line.rstrip(), *(f"{'':<{width}}  {check.code} {problem}" for problem in check.problems)]
        return "\n".join([*lines, *([] if self.quality is None else ["", self.quality.as_text()])])

    def as_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "path": str(self.path),
            "ok": self.ok,
            "checks": [asdict(check) for check in self.checks],
        }
        return content if self.quality is None else content | {"quality": self.quality.as_json()}


def verify(path: str | Path, progress: Progress = lambda message: None) -> Report:
    """Check an artifact folder by itself: files, graphs, weights, numbers.

    A later group of checks is not done where an earlier one failed: what is not the file that was built is not run.
    Raises ArchwrightError SPEC091 or RUN015 where the folder is no artifact, RUN023 without ONNX Runtime.
    """
    path = Path(path)
    load_onnxruntime()
    manifest = read_artifact_manifest(path)
    progress("checking the files")
    checks = list(file_checks(path, manifest))
    if all(check.result == "ok" for check in checks):
        artifact = Artifact(path, load(path / "spec.yaml"))
        checks.append(_check("manifest facts", "VERIFY001", _facts(manifest, artifact)))
        if checks[-1].result == "ok":
            return Report(path=path, checks=(*checks, *content_checks(artifact, progress=progress)))
    not_done = (_not_done(name, code) for name, code in (*_GRAPH_CHECKS, *_NUMBER_CHECKS))
    return Report(path=path, checks=(*checks, *not_done))


_GRAPH_CHECKS = (("onnx checker", "VERIFY004"), ("linter", "VERIFY005"), ("weights", "VERIFY006"))
_NUMBER_CHECKS = (("numbers", "VERIFY007"),)


def content_checks(
    artifact: Artifact, *, source: Weights | None = None, progress: Progress = lambda message: None
) -> Iterator[Check]:
    """The checks of what the files say, as `verify` and `build` do them.

    source: the weights that the artifact was built from, which only `build` has.
    """
    progress("checking the graphs")
    held = _Held(artifact)
    finders = (_checker(artifact), _linter(artifact), _weights(held, source))
    checks = [_guarded(name, code, found) for (name, code), found in zip(_GRAPH_CHECKS, finders, strict=True)]
    yield from checks
    if any(check.result == "failed" for check in checks):
        yield from (_not_done(name, code) for name, code in _NUMBER_CHECKS)
        return
    scope = numeric_scope(artifact.spec)
    progress("comparing numbers with the oracle" + (", on the reduced spec" if scope == "reduced" else ""))
    try:
        detail = ", reduced spec" if scope == "reduced" else ""
        detail += f", {_run_as(artifact.spec)}" if artifact.spec.build.target == "tensorrt" else ""
        with computable(held.artifact) as small:
            weights = held.weights if small is held.artifact else RankWeights(small)
            for comparison in compare(_backend(small), small.program, weights):
                yield _compared(comparison, detail)
            if cuda_problem() is None:
                progress("comparing numbers with the oracle, on the GPU")
                yield from _gpu_checks(small, weights)
    except Exception as error:  # ONNX Runtime's exceptions have no class of their own but Exception
        yield _check("numbers", "VERIFY007", [_reason(error)])


def numeric_scope(spec: Spec) -> Literal["whole", "reduced"]:
    """Whether the numbers of an artifact are checked with its own weights, or on its spec made small."""
    return "whole" if lower(spec).num_params() <= LARGE else "reduced"


def file_checks(path: Path, manifest: Manifest) -> Iterator[Check]:
    problems = check_manifest(path)
    measured = manifest.measured or {}
    if measured.get(SEAL) != seal(manifest.details, measured, manifest.spec_digest):
        problems.append(f"{MANIFEST}: what it says is not what `build` wrote")
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    if (path / MANIFEST).read_text() != text:
        problems.append(f"{MANIFEST}: its form is not what `build` wrote")
    yield _check("files and hashes", "VERIFY001", problems, detail=f"{len(manifest.files)} files")
    yield _check("no links", "VERIFY002", list(escapes(path)))
    yield _check("external data", "VERIFY003", list(external_data(path)))


def _facts(manifest: Manifest, artifact: Artifact) -> Iterator[str]:
    """What the manifest repeats from the spec, for tools that do not read specs; and a graph for each rank."""
    spec = artifact.spec
    if manifest.spec_digest != spec_digest(spec):
        yield f"{MANIFEST}: its spec_digest is not that of spec.yaml"
    for graph in artifact.graphs:
        name = graph.relative_to(artifact.path).as_posix()
        if name not in manifest.files:
            yield f"{name}: missing, and spec.yaml says {len(artifact.graphs)} ranks"
    yield from (
        f"{MANIFEST}: {key} is {manifest.details.get(key)!r}, spec.yaml says {value!r}"
        for key, value in describe(spec).items()
        if manifest.details.get(key) != value
    )
    yield from _engine_facts(artifact)


def _engine_facts(artifact: Artifact) -> Iterator[str]:
    """An engine for each rank, of that rank's graph, where the artifact has engines at all."""
    if has_engines(artifact):
        try:
            find_engines(artifact)
        except ArchwrightError as error:
            yield error.message


def describe(spec: Spec) -> dict[str, Any]:
    """What the manifest of an artifact repeats from its spec."""
    parallel, dialect, program = spec.build.parallel, dialect_of(spec.build), lower(spec)
    return {
        "target": spec.build.target,
        "fusions": list(dialect.fusions),
        "unfused_layers": dict(fuse(build_program(spec), dialect.fusions).unfused),
        "portable_layers": dialect.portable_layers(program, spec.build.precision),
        "numbers_run_as": _run_as(spec),
        "precision": spec.build.precision,
        "degrees": {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "expert": parallel.expert},
        "logits": spec.build.logits,
        "moe": spec.build.moe.kind,
        "capacity": spec.build.max_positions or spec.model.max_positions,
        "max_batch": spec.build.max_batch,
        "num_parameters": program.num_params(),
        "numbers_checked_on": numeric_scope(spec),
    }


def _run_as(spec: Spec) -> str:
    """What is executed where the numbers are checked: a CPU has neither half precision nor TensorRT's operators."""
    changes = ["float32 copy"] if spec.build.precision != "float32" else []
    changes += ["TensorRT's operators in portable form"] if spec.build.target == "tensorrt" else []
    return ", ".join(changes) or "as written"


def _checker(artifact: Artifact) -> Iterator[str]:
    for graph in artifact.graphs:
        try:
            onnx.checker.check_model(str(graph))
        except onnx.checker.ValidationError as error:
            yield f"{graph.parent.name}/{graph.name}: {error}"


def _linter(artifact: Artifact) -> Iterator[str]:
    for stage in range(artifact.num_stages):
        ranks = artifact.plan.stage_ranks(stage)
        for rank, model in zip(ranks, load_ranks(artifact.path, stage, ranks), strict=True):
            folder = artifact.graphs[rank].parent
            problems = lint(model, folder, artifact.dialect)
            yield from (f"{folder.name}/stage{stage}.onnx: {problem}" for problem in problems)
        merge_ranks(artifact.path, stage=stage, ranks=ranks)  # raises where the ranks' collectives do not match


@dataclass(frozen=True)
class _Held:
    """An artifact and its weights, whose places are looked up when they are first asked for."""

    artifact: Artifact

    @cached_property
    def weights(self) -> RankWeights:
        return RankWeights(self.artifact)


def _weights(held: _Held, source: Weights | None) -> Iterator[str]:
    weights = held.weights
    sample: Sample = "all"
    if numeric_scope(held.artifact.spec) == "reduced":
        sample = "rows" if source is None else "windows"
    yield from differing_ranks(weights, sample=sample)
    yield from not_finite(weights, sample=sample)
    if source is not None:
        yield from differing_source(weights, source, sample=sample)


def _gpu_checks(artifact: Artifact, weights: Weights) -> Iterator[Check]:
    """The same graphs through ONNX Runtime's CUDA provider, in their own precision."""
    if rounds_inputs(artifact.program):
        yield _skipped("GPU", "its roundings to 8 bits are followed on the CPU alone")
        return
    try:
        backend = open_artifact_graphs(artifact, Place(gpu=0))
    except ArchwrightError as error:
        if error.code != "RUN025":
            raise
        yield _skipped("GPU", error.message)
        return
    for comparison in compare(backend, artifact.program, weights, artifact.precision):
        yield _compared(replace(comparison, name=f"GPU, {comparison.name}"), f", {artifact.precision}")


def _backend(artifact: Artifact) -> OnnxRuntimeBackend:
    if rounds_inputs(artifact.program):
        return ExposingBackend(artifact.path, artifact.plan, max_batch=artifact.max_batch)
    return open_artifact_graphs(artifact)


@contextmanager
def computable(artifact: Artifact) -> Iterator[Artifact]:
    """The artifact whose numbers are compared: itself, or for a large one its spec made small and exported now."""
    if numeric_scope(artifact.spec) == "whole":
        yield artifact
        return
    with tempfile.TemporaryDirectory(prefix="archwright-reduced-") as name:
        small = Artifact(Path(name), reduced(artifact.spec))
        weights = built_weights(small.spec, GeneratedWeights(params=lower(small.spec).params(), seed=0))
        export_graphs(
            small.plan,
            weights,
            small.path,
            precision=small.precision,
            capacity=small.capacity,
            options=small.options,
        )
        yield small


def _guarded(name: str, code: str, problems: Iterator[str]) -> Check:
    """A check that also fails where its search does: a forged graph can trip whatever reads it."""
    try:
        return _check(name, code, list(problems))
    except Exception as error:
        return _check(name, code, [_reason(error)])


def _reason(error: Exception) -> str:
    if isinstance(error, ArchwrightError):
        return f"{error.where}: {error.message}" if error.where else error.message
    return f"cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _check(name: str, code: str, problems: Iterable[str], detail: str = "") -> Check:
    found = tuple(problems)
    return Check(name=name, code=code, result="failed" if found else "ok", problems=found, detail=detail)


def _not_done(name: str, code: str) -> Check:
    return Check(name=name, code=code, result="not done")


def _skipped(name: str, reason: str) -> Check:
    return Check(name=name, code="VERIFY007", result="skipped", detail=reason)


def _compared(comparison: Comparison, detail: str) -> Check:
    problem = f"{comparison.name}: the error is {comparison.error:.2e}, allowed is {comparison.tolerance:.0e}"
    return Check(
        name=comparison.name,
        code="VERIFY007",
        result="ok" if comparison.passed else "failed",
        problems=() if comparison.passed else (problem,),
        error=comparison.error,
        tolerance=comparison.tolerance,
        detail=comparison.detail + detail,
    )


def measurements(checks: tuple[Check, ...]) -> Mapping[str, float]:
    """Largest error of each check that compared numbers."""
    return {check.name: check.error for check in checks if check.error is not None}
