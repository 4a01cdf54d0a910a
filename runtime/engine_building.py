"""The engines of an artifact, built beside its graphs, and the values that they will be compared with."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from archwright.compiler.targets.network_check import planned_network
from archwright.compiler.targets.structural_hash import by_structure
from archwright.compiler.targets.tensorrt_config import default_profiles
from archwright.compiler.targets.tensorrt_engine import EngineBuilder, EngineSummary
from archwright.compiler.targets.tensorrt_loader import tensorrt_title
from archwright.runtime.artifact import Artifact
from archwright.runtime.build_progress import Reporter
from archwright.runtime.engines.probe import make_probe, write_probe
from archwright.runtime.rank_weights import RankWeights


@dataclass(frozen=True, kw_only=True)
class BuiltEngines:
    """What the manifest says of the engines. details: the same in every build; measured: not."""

    details: Mapping[str, Any]
    measured: Mapping[str, Any]


def build_engines(artifact: Artifact, builder: EngineBuilder, reporter: Reporter) -> BuiltEngines:
    """An engine and its log beside each rank's graph, and the probe. Raises what `EngineBuilder.build` raises."""
    title = tensorrt_title(builder.library)
    planned = planned_network(artifact.plan, precision=artifact.precision, capacity=artifact.capacity)
    engines: dict[str, EngineSummary] = {}
    structures = len(by_structure(artifact.graphs, builder.facts()))
    reporter.say(f"{_count(len(artifact.graphs), 'engine')} to build, of {_count(structures, 'structure')}")
    for number, graph in enumerate(artifact.graphs, 1):
        reporter.say(f"building engine {number} of {len(artifact.graphs)} with {title}")
        engine = builder.build(graph, planned)
        engines[engine.path.relative_to(artifact.path).as_posix()] = engine
    reporter.say("computing the values that the engines will be compared with")
    weights = RankWeights(artifact)
    write_probe(
        artifact.path,
        make_probe(artifact.plan, weights, max_batch=artifact.max_batch, capacity=artifact.capacity),
    )
    return BuiltEngines(
        details={name: dict(engine.facts) for name, engine in engines.items()},
        measured={name: engine.seconds for name, engine in engines.items()},
    )


def engine_builder(artifact: Artifact, library: ModuleType, reporter: Reporter) -> EngineBuilder:
    """Raises ArchwrightError BUILD034 where this library cannot build what the artifact's spec asks for."""
    build = artifact.spec.build
    profiles = default_profiles(build, artifact.capacity)
    return EngineBuilder(profiles=profiles, engine=build.engine, library=library, watch=reporter.watch)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
