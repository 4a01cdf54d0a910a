import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archwright.spec import Diagnostic, SpecError, load
from archwright.spec.diagnostics import diagnostics_of, render
from archwright.spec.errors import ArchwrightError

MODEL = """\
version: 1
name: example
model:
  vocab_size: 512
  hidden_size: 64
  max_positions: 256
  layers: 2
  layer:
    attention: {kind: gqa, heads: 4}
    ffn: {kind: swiglu, hidden_size: 176}
"""

CASES: dict[str, str] = {
    "syntax": MODEL + "train: {kind: pretrain\n",
    "tab": MODEL + "train:\n\tkind: pretrain\n",
    "empty": "# nothing\n",
    "list": "- version: 1\n",
    "nothing_but_a_name": "version: 1\nname: x\n",
    "duplicate_key": MODEL + "name: again\n",
    "unknown_key": MODEL + "trian: {kind: pretrain}\n",
    "unknown_inner_key": MODEL.replace("heads: 4", "heads: 4, kv_head: 2, xyzzy: 1"),
    "missing_field": MODEL.replace("  vocab_size: 512\n", "").replace("heads: 4", ""),
    "missing_kind": MODEL.replace("kind: gqa, ", "") + "train: {steps: 5}\n",
    "unknown_kind": MODEL.replace("gqa", "gqaa").replace("heads: 4", "heads: 4, rank: 3")
    + "train: {kind: sfft, x: 1}\n",
    "kind_is_no_text": MODEL + "train: {kind: [sft]}\ntokenizer: {kind: null}\n",
    "wrong_type": MODEL.replace("layers: 2", "layers: '2'")
    .replace("64", "64.0")
    .replace("hidden_size: 176", "hidden_size: [1]")
    + "serve: {host: 1, port: yes}\nparallel: 4\n",
    "truth_values": MODEL.replace("layers: 2", "layers: true").replace("heads: 4", "heads: null")
    + "train: {kind: sft, compile: on, steps: false}\n",
    "out_of_range": MODEL.replace("layers: 2", "layers: 0")
    + "serve: {port: 65536}\ndata: {validation_fraction: 1}\nbuild: {engine: {optimization_level: -1}}\n",
    "not_finite": MODEL + "train: {kind: sft, clip_norm: .inf, optimizer: {kind: adamw, learning_rate: .nan}}\n",
    "betas": MODEL + "train: {kind: sft, optimizer: {kind: adamw, betas: [0.9, 1.5]}}\n",
    "too_many_betas": MODEL + "train: {kind: sft, optimizer: {kind: adamw, betas: [0.9, 0.9, 0.9]}}\n",
    "beta_is_true": MODEL + "train: {kind: sft, optimizer: {kind: adamw, betas: [true, '0.9']}}\n",
    "literals": MODEL + "build: {target: portabel, precision: bf16}\ndata: {deduplicate: fuzzy}\n",
    "items": MODEL + "data:\n  sources:\n    - {kind: text}\n    - {path: x}\n    - 3\n    - {kind: jsonl, path: 3}\n",
    "unions": MODEL + "parallel: {data_shard: all}\nbuild: {max_positions: big}\n",
    "several_sections": MODEL.replace("heads: 4", "heads: 3").replace("layers: 2", "layer_count: 2")
    + "train: {kind: sft, steps: many, batch_size: 3, micro_batches: 2}\n",
}


def fault(text: str, overrides: dict[str, Any] | None = None) -> SpecError:
    Path("spec.yaml").write_text(text)
    with pytest.raises(SpecError) as error:
        load("spec.yaml", overrides)
    return error.value


@pytest.mark.parametrize("name", CASES)
def test_text(name: str, folder: Path, golden: Callable[[str, str], None]):
    golden(f"{name}.txt", f"{fault(CASES[name])}\n")


def test_a_fault_in_a_section_does_not_hide_the_rules_of_others(folder: Path):
    codes = {diagnostic.code for diagnostic in fault(CASES["several_sections"]).diagnostics}
    assert codes == {"SPEC010", "SPEC011", "SPEC012"}, "without `layers` there is no sound spec to check"
    text = MODEL.replace("heads: 4", "heads: 3") + "train: {kind: sft, steps: many, batch_size: 3, micro_batches: 2}\n"
    text = text.replace("256", "512")
    assert {diagnostic.code for diagnostic in fault(text).diagnostics} == {"SPEC011", "SPEC024", "SPEC031"}


def test_every_kind_of_error_says_what_was_found(folder: Path):
    """No word of pydantic's comes through."""
    for text in CASES.values():
        for diagnostic in fault(text).diagnostics:
            assert "Input should" not in diagnostic.message + diagnostic.label + diagnostic.help
            assert diagnostic.file == "spec.yaml" and diagnostic.line >= 1 and diagnostic.column >= 1


def test_json(folder: Path):
    error = fault(MODEL.replace("heads: 4", "heads: 3"))
    content = json.loads(render(error.diagnostics, "json"))
    assert content == {
        "ok": False,
        "diagnostics": [
            {
                "code": "SPEC024",
                "message": "`hidden_size` (64) is not divisible by `heads` (3)",
                "file": "spec.yaml",
                "line": 9,
                "column": 35,
                "length": 1,
                "path": "model.layer.attention.heads",
                "label": "64 / 3 is no whole head_dim, and none is given",
                "help": "use heads: 2, or give head_dim",
                "notes": ["`model.hidden_size` is 64, set at spec.yaml:5:16"],
            }
        ],
    }
    assert json.loads(render([], "json")) == {"ok": True, "diagnostics": []}


def test_github():
    diagnostic = Diagnostic(code="SPEC010", message="100%\nsure", file="--set a,b", line=2, column=3, help="none")
    assert render([diagnostic], "github") == (
        "::error file=--set a%2Cb,line=2,col=3,title=SPEC010::100%25%0Asure%0Ahelp: none"
    )


def test_any_error_of_the_user_is_a_diagnostic():
    (diagnostic,) = diagnostics_of(ArchwrightError("RUN001", "none", where="out/model", help="build it"))
    assert (diagnostic.code, diagnostic.file, diagnostic.help) == ("RUN001", "out/model", "build it")
