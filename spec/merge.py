"""From files, presets and overrides to one tree: `extends` chains, deep merge, `--set`.

Precedence: class default < preset < parent < file < `--set`. Every node keeps the span it was read at, which is its
provenance.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from archwright.spec.errors import Diagnostic, SpecError
from archwright.spec.models import Node
from archwright.spec.source import Entry, ListNode, MapNode, ScalarNode, Source, Span, Tree, fault, parse, read_source
from archwright.spec.structure import ROOT, Shape, field_names, field_shape, kind_of, suggest

PRESET = "preset:"
PRESET_FOLDER = Path(__file__).parent / "presets"

# The fields that name files; `*` is any item of a list. Relative ones start from the file that holds them.
PATH_FIELDS = (
    ("tokenizer", "path"),
    ("tokenizer", "chat_template"),
    ("data", "path"),
    ("data", "sources", "*", "path"),
    ("train", "base"),
    ("build", "engine", "timing_cache"),
    ("build", "quantize", "calibration", "path"),
)


@dataclass(frozen=True)
class SetText:
    """The VALUE of a `--set PATH=VALUE`, still YAML text, so that a fault in it can be placed."""

    text: str


def preset_names() -> list[str]:
    """The presets that come with archwright."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def preset_text(name: str) -> str:
    """The YAML of a preset. Raises `SpecError` (SPEC006) for an unknown one."""
    return _open(PRESET + name, None).text


def read_merged(path: str | os.PathLike[str]) -> tuple[MapNode, list[Diagnostic]]:
    """The tree of a spec and of all its parents, merged, with the faults found on the way.

    Raises `SpecError` where a file cannot be read at all.
    """
    source = _open(os.fspath(path), None)
    faults: list[Diagnostic] = []
    trees: list[MapNode] = []
    seen: dict[Path, str] = {}
    while True:
        seen[_identity(source)] = source.name
        tree, found = _parse_file(source)
        faults += [*found, *_check_version(tree)]
        trees.append(tree)
        parent = tree.entries.pop("extends", None)
        if parent is None or (isinstance(parent.value, ScalarNode) and parent.value.value is None):
            break
        if not isinstance(parent.value, ScalarNode) or not isinstance(parent.value.value, str):
            message = "`extends` must be text: preset:NAME or the path of a spec file"
            faults.append(fault(parent.value.span, "SPEC006", message, path="extends", help="one parent, no list"))
            break
        source = _open(parent.value.value, parent.value.span)
        if _identity(source) in seen:
            chain = " -> ".join([*seen.values(), source.name])
            raise SpecError([*faults, fault(parent.value.span, "SPEC006", f"`extends` goes in a circle: {chain}",
                                            path="extends", help="remove this `extends`")])  # fmt: skip
    faults += _missing_head(trees[0])
    merged = trees.pop()
    while trees:
        child = merge(merged, trees.pop())
        assert isinstance(child, MapNode)
        merged = child
    return merged, faults


def merge(base: Tree, over: Tree) -> Tree:
    """`over` on top of `base`: mappings entry by entry, everything else replaced.

    A mapping whose `kind` differs replaces the whole mapping: the old one's other keys belong to another class.
    """
    if not isinstance(base, MapNode) or not isinstance(over, MapNode):
        return over
    old_kind, new_kind = base.get("kind"), over.get("kind")
    if isinstance(new_kind, ScalarNode) and isinstance(old_kind, ScalarNode) and new_kind.value != old_kind.value:
        return over
    entries = dict(base.entries)
    for key, entry in over.entries.items():
        old = entries.get(key)
        entries[key] = Entry(entry.key_span, merge(old.value, entry.value)) if old else entry
    return MapNode(over.span, entries)


def apply_overrides(tree: MapNode, overrides: Mapping[str, object]) -> tuple[MapNode, list[Diagnostic]]:
    """The tree with each override laid on it, in order. Values are plain Python values or `SetText`."""
    faults: list[Diagnostic] = []
    for path, value in overrides.items():
        name = f"--set {path}"
        try:
            text = value.text if isinstance(value, SetText) else _as_text(value)
            node, found = parse(Source(name, text, Path.cwd()))
            faults += found
            override = _Override(path, Span(Source(name, path, Path.cwd())))
            merged = override.lay(tree, ROOT, override.segments, node)
            assert isinstance(merged, MapNode)
            tree = merged
            faults += _check_version(tree) if path == "version" else []
        except SpecError as error:
            faults += error.diagnostics
    return tree, faults


def absolute_paths(tree: MapNode) -> MapNode:
    """The tree with every path of `PATH_FIELDS` made absolute."""
    result: Tree = tree
    for pattern in PATH_FIELDS:
        result = _absolute(result, pattern)
    assert isinstance(result, MapNode)
    return result


