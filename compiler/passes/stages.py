"""Program → pipeline stages: neighbouring segments that take about as long as those of every other stage."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from archwright.compiler.interpreters.cost_ops import run_cost
from archwright.compiler.ir import Program
from archwright.spec import ArchwrightError

NOMINAL_SEQUENCE = 4096
"""Tokens at which segments are weighed; how heavy the head is beside a layer hardly depends on it."""


def cut_stages(program: Program, number: int) -> tuple[tuple[int, int], ...]:
    """The segments [start, stop) of each of `number` stages, the heaviest stage as light as can be.

    Weighed in FLOPs. The embedding stays with the first layer, since it has none.
    Raises ArchwrightError IR012 where there are fewer layers than stages.
    """
    if number == 1:
        return ((0, len(program.segments)),)
    layers = len(program.segments) - 2
    if number > layers:
        raise ArchwrightError(
            "IR012", f"{layers} layers cannot be {number} stages", help=f"use a pipeline of {layers} stages or fewer"
        )
    return _lightest(_weights(program), number)


def _weights(program: Program) -> list[int]:
    """FLOPs of each segment. Equal segments are counted once."""
    few = {segment.block: segment for segment in reversed(program.segments)}
    sequence = min(program.max_positions, NOMINAL_SEQUENCE)
    chosen = replace(program, segments=tuple(reversed(few.values())))
    cost = run_cost(chosen, batch=1, sequence=sequence, targets=True)
    flops = {block: cost.of(segment).causal_flops for block, segment in few.items()}
    return [flops[segment.block] for segment in program.segments]


def _lightest(weights: Sequence[int], number: int) -> tuple[tuple[int, int], ...]:
    """The contiguous partition with the least largest sum, by dynamic programming over (parts, start).

    The first part holds two segments at least, every other one.
    """
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + weight)

    @cache
    def best(start: int, parts: int) -> tuple[int, tuple[int, ...]]:
        """(largest sum, ends) of the segments from `start` in so many parts."""
        if parts == 1:
            return sums[-1] - sums[start], (len(weights),)
        first = start + (2 if start == 0 else 1)
        choices = (
            (max(sums[stop] - sums[start], rest), (stop, *ends))
            for stop in range(first, len(weights) - parts + 2)
            for rest, ends in [best(stop, parts - 1)]
        )
        return min(choices, key=lambda choice: choice[0])

    ends = best(0, number)[1]
    return tuple(zip((0, *ends[:-1]), ends, strict=True))
