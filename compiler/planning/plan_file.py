"""Plans on disk: what `plan -o` writes, and whether a spec still is what was planned."""

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from archwright.compiler.ir import Degrees
from archwright.compiler.planning.report import PlanReport
from archwright.spec import ArchwrightError, Spec
from archwright.spec.files import atomic_write
from archwright.spec.json_text import parse_json

Kind = Literal["training", "inference"]

_TRAIN = ("batch_size", "micro_batches", "sequence_length", "precision", "activation_checkpointing", "compile")
_BUILD = ("precision", "max_batch", "max_positions")


def write_plan(path: Path, report: PlanReport, spec: Spec) -> None:
    """The report, and under `inputs` everything that it depends on. Complete or absent."""
    kind: Kind = "training" if spec.train else "inference"
    degrees = report.training.degrees if report.training else Degrees(tensor=report.degrees["tensor"])
    content = {**report.to_json(), "inputs": inputs(spec, degrees, kind)}
    atomic_write(path, json.dumps(content, indent=2) + "\n")


def check_plan(path: Path, spec: Spec, degrees: Degrees, kind: Kind = "training") -> None:
    """Refuse a plan that was not made for this spec on this mesh.

    Raises ArchwrightError PLAN004 for a file that is no plan, PLAN005 where the plan is stale: it names the first value
    that differs, as planned and as it is.
    """
    planned, now = _read(path), inputs(spec, degrees, kind)
    for name in dict.fromkeys([*planned, *now]):
        before, after = planned.get(name, "absent"), now.get(name, "absent")
        if before != after:
            raise ArchwrightError(
                "PLAN005",
                f"the plan is stale: `{name}` was {_text(before)} and is {_text(after)}",
                where=str(path),
                help="plan again: archwright plan SPEC --gpus COUNTxGPU -o FILE",
            )


def inputs(spec: Spec, degrees: Degrees, kind: Kind) -> dict[str, Any]:
    """Dotted path → value of what a plan depends on: toolchain, mesh, architecture, and the sizes of the work.

    How weights begin, names, paths, and how long a run is do not matter.
    """
    values: dict[str, Any] = {"archwright": metadata.version("archwright"), "kind": kind}
    values |= {f"parallel.{axis}": degree for axis, degree in degrees.sizes.items()}
    values |= _flat("model", spec.model.model_dump(mode="json", exclude={"init"}))
    if kind == "inference":
        return values | _flat("build", spec.build.model_dump(mode="json", include=set(_BUILD)))
    values |= {"parallel.sequence": degrees.sequence, "parallel.ring": degrees.ring}
    if degrees.pipeline > 1:
        values |= _flat("parallel.schedule", spec.parallel.schedule.model_dump(mode="json"))
    if spec.train is not None:
        values |= _flat("train", spec.train.model_dump(mode="json", include=set(_TRAIN)))
        values["train.optimizer.kind"] = spec.train.optimizer.kind
    return values


def _flat(path: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {name: leaf for key, inner in value.items() for name, leaf in _flat(f"{path}.{key}", inner).items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {name: leaf for i, item in enumerate(value) for name, leaf in _flat(f"{path}[{i}]", item).items()}
    return {path: value}


def _read(path: Path) -> Mapping[str, Any]:
    help = "archwright plan SPEC -o FILE writes one"
    try:
        found = parse_json(path.read_bytes())["inputs"]
        if not isinstance(found, dict):
            raise TypeError
    except FileNotFoundError:
        raise ArchwrightError("PLAN004", "there is no such plan", where=str(path), help=help) from None
    except (ValueError, KeyError, TypeError):
        raise ArchwrightError("PLAN004", "this is no plan", where=str(path), help=help) from None
    return found


def _text(value: Any) -> str:
    return value if value == "absent" else json.dumps(value)
