"""Faults as the user meets them: pydantic's errors put into the language's words, and three renderings."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from archwright.spec.errors import ArchwrightError, Diagnostic, SpecError
from archwright.spec.models import Node
from archwright.spec.source import ListNode, MapNode, ScalarNode, Span, Tree, fault, find
from archwright.spec.structure import (
    ROOT,
    Path,
    Shape,
    bounds,
    describe,
    dotted,
    field_names,
    field_shape,
    kind_of,
    literals_of,
    nearest,
    suggest,
)

OutputFormat = Literal["text", "json", "github"]

_OUT_OF_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}


def span_of(tree: Tree, path: Path) -> Span:
    """Where a value stands; for one that is not spelt out, the key of the nearest mapping around it."""
    node = find(tree, path)
    if node and not (isinstance(node, MapNode) and path):
        return node.span
    for end in range(len(path), 0, -1):
        parent = find(tree, path[: end - 1])
        name = path[end - 1]
        if isinstance(parent, MapNode) and isinstance(name, str) and name in parent.entries:
            return parent.entries[name].key_span
        if isinstance(parent, ListNode) and isinstance(name, int) and name < len(parent.items):
            return parent.items[name].span
    return Span(tree.span.source, tree.span.line, tree.span.column)


def key_span_of(tree: Tree, path: Path) -> Span:
    """Where the key of a value stands."""
    parent, name = find(tree, path[:-1]), path[-1]
    if isinstance(parent, MapNode) and name in parent.entries:
        return parent.entries[str(name)].key_span
    return span_of(tree, path)


def explain(error: ValidationError, tree: MapNode) -> dict[Path, Diagnostic]:
    """One diagnostic a place, by path: a wrong value in a union brings one error for each member."""
    by_path: dict[Path, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False, include_context=False):
        by_path.setdefault(_spec_path(detail["loc"], tree), []).append(detail)
    by_path = {path: details for path, details in by_path.items() if not _is_noise(path, by_path, tree)}
    return {path: _explain_one(path, details[0], tree) for path, details in by_path.items()}


def _spec_path(location: tuple[str | int, ...], tree: MapNode) -> Path:
    """pydantic's location without the names of union members that it holds."""
    path: Path = ()
    shape: Shape | None = ROOT
    classes: tuple[type[Node], ...] = ROOT.classes
    for part in location:
        if shape is None or not (classes or shape.item):
            break
        if len(classes) > 1:  # a tagged union: this part is the tag
            classes = shape.chosen(part)
            continue
        if isinstance(part, str) and not classes:  # a number or a list: this part names the form
            continue
        path = (*path, part)
        if isinstance(part, int):
            shape = shape.item
        else:
            shape = field_shape(classes[0], part) if classes and part in classes[0].model_fields else None
        classes = shape.classes if shape else ()
    return path


def _is_noise(path: Path, by_path: dict[Path, list[ErrorDetails]], tree: MapNode) -> bool:
    """An object of an unknown kind: its other keys cannot be judged."""
    return any(
        parent in by_path and parent != path and isinstance(find(tree, parent), ScalarNode)
        for parent in ((*path[:end], "kind") for end in range(len(path)))
    )


def shape_at(path: Path, tree: MapNode) -> tuple[Shape, tuple[type[Node], ...]]:
    """What may stand at a path, and the classes that the mapping around it may be."""
    shape, around = ROOT, ROOT.classes
    for end, part in enumerate(path):
        kind = find(tree, (*path[:end], "kind"))
        if isinstance(part, int):
            shape = shape.item or shape
            continue
        around = shape.chosen(kind.value if isinstance(kind, ScalarNode) else None)
        owner = next((cls for cls in around if part in cls.model_fields), None)
        if owner is None:
            return Shape(None), around
        shape = field_shape(owner, part)
    return shape, around


def _explain_one(path: Path, detail: ErrorDetails, tree: MapNode) -> Diagnostic:
    kind, text, name = detail["type"], dotted(path), dotted(path[-1:])
    shape, around = shape_at(path, tree)
    place = f" in `{dotted(path[:-1])}`" if len(path) > 1 else ""
    if kind == "extra_forbidden":
        message = f"unknown key `{name}`{place}"
        help = suggest(name, field_names(around), list_as="keys here")
        return fault(key_span_of(tree, path), "SPEC010", message, path=text, help=help)
    if kind.startswith("union_tag"):
        return _explain_kind((*path, "kind"), list(shape.kinds), tree)
    if name == "kind":
        return _explain_kind(path, [word for cls in around if (word := kind_of(cls))], tree)
    if kind == "missing":
        message = f"`{name}` is missing{place}"
        help = f"add `{name}:`, {describe(shape)}"
        if path == ("model",):
            help = "add `model:`, or `extends:` a preset or another spec"
        return fault(span_of(tree, path[:-1]), "SPEC012", message, path=text, help=help)
    return _explain_value(path, kind, shape, tree)


