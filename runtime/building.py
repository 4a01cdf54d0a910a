"""A run, a model folder or a spec → an artifact folder: graphs, weights, tokenizer, manifest; complete and verified,
or absent.
"""

import importlib.metadata
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from archwright.compiler.passes import degrees_of, lower
from archwright.compiler.planning import check_plan
from archwright.compiler.targets.onnx_graph import Export, export_graphs
from archwright.compiler.targets.tensorrt_loader import load_tensorrt, tensorrt_title
from archwright.compiler.weights.folder import open_folder
from archwright.compiler.weights.streaming import GeneratedWeights, Weights
from archwright.runtime.artifact import SEAL, Artifact, is_artifact, seal
from archwright.runtime.backends.onnxruntime_sessions import load_onnxruntime
from archwright.runtime.build_progress import Reporter
from archwright.runtime.engine_building import build_engines, engine_builder
from archwright.runtime.quantization.preparation import prepare, quantization_measured
from archwright.runtime.text.tokenizer import open_tokenizer
from archwright.runtime.verification import Report, content_checks, describe, measurements
from archwright.spec import ArchwrightError, Spec, dump, load, spec_digest
from archwright.spec.files import atomic_folder, refuse_existing
from archwright.spec.manifest import write_manifest
from archwright.spec.models import ModelWeights, Parallel

To = Literal["onnx", "engine"]
TOOLS = ("archwright", "numpy", "onnx", "onnx-ir", "onnxruntime")
"""Distributions whose versions stand in the manifest, where they are installed."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What is built: spec, weights, and the folder of the tokenizer if there is one."""

    spec: Spec
    weights: Weights
    tokenizer: Path | None


def build(
    source: str | Path,
    out: str | Path,
    to: To = "onnx",
    overrides: Mapping[str, object] | None = None,
    progress: Reporter | Callable[[str], None] = lambda message: None,
    plan: Path | None = None,
) -> Report:
    """Write the artifact folder `out`, and return what its checks found (all passed).

    source: a run (its newest checkpoint), a model folder, or a spec file or preset with build.weights.kind=generated.
    to: onnx, or engine for TensorRT engines beside the graphs. overrides: of the spec's `build` section.
    plan: a file of `archwright plan -o`, refused (PLAN005) where it was made for something else.
    progress: is told what is being done; a Reporter also of TensorRT's phases.
    Graphs and weights of equal inputs are byte-equal; engines and their logs are not, which is TensorRT's doing.
    Raises ArchwrightError BUILD001 to BUILD034 and BUILD060 to BUILD063 where it cannot be built, VERIFY010 where a
    check fails; then, and where it is interrupted, there is no `out`. An interrupted calibration goes on another time.
    """
    out = Path(out)
    if to not in ("onnx", "engine"):
        raise ArchwrightError("BUILD002", f"there is no target `{to}`", help="use onnx or engine")
    # What is missing is said before anything is computed.
    load_onnxruntime()
    tensorrt = load_tensorrt() if to == "engine" else None
    reporter = progress if isinstance(progress, Reporter) else Reporter(say=progress)
    opened = _open_source(source, overrides or {})
    if tensorrt is not None:
        _check_target(source, opened.spec)
    builder = None if tensorrt is None else engine_builder(Artifact(out, opened.spec), tensorrt, reporter)
    if plan is not None:
        check_plan(plan, opened.spec, degrees_of(opened.spec.build.parallel), "inference")
    refuse_existing(out)  # before minutes of calibration
    prepared = prepare(opened.spec, opened.weights, opened.tokenizer, out, reporter.say)
    opened = replace(opened, weights=prepared.weights)
    with atomic_folder(out) as folder:
        start = time.perf_counter()
        artifact = Artifact(folder, _artifact_spec(opened.spec))
        export = _write(artifact, opened, reporter.say)
        exported_s = time.perf_counter() - start
        checks = tuple(content_checks(artifact, source=opened.weights, progress=reporter.say))
        report = Report(path=out, checks=checks, quality=prepared.quality)
        if not report.ok:
            raise _failed(source, report)
        measured: dict[str, Any] = {
            "errors": dict(measurements(report.checks)),
            "export_s": exported_s,
            "verify_s": time.perf_counter() - start - exported_s,
        } | quantization_measured(prepared)
        details = describe(artifact.spec) | {"toolchain": _versions()}
        if builder is not None:
            engines = build_engines(artifact, builder, reporter)
            details["toolchain"]["tensorrt"] = tensorrt_title(builder.library)
            details["engines"], measured["engine_s"] = engines.details, engines.measured
        _list_files(artifact, export, details, measured)
    return report


