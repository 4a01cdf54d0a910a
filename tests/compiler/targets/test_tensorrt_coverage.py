"""TensorRT for RTX parses and builds what `build` writes, over a covering set of all that a build section chooses.

It needs no GPU. Where its wheel installs, this test lists what was built and fails unless that is everything; elsewhere
it is a visible skip. Of the ranks whose graphs have one structure one is built. Target `onnxruntime` is not among them:
its operators are ONNX Runtime's own, and `build --to engine` refuses it.
"""

from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest

from archwright.compiler.passes import lower
from archwright.compiler.targets.network_check import planned_network
from archwright.compiler.targets.onnx_graph import export_graphs
from archwright.compiler.targets.structural_hash import by_structure
from archwright.compiler.targets.tensorrt_engine import EngineBuilder, default_profiles
from archwright.compiler.weights.quantized import built_weights
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.runtime.artifact import Artifact
from archwright.spec import ArchwrightError, Spec
from tests.compiler.targets.covering import AXES, Row, covering_set, is_legal, pairs, spec_of

LISTED = "listed: what TensorRT for RTX built, with attention/cache/collective layers of each structure"
MOST = 150


def build_structures(trt: ModuleType, spec: Spec, folder: Path) -> list[str]:
    """The layers of one rank's network of each structure, which was checked against its plan and built."""
    artifact = Artifact(folder, spec)
    weights = built_weights(spec, GeneratedWeights(params=lower(spec).params(), seed=0))
    form = {"precision": artifact.precision, "capacity": artifact.capacity, "options": artifact.options}
    export_graphs(artifact.plan, weights, folder, **form)
    profiles = default_profiles(spec.build, artifact.capacity, token_bytes=artifact.rank_gathered_bytes)
    builder = EngineBuilder(profiles=profiles, engine=spec.build.engine, library=trt)
    found: list[str] = []
    for first, *_ in by_structure(artifact.graphs).values():
        stage = artifact.stage_of_rank(artifact.graphs.index(first))
        layers = builder.build(first, planned_network(artifact.plan, stage=stage, **form)).layers
        kinds = (layers.get(kind, 0) for kind in ("ATTENTION_INPUT", "KV_CACHE_UPDATE", "DIST_COLLECTIVE"))
        found.append("/".join(map(str, kinds)))
    return found


def title(row: Row) -> str:
    chosen = dict(zip(AXES, row, strict=True))
    numbers = [f"{axis} {chosen[axis]}" for axis in ("tensor", "pipeline", "expert") if chosen[axis] != "1"]
    words = [chosen["experts"] if chosen["experts"] != "dense" else "", "fused" if chosen["fuse"] == "all" else ""]
    words += ["last logits" if chosen["logits"] == "last" else ""]
    return ", ".join([chosen["model"], chosen["weights"], chosen["target"], *numbers, *filter(None, words)])


@pytest.mark.heavy
def test_the_covering_set_is_built(tmp_path: Path, record_property: pytest.FixtureRequest) -> None:
    if find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT for RTX is not installed: pip install archwright[tensorrt-rtx]")
    import tensorrt_rtx  # where the wheel is installed and broken, this is a failure and no skip

    lines: list[str] = []
    failed: list[str] = []
    rows = covering_set()
    for number, row in enumerate(rows):
        try:
            built = build_structures(tensorrt_rtx, spec_of(row), tmp_path / str(number))
        except ArchwrightError as error:
            failed.append(f"{title(row)}: {error}")
        else:
            lines.append(f"{title(row)}: {', '.join(built)}")
    record_property(LISTED, "\n".join(lines))
    assert not failed, "\n".join(failed)
    assert 0 < len(rows) == len(lines) and sum(line.count("/") // 2 for line in lines) <= MOST


def test_every_pair_of_choices_is_covered() -> None:
    rows = covering_set()
    assert len(rows) == len(set(rows)) and all(map(is_legal, rows))
    covered = set[tuple[int, str, int, str]]().union(*map(pairs, rows))
    names = list(AXES)
    for a, b in combinations(range(len(names)), 2):
        for x in AXES[names[a]]:
            for y in AXES[names[b]]:
                dense = {"expert": "1", "experts": "dense"}
                plain = {names[a]: x, names[b]: y}
                about_experts = any(plain.get(axis, value) != value for axis, value in dense.items())
                if about_experts and plain.get("model", "experts") not in ("experts", "mixtral-8x7b"):
                    continue  # no such build
                assert (a, x, b, y) in covered, plain
