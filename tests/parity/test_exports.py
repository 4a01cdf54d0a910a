"""Whatever a `build` section says, the graphs compute what the spec says: 300 random builds, 10,000 under `slow`."""

from collections import Counter
from pathlib import Path

import pytest

from archwright.spec import Spec
from tests.parity.conftest import Record
from tests.parity.exports import check_export, failures, fused_storages, largest, random_export

NUM_BUILDS, PIECE, NUM_MANY, MANY_PIECE = 300, 25, 10_000, 200


def run(seeds: range, folder: Path, record: Record) -> None:
    reports: list[str] = []
    for seed in seeds:
        place = folder / str(seed)
        spec = random_export(seed, place / "spec")
        checks = check_export(spec, seed, place / "artifact")
        record(f"error: builds, {title(spec)}", largest(checks))
        if report := failures(spec, checks, seed):
            reports.append(report)
    assert not reports, "\n\n".join(reports)


def title(spec: Spec) -> str:
    return spec.build.target + (", quantized" if spec.build.quantize else "")


@pytest.mark.heavy
@pytest.mark.parametrize("start", range(0, NUM_BUILDS, PIECE))
def test_builds_compute_what_their_specs_say(start: int, tmp_path: Path, record: Record) -> None:
    run(range(start, start + PIECE), tmp_path, record)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(NUM_BUILDS, NUM_BUILDS + NUM_MANY, MANY_PIECE))
def test_many_builds_compute_what_their_specs_say(start: int, tmp_path: Path, record: Record) -> None:
    run(range(start, start + MANY_PIECE), tmp_path, record)


def test_every_choice_is_drawn(tmp_path: Path) -> None:
    counts = Counter[str]()
    for seed in range(NUM_BUILDS):
        spec = random_export(seed, tmp_path / str(seed))
        build = spec.build
        if build.quantize is not None:
            counts.update(f"{build.target}, fused: {storage}" for storage in fused_storages(spec))
        counts.update([build.target, build.precision, f"fuse {build.fuse}", f"logits {build.logits}", build.moe.kind])
        counts.update(f"{axis} {getattr(build.parallel, axis)}" for axis in ("tensor", "pipeline", "expert"))
        counts.update(rule.kind for rule in (build.quantize.rules if build.quantize else ()))
    expected = {"portable", "tensorrt", "onnxruntime", "float32", "float16", "bfloat16", "fuse none", "fuse all"}
    expected |= {"logits all", "logits last", "dense", "gathered", "tensor 2", "tensor 4", "pipeline 2", "pipeline 3"}
    expected |= {"expert 2", "expert 3", "int4", "int8", "fp8", "keep"}
    targets = ("portable", "tensorrt", "onnxruntime")
    expected |= {f"{target}, fused: {storage}" for target in targets for storage in ("int4", "int8", "not alike")}
    assert all(counts[name] >= 5 for name in expected), counts