class _Override:
    """One `--set`: the classes say where it belongs, so that a misspelt path is an error and not a new key."""

    def __init__(self, path: str, span: Span) -> None:
        self.path = path
        self.span = span
        self.segments = re.sub(r"\[(\d+)\]", r".\1", path).split(".")

    def lay(self, node: Tree | None, shape: Shape, segments: list[str], value: Tree) -> Tree:
        """`node`, which has the given shape, with `value` at `segments` below it."""
        if not segments:
            return merge(node, value) if node else value
        if isinstance(node, ListNode) and shape.item:
            return self._lay_item(node, shape.item, segments, value)
        if not isinstance(node, MapNode):
            raise self.fault(len(segments), "holds no keys", "name the value itself")
        name, *rest = segments
        kind = node.get("kind")
        classes = shape.chosen(kind.value if isinstance(kind, ScalarNode) else None)
        if (name == "extends" and shape is ROOT) or not any(name in cls.model_fields for cls in classes):
            legal = [word for word in field_names(classes) if word != "extends"]
            help = suggest(name, legal, list_as="keys here")
            raise self.fault(len(segments) - 1, "is not part of the language", help)
        cls = next(cls for cls in classes if name in cls.model_fields)
        old = node.entries.get(name)
        inner = old.value if old else None
        if rest and (inner is None or (isinstance(inner, ScalarNode) and inner.value is None)):
            inner = self._default(cls, name, len(rest))
        laid = self.lay(inner, field_shape(cls, name), rest, value)
        return merge(node, MapNode(node.span, {name: Entry(old.key_span if old else self.span, laid)}))

    def _lay_item(self, node: ListNode, shape: Shape, segments: list[str], value: Tree) -> ListNode:
        index, *rest = segments
        if not index.isdecimal() or int(index) >= len(node.items):
            help = f"an index from 0 to {len(node.items) - 1}" if node.items else "the list is empty: set it as a whole"
            raise self.fault(len(segments) - 1, "is not an item of the list", help)
        items = list(node.items)
        items[int(index)] = self.lay(items[int(index)], shape, rest, value)
        return ListNode(node.span, tuple(items))

    def _default(self, cls: type[Node], name: str, num_left: int) -> MapNode:
        """The class default as a mapping to write into; only `kind` has to be spelt out."""
        default = cls.model_fields[name].default
        if not isinstance(default, Node):
            if field_shape(cls, name).item:
                raise self.fault(num_left, "is an empty list", "set it as a whole")
            if not field_shape(cls, name).classes:
                raise self.fault(num_left, "holds no keys", "name the value itself")
            help = f"add `{name}:` to the spec, or set it as a whole: --set '{name}={{...}}'"
            raise self.fault(num_left, "is absent from this spec", help)
        kind = kind_of(type(default))
        entries = {"kind": Entry(self.span, ScalarNode(self.span, kind))} if kind else {}
        return MapNode(self.span, entries)

    def fault(self, num_left: int, what: str, help: str) -> SpecError:
        """An error at the segment that has `num_left` segments after it."""
        shown = ".".join(self.segments[: len(self.segments) - num_left])
        column = shown.rfind(".") + 1
        span = replace(self.span, column=column + 1, length=max(1, len(shown) - column))
        return SpecError([fault(span, "SPEC007", f"`{shown}` {what}", path=shown, help=help)])


def _as_text(value: object) -> str:
    """JSON, which is YAML too, and so has places."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _open(reference: str, asked_at: Span | None) -> Source:
    if reference.startswith(PRESET):
        preset = reference.removeprefix(PRESET)
        names = preset_names()
        if preset not in names:
            span = asked_at or Span(Source(reference, "", Path.cwd()))
            help = suggest(preset, names, list_as="presets")
            raise SpecError([fault(span, "SPEC006", f"there is no preset `{preset}`", help=help)])
        return read_source(PRESET_FOLDER / f"{preset}.yaml", reference)
    if asked_at is None:
        return read_source(Path(reference), reference)
    child = asked_at.source
    name = os.path.normpath(os.path.join(os.path.dirname(child.name), reference))
    return read_source(child.folder / reference, name, asked_at)


def _identity(source: Source) -> Path:
    return (source.folder / os.path.basename(source.name)).resolve()


def _parse_file(source: Source) -> tuple[MapNode, list[Diagnostic]]:
    tree, faults = parse(source)
    if isinstance(tree, MapNode):
        return tree, faults
    empty = isinstance(tree, ScalarNode) and tree.value is None
    message = "the file is empty" if empty else "a spec must be a mapping of sections"
    help = "begin with `version: 1`, `name: ...` and `model:` or `extends:`"
    raise SpecError([*faults, fault(tree.span, "SPEC005", message, help=help)])


def _check_version(tree: MapNode) -> list[Diagnostic]:
    """A parent's version would be hidden by the child's; and pydantic takes `true` and `1.0` for 1."""
    node = tree.get("version")
    if node is None or (isinstance(node, ScalarNode) and type(node.value) is int and node.value == 1):
        return []
    help = "this archwright reads version 1 of the language"
    return [fault(node.span, "SPEC015", "`version` must be 1", path="version", help=help)]


def _missing_head(tree: MapNode) -> list[Diagnostic]:
    """`version` and `name` belong to each spec itself; a parent's do not count."""
    help = {"version": "add `version: 1`", "name": "add `name: ...`, a name for this spec"}
    return [
        fault(replace(tree.span, length=1), "SPEC012", f"`{key}` is missing", path=key, help=help[key])
        for key in ("version", "name")
        if key not in tree.entries
    ]


def _absolute(tree: Tree, pattern: tuple[str, ...]) -> Tree:
    if not pattern:
        if isinstance(tree, ScalarNode) and isinstance(tree.value, str):
            value = os.path.normpath(tree.span.source.folder.absolute() / os.path.expanduser(tree.value))
            return ScalarNode(tree.span, value)
        return tree
    first, *rest = pattern
    if isinstance(tree, ListNode) and first == "*":
        return ListNode(tree.span, tuple(_absolute(item, tuple(rest)) for item in tree.items))
    if isinstance(tree, MapNode) and first in tree.entries:
        entry = tree.entries[first]
        return MapNode(tree.span, {**tree.entries, first: Entry(entry.key_span, _absolute(entry.value, tuple(rest)))})
    return tree
