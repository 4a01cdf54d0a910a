"""Rules of `build.quantize`."""

from collections.abc import Callable, Iterator

from archwright.spec.findings import Finding, divisors, nearest
from archwright.spec.models import Spec
from archwright.spec.quantization import Matrix, deciding, matrices

GROUP_SIZES = (128, 64, 32)
_RULES = "build.quantize.rules"


def _matched(spec: Spec) -> Iterator[tuple[int, Matrix]]:
    """(number of the rule, matrix) of each matrix that a rule decides about; of equal ones in several layers one."""
    quantize = spec.build.quantize
    if quantize is None:
        return
    told: set[tuple[int, str, int]] = set()
    for matrix in matrices(spec.model):
        number = deciding(quantize, matrix.path)
        if number is None or (number, matrix.suffix, matrix.columns) in told:
            continue
        told.add((number, matrix.suffix, matrix.columns))
        yield number, matrix


def _rules_match(spec: Spec) -> Iterator[Finding]:
    """A rule that never decides is a misspelt name, or stands behind one that takes everything."""
    quantize = spec.build.quantize
    if quantize is None:
        return
    names = [matrix.path for matrix in matrices(spec.model)]
    used = {deciding(quantize, name) for name in names}
    for number, rule in enumerate(quantize.rules):
        if number in used:
            continue
        tied = spec.model.tied_embeddings and rule.match == "lm_head"
        yield Finding(
            code="SPEC060", path=f"{_RULES}[{number}]",
            message=f"the rule for `{rule.match}` decides about no matrix",
            label="the first rule that matches decides, and none is left for this one",
            help="the tied head is `model.embed_tokens`" if tied else
            f"the matrices are {names[0]}, {names[1]}, ..., {names[-1]}; put narrow rules before wide ones",
        )  # fmt: skip


def _groups_divide_columns(spec: Spec) -> Iterator[Finding]:
    quantize = spec.build.quantize
    for number, matrix in _matched(spec):
        assert quantize is not None
        rule = quantize.rules[number]
        degree = spec.build.parallel.tensor if matrix.cut else 1
        if rule.kind != "int4" or matrix.columns % degree or (matrix.columns // degree) % rule.group_size == 0:
            continue
        local = matrix.columns // degree
        legal = [size for size in GROUP_SIZES if local % size == 0]
        where = f" on each of {degree} ranks" if degree > 1 else ""
        help = f"use group_size: {nearest(rule.group_size, legal)}" if legal else "use kind: int8 or keep for it"
        degrees = [d for d in divisors(degree) if matrix.columns // d % rule.group_size == 0]
        if degrees and not legal:
            help = f"use tensor: {max(degrees)}, or kind: int8 for it"
        yield Finding(
            code="SPEC061", path=f"{_RULES}[{number}]",
            others={"build.parallel.tensor": degree} if degree > 1 else {},
            message=f"`{matrix.path}` has {local} input channels{where}, not a multiple of {rule.group_size}",
            label=f"{rule.group_size} channels share a scale", help=help,
        )  # fmt: skip


def _awq_has_a_place(spec: Spec) -> Iterator[Finding]:
    quantize = spec.build.quantize
    for number, matrix in _matched(spec):
        assert quantize is not None
        rule = quantize.rules[number]
        if rule.kind == "int4" and rule.method == "awq" and not matrix.scalable:
            yield Finding(
                code="SPEC062", path=f"{_RULES}[{number}]",
                message=f"awq cannot scale the inputs of `{matrix.path}`",
                label="no weight before it could be divided by the scales",
                help=f"put a rule {{kind: int4, match: \"{_pattern(matrix)}\"}} with method: rtn before this one",
            )  # fmt: skip


def _fp8_is_linear(spec: Spec) -> Iterator[Finding]:
    quantize = spec.build.quantize
    for number, matrix in _matched(spec):
        assert quantize is not None
        if quantize.rules[number].kind == "fp8" and not matrix.is_linear:
            yield Finding(
                code="SPEC063", path=f"{_RULES}[{number}]",
                message=f"`{matrix.path}` cannot be fp8",
                label="its input is not one tensor that could be rounded to 8-bit floats",
                help=f"put a rule {{kind: int8, match: \"{_pattern(matrix)}\"}} before this one",
            )  # fmt: skip


def _pattern(matrix: Matrix) -> str:
    return matrix.path if matrix.path == matrix.suffix else f"*.{matrix.suffix}"


def _limit_is_measured(spec: Spec) -> Iterator[Finding]:
    quantize = spec.build.quantize
    if quantize is not None and quantize.limit is not None and quantize.calibration is None:
        yield Finding(
            code="SPEC064", path="build.quantize.limit",
            message="`build.quantize.limit` without `calibration`",
            label="the quality is measured on the calibration's last sequences",
            help="add calibration: {path: ...}, or remove the limit",
        )  # fmt: skip


def _samples_fit_positions(spec: Spec) -> Iterator[Finding]:
    quantize, limit = spec.build.quantize, spec.model.max_positions
    if quantize is not None and quantize.calibration is not None and quantize.calibration.sequence_length > limit:
        length = quantize.calibration.sequence_length
        yield Finding(
            code="SPEC065", path="build.quantize.calibration.sequence_length", others={"model.max_positions": limit},
            message=f"`sequence_length` ({length}) is longer than `model.max_positions` ({limit})",
            label=f"the model accepts {limit} positions", help=f"use sequence_length: {limit}",
        )  # fmt: skip


QUANTIZE_RULES: tuple[Callable[[Spec], Iterator[Finding]], ...] = (
    _rules_match,
    _groups_divide_columns,
    _awq_has_a_place,
    _fp8_is_linear,
    _limit_is_measured,
    _samples_fit_positions,
)
