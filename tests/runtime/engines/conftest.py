"""Artifacts whose engines are fakes (`fake.py`), for any number of stages and ranks."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest

from archwright.compiler.interpreters.numpy_ops import run_numpy
from archwright.compiler.ir import Plan
from archwright.compiler.targets.onnx_graph import export_graphs
from archwright.compiler.targets.stages import GraphOptions, stage_of
from archwright.compiler.targets.structural_hash import structural_hash
from archwright.compiler.targets.tensorrt_config import default_profiles
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.runtime.artifact import SEAL, Artifact, seal
from archwright.runtime.backends.tensorrt_backend import TensorRTBackend
from archwright.runtime.engines.binding import read_bindings
from archwright.runtime.engines.device import Array
from archwright.runtime.engines.mailbox import ThreadMailbox
from archwright.runtime.engines.opening import EngineFile, Engines
from archwright.runtime.engines.probe import make_probe, write_probe
from archwright.runtime.engines.processes import start_ranks
from archwright.runtime.engines.ranks import Ranks, RankServer
from archwright.runtime.model import Model
from archwright.runtime.rank_weights import RankWeights
from archwright.spec import Spec, load
from archwright.spec.manifest import read_manifest, write_manifest
from tests.runtime.engines.fake import FakeEngine, World
from tests.runtime.engines.models import (
    CAPACITY,
    fake_engine,
    plan_and_weights,
    spec_of,
)

FACTS: dict[str, Any] = {
    "library": "tensorrt_rtx",
    "version": "1.7.1",
    "compute_capabilities": ["8.9", "12.0"],
    "gpu": None,
    "flags": [],
    "hardware_compatibility": "none",
    "optimization_level": 3,
    "workspace_gib": 4.0,
    "layers": {"MATRIX_MULTIPLY": 9, "KV_CACHE_UPDATE": 4},
}
"""What the manifest says of an engine, but for its profiles."""


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
        logits: Literal["all", "last"] = "all",
        processes: bool = False,
        **limits: Any,
    ) -> Rig:
        spec = spec_of(layers, precision)
        plan, weights = plan_and_weights(spec, stages, tensor)
        profiles = [profile.model_dump(mode="json") for profile in default_profiles(spec.build, CAPACITY)]
        facts = {"library": "tensorrt", "version": "11.2", "flags": [], "profiles": profiles}
        options = GraphOptions(logits=logits)
        export = export_graphs(plan, None, tmp_path, precision=precision, capacity=CAPACITY, options=options)
        world, files = World(per_stage=tensor), []
        for rank in range(stages * tensor):
            graph = export.graphs[rank]
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


def rewrite(folder: Path, engines: Any) -> None:
    """A manifest of what now lies in the folder."""
    spec, old = load(folder / "spec.yaml"), read_manifest(folder)
    details = old.details | {"engines": engines}
    measured = {key: value for key, value in (old.measured or {}).items() if key != SEAL}
    measured[SEAL] = seal(details, measured, old.spec_digest)
    write_manifest(folder, kind="artifact", spec=spec, details=details, measured=measured)


def listed(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `build` says of the engines in a folder: FACTS, with `facts` in their place."""
    entries: dict[str, Any] = {}
    for rank in range(2):
        graph = onnx.load(folder / f"rank{rank}" / "stage0.onnx", load_external_data=False)
        config = {key: value for key, value in (FACTS | facts).items() if key != "layers"}
        entries[f"rank{rank}/stage0.engine"] = FACTS | facts | {"structural_hash": structural_hash(graph, config)}
    return entries


@pytest.fixture
def engines_of(tmp_path: Path, two_ranks: Path) -> Callable[..., Path]:
    """`engines_of(flags=[...])`: the artifact of two ranks with files that stand for engines, and a probe, as `build`
    lists and seals them."""

    def make(**facts: Any) -> Path:
        folder = tmp_path / "artifact"
        shutil.copytree(two_ranks, folder)
        artifact = Artifact(folder, load(folder / "spec.yaml"))
        limits = {"max_batch": artifact.max_batch, "capacity": artifact.capacity}
        write_probe(folder, make_probe(artifact.plan, RankWeights(artifact), **limits))
        for rank in range(2):
            (folder / f"rank{rank}" / "stage0.engine").write_bytes(b"engine %d" % rank)
        profiles = default_profiles(artifact.spec.build, artifact.capacity)
        shown = {"profiles": [profile.model_dump(mode="json") for profile in profiles]}
        rewrite(folder, listed(folder, shown | facts))
        return folder

    return make


def engines_of_weights(folder: Path) -> World:
    """Fake engines of an artifact's ranks, with the weights and the graphs that lie in it."""
    artifact = Artifact(folder, load(folder / "spec.yaml"))
    held, plan = RankWeights(artifact), artifact.plan
    world = World(per_stage=len(artifact.graphs) // artifact.num_stages)
    for rank, graph in enumerate(artifact.graphs):
        world.engines.append(
            FakeEngine(
                stage=stage_of(plan, artifact.stage_of_rank(rank)),
                weights={name: held.part(name, rank) for name in held.names()},
                table=read_bindings(graph),
                profiles=default_profiles(artifact.spec.build, artifact.capacity),
            )
        )
    return world


def in_threads(world: World) -> Callable[[int], Ranks]:
    """What starts the ranks of fake engines."""
    return lambda count: Ranks([ThreadMailbox(lambda: RankServer(world.machine).handle, rank) for rank in range(count)])
