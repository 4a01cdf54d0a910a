"""YAML 1.2 text → a tree of values that know where they stand.

The tree is composed from ruamel.yaml's events instead of its Python objects: an event carries the place of every key
and value, and nothing is constructed that the language does not have (tags, dates, sets).
"""

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError

from archwright.spec.errors import Diagnostic, SpecError

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_NODES = 20_000
MAX_INT = 2**63 - 1

# Line breaks of YAML 1.2; str.splitlines knows more.
_LINE_BREAK = re.compile("\r\n|[\n\r]")
_INT = re.compile(r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_TAG = "tag:yaml.org,2002:"

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Source:
    """A text, the name under which diagnostics show it, and the folder that its relative paths start from."""

    name: str
    text: str
    folder: Path

    def line(self, number: int) -> str:
        """The line with that number, counted from 1; empty past the end."""
        lines = _LINE_BREAK.split(self.text)
        return lines[number - 1] if number <= len(lines) else ""


@dataclass(frozen=True)
class Span:
    """`length` characters of one line; line and column count from 1."""

    source: Source
    line: int = 1
    column: int = 1
    length: int = 1

    def __str__(self) -> str:
        return f"{self.source.name}:{self.line}:{self.column}"


@dataclass(frozen=True)
class ScalarNode:
    """A text, number, truth value or null."""

    span: Span
    value: Value


@dataclass(frozen=True)
class ListNode:
    """A sequence."""

    span: Span
    items: "tuple[Tree, ...]"


@dataclass(frozen=True)
class Entry:
    """One `key: value` of a mapping."""

    key_span: Span
    value: "Tree"


@dataclass(frozen=True)
class MapNode:
    """A mapping; `entries` keeps the order of the file."""

    span: Span
    entries: dict[str, Entry]

    def get(self, key: str) -> "Tree | None":
        """The value under `key`, None where there is none."""
        entry = self.entries.get(key)
        return entry.value if entry else None


Tree = ScalarNode | ListNode | MapNode


def fault(
    span: Span, code: str, message: str, *, label: str = "", help: str = "", path: str = "", notes: tuple[str, ...] = ()
) -> Diagnostic:
    """A diagnostic that points at `span`."""
    return Diagnostic(
        code=code, message=message, file=span.source.name, line=span.line, column=span.column, length=span.length,
        path=path, source_line=span.source.line(span.line), label=label, help=help, notes=notes,
    )  # fmt: skip


def find(tree: Tree, path: tuple[str | int, ...]) -> Tree | None:
    """The node at a path, None where the text does not spell it out."""
    node: Tree | None = tree
    for part in path:
        if isinstance(node, MapNode) and isinstance(part, str):
            node = node.get(part)
        elif isinstance(node, ListNode) and isinstance(part, int) and part < len(node.items):
            node = node.items[part]
        else:
            return None
    return node


def plain(tree: Tree) -> Any:
    """The tree as dicts, lists and scalars."""
    if isinstance(tree, MapNode):
        return {key: plain(entry.value) for key, entry in tree.entries.items()}
    if isinstance(tree, ListNode):
        return [plain(item) for item in tree.items]
    return tree.value


def read_source(path: Path, name: str, asked_at: Span | None = None) -> Source:
    """Reads a spec file. Raises `SpecError` (SPEC001), placed at `asked_at` (the `extends` that names it) if given."""

    def refuse(message: str, help: str) -> SpecError:
        return SpecError([fault(asked_at or Span(Source(name, "", path.parent)), "SPEC001", message, help=help)])

    try:
        if path.is_dir():
            raise refuse(f"`{name}` is a folder", "name the YAML file in it")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = "write one with `archwright init`, or use preset:NAME (`archwright presets` lists them)"
        raise refuse(f"cannot read `{name}`: {reason.lower()}", hint) from error
    if len(content) > MAX_BYTES:
        raise refuse(f"`{name}` is larger than {MAX_BYTES >> 20} MiB", "a spec is a short text: is this one?")
    try:
        return Source(name, content.decode("utf-8-sig"), path.parent)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"`{name}` is not UTF-8 text: byte 0x{content[error.start]:02x} in line {line}"
        raise refuse(message, "save the file as UTF-8") from error


def parse(source: Source) -> tuple[Tree, list[Diagnostic]]:
    """The tree of a YAML text, and the faults that leave a tree (duplicate keys, tags, ...).

    Raises `SpecError` where there is no tree: broken syntax (SPEC002), or far more than a spec holds (SPEC004).
    """
    composer = _Composer(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ruamel warns of anchors that are defined again, which YAML allows
            return composer.document(), composer.faults
    except SpecError:
        raise
    except MarkedYAMLError as error:
        raise SpecError([*composer.faults, _syntax_fault(source, error)]) from error
    except ReaderError as error:
        position: int = error.position  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        before = source.text[:position]
        line = len(_LINE_BREAK.findall(before)) + 1
        column = len(_LINE_BREAK.split(before)[-1]) + 1
        message = f"the character U+{ord(source.text[position]):04X} is not allowed in YAML"
        raise SpecError([fault(Span(source, line, column), "SPEC002", message, help="remove it")]) from error
    except Exception as error:  # ruamel's scanner trips over some broken texts with errors of every kind
        raise SpecError([fault(Span(source), "SPEC002", f"not readable as YAML: {error}")]) from error


def _syntax_fault(source: Source, error: Any) -> Diagnostic:
    mark = error.problem_mark or error.context_mark
    span = Span(source, mark.line + 1, mark.column + 1) if mark else Span(source)
    problem = (error.problem or error.context or "not readable as YAML").strip()
    context = error.context_mark
    notes = (f"{error.context} that begins at line {context.line + 1}",) if error.context and context else ()
    help = "indent with spaces, not tabs" if "'\\t'" in problem else ""
    return fault(span, "SPEC002", f"YAML syntax: {problem}", help=help, notes=notes)


class _Composer:
    """Builds the tree of one document from ruamel's events."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.faults: list[Diagnostic] = []
        self.anchors: dict[str, tuple[Tree, int]] = {}
        self.num_nodes = 0
        self.events: Iterator[Any] = YAML(typ="safe", pure=True).parse(source.text)  # pyright: ignore[reportUnknownMemberType]

    def document(self) -> Tree:
        tree: Tree = ScalarNode(Span(self.source), None)
        num_documents = 0
        for event in self.events:
            name = type(event).__name__
            if name == "DocumentStartEvent":
                num_documents += 1
                if event.version not in (None, (1, 2)):
                    self.report(event, "a spec is YAML 1.2", "remove the %YAML line")
                if num_documents == 2:
                    self.report(event, "a second document", "a spec file holds one document; remove `---`")
            elif (name.endswith("StartEvent") and name != "StreamStartEvent") or name in ("ScalarEvent", "AliasEvent"):
                node = self.node(event, 1)
                tree = node if num_documents == 1 else tree
        return tree

    def node(self, event: Any, depth: int) -> Tree:
        name = type(event).__name__
        if name == "AliasEvent":
            return self.alias(event, depth)
        begin = self.num_nodes
        self.count(event, 1)
        if depth > MAX_DEPTH:
            raise self.fatal(event, f"nested more than {MAX_DEPTH} levels deep")
        if name == "ScalarEvent":
            node: Tree = self.scalar(event)
        elif name == "SequenceStartEvent":
            node = self.sequence(event, depth)
        else:
            node = self.mapping(event, depth)
        if event.anchor:
            self.anchors[event.anchor] = node, self.num_nodes - begin
        return node

    def alias(self, event: Any, depth: int) -> Tree:
        if event.anchor not in self.anchors:
            raise self.fatal(event, f"`*{event.anchor}` names an anchor that is not defined before it")
        tree, num_nodes = self.anchors[event.anchor]
        self.count(event, num_nodes)
        if depth + _height(tree) > MAX_DEPTH + 1:
            raise self.fatal(event, f"nested more than {MAX_DEPTH} levels deep")
        return tree

    def sequence(self, event: Any, depth: int) -> ListNode:
        self.check_tag(event, "seq")
        items: list[Tree] = []
        while type(inner := next(self.events)).__name__ != "SequenceEndEvent":
            items.append(self.node(inner, depth + 1))
        return ListNode(self.span(event), tuple(items))

    def mapping(self, event: Any, depth: int) -> MapNode:
        self.check_tag(event, "map")
        entries: dict[str, Entry] = {}
        merged: list[tuple[Span, Tree]] = []
        while type(key_event := next(self.events)).__name__ != "MappingEndEvent":
            key_span = self.span(key_event)
            key = self.node(key_event, depth + 1)
            value_event = next(self.events)
            value = self.node(value_event, depth + 1)
            if isinstance(value, ScalarNode) and value.value is None and value.span.length == 0:
                value = ScalarNode(key_span, None)  # `key:` with nothing after it: the caret shows the key
            if not isinstance(key, ScalarNode) or not isinstance(key.value, str):
                self.report(key_event, "a key must be text", 'put quotes around it, `"1": ...`')
            elif key.value == "<<":
                merged.append((key_span, value))
            elif key.value in entries:
                first = entries[key.value].key_span
                note = (f"first given at line {first.line}, column {first.column}",)
                message = f"`{key.value}` is given twice"
                self.faults.append(fault(key_span, "SPEC003", message, help="remove one of the two", notes=note))
            else:
                entries[key.value] = Entry(key_span, value)
        for key_span, value in merged:
            self.merge(entries, key_span, value)
        return MapNode(self.span(event), entries)

    def merge(self, entries: dict[str, Entry], key_span: Span, value: Tree) -> None:
        """YAML's merge key: the other mapping's entries, below those that stand here."""
        for other in value.items if isinstance(value, ListNode) else (value,):
            if isinstance(other, MapNode):
                for key, entry in other.entries.items():
                    entries.setdefault(key, entry)
            else:
                help = "write `<<: *anchor` with the anchor of a mapping"
                self.faults.append(fault(key_span, "SPEC004", "`<<` must name mappings", help=help))

    def scalar(self, event: Any) -> ScalarNode:
        span = self.span(event)
        tag = str(event.tag) if event.tag else ""
        if tag in ("!", _TAG + "str") or (not tag and event.style):
            return ScalarNode(span, event.value)
        value = resolve_scalar(event.value)
        if isinstance(value, int) and abs(value) > MAX_INT:
            message = "a whole number this large is not allowed"
            self.faults.append(fault(span, "SPEC004", message, help=f"the largest is {MAX_INT}"))
            value = MAX_INT
        names = {str: "str", bool: "bool", int: "int", float: "float", type(None): "null"}
        self.check_tag(event, names[type(value)])
        return ScalarNode(span, value)

    def check_tag(self, event: Any, expected: str) -> None:
        tag = str(event.tag) if event.tag else ""
        if tag not in ("", "!", _TAG + expected):
            self.report(event, f"the tag `{tag.replace(_TAG, '!!')}` is not part of the language", "remove the tag")

    def count(self, event: Any, num_nodes: int) -> None:
        self.num_nodes += num_nodes
        if self.num_nodes > MAX_NODES:
            raise self.fatal(event, f"more than {MAX_NODES} values, aliases expanded")

    def span(self, event: Any) -> Span:
        start, end = event.start_mark, event.end_mark
        same_line = start.line == end.line
        length = end.column - start.column if same_line else len(self.source.line(start.line + 1)) - start.column
        return Span(self.source, start.line + 1, start.column + 1, max(length, 0 if same_line else 1))

    def report(self, event: Any, message: str, help: str) -> None:
        self.faults.append(fault(self.span(event), "SPEC004", message, help=help))

    def fatal(self, event: Any, message: str) -> SpecError:
        help = "write the values out; a spec is a short text"
        return SpecError([*self.faults, fault(self.span(event), "SPEC004", message, help=help)])


def _height(tree: Tree) -> int:
    inner: list[Tree] = []
    if isinstance(tree, ListNode):
        inner = list(tree.items)
    elif isinstance(tree, MapNode):
        inner = [entry.value for entry in tree.entries.values()]
    return 1 + max(map(_height, inner), default=0)


def resolve_scalar(text: str) -> Value:
    """YAML 1.2's core schema: what a plain scalar means. Underscores in numbers are allowed, as in `500_000`."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text):
        if len(text) > 40:  # Python refuses to convert thousands of digits; any of these is too large anyway
            return MAX_INT + 1
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text
