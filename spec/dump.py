"""Writing a resolved spec as YAML."""

import json
import re
from collections.abc import Callable
from typing import Any, cast

from archwright.spec.models import Node, Spec
from archwright.spec.source import MapNode, find, resolve_scalar
from archwright.spec.structure import Path, field_names

# What YAML cannot hold as it is within double quotes.
_UNPRINTABLE = re.compile("[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./+-]*")

_Origin = Callable[[Path], str]


def dump(spec: Spec, tree: MapNode | None = None) -> str:
    """The resolved spec as YAML that loads to an equal spec; with its tree, a comment says where each value is from."""

    def origin(path: Path) -> str:
        node = find(tree, path) if tree else None
        return str(node.span) if node else "default"

    return "\n".join(_mapping(spec, (), origin if tree else None)) + "\n"


def _mapping(node: Node, path: Path, origin: _Origin | None) -> list[str]:
    lines: list[str] = []
    for name in field_names([type(node)]):
        value = getattr(node, name)
        is_absent = value is None and type(node).model_fields[name].default is None
        if not is_absent:
            lines += _entry(name, value, (*path, name), origin)
    return lines


def _entry(name: str, value: Any, path: Path, origin: _Origin | None) -> list[str]:
    if isinstance(value, Node):
        return [f"{name}:", *("  " + line for line in _mapping(value, path, origin))]
    if isinstance(value, tuple) and value and isinstance(value[0], Node):  # pyright: ignore[reportUnknownArgumentType]
        lines = [f"{name}:"]
        for index, item in enumerate(cast(tuple[Node, ...], value)):
            first, *rest = _mapping(item, (*path, index), origin)
            lines += [f"  - {first}", *("    " + line for line in rest)]
        return lines
    line = f"{name}: {_value(value)}"
    return [f"{line}  # {origin(path)}" if origin else line]


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, cast(tuple[Any, ...], value)))}]"
    if not isinstance(value, str):
        return json.dumps(value, allow_nan=False)
    if _PLAIN.fullmatch(value) and resolve_scalar(value) == value:
        return value
    return _UNPRINTABLE.sub(lambda match: _escape(match[0]), json.dumps(value, ensure_ascii=False))


def _escape(character: str) -> str:
    return f"\\u{ord(character):04x}"
