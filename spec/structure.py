"""What the section classes allow at a place: read from pydantic's fields, for `--set`, diagnostics and suggestions."""

import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from archwright.spec.models import Node, Spec

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Shape:
    """What may stand at one place: an annotation and the constraints on it."""

    annotation: Any
    constraints: tuple[Any, ...] = ()

    @property
    def choices(self) -> "tuple[Shape, ...]":
        """The members of a union, itself otherwise."""
        if get_origin(self.annotation) is Annotated:
            inner, *metadata = get_args(self.annotation)
            return Shape(inner, (*self.constraints, *_flatten(metadata))).choices
        if get_origin(self.annotation) in (Union, types.UnionType):
            return tuple(choice for member in get_args(self.annotation) for choice in Shape(member).choices)
        return (self,)

    @property
    def classes(self) -> tuple[type[Node], ...]:
        """The mappings that may stand here."""
        return tuple(
            choice.annotation
            for choice in self.choices
            if isinstance(choice.annotation, type) and issubclass(choice.annotation, Node)
        )

    @property
    def kinds(self) -> "dict[str, type[Node]]":
        """The tagged mappings that may stand here, by `kind`."""
        return {kind: cls for cls in self.classes if (kind := kind_of(cls))}

    @property
    def item(self) -> "Shape | None":
        """What a list's items may be, where a list may stand here."""
        for choice in self.choices:
            if get_origin(choice.annotation) is tuple:
                return Shape(get_args(choice.annotation)[0])
        return None

    def chosen(self, kind: object) -> tuple[type[Node], ...]:
        """The classes that remain once `kind` is known; all of them where it is not a legal one."""
        cls = self.kinds.get(kind) if isinstance(kind, str) else None
        return (cls,) if cls else self.classes


ROOT = Shape(Spec)


def dotted(path: Path) -> str:
    """`data.sources[0].path`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def parse_path(text: str) -> Path:
    """The other way round; `data.sources.0.path` is the same place."""
    parts = re.sub(r"\[(\d+)\]", r".\1", text).split(".")
    return tuple(int(part) if part.isdecimal() and part.isascii() else part for part in parts)


def kind_of(cls: type[Node]) -> str | None:
    """The `kind` that a class stands for, None where the mapping needs no `kind`."""
    field = cls.model_fields.get("kind")
    return get_args(field.annotation)[0] if field else None


def field_shape(cls: type[Node], name: str) -> Shape:
    """What the field may hold."""
    field: FieldInfo = cls.model_fields[name]
    return Shape(field.annotation, tuple(_flatten(field.metadata)))


def field_names(classes: Iterable[type[Node]]) -> list[str]:
    """The legal keys of a mapping that is one of `classes`, `kind` first."""
    return sorted(dict.fromkeys(name for cls in classes for name in cls.model_fields), key=lambda name: name != "kind")


def nearest(word: object, legal: Iterable[str]) -> str | None:
    """The legal word that looks most like `word`, None where none does."""
    text, words = str(word).lower()[:100], list(legal)
    distances = {candidate: _typos(text, candidate.lower()) for candidate in words}
    best = min(words, key=distances.__getitem__, default=None)
    if best is not None and distances[best] <= (max(2, len(best) // 3) if len(best) > 3 else 1):
        return best
    matches = get_close_matches(text, words, n=1, cutoff=0.6)  # shortened words: bf16 for bfloat16
    return matches[0] if matches else None


def _typos(a: str, b: str) -> int:
    """Letters left out, added, exchanged or swapped with their neighbour (optimal string alignment distance)."""
    before, last = [], list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def suggest(word: object, legal: Iterable[str], *, list_as: str) -> str:
    """`did you mean ...?` where something is near, and what is legal."""
    words = list(legal)
    near = nearest(word, words)
    listing = f"{list_as}: {', '.join(words)}"
    return f"did you mean `{near}`? {listing}" if near else listing


def describe(shape: Shape) -> str:
    """What is required, in words: `a whole number of at least 1`."""
    literals = literals_of(shape)
    words = [text for choice in shape.choices if (text := _describe_one(choice))]
    if shape.classes:
        kinds = shape.kinds
        words.append(f"a mapping with `kind: {' | '.join(kinds)}`" if kinds else "a mapping")
    if literals:
        words.append(f"one of {', '.join(literals)}" if len(literals) > 1 else f"`{literals[0]}`")
    return " or ".join(words)


def _describe_one(choice: Shape) -> str:
    annotation = choice.annotation
    if get_origin(annotation) is tuple:
        items = get_args(annotation)
        if items[-1] is Ellipsis:
            return "a list"
        return f"a list of {len(items)} values, each {describe(Shape(items[0]))}"
    if annotation in (int, float):
        return " ".join(["a whole number" if annotation is int else "a number", _bounds(choice)]).strip()
    return {str: "text", bool: "true or false", type(None): "null"}.get(annotation, "")


def bounds(shape: Shape) -> dict[str, float]:
    """The numeric limits by annotated_types' names: `ge`, `gt`, `le`, `lt`."""
    return {
        name: getattr(constraint, name)
        for choice in shape.choices
        for constraint in choice.constraints
        for name in ("ge", "gt", "le", "lt")
        if hasattr(constraint, name)
    }


def _bounds(choice: Shape) -> str:
    limits = bounds(choice)
    words: list[str] = []
    if choice.annotation is int and "gt" in limits:
        limits["ge"] = limits.pop("gt") + 1
    for name, text in (("ge", "of at least"), ("gt", "greater than"), ("le", "at most"), ("lt", "less than")):
        if name in limits:
            words.append(f"{text} {limits[name]:g}")
    return " and ".join(words)


def literals_of(shape: Shape) -> list[str]:
    """The words that may stand here."""
    literals = (choice.annotation for choice in shape.choices if get_origin(choice.annotation) is Literal)
    return [str(value) for literal in literals for value in get_args(literal)]


def _flatten(metadata: Iterable[Any]) -> Iterator[Any]:
    """pydantic keeps constraints bare, or inside the FieldInfo of an Annotated."""
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item
