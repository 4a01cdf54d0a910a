"""Any mutation of a sound spec loads, or raises `SpecError` with diagnostics that point into a text."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archwright.spec import SpecError, dump, load
from archwright.spec.merge import SetText, preset_text

TEXT = preset_text("tiny")
FRAGMENTS = [
    *"\t\n :,-?{}[]&*!|>'\"%@`#~", "\r", "\x00", "\x85", "\u2028", "\ud800", "é", "<<: ", "*a", "&a ", "!!int ", "--- ",
    "%YAML 1.1\n", "null", "true", ".nan", ".inf", "1e999", "9" * 50, "kind: ", "extends: preset:tiny\n", "? ", "- ",
    "[[[[",
    "  ", "model: ", "train: {kind: sft}\n", "{kind: text, path: x}", "0", "-1", "3",
]  # fmt: skip
FAST = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

edits = st.lists(
    st.tuples(st.integers(0, len(TEXT)), st.integers(0, 30), st.sampled_from(["", *FRAGMENTS]) | st.text(max_size=4)),
    min_size=1,
    max_size=4,
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["sft", "text", "gqa"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "path", "steps", "x"]), inner),
    max_leaves=5,
)
PATHS = [
    "train", "train.kind", "train.optimizer.betas", "model", "model.layers", "model.layer.attention", "name", "version",
    "model.layer.attention.heads", "data.sources", "data.sources.0", "build.profiles", "parallel", "build.weights.kind",
    "parallel.data_shard", "tokenizer.path", "serve", "model.layer.attention.position.scaling", "build.max_positions",
]  # fmt: skip


def loads_or_points(path: str, overrides: dict[str, Any] | None = None) -> None:
    try:
        spec = load(path, overrides)
    except SpecError as error:
        assert error.diagnostics
        for diagnostic in error.diagnostics:
            assert diagnostic.file and diagnostic.line >= 1 and diagnostic.column >= 1 and diagnostic.message
            assert diagnostic.column <= len(diagnostic.source_line) + 1
            assert str(diagnostic)
    else:
        Path("again.yaml").write_text(dump(spec), encoding="utf-8")
        assert load("again.yaml") == spec


@FAST
@given(edits)
def test_edited_texts(folder: Path, edits: list[tuple[int, int, str]]):
    text = TEXT
    for start, length, new in edits:
        text = text[:start] + new + text[start + length :]
    Path("spec.yaml").write_bytes(text.encode(errors="surrogatepass"))
    loads_or_points("spec.yaml")


@FAST
@given(st.dictionaries(st.sampled_from(PATHS), values, min_size=1, max_size=3))
def test_python_values(folder: Path, overrides: dict[str, Any]):
    loads_or_points("preset:tiny", overrides)


@FAST
@given(st.sampled_from(PATHS) | st.text(max_size=8), st.text(max_size=6) | st.sampled_from(FRAGMENTS))
def test_set_texts(folder: Path, path: str, text: str):
    loads_or_points("preset:tiny", {path: SetText(text)})


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"\xef\xbb\xbf", b"\x00" * 10, b"[" * 3000, b"a: " * 300, b"&a *a"]
)
def test_odd_files(folder: Path, content: bytes):
    Path("spec.yaml").write_bytes(content)
    loads_or_points("spec.yaml")
