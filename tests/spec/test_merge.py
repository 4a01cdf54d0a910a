from pathlib import Path
from typing import Any

import pytest

from archwright.spec import SpecError, load
from archwright.spec.load import resolve
from archwright.spec.merge import SetText
from archwright.spec.source import find, plain

HEAD = "version: 1\nname: child\n"


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def refused(path: str, overrides: dict[str, Any] | None = None) -> tuple[str, str, str]:
    with pytest.raises(SpecError) as error:
        load(path, overrides)
    assert len(error.value.diagnostics) == 1
    first = error.value.diagnostics[0]
    return first.where, first.code, f"{first.message}; {first.help}"


def test_chains_merge_deeply_and_nearer_wins(folder: Path):
    write("base/base.yaml", f"{HEAD}extends: preset:tiny\nmodel: {{layers: 3, layer: {{norm: {{eps: 1e-6}}}}}}\n")
    write("child.yaml", f"{HEAD}extends: base/base.yaml\nmodel: {{layers: 4}}\n")
    resolved = resolve("child.yaml", {"train.steps": 7})
    spec, tree = resolved.spec, resolved.tree
    assert (spec.name, spec.extends) == ("child", None)
    assert (spec.model.layers, spec.model.layer.norm.eps, spec.model.hidden_size) == (4, 1e-6, 64)
    assert spec.train and spec.train.steps == 7
    origins = {
        ("model", "layers"): "child.yaml:4:17",
        ("model", "layer", "norm", "eps"): "base/base.yaml:4:40",
        ("model", "hidden_size"): "preset:tiny:7:16",
        ("train", "steps"): "--set train.steps:1:1",
        ("serve", "host"): None,
    }
    for path, origin in origins.items():
        node = find(tree, path)
        assert (str(node.span) if node else None) == origin


def test_a_mapping_of_another_kind_replaces_the_whole(folder: Path):
    path = write("spec.yaml", f"{HEAD}extends: preset:tiny\ntokenizer: {{kind: huggingface}}\ndata: {{sources: []}}\n")
    tokenizer = load(path).tokenizer
    assert tokenizer is not None and tokenizer.kind == "huggingface"
    changed = resolve("preset:tiny", {"model.init": {"kind": "normal"}}).tree
    init = find(changed, ("model", "init"))
    assert init is not None and plain(init) == {"kind": "normal"}


def test_lists_and_null_replace(folder: Path):
    write(
        "base.yaml",
        f"{HEAD}extends: preset:tiny\ndata: {{sources: [{{kind: text, path: a}}, {{kind: text, path: b}}]}}\n",
    )
    write("child.yaml", f"{HEAD}extends: base.yaml\ndata: {{sources: [{{kind: text, path: c}}]}}\ntrain: null\n")
    spec = load("child.yaml")
    assert spec.data and [source.path for source in spec.data.sources] == [str(folder / "c")]
    assert spec.train is None


def test_paths_start_from_the_file_that_holds_them(folder: Path, monkeypatch: pytest.MonkeyPatch):
    write(
        "one/base.yaml", f"{HEAD}extends: preset:tiny\ndata: {{path: d, sources: [{{kind: text, path: ../t/*.txt}}]}}\n"
    )
    write("two/child.yaml", f"{HEAD}extends: ../one/base.yaml\ntokenizer: {{path: tok, chat_template: ./c.jinja}}\n")
    monkeypatch.setenv("HOME", "/home/me")
    spec = load("two/child.yaml", {"train.base": SetText("run"), "data.sources[0].path": "~/u"})
    assert spec.data and spec.tokenizer and spec.train
    assert spec.data.path == str(folder / "one" / "d")
    assert spec.data.sources[0].path == "/home/me/u"
    assert spec.tokenizer.path == str(folder / "two" / "tok")
    assert spec.tokenizer.kind == "sentencepiece" and spec.tokenizer.chat_template == str(folder / "two" / "c.jinja")
    assert spec.train.base == str(folder / "run")
    assert load("two/child.yaml").data.sources[0].path == str(folder / "t" / "*.txt")  # type: ignore[union-attr]


def test_circles_are_found(folder: Path):
    write("a.yaml", f"{HEAD}extends: sub/b.yaml\n")
    write("sub/b.yaml", f"{HEAD}extends: ./../a.yaml\n")
    where, code, text = refused("a.yaml")
    assert (where, code) == ("sub/b.yaml:3:10", "SPEC006")
    assert "a.yaml -> sub/b.yaml -> a.yaml" in text


@pytest.mark.parametrize(
    ("extends", "code", "message"),
    [
        ("preset:tyni", "SPEC006", "did you mean `tiny`?"),
        ("none.yaml", "SPEC001", "no such file"),
        ("''", "SPEC001", "is a folder"),
        ("[preset:tiny]", "SPEC006", "must be text"),
    ],
)
def test_a_parent_that_is_not_there_is_shown_in_the_child(folder: Path, extends: str, code: str, message: str):
    write("spec.yaml", f"{HEAD}extends: {extends}\n")
    with pytest.raises(SpecError) as error:
        load("spec.yaml")
    first = next(diagnostic for diagnostic in error.value.diagnostics if diagnostic.code == code)
    assert first.where == "spec.yaml:3:10"
    assert message in f"{first.message} {first.help}"


