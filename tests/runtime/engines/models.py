"""The model that fake engines compute, cut into stages and ranks."""

import json
from pathlib import Path

from archwright.compiler.ir import Degrees, Plan
from archwright.compiler.passes import run_passes
from archwright.compiler.targets.stages import stage_of
from archwright.compiler.targets.tensorrt_config import default_profiles
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.runtime.engines.binding import read_bindings
from archwright.spec import Spec
from tests.runtime.engines.fake import FakeEngine, local_weights

CAPACITY = 40


def spec_of(layers: int, precision: str) -> Spec:
    """A model whose tokens depend strongly on every weight."""
    attention = {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8, "position": {"kind": "rope"}}
    layer = {"attention": attention, "ffn": {"kind": "swiglu", "hidden_size": 40}}
    model = {"vocab_size": 61, "hidden_size": 24, "max_positions": 64, "layers": layers, "layer": layer}
    model["init"] = {"kind": "normal", "std": 0.3}
    build = {"precision": precision, "max_batch": 3, "max_positions": CAPACITY}
    return Spec.model_validate({"version": 1, "name": "engines", "model": model, "build": build})


def plan_and_weights(spec: Spec, stages: int, tensor: int) -> tuple[Plan, GeneratedWeights]:
    plan = run_passes(spec, Degrees(tensor=tensor, pipeline=stages))
    weights = GeneratedWeights(params=plan.program.params(), seed=3, precision=spec.build.precision)
    return plan, weights


def fake_engine(content: bytes) -> FakeEngine:
    """What the file of a fake engine says: the model, its mesh, the rank, and where its graph lies."""
    said = json.loads(content)
    spec = spec_of(said["layers"], said["precision"])
    plan, weights = plan_and_weights(spec, said["stages"], said["tensor"])
    return FakeEngine(
        stage=stage_of(plan, said["rank"] // said["tensor"]),
        weights=local_weights(plan, weights, said["rank"] % said["tensor"]),
        table=read_bindings(Path(said["graph"])),
        profiles=default_profiles(spec.build, CAPACITY),
    )
