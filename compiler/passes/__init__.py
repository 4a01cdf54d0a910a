"""Pure functions between the spec and the plan, run in order; the Program is verified after each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from archwright.compiler.ir import Axis, Degrees, Plan, Program
from archwright.compiler.ir.dump import dump_program
from archwright.compiler.ir.verifier import verify_plan, verify_program
from archwright.compiler.passes.lower import lower
from archwright.compiler.passes.partition import INFERENCE_TABLE, TRAINING_TABLE, degrees_of, partition
from archwright.compiler.passes.quantize import quantize
from archwright.spec import ArchwrightError, Spec

__all__ = [
    "INFERENCE_TABLE",
    "PASSES",
    "TRAINING_TABLE",
    "Pass",
    "build_passes",
    "build_plan",
    "build_program",
    "degrees_of",
    "lower",
    "partition",
    "quantize",
    "run_passes",
]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A step from the spec towards the plan. run: (what the pass before gave, degrees, table) → Program or Plan."""

    name: str
    run: Callable[[Any, Degrees, Mapping[Axis, str]], Program | Plan]


PASSES = (
    Pass(name="lower", run=lambda spec, degrees, table: lower(spec)),
    Pass(name="partition", run=partition),
)
"""In order. The first reads the spec, the last gives the plan."""


def build_passes(spec: Spec) -> tuple[Pass, ...]:
    """The passes of what `build` writes: between the others, what the spec's `build` section asks for."""
    first, *rest = PASSES
    chosen = spec.build.quantize
    return (first, Pass(name="quantize", run=lambda program, degrees, table: quantize(program, chosen)), *rest)


def build_program(spec: Spec) -> Program:
    """The Program of what `build` writes, of global sizes, not placed on a mesh."""
    return quantize(lower(spec), spec.build.quantize)


def build_plan(spec: Spec) -> Plan:
    """The plan of what `build` writes. Raises what `run_passes` raises."""
    return run_passes(spec, degrees_of(spec.build.parallel), passes=build_passes(spec))


def run_passes(
    spec: Spec,
    degrees: Degrees,
    table: Mapping[Axis, str] = INFERENCE_TABLE,
    *,
    passes: Sequence[Pass] | None = None,
    dump_after: str | None = None,
    write: Callable[[str], None] = print,
) -> Plan:
    """spec → Plan. table: which logical axes are cut, TRAINING_TABLE or INFERENCE_TABLE. passes: PASSES
    unless given, see `build_passes`.

    After the pass `dump_after` its Program is given to `write` as text.
    Raises ArchwrightError IR001 to IR010 and IR012 where a pass cannot do its work or leaves a Program that breaks a
    rule, and IR011 where `dump_after` is no pass.
    """
    passes = PASSES if passes is None else passes
    names = [item.name for item in passes]
    if dump_after is not None and dump_after not in names:
        raise ArchwrightError("IR011", f"there is no pass `{dump_after}`", help=f"the passes are {', '.join(names)}")
    value: Any = spec
    for item in passes:
        value = item.run(value, degrees, table)
        if isinstance(value, Plan):
            verify_plan(value)
        else:
            verify_program(value)
        if item.name == dump_after:
            write(dump_program(value.program if isinstance(value, Plan) else value))
    assert isinstance(value, Plan), "the last pass gives the plan"
    return value
