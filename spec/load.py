"""Reading a spec: files and overrides → tree → classes → cross-field rules."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from archwright.spec.checks import check
from archwright.spec.diagnostics import explain
from archwright.spec.digest import spec_digest
from archwright.spec.dump import dump
from archwright.spec.errors import Diagnostic, SpecError
from archwright.spec.merge import absolute_paths, apply_overrides, read_merged
from archwright.spec.models import Spec
from archwright.spec.source import MapNode, plain
from archwright.spec.structure import Path

__all__ = ["Resolved", "dump", "load", "resolve", "spec_digest"]


@dataclass(frozen=True)
class Resolved:
    """A spec and the tree that it came from; the tree knows where each value was written."""

    spec: Spec
    tree: MapNode


def load(path: str | os.PathLike[str], overrides: Mapping[str, object] | None = None) -> Spec:
    """Reads, merges and checks a spec.

    `path` is a YAML file or `preset:NAME`. `overrides` maps dotted paths (`train.steps`, `data.sources[0].path`) to
    values, applied in order on top. Paths in the result are absolute. Raises `SpecError` with everything that is wrong.
    """
    return resolve(path, overrides).spec


def resolve(path: str | os.PathLike[str], overrides: Mapping[str, object] | None = None) -> Resolved:
    """As `load`, with the tree."""
    tree, faults = read_merged(path)
    tree, override_faults = apply_overrides(tree, overrides or {})
    faults += override_faults
    tree = absolute_paths(tree)
    try:
        spec = Spec.model_validate(plain(tree))
    except ValidationError as error:
        explained = explain(error, tree)
        told = {diagnostic.path for diagnostic in faults}
        faults += [diagnostic for diagnostic in explained.values() if diagnostic.path not in told]
        raise SpecError(faults + _check_rest(tree, tuple(explained))) from None
    faults += check(spec, tree)
    if faults:
        raise SpecError(faults)
    return Resolved(spec, tree)


def _check_rest(tree: MapNode, faulty: tuple[Path, ...]) -> list[Diagnostic]:
    """The cross-field rules on what is sound: faulty values are left out where the classes have defaults for them."""
    content: dict[str, Any] = plain(tree)
    for path in faulty:
        _remove(content, path)
    try:
        spec = Spec.model_validate(content)
    except ValidationError:
        return []
    return check(spec, tree, ignore=faulty)


def _remove(content: Any, path: Path) -> None:
    *parents, last = path or ("",)
    for part in parents:
        if isinstance(content, dict):
            content = content.get(part)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if isinstance(content, dict):
        content.pop(last, None)  # pyright: ignore[reportUnknownMemberType]
