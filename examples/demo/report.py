"""The demo's closing page: one list of sections, rendered as Markdown for the terminal and as one HTML file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from charts import loss_chart, plan_drawing


@dataclass(frozen=True)
class Check:
    """A claim of the demo, and whether it held."""

    claim: str
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Section:
    """A title with a sentence, a table (its first row is the head), literal text, or a drawing (SVG, HTML only)."""

    title: str
    sentence: str = ""
    table: Sequence[Sequence[object]] = ()
    literal: str = ""
    drawing: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the demo measured.

    seconds: by step, of all runs together. losses: by training, (step, loss) pairs. plan: JSON of `archwright plan` for
    the two-rank training. verified: artifact → JSON of `archwright verify`.
    """

    folder: Path
    recipe: str
    seconds: Mapping[str, float]
    bits_per_byte: Mapping[str, float]
    losses: Mapping[str, Sequence[tuple[int, float]]]
    plan: Mapping[str, Any]
    verified: Mapping[str, Mapping[str, Any]]
    samples: Mapping[str, str]
    checks: Sequence[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def sections(self) -> list[Section]:
        bits = sorted(self.bits_per_byte.items(), key=lambda item: item[1])
        return [
            Section(
                title="Checks",
                table=[("check", "result"), *((c.claim, "passed" if c.passed else "FAILED") for c in self.checks)],
            ),
            Section(
                title="Bits per byte on held-out files (fewer is better)",
                sentence=self.recipe,
                table=[("predictor", "bits per byte"), *((name, f"{value:.3f}") for name, value in bits)],
            ),
            Section(title="Loss", drawing=loss_chart(self.losses)),
            Section(title="The plan of the two-rank finetuning", drawing=plan_drawing(self.plan)),
            Section(
                title="Verification",
                table=[("artifact", "check", "result", "largest error", "tolerance"), *self._verification()],
            ),
            *(Section(title=f"Sample: {prompt}", literal=text) for prompt, text in self.samples.items()),
            Section(
                title="Seconds of each step",
                table=[("step", "s"), *((name, f"{value:.1f}") for name, value in self.seconds.items())],
            ),
            Section(
                title="To go on",
                sentence=f"Everything lies in {self.folder}.",
                literal=f"archwright generate {self.folder / 'onnx-1'} --chat\n"
                f"archwright inspect {self.folder / 'onnx-2'}",
            ),
        ]

    def _verification(self) -> list[tuple[str, ...]]:
        return [
            (out, row["name"], row["result"], _number(row["error"]), _number(row["tolerance"]))
            for out, result in self.verified.items()
            for row in result["checks"]
        ]

    def markdown(self) -> str:
        parts = ["# Archwright demo"]
        for section in self.sections():
            body = [section.sentence, _markdown_table(section.table), _indented(section.literal)]
            if any(body):
                parts += [f"## {section.title}", *(text for text in body if text)]
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """A page that needs no other file."""
        body = "\n".join(
            f"<h2>{escape(section.title)}</h2>"
            + (f"<p>{escape(section.sentence)}</p>" if section.sentence else "")
            + _html_table(section.table)
            + (f"<pre>{escape(section.literal)}</pre>" if section.literal else "")
            + section.drawing
            for section in self.sections()
        )
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Archwright demo</title>'
            f"<style>{_STYLE}</style><h1>Archwright demo</h1>\n{body}</html>\n"
        )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}"
    "pre{background:#f5f5f5;padding:1em;overflow-x:auto;white-space:pre-wrap}svg{max-width:100%}"
)


def _html_table(rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    tags = ["th", *["td"] * (len(rows) - 1)]
    lines = (
        "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(tags, rows, strict=True)
    )
    return f"<table>{''.join(lines)}</table>"


def _markdown_table(rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