def test_a_fault_in_a_parent_is_shown_there(folder: Path):
    write("base.yaml", f"{HEAD}extends: preset:tiny\ntrain: {{steps: none}}\n")
    write("child.yaml", f"{HEAD}extends: base.yaml\n")
    assert refused("child.yaml")[:2] == ("base.yaml:4:16", "SPEC011")


def test_version_and_name_are_not_inherited(folder: Path):
    with pytest.raises(SpecError) as error:
        load(write("spec.yaml", "extends: preset:tiny\n"))
    assert [(d.code, d.path, d.where) for d in error.value.diagnostics] == [
        ("SPEC012", "name", "spec.yaml:1:1"),
        ("SPEC012", "version", "spec.yaml:1:1"),
    ]


@pytest.mark.parametrize("version", ["2", "true", "1.0", "'1'", "null"])
def test_another_version_is_refused_in_every_file(folder: Path, version: str):
    write("base.yaml", f"version: {version}\nname: a\nextends: preset:tiny\n")
    assert refused("base.yaml")[:2] == ("base.yaml:1:10", "SPEC015")
    assert refused(write("child.yaml", f"{HEAD}extends: base.yaml\n"))[:2] == ("base.yaml:1:10", "SPEC015")
    assert refused("preset:tiny", {"version": SetText(version)})[:2] == ("--set version:1:1", "SPEC015")


def test_overrides_are_yaml_and_applied_in_order():
    overrides = {
        "data.sources": SetText("[{kind: jsonl, path: a}]"),
        "data.sources.0.text": SetText("body"),
        "train": {"kind": "sft"},
        "train.optimizer.learning_rate": 1,
        "train.optimizer.betas": (0.5, 0.75),
        "build.weights.kind": "generated",
        "build.weights.seed": SetText("0x10"),
        "train.clip_norm": SetText(""),
    }
    spec = load("preset:tiny", overrides)
    assert spec.data and spec.data.sources[0].model_dump()["text"] == "body"
    assert spec.train and (spec.train.kind, spec.train.clip_norm) == ("sft", None)
    assert spec.train.steps == 1000, "another kind of train drops the preset's values"
    assert spec.train.optimizer.betas == (0.5, 0.75) and isinstance(spec.train.optimizer.learning_rate, float)
    assert spec.build.weights.model_dump() == {"kind": "generated", "seed": 16}


@pytest.mark.parametrize(
    ("path", "value", "where", "message"),
    [
        ("trian.steps", 1, "1", "`trian` is not part of the language; did you mean `train`?"),
        ("train.stpes", 1, "7", "`train.stpes` is not part of the language; did you mean `steps`?"),
        ("train.steps.x", 1, "7", "`train.steps` holds no keys"),
        ("train.base.x", 1, "7", "`train.base` holds no keys"),
        (
            "model.layer.attention.position.scaling.factor",
            1,
            "32",
            "`model.layer.attention.position.scaling` is absent",
        ),
        ("data.sources[0].path", "x", "14", "`data.sources.0` is not an item of the list; the list is empty"),
        ("build.profiles[0].batch", 1, "7", "`build.profiles` is an empty list; set it as a whole"),
        ("extends", "preset:tiny", "1", "`extends` is not part of the language"),
        ("", 1, "1", "`` is not part of the language"),
    ],
)
def test_a_path_that_leads_nowhere(path: str, value: object, where: str, message: str):
    found, code, text = refused("preset:tiny", {path: value})
    assert found.startswith(f"--set {path}:1:") and code == "SPEC007"
    assert text.startswith(message)


def test_an_absent_section_is_not_conjured_up():
    where, code, text = refused("preset:llama3.2-1b", {"train.steps": 5})
    assert (where, code) == ("--set train.steps:1:1", "SPEC007")
    assert text.startswith("`train` is absent from this spec; add `train:`")
    assert load("preset:llama3.2-1b", {"train": {"kind": "pretrain"}, "train.steps": 5}).train is not None


@pytest.mark.parametrize(
    ("text", "where", "code"),
    [
        ("[1", "1:3", "SPEC002"),
        ("{a: 1, a: 2}", "1:8", "SPEC003"),
        ("!x 100", "1:1", "SPEC004"),
        ("abc", "1:1", "SPEC011"),
    ],
)
def test_a_fault_in_a_value_is_shown_in_the_value(text: str, where: str, code: str):
    with pytest.raises(SpecError) as error:
        load("preset:tiny", {"train.steps": SetText(text)})
    first = error.value.diagnostics[0] if code != "SPEC003" else error.value.diagnostics[-1]
    assert (first.where, first.code) == (f"--set train.steps:{where}", code)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"x", {1: 2}, 2**70, "\ud800"])
def test_python_values_that_are_no_values(value: object):
    with pytest.raises(SpecError):
        load("preset:tiny", {"train.optimizer.learning_rate": value})
