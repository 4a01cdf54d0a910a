from collections.abc import Callable
from pathlib import Path

import pytest

from archwright.spec import dump, load
from archwright.spec.load import resolve

OVERRIDES = {
    "data.sources": [{"kind": "text", "path": "/t/*.txt"}, {"kind": "pairs", "path": "/p.jsonl", "prompt": "a: b"}],
    "train.clip_norm": None,
    "train.optimizer.eps": 1e-30,
    "build.profiles": [{name: {"min": 1, "opt": 2, "max": 4} for name in ("batch", "sequence", "positions")}],
    "model.layer.attention.position.scaling": {"kind": "llama3"},
    "parallel.data_shard": 1,
}


def test_a_dump_loads_to_an_equal_spec(folder: Path):
    spec = load("preset:tiny", OVERRIDES)
    for tree in (None, resolve("preset:tiny", OVERRIDES).tree):
        Path("spec.yaml").write_text(dump(spec, tree))
        assert load("spec.yaml") == spec
    assert dump(load("spec.yaml")) == dump(spec)


@pytest.mark.parametrize(
    "text",
    ["null", "1e5", "on", "true", "", " ", "a: b", "# no", "é\t\n", "\x7f\x85\u2028\ufeff", "'\"\\", "2024-01-01",
     "- a", "*a", "!t", "😀", "\ud800", "~", "0x1f", "a" * 300, "key:", "%", "@", "{", "a #b", "\u0661"],
)  # fmt: skip
def test_any_text_comes_back(folder: Path, text: str):
    spec = load("preset:tiny").model_copy(update={"name": text})
    Path("spec.yaml").write_text(dump(spec), encoding="utf-8")
    assert load("spec.yaml").name == text


def test_provenance(golden: Callable[[str, str], None]):
    resolved = resolve("preset:tiny", OVERRIDES)
    golden("provenance.yaml", dump(resolved.spec, resolved.tree))
