"""Artifacts whose engines are fakes (`fake.py`), for any number of stages and ranks."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from archwright.compiler.interpreters.numpy_ops import run_numpy
from archwright.compiler.ir import Plan
from archwright.compiler.targets.tensorrt_config import default_profiles
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.runtime.artifact import Artifact
from archwright.runtime.backends.tensorrt_backend import TensorRTBackend
from archwright.runtime.engines.device import Array
from archwright.runtime.engines.mailbox import ThreadMailbox
from archwright.runtime.engines.opening import EngineFile, Engines
from archwright.runtime.engines.processes import start_ranks
from archwright.runtime.engines.ranks import Ranks, RankServer
from archwright.runtime.model import Model
from archwright.spec import Spec
from tests.runtime.engines.fake import World
from tests.runtime.engines.models import (
    CAPACITY,
    fake_engine,
    interface,
    plan_and_weights,
    spec_of,
    stage_caches,
    stage_program,
)


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
        ids = list(prompt)
        for _ in range(tokens):
            ids.append(int(self.oracle(np.array([ids]))[0, -1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """`rig(stages=2, tensor=2)`: every rank a thread."""

    def make(
        *,
        stages: int = 1,
        tensor: int = 1,
        layers: int = 2,
        precision: str = "float32",
        processes: bool = False,
        **limits: Any,
    ) -> Rig:
        spec = spec_of(layers, precision)
        plan, weights = plan_and_weights(spec, stages, tensor)
        profiles = default_profiles(spec.build, CAPACITY)
        facts = {
            "library": "tensorrt",
            "version": "11.2",
            "flags": [],
            "profiles": [profile.model_dump(mode="json") for profile in profiles],
        }
        world, files = World(per_stage=tensor), []
        for rank in range(stages * tensor):
            stage = rank // tensor
            program = stage_program(plan, stage)
            graph = tmp_path / f"rank{rank}" / f"stage{stage}.onnx"
            graph.parent.mkdir()
            caches = stage_caches(plan, program)
            onnx.save(interface(program, caches, precision, stage == 0, stage == stages - 1), graph)
            said = {"layers": layers, "precision": precision, "stages": stages, "tensor": tensor, "rank": rank}
            content = json.dumps(said | {"graph": str(graph)}).encode()
            path = graph.with_suffix(".engine")
            path.write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest()
            files.append(EngineFile(rank=rank, graph=graph, path=path, sha256=sha256, facts=facts))
            if not processes:
                world.engines.append(fake_engine(content))
        engines = Engines(artifact=Artifact(tmp_path, spec), files=tuple(files), stages=stages)
        if processes:
            ranks = start_ranks(len(files), "tests.runtime.engines.gloo:machine")
        else:
            boxes = [ThreadMailbox(lambda: RankServer(world.machine).handle, rank) for rank in range(len(files))]
            ranks = Ranks(boxes, **limits)
        made.append(ranks)
        return Rig(spec, plan, weights, world, engines, ranks)

    made: list[Ranks] = []
    yield make
    for ranks in made:
        ranks.close()
