"""The rules that every Program keeps, checked after each pass."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from archwright.compiler.interpreters.cost_ops import Shaped, run_cost
from archwright.compiler.ir.param import TABLE_AXES, Param, Split
from archwright.compiler.ir.plan import Plan
from archwright.compiler.ir.program import Program
from archwright.spec import ArchwrightError

# Any sizes do, as long as no two of them are equal by accident of the model's own.
_BATCH, _SEQUENCE, _VISIBLE = 3, 7, 11


def verify_program(program: Program, *, splits: Mapping[str, tuple[Split, ...]] | None = None) -> None:
    """Check a Program: what can be read off it, then runs over shapes: whole sequences, with targets, with a cache, and
    with a cache the logits of one token a row.

    splits: canonical name → how the parameter is cut, where the Program's own sizes are local (see `verify_plan`).
    Raises ArchwrightError, located at the block: IR002 a parameter whose shape, axes and grain disagree; IR003 a split
    that does not fit its parameter; IR004 shared parameters that differ; IR005 names that are not unique; IR006 a block
    reads what it does not declare; IR007 declares what it does not read; IR008 shapes, IR009 placements that disagree.
    """
    _check_names(program)
    shared: dict[str, Param] = {}
    for place, site in program.sites().items():
        _check_param(place, site.param)
        if site.param.share and shared.setdefault(site.param.share, site.param) != site.param:
            message = f"differs from the other parameter that is shared as `{site.param.share}`"
            raise ArchwrightError("IR004", message, where=place)
    _check_run(program, splits)


def verify_plan(plan: Plan) -> None:
    """Check both Programs of a plan, and that the local one is the global one cut as its splits say (IR010).

    Raises what `verify_program` raises.
    """
    verify_program(plan.program)
    sites, local = plan.program.sites(), plan.local.sites()
    if sites.keys() != local.keys():
        raise ArchwrightError("IR010", f"the local Program differs in {sorted(sites.keys() ^ local.keys())}")
    for place, site in sites.items():
        shape = site.param.shape
        for split in site.param.splits:
            shape = split.local_shape(shape)
        if local[place].param != replace(site.param, shape=shape, splits=()):
            raise ArchwrightError("IR010", f"the local shape is {local[place].param.shape}, not {shape}", where=place)
    verify_program(plan.local, splits={name: site.param.splits for name, site in sites.items()})


def _check_names(program: Program) -> None:
    paths = Counter(path for path, _ in program.blocks())
    repeated = [path for path, count in paths.items() if count > 1]
    if repeated:
        raise ArchwrightError("IR005", "two blocks have this path", where=repeated[0] or "the empty path")


def _check_param(place: str, param: Param) -> None:
    if len(param.axes) != len(param.shape) or len(param.grain or param.shape) != len(param.shape):
        message = f"shape {param.shape}, axes {param.axes} and grain {param.grain} differ in length"
        raise ArchwrightError("IR002", message, where=place)
    if any(size < 1 for size in (*param.shape, *param.grain)):
        raise ArchwrightError("IR002", f"shape {param.shape} and grain {param.grain} must be positive", where=place)
    if any(size % grain for size, grain in zip(param.shape, param.grain or param.shape, strict=True)):
        raise ArchwrightError("IR002", f"grain {param.grain} does not divide shape {param.shape}", where=place)
    for split in param.splits:
        _check_split(place, param, split)


def _check_split(place: str, param: Param, split: Split) -> None:
    if not 0 <= split.dim < len(param.shape):
        raise ArchwrightError("IR003", f"dim {split.dim} is cut, and there are {len(param.shape)}", where=place)
    uneven = param.units(split.dim) % split.parts and param.axes[split.dim] not in TABLE_AXES
    if split.parts < 1 or uneven or split.degree % split.parts:
        message = f"{param.units(split.dim)} units in {split.parts} parts for {split.degree} ranks do not come out even"
        raise ArchwrightError("IR003", message, where=place)
    if split.parts < split.degree and param.axes[split.dim] != "kv_heads":
        raise ArchwrightError("IR003", f"{param.axes[split.dim]} is repeated; only kv_heads may be", where=place)


def _check_run(program: Program, splits: Mapping[str, tuple[Split, ...]] | None) -> None:
    runs = [
        run_cost(program, batch=_BATCH, sequence=_SEQUENCE, splits=splits),
        run_cost(program, batch=_BATCH, sequence=_SEQUENCE, targets=True, splits=splits),
        run_cost(program, batch=_BATCH, sequence=_SEQUENCE, visible=_VISIBLE, splits=splits),
    ]
    if program.spread is None:  # pieces of a sequence are a training's, which has no use for single logits
        runs.append(run_cost(program, batch=_BATCH, sequence=_SEQUENCE, visible=_VISIBLE, last=True, splits=splits))
    reads = {read for run in runs for read in run.reads}
    for path, block in program.blocks():
        for name in (*block.params(), *block.children()):
            if (path, name) not in reads:
                raise ArchwrightError("IR007", f"`{name}` is declared and never read", where=path or "the last segment")
    written = Counter(runs[2].states)
    declared = Counter((path, name) for path, states in program.states().items() for name in states)
    if written != declared:
        path, name = next(iter((written - declared) + (declared - written)))
        message = f"state `{name}` is declared {declared[path, name]} and updated {written[path, name]} times"
        raise ArchwrightError("IR007", message, where=path)
    spread = None if program.segments[-1].path == "" else program.spread  # between stages tokens stay spread
    for run in runs:
        for value in run.output if isinstance(run.output, tuple) else (run.output,):
            _check_output(value, spread)


def _check_output(value: Shaped, spread: str | None) -> None:
    if value.sharded is not None or value.entered is not None or value.spread != spread:
        raise ArchwrightError("IR009", "the Program's output is not the same on all ranks", where="the last segment")
