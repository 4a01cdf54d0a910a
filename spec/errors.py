"""Errors that the user can mend: each has a stable code (docs/errors.md), and says what, where and how to mend it."""

from collections.abc import Sequence
from dataclasses import dataclass

_MAX_WIDTH = 120


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """One fault in a spec, with the place that holds it. Lines and columns count from 1."""

    code: str
    message: str
    file: str = ""
    """File as the user named it, `preset:NAME`, or `--set PATH`."""
    line: int = 1
    column: int = 1
    length: int = 1
    """Characters under the caret."""
    path: str = ""
    """Dotted path of the value, `model.layer.attention.heads`."""
    source_line: str = ""
    label: str = ""
    """What the caret says."""
    help: str = ""
    notes: tuple[str, ...] = ()
    """Where the other values of the rule come from."""

    @property
    def where(self) -> str:
        """`file:line:column`."""
        return f"{self.file}:{self.line}:{self.column}"

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.code} {self.message}"]
        if self.source_line:
            width = max(5, len(str(self.line)) + 2)
            start = max(0, self.column - _MAX_WIDTH // 2) if len(self.source_line) > _MAX_WIDTH else 0
            excerpt = _printable(self.source_line[start : start + _MAX_WIDTH])
            caret = "^" * max(1, min(self.length, len(excerpt) - (self.column - 1 - start)))
            lines.append(f"{self.line:>{width}} | {excerpt}".rstrip())
            lines.append(f"{'':>{width}} | {'':>{self.column - 1 - start}}{caret} {self.label}".rstrip())
        lines += [f"  note: {note}" for note in self.notes]
        if self.help:
            lines.append(f"  help: {self.help}")
        return "\n".join(lines)


def _printable(text: str) -> str:
    """One column a character, so that the caret stands under its value: tabs and control characters become spaces."""
    return "".join(c if c.isprintable() else " " for c in text)


class ArchwrightError(Exception):
    """A mistake that the user can mend; the command line prints it without a traceback and exits with 1."""

    def __init__(self, code: str, message: str, *, where: str | None = None, help: str | None = None) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.where = where
        self.help = help

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.code} {self.message}" + (f"\n  help: {self.help}" if self.help else "")


class SpecError(ArchwrightError):
    """Everything that is wrong with a spec, at once; `diagnostics` is sorted by place and never empty."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        ordered = sorted(
            dict.fromkeys(diagnostics),
            key=lambda d: (d.file.startswith("--set"), d.file, d.line, d.column, d.code, d.path),
        )
        first = ordered[0]
        super().__init__(first.code, first.message, where=first.where, help=first.help or None)
        self.diagnostics: tuple[Diagnostic, ...] = tuple(ordered)

    def __reduce__(self) -> tuple[type["SpecError"], tuple[tuple[Diagnostic, ...]]]:
        return SpecError, (self.diagnostics,)  # for worker processes that raise it

    def __str__(self) -> str:
        return "\n".join(str(diagnostic) for diagnostic in self.diagnostics)
