"""Artifacts whose engines are fakes (`fake.py`), for any number of stages and ranks."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from archwright.compiler.interpreters.numpy_ops import run_numpy
from archwright.compiler.ir import Degrees, Plan, Program
from archwright.compiler.passes import run_passes
from archwright.compiler.targets.onnx_graph import cache_names
from archwright.compiler.targets.tensorrt_config import default_profiles
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.runtime.artifact import Artifact
from archwright.runtime.backends.tensorrt_backend import TensorRTBackend
from archwright.runtime.engines.binding import read_bindings
from archwright.runtime.engines.device import Array
from archwright.runtime.engines.mailbox import ThreadMailbox
from archwright.runtime.engines.opening import EngineFile, Engines
from archwright.runtime.engines.ranks import Ranks, RankServer
from archwright.runtime.model import Model
from archwright.spec import Spec
from tests.runtime.engines.fake import FakeEngine, World, local_weights

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


@dataclass
class Rig:
    """A model on fake ranks, and its oracle."""

    spec: Spec
    plan: Plan
    weights: GeneratedWeights
    world: World
    engines: Engines
    ranks: Ranks

    def open(self) -> Model:
        backend = TensorRTBackend(self.engines, self.ranks)
        return Model(path=self.engines.artifact.path, spec=self.spec, backend=backend, tokenizer=None)

    def oracle(self, ids_BS: Array) -> Array:
        arrays = {name: self.weights.read(name) for name in self.weights.names()}
        return run_numpy(self.plan.program, arrays, ids_BS)

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        """The oracle's tokens, each from the whole sequence, without a cache."""
        import numpy as np

        ids = list(prompt)
        for _ in range(tokens):
            ids.append(int(self.oracle(np.array([ids]))[0, -1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture
def rig(tmp_path: Path) -> Callable[..., Rig]:
    """`rig(stages=2, tensor=2)`: every rank a thread."""

    def make(*, stages: int = 1, tensor: int = 1, layers: int = 2, precision: str = "float32", **ranks: Any) -> Rig:
        spec = spec_of(layers, precision)
        plan = run_passes(spec, Degrees(tensor=tensor, pipeline=stages))
        weights = GeneratedWeights(params=plan.program.params(), seed=3, precision=precision)
        profiles = default_profiles(spec.build, CAPACITY)
        world, names = World(per_stage=tensor), cache_names(plan.local)
        files: list[EngineFile] = []
        facts = {
            "library": "tensorrt",
            "version": "11.2",
            "profiles": [profile.model_dump(mode="json") for profile in profiles],
        }
        for rank in range(stages * tensor):
            stage = rank // tensor
            start, stop = plan.stages[stage]
            program = replace(plan.local, segments=plan.local.segments[start:stop])
            caches = {key: name for key, name in names.items() if key[0] in program.states()}
            graph = tmp_path / f"rank{rank}" / f"stage{stage}.onnx"
            graph.parent.mkdir()
            onnx.save(interface(program, caches, precision, stage == 0, stage == stages - 1), graph)
            content = f"engine of rank {rank}".encode()
            graph.with_suffix(".engine").write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest()
            files.append(
                EngineFile(rank=rank, graph=graph, path=graph.with_suffix(".engine"), sha256=sha256, facts=facts)
            )
            local = local_weights(plan, weights, rank % tensor)
            table = read_bindings(graph)
            world.engines.append(
                FakeEngine(program=program, weights=local, table=table, caches=caches, profiles=profiles)
            )
        engines = Engines(artifact=Artifact(tmp_path, spec), files=tuple(files), stages=stages)
        boxes = [ThreadMailbox(lambda: RankServer(world.machine).handle, rank) for rank in range(len(files))]
        return Rig(spec, plan, weights, world, engines, Ranks(boxes, **ranks))

    return make