def _failed(source: str | Path, report: Report) -> ArchwrightError:
    return ArchwrightError(
        "VERIFY010",
        f"the artifact is not written, since its checks failed:\n{report.as_text()}",
        where=str(source),
        help="this is a fault of Archwright or of the weights; `archwright build --debug` shows more",
    )


def _check_target(source: str | Path, spec: Spec) -> None:
    """Whether TensorRT can read the graphs."""
    if spec.build.target == "onnxruntime":
        message = "TensorRT cannot read graphs of `build.target: onnxruntime`, whose operators only ONNX Runtime has"
        help = "use --to onnx, or set build.target to tensorrt or portable"
        raise ArchwrightError("BUILD007", message, where=str(source), help=help)


def _open_source(source: str | Path, overrides: Mapping[str, object]) -> _Source:
    path = Path(source)
    if not path.is_dir():
        return _from_spec(load(str(source), overrides))
    if is_artifact(path):
        help = "build from the run or the model folder; `archwright inspect` says what a folder is"
        raise ArchwrightError("BUILD003", "this is an artifact already", where=str(path), help=help)
    if any(key.startswith("build.weights") for key in overrides):
        help = "leave build.weights out, or build from the spec itself"
        raise ArchwrightError("BUILD004", "a run or a model folder is built with its own weights", help=help)
    opened = open_folder(path)
    spec = load(path / "spec.yaml", overrides)
    if spec_digest(spec) != spec_digest(opened.spec):
        raise ArchwrightError(
            "BUILD005",
            "the overrides change the model that the weights belong to",
            where=str(path),
            help="override values of the `build` section only",
        )
    build = spec.build.model_copy(update={"weights": ModelWeights(kind="model")})
    spec = spec.model_copy(update={"build": build})
    return _Source(spec=spec, weights=opened.weights, tokenizer=opened.tokenizer)


def _from_spec(spec: Spec) -> _Source:
    chosen = spec.build.weights
    if chosen.kind != "generated":
        raise ArchwrightError(
            "BUILD006",
            "a spec has no weights",
            help="give a run or a model folder, or add --set build.weights.kind=generated for initial weights",
        )
    path = spec.tokenizer.path if spec.tokenizer else None
    return _Source(
        spec=spec,
        # Already rounded: a table of 65,536 values is, in place of billions of its entries.
        weights=GeneratedWeights(params=lower(spec).params(), seed=chosen.seed, precision=spec.build.precision),
        tokenizer=Path(path) if path is not None else None,
    )


def _artifact_spec(spec: Spec) -> Spec:
    """The part of a spec that an artifact is made of: no paths, nothing of the training."""
    parts = {"extends": None, "tokenizer": None, "data": None, "train": None, "parallel": Parallel()}
    capacity = spec.build.max_positions or spec.model.max_positions
    quantize = spec.build.quantize and spec.build.quantize.model_copy(update={"calibration": None, "limit": None})
    engine = spec.build.engine.model_copy(update={"timing_cache": None})
    build = {"max_positions": capacity, "engine": engine, "quantize": quantize}
    return spec.model_copy(update=parts | {"build": spec.build.model_copy(update=build)})


def _write(artifact: Artifact, opened: _Source, progress: Callable[[str], None]) -> Export:
    ranks = len(artifact.graphs)
    progress(f"writing the graph{'s' if ranks > 1 else ''} and weights of {ranks} rank{'s' if ranks > 1 else ''}")
    (artifact.path / "spec.yaml").write_text(dump(artifact.spec))
    if opened.tokenizer is not None:
        for file in open_tokenizer(opened.tokenizer).files():
            shutil.copyfile(file, artifact.path / file.name)
    return export_graphs(
        artifact.plan,
        opened.weights,
        artifact.path,
        precision=artifact.precision,
        capacity=artifact.capacity,
        options=artifact.options,
        spec_digest=spec_digest(artifact.spec),
    )


def _list_files(artifact: Artifact, export: Export, details: dict[str, Any], measured: dict[str, Any]) -> None:
    """Write the sealed manifest, the last file of an artifact."""
    spec = artifact.spec
    sealed = measured | {SEAL: seal(details, measured, spec_digest(spec))}
    write_manifest(artifact.path, kind="artifact", spec=spec, details=details, measured=sealed, known=export.data)


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in TOOLS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
