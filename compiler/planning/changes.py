"""The cheapest change that makes a training fit: neighbours of the spec, estimated, those that fit by step time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from archwright.compiler.ir import Degrees
from archwright.compiler.passes import degrees_of
from archwright.compiler.planning.layout import Layouts
from archwright.compiler.planning.machines import Cluster
from archwright.compiler.planning.memory import total_bytes
from archwright.compiler.planning.training import estimate, memory_of
from archwright.spec import ArchwrightError, Spec
from archwright.spec.checks import RULES
from archwright.spec.models import FullRecompute, Node, SelectiveRecompute

Settings = dict[str, Any]
"""Path below the spec → value, `parallel.tensor` → 4."""

_MOST_TIMES_MORE_GPUS = 64


@dataclass(frozen=True, kw_only=True)
class Change:
    """settings: `--set PATH=VALUE`, as text. count: GPUs. total_bytes: of the fullest rank then."""

    settings: dict[str, str]
    count: int
    name: str
    total_bytes: int
    step_s: float

    @property
    def command(self) -> str:
        """What to add to the command line."""
        assignments = [f"{path}={value}" for path, value in self.settings.items()]
        words = [f"--set '{text}'" if " " in text else f"--set {text}" for text in assignments]
        return " ".join([*words, f"--gpus {self.count}x{self.name}"])

    def to_json(self) -> dict[str, object]:
        return {
            "set": self.settings, "gpus": f"{self.count}x{self.name}", "command": self.command,
            "total_bytes": self.total_bytes, "step_s": self.step_s,
        }  # fmt: skip


def cheapest_change(spec: Spec, layouts: Layouts, degrees: Degrees, cluster: Cluster) -> Change | None:
    """Of the changes that make `spec` fit `cluster`, the one with the shortest expected step; None if none does.

    One change at a time; then recomputation or smaller micro-batches together with another; then more GPUs, twice as
    many until it fits. Each candidate must be a legal spec.
    """
    search = _Search(spec, layouts, cluster)
    single = list(_single(spec, degrees))
    saving = [each for each in single if any(path.startswith("train.") for path in each)]
    pairs = [a | b for a in saving for b in single if a.keys().isdisjoint(b.keys())]
    for settings in (single, pairs, [a | b for a in pairs for b in saving if a.keys().isdisjoint(b.keys())]):
        found = [change for each in settings if (change := search.try_(each, cluster.count))]
        if found:
            return min(found, key=lambda change: change.step_s)
    return search.more_gpus([{}, *saving, *(a | b for a in saving for b in saving if a.keys().isdisjoint(b.keys()))])


def _single(spec: Spec, degrees: Degrees) -> Iterator[Settings]:
    """Changes of one thing. Degrees are all written as numbers but one, so that their product stays the same."""
    train = spec.train
    assert train is not None
    if train.activation_checkpointing.kind == "none":
        yield {"train.activation_checkpointing": SelectiveRecompute(kind="selective")}
    if train.activation_checkpointing.kind != "full":
        yield {"train.activation_checkpointing": SelectiveRecompute(kind="selective", keep=("attention",))}
        yield {"train.activation_checkpointing": FullRecompute(kind="full")}
    if not spec.parallel.reshard and degrees.pipeline == 1 and degrees.shard > 1:
        yield {"parallel.reshard": True}
    if degrees.tensor > 1 and not degrees.sequence:
        yield {"parallel.sequence": True}
    for times in (2, 4, 8, 16):
        yield {"train.micro_batches": train.micro_batches * times}
    if degrees.data_replicate > 1:
        yield {"parallel.data_shard": degrees.data_shard * degrees.data_replicate, "parallel.data_replicate": 1}
    yield from chain(_more(degrees, "tensor"), _more(degrees, "pipeline"), _more(degrees, "context"))


def _more(degrees: Degrees, axis: str) -> Iterator[Settings]:
    """2, 4 and 8 times as much of an axis, taken from `data_shard` or from `data_replicate`."""
    for other in ("data_shard", "data_replicate"):
        for times in (2, 4, 8):
            if getattr(degrees, other) % times == 0:
                settings: Settings = {
                    f"parallel.{axis}": getattr(degrees, axis) * times,
                    f"parallel.{other}": getattr(degrees, other) // times,
                }
                if axis == "tensor":
                    settings["parallel.sequence"] = True
                yield settings


class _Search:
    def __init__(self, spec: Spec, layouts: Layouts, cluster: Cluster) -> None:
        self._spec = spec
        self._layouts = layouts
        self._cluster = cluster

    def try_(self, settings: Settings, count: int) -> Change | None:
        """The change, if it is a legal spec, is a mesh of so many GPUs, and fits."""
        spec = with_settings(self._spec, settings)
        train = spec.train
        assert train is not None
        degrees = degrees_of(spec.parallel, count)
        pieces = degrees.data * train.micro_batches
        if degrees.world != count or train.batch_size % pieces or train.batch_size < pieces:
            return None
        if any(True for rule in RULES for _ in rule(spec)):
            return None
        try:
            layout = self._layouts.at(degrees)
        except ArchwrightError:
            return None
        cluster = replace(self._cluster, count=count)
        memory = memory_of(layout, spec.parallel, train, cluster)[1]
        if max(map(total_bytes, memory)) > cluster.capacity_bytes:
            return None
        found = estimate(layout, spec.parallel, train, cluster)
        assert found.time is not None
        return Change(
            settings={path: _text(value) for path, value in settings.items()},
            count=count,
            name=cluster.name,
            total_bytes=found.largest_bytes,
            step_s=found.time.step_s,
        )

    def more_gpus(self, savings: list[Settings]) -> Change | None:
        """Twice as many GPUs, and again, that share parameters and batch."""
        count = self._cluster.count
        for times in (2, 4, 8, 16, 32, _MOST_TIMES_MORE_GPUS):
            found: list[Change] = []
            for each in savings:
                auto = each if self._auto() else {**each, "parallel.data_shard": self._data_shard() * times}
                batch = self._spec.train.batch_size if self._spec.train else 1
                for more in ({}, {"train.batch_size": batch * times}):
                    change = self.try_(auto | more, count * times)
                    if change:
                        found.append(change)
                        break
            if found:
                return min(found, key=lambda change: change.step_s)
        return None

    def _auto(self) -> bool:
        parallel = self._spec.parallel
        return any(getattr(parallel, axis) == "auto" for axis in Degrees().sizes)

    def _data_shard(self) -> int:
        degree = self._spec.parallel.data_shard
        assert degree != "auto"
        return degree


def with_settings(spec: Spec, settings: Settings) -> Spec:
    """A copy of a spec with values at `section.field`."""
    for path, value in settings.items():
        section, _, name = path.partition(".")
        node = getattr(spec, section).model_copy(update={name: value})
        spec = spec.model_copy(update={section: node})
    return spec


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Node):
        given = {name: each for name, each in value.model_dump(mode="json").items() if name in value.model_fields_set}
        return "{" + ", ".join(f"{name}: {_flow(each)}" for name, each in given.items()) + "}"
    return str(value)


def _flow(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
