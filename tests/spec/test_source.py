import math
from pathlib import Path
from typing import Any

import pytest

from archwright.spec import SpecError
from archwright.spec.source import MAX_BYTES, Source, Span, find, parse, plain, read_source


def values(text: str) -> Any:
    tree, faults = parse(Source("spec.yaml", text, Path()))
    assert faults == []
    return plain(tree)


def codes(text: str) -> list[str]:
    try:
        return [fault.code for fault in parse(Source("spec.yaml", text, Path()))[1]]
    except SpecError as error:
        return [fault.code for fault in error.diagnostics]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("3e4", 3e4), ("500_000", 500_000), ("0x1F", 31), ("0o17", 15), ("017", 17), ("-3", -3),
        ("+.5", 0.5), ("1.", 1.0), (".inf", math.inf), ("-.INF", -math.inf), ("1_0.5", 10.5),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("on", "on"), ("yes", "yes"), ("'1'", "1"), ('"\\u00e9\\n"', "é\n"),
        ("2024-01-01", "2024-01-01"), ("1:30", "1:30"),
        ("0b1", "0b1"), ("1e", "1e"), ("!!str 5", "5"), ("! 5", "5"), ("!!int 5", 5), (".nan.", ".nan."),
        ("\u0661", "\u0661"),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: object):
    result = values(f"a: {text}")["a"]
    assert result == value and type(result) is type(value)


def test_nan():
    assert math.isnan(values("a: .nan")["a"])


def test_anchors_aliases_and_merge_keys():
    text = "base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\nboth: {<<: [*base, {c: 4}], a: 0}\n"
    assert values(text) == {"base": {"a": 1, "b": 2}, "other": {"a": 1, "b": 3}, "both": {"a": 0, "b": 2, "c": 4}}


def test_every_value_knows_its_place():
    text = "\ufeffa: 1\nmodel:\n  heads: [8,  16]\n  text: 'x'\n  none:\n".removeprefix("\ufeff")
    tree, _ = parse(source := Source("spec.yaml", text, Path()))
    places = {("model", "heads", 1): (3, 15, 2), ("model", "text"): (4, 9, 3), ("model", "none"): (5, 3, 4)}
    for path, place in places.items():
        node = find(tree, path)
        assert node is not None
        assert node.span == Span(source, *place)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a: [1", "SPEC002"), ("a:\n\t- 1", "SPEC002"), ("a: b: c", "SPEC002"), ("a: \x01", "SPEC002"),
        ("{a: 1}}", "SPEC002"),
        ("a: 'x", "SPEC002"), ("- a\nb: c", "SPEC002"), ("\x00", "SPEC002"), ("%YAML 3.0\n---\na: 1", "SPEC002"),
        ("a: 1\na: 2", "SPEC003"), ("{a: {b: 1, 'b': 2}}", "SPEC003"),
        ("a: !ruby/object 1", "SPEC004"), ("a: !!set {b}", "SPEC004"), ("a: !!int x", "SPEC004"), ("1: a", "SPEC004"),
        ("? [a]\n: b", "SPEC004"), ("null: a", "SPEC004"), ("a: 1\n---\nb: 2", "SPEC004"),
        ("%YAML 1.1\n---\na: 1", "SPEC004"),
        ("a: &a [*a]", "SPEC004"), ("a: *b", "SPEC004"), ("a: {<<: 1}", "SPEC004"), (f"a: {2**63}", "SPEC004"),
        ("a: " + "9" * 5000, "SPEC004"), ("a: " + "[" * 65 + "]" * 65, "SPEC004"), ("- [" * 5000, "SPEC002"),
    ],
)  # fmt: skip
def test_what_is_no_spec(text: str, code: str):
    assert codes(text) == [code]


def test_lines_are_counted_as_yaml_1_2_counts_them():
    tree, _ = parse(source := Source("spec.yaml", "# \x85 \u2028\r\na: 1\rb: [\n2]", Path()))
    node = find(tree, ("b", 0))
    assert node is not None and node.span == Span(source, 4, 1)
    assert source.line(2) == "a: 1"


def test_faults_that_leave_a_tree_come_together():
    assert codes("a: 1\na: 2\nb: !x 1\n3: 4") == ["SPEC003", "SPEC004", "SPEC004"]


def test_billions_of_laughs_are_refused():
    levels = [f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 10)}]" for level in range(1, 12)]
    assert codes("\n".join(["l0: &l0 ha", *levels])) == ["SPEC004"]


def test_depth_through_aliases_is_refused():
    nested = "[" * 40 + "{}" + "]" * 40
    assert codes(f"a: &a {nested.format(1)}\nb: {nested.format('*a')}") == ["SPEC004"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: \xff", "is not UTF-8 text: byte 0xff in line 1"), (b"#" * (MAX_BYTES + 1), "is larger than 1 MiB")],
)
def test_what_is_no_text(folder: Path, content: bytes, message: str):
    (folder / "spec.yaml").write_bytes(content)
    with pytest.raises(SpecError, match=message) as error:
        read_source(Path("spec.yaml"), "spec.yaml")
    assert error.value.code == "SPEC001"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.yaml", "no such file"),
        (".", "is a folder"),
        ("a\0b", "null byte|null character"),
        ("x" * 999, "too long"),
    ],
)
def test_what_is_no_file(folder: Path, path: str, message: str):
    with pytest.raises(SpecError, match=message) as error:
        read_source(Path(path), path)
    assert error.value.code == "SPEC001"


def test_a_byte_order_mark_is_skipped(folder: Path):
    (folder / "spec.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_source(Path("spec.yaml"), "spec.yaml").text == "a: 1"
