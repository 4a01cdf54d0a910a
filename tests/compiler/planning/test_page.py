"""The HTML page: it parses, fetches nothing, and says what the JSON says."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from archwright.compiler import plan
from archwright.compiler.planning.memory import total_bytes
from archwright.compiler.planning.page import as_html
from archwright.compiler.planning.report import PlanReport
from archwright.spec import load
from archwright.spec.cli import main

VOID = {"meta", "line", "rect"}
TRAIN = {"kind": "pretrain", "precision": "bfloat16", "batch_size": 64, "micro_batches": 8, "sequence_length": 4096}
PIPELINE = {"train": TRAIN, "parallel": {"pipeline": 4, "tensor": 2}}


class Page(HTMLParser):
    """Checks that elements close in order; collects texts, attributes and the JSON."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.links: list[str] = []
        self.texts: list[str] = []
        self.json = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.json += data
        else:
            self.texts.append(data)


def reports() -> dict[str, PlanReport]:
    specs: dict[str, tuple[str, dict[str, Any], str | None]] = {
        "pipeline": ("llama3.1-8b", PIPELINE, "64xH100"),
        "too large": ("llama3.1-8b", {"train": {**TRAIN, "micro_batches": 1}}, "8xH100"),
        "inference": ("llama3.1-8b", {"build.precision": "bfloat16", "build.parallel.tensor": 4}, "8xH100"),
        "no machine": ("tiny", {}, None),
    }
    return {name: plan(load(f"preset:{preset}", more), gpus=gpus) for name, (preset, more, gpus) in specs.items()}


@pytest.mark.parametrize(("name", "report"), reports().items())
def test_the_page_says_what_the_json_says(name: str, report: PlanReport) -> None:
    text = as_html(report)
    page = Page(text)
    assert json.loads(page.json) == json.loads(json.dumps(report.to_json()))
    assert page.links == [] and "http" not in text.replace("http-equiv", "")
    words = " ".join(page.texts)
    assert f"{report.num_params:,}" in words
    if report.cluster is not None:
        assert f"{max(map(total_bytes, report.memory)) / 1e9:.1f} of" in words
        assert f"{report.step_s:.4g} s expected" in words
    if report.change is not None:
        assert report.change.command in words
    assert page.count["svg"] == (3 if name == "pipeline" else 2)


def test_the_timeline_has_every_micro_batch_and_the_mesh_every_gpu() -> None:
    report = reports()["pipeline"]
    text = as_html(report)
    for stage in range(4):
        for micro in range(8):
            assert f"forward of micro-batch {micro}, stage {stage}," in text
            assert f"backward of micro-batch {micro}, stage {stage}," in text
    assert all(f"rank {rank}, pipeline {rank // 16}," in text for rank in range(64))


def test_a_name_is_text() -> None:
    text = as_html(plan(load("preset:tiny", {"name": "<script>alert(1)</script>"})))
    assert "<script>alert" not in text and Page(text).count["script"] == 1


def test_the_verb_writes_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "preset:tiny", "--gpus", "2xH100", "--html", "plan.html"]) == 0
    assert Page((folder / "plan.html").read_text()).count["svg"] == 2
    assert "tiny: training" in capsys.readouterr().out


def test_a_name_that_no_utf_8_can_hold(folder: Path) -> None:
    assert main(["plan", "preset:tiny", "--set", 'name="a\\ud800"', "--html", "page.html"]) == 0
    assert "a&#55296;" in Path("page.html").read_text(encoding="utf-8")
