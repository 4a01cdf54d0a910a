"""Pure functions between the spec and the plan, run in order; the Program is verified after each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from archwright.compiler.ir import Degrees, Plan, Program
from archwright.compiler.ir.dump import dump_program
from archwright.compiler.ir.verifier import verify_plan, verify_program
from archwright.compiler.passes.lower import lower
from archwright.compiler.passes.partition import degrees_of, partition
from archwright.spec import ArchwrightError, Spec

__all__ = ["PASSES", "Pass", "degrees_of", "lower", "partition", "run_passes"]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A step from the spec towards the plan. run: (what the pass before gave, degrees) → Program or Plan."""

    name: str
    run: Callable[[Any, Degrees], Program | Plan]


PASSES = (
    Pass(name="lower", run=lambda spec, degrees: lower(spec)),
    Pass(name="partition", run=partition),
)
"""In order. The first reads the spec, the last gives the plan."""


def run_passes(
    spec: Spec, degrees: Degrees, *, dump_after: str | None = None, write: Callable[[str], None] = print
) -> Plan:
    """spec → Plan. After the pass `dump_after` its Program is given to `write` as text.

    Raises ArchwrightError IR001 to IR010 where a pass cannot do its work or leaves a Program that breaks a rule, and
    IR011 where `dump_after` is no pass.
    """
    names = [item.name for item in PASSES]
    if dump_after is not None and dump_after not in names:
        raise ArchwrightError("IR011", f"there is no pass `{dump_after}`", help=f"the passes are {', '.join(names)}")
    value: Any = spec
    for item in PASSES:
        value = item.run(value, degrees)
        if isinstance(value, Plan):
            verify_plan(value)
        else:
            verify_program(value)
        if item.name == dump_after:
            write(dump_program(value.program if isinstance(value, Plan) else value))
    assert isinstance(value, Plan), "the last pass gives the plan"
    return value
