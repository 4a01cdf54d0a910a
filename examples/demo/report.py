"""The demo's closing page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Check:
    """A claim of the demo, and whether it held."""

    claim: str
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the demo measured. seconds: by step, only of steps that ran this time."""

    folder: Path
    precision: str
    steps: int
    seconds: Mapping[str, float]
    bits_per_byte: Mapping[str, float]
    verified: Mapping[str, Mapping[str, Any]]
    samples: Mapping[str, str]
    checks: Sequence[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def markdown(self) -> str:
        bits = sorted(self.bits_per_byte.items(), key=lambda item: item[1])
        sections = [
            "# Archwright demo",
            _table(("check", ""), [(c.claim, "passed" if c.passed else "FAILED") for c in self.checks]),
            "## Bits per byte on held-out files (fewer is better)",
            _table(("predictor", "bits per byte"), [(name, f"{value:.3f}") for name, value in bits]),
            f"Pretrained for {self.steps} steps in {self.precision}.",
            "## Verification",
            _table(("artifact", "check", "result", "largest error", "tolerance"), self._verification()),
            "## Samples (greedy, from the one-rank ONNX artifact)",
            *(f"`{prompt}`\n\n{_indented(text)}" for prompt, text in self.samples.items()),
            "## Seconds of each step",
            _table(("step", "s"), [(name, f"{value:.1f}") for name, value in self.seconds.items()]),
            f"Everything lies in {self.folder}. To go on:",
            f"    archwright generate {self.folder / 'onnx-1'} --chat\n    archwright inspect {self.folder / 'onnx-2'}",
        ]
        return "\n\n".join(sections) + "\n"

    def _verification(self) -> list[tuple[str, ...]]:
        return [
            (out, row["name"], row["result"], _number(row["error"]), _number(row["tolerance"]))
            for out, result in self.verified.items()
            for row in result["checks"]
        ]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell) for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
