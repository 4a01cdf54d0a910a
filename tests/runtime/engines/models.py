"""The model that fake engines compute, cut into stages and ranks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from archwright.compiler.ir import Degrees, Plan, Program
from archwright.compiler.passes import run_passes
from archwright.compiler.targets.onnx_graph import cache_names
from archwright.compiler.targets.tensorrt_config import default_profiles
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.runtime.engines.binding import read_bindings
from archwright.spec import Spec
from tests.runtime.engines.fake import FakeEngine, local_weights

CAPACITY = 40
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def spec_of(layers: int, precision: str) -> Spec:
    """A model whose tokens depend strongly on every weight."""
    attention = {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8, "position": {"kind": "rope"}}
    layer = {"attention": attention, "ffn": {"kind": "swiglu", "hidden_size": 40}}
    model = {"vocab_size": 61, "hidden_size": 24, "max_positions": 64, "layers": layers, "layer": layer}
    model["init"] = {"kind": "normal", "std": 0.3}
    build = {"precision": precision, "max_batch": 3, "max_positions": CAPACITY}
    return Spec.model_validate({"version": 1, "name": "engines", "model": model, "build": build})


def interface(program: Program, caches: dict[Any, str], precision: str, first: bool, last: bool) -> onnx.ModelProto:
    """A rank graph's inputs and outputs, without nodes: all that binding reads of it."""
    tokens, kind, hidden = ["batch", "sequence"], TYPES[precision], program.hidden_size
    states = {(path, state): s for path, block in program.states().items() for state, s in block.items()}
    sizes = {key: ["batch", states[key].sizes[1], CAPACITY, states[key].sizes[3]] for key in caches}
    source = ("input_ids", TensorProto.INT64, tokens) if first else ("hidden", kind, [*tokens, hidden])
    result = ("hidden" if first else "hidden.next", kind, [*tokens, hidden])
    if last:
        result = ("logits", TensorProto.FLOAT, [*tokens, program.vocab_size])
    inputs = [
        source,
        ("position_ids", TensorProto.INT64, tokens),
        ("write_index", TensorProto.INT64, ["batch"]),
        ("kv_positions", TensorProto.INT64, ["positions"]),
        *((f"past.{name}", kind, sizes[key]) for key, name in caches.items()),
    ]
    outputs = [result, *((f"present.{name}", kind, sizes[key]) for key, name in caches.items())]
    infos = [[helper.make_tensor_value_info(*each) for each in group] for group in (inputs, outputs)]
    return helper.make_model(helper.make_graph([], "stage", *infos))


def stage_caches(plan: Plan, program: Program) -> dict[Any, str]:
    """The caches of a stage, the layers counted through the whole model."""
    return {key: name for key, name in cache_names(plan.local).items() if key[0] in program.states()}


def stage_program(plan: Plan, stage: int) -> Program:
    start, stop = plan.stages[stage]
    return replace(plan.local, segments=plan.local.segments[start:stop])


def plan_and_weights(spec: Spec, stages: int, tensor: int) -> tuple[Plan, GeneratedWeights]:
    plan = run_passes(spec, Degrees(tensor=tensor, pipeline=stages))
    weights = GeneratedWeights(params=plan.program.params(), seed=3, precision=spec.build.precision)
    return plan, weights


def fake_engine(content: bytes) -> FakeEngine:
    """What the file of a fake engine says: the model, its mesh, the rank, and where its graph lies."""
    said = json.loads(content)
    spec = spec_of(said["layers"], said["precision"])
    plan, weights = plan_and_weights(spec, said["stages"], said["tensor"])
    program = stage_program(plan, said["rank"] // said["tensor"])
    return FakeEngine(
        program=program,
        weights=local_weights(plan, weights, said["rank"] % said["tensor"]),
        table=read_bindings(Path(said["graph"])),
        caches=stage_caches(plan, program),
        profiles=default_profiles(spec.build, CAPACITY),
    )
