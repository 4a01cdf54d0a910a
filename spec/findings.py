"""What a broken rule says, and what the rules share."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from archwright.spec.models import Layer, Spec


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A broken rule: the caret goes to `path`; `others` are the values that it is at odds with, by path."""

    code: str
    path: str
    message: str
    label: str
    help: str
    others: dict[str, object] = field(default_factory=dict[str, object])


def layers(spec: Spec) -> Iterator[tuple[str, Layer]]:
    """Each layer that the spec spells out, with its path."""
    model = spec.model
    if isinstance(model.layers, tuple):
        yield from ((f"model.layers[{index}].layer", run.layer) for index, run in enumerate(model.layers))
    elif model.layer is not None:
        yield "model.layer", model.layer


def divisors(number: int) -> list[int]:
    """All of them for the sizes that models have; past a million only the powers of two."""
    if number > 1_000_000:
        return [1 << shift for shift in range(number.bit_length()) if number % (1 << shift) == 0]
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def nearest(value: int, legal: Iterable[int]) -> int:
    return min(legal, key=lambda candidate: (abs(candidate - value), candidate))


def nearest_multiple(value: int, factor: int) -> int:
    return max(factor, (value + factor // 2) // factor * factor)


def tensor_degrees(spec: Spec) -> Iterator[tuple[str, int]]:
    """Where the spec gives a tensor degree as a number, and the number."""
    if isinstance(spec.parallel.tensor, int):
        yield "parallel.tensor", spec.parallel.tensor
    yield "build.parallel.tensor", spec.build.parallel.tensor


def channels_cut(path: str, name: str, width: int, degree_path: str, degree: int) -> Iterator[Finding]:
    """SPEC023 where inner channels do not come out even. name: of the field `path`, as users call it."""
    if width % degree:
        yield Finding(
            code="SPEC023", path=path, others={degree_path: degree},
            message=f"`{name}` ({width}) is not divisible by `{degree_path}` ({degree})",
            label=f"{width} inner channels cannot be split over {degree} ranks",
            help=f"use hidden_size: {nearest_multiple(width, degree)}, "
            f"or tensor: {nearest(degree, divisors(width))}",
        )  # fmt: skip