def _explain_kind(path: Path, kinds: list[str], tree: MapNode) -> Diagnostic:
    found, text, owner = find(tree, path), dotted(path), dotted(path[:-1])
    if found is None:
        example = f"add `kind: {kinds[0]}`" if len(kinds) == 1 else f"kinds: {', '.join(kinds)}"
        return fault(span_of(tree, path[:-1]), "SPEC013", f"`{owner}` needs a `kind`", path=text, help=example)
    help = suggest(_value(found), kinds, list_as="kinds")
    if isinstance(_value(found), str):
        return fault(found.span, "SPEC013", f"`{owner}` knows no kind `{_value(found)}`", path=text, help=help)
    label = f"found {found_words(found)}"
    return fault(found.span, "SPEC013", f"`{text}` must be the name of a kind", path=text, label=label, help=help)


def _explain_value(path: Path, kind: str, shape: Shape, tree: MapNode) -> Diagnostic:
    found = find(tree, path)
    code = "SPEC014" if kind in _OUT_OF_RANGE else "SPEC011"
    required = describe(shape) or "another value"
    message = f"`{dotted(path) or 'the spec'}` must be {required}"
    label = f"found {found_words(found)}" if found else ""
    return fault(span_of(tree, path), code, message, path=dotted(path), label=label, help=_fix(found, shape))


def found_words(node: Tree | None) -> str:
    """What stands there, in words."""
    if isinstance(node, ListNode):
        return f"a list of {len(node.items)}" if node.items else "an empty list"
    if isinstance(node, MapNode):
        return "a mapping"
    value = _value(node)
    if isinstance(value, str):
        return f"the text {_shorten(json.dumps(value, ensure_ascii=False))}"
    words = {None: "nothing", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else _shorten(f"{value!r}")


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _value(node: Tree | None) -> Any:
    return node.value if isinstance(node, ScalarNode) else None


def _fix(found: Tree | None, shape: Shape) -> str:
    """The nearest legal value, where there is one."""
    value = _value(found)
    types = {choice.annotation for choice in shape.choices}
    if isinstance(value, str):
        if bool in types and value.lower() in ("yes", "no", "on", "off", "true", "false"):
            return f"write {'true' if value.lower() in ('yes', 'on', 'true') else 'false'}"
        if types & {int, float} and _is_number(value):
            return "remove the quotes"
        near = nearest(value, literals_of(shape)) if str not in types else None
        return f"did you mean `{near}`?" if near else ""
    if str in types and value is not None:
        return "put quotes around it"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _nearest_number(value, shape, int in types)
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _nearest_number(value: float, shape: Shape, whole: bool) -> str:
    limits = bounds(shape)
    low = limits.get("ge", limits["gt"] + 1 if whole and "gt" in limits else None)
    high = limits.get("le", limits["lt"] - 1 if whole and "lt" in limits else None)
    if low is not None and value < low:
        return f"the nearest legal value is {low:g}"
    if high is not None and value > high:
        return f"the nearest legal value is {high:g}"
    if whole and isinstance(value, float) and abs(value) < 1e15:
        return f"write {round(value)}"
    return ""


def render(diagnostics: Sequence[Diagnostic], output_format: OutputFormat) -> str:
    """The diagnostics as text for people, JSON for tools, or GitHub's workflow commands."""
    if output_format == "json":
        return json.dumps({"ok": not diagnostics, "diagnostics": [_as_json(d) for d in diagnostics]}, indent=2)
    if output_format == "github":
        return "\n".join(_as_github(d) for d in diagnostics)
    return "\n".join(str(d) for d in diagnostics)


def diagnostics_of(error: ArchwrightError) -> tuple[Diagnostic, ...]:
    """The diagnostics of a spec error; any other error as a single one."""
    if isinstance(error, SpecError):
        return error.diagnostics
    return (Diagnostic(code=error.code, message=error.message, file=error.where or "", help=error.help or ""),)


def _as_json(diagnostic: Diagnostic) -> dict[str, object]:
    fields: Iterable[str] = ("code", "message", "file", "line", "column", "length", "path", "label", "help", "notes")
    return {name: getattr(diagnostic, name) for name in fields}


def _as_github(diagnostic: Diagnostic) -> str:
    def escape(text: str, *, in_property: bool = False) -> str:
        text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
        return text.replace(":", "%3A").replace(",", "%2C") if in_property else text

    parts = (diagnostic.message, diagnostic.label, *diagnostic.notes, diagnostic.help and f"help: {diagnostic.help}")
    place = {"file": diagnostic.file, "line": diagnostic.line, "col": diagnostic.column, "title": diagnostic.code}
    properties = ",".join(f"{name}={escape(str(value), in_property=True)}" for name, value in place.items())
    return f"::error {properties}::{escape(chr(10).join(part for part in parts if part))}"
