"""The linter's rules for the dialects fire on graphs that break them; graphs of every dialect are clean."""

from collections.abc import Callable
from typing import Any

import onnx
import pytest
from onnx import ModelProto

from archwright.compiler.interpreters.onnx_dialects import ALL, Dialect
from archwright.compiler.targets.linter import RULES, lint
from archwright.spec import Spec
from tests.compiler.targets.test_linter import (
    VIOLATIONS,
    Change,
    half_precision_tables,
    node_of,
    set_attribute,
    set_input,
    set_opset,
)

TENSORRT, OWN = Dialect(target="tensorrt"), Dialect(target="onnxruntime")


def set_domain(op: str, domain: str) -> Change:
    def change(model: ModelProto) -> None:
        node_of(model.graph, op).domain = domain

    return change


def symbolic_cache(model: ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        if value.name.endswith(".1.value"):
            value.type.tensor_type.shape.dim[2].dim_param = "capacity"


def swapped_caches(model: ModelProto) -> None:
    """Keys and values of one layer written to each other's place."""
    node = node_of(model.graph, "GroupQueryAttention")
    node.output[1], node.output[2] = node.output[2], node.output[1]


GQA, TRT, UPDATE = "GroupQueryAttention", "TRT_Attention", "TRT_KVCacheUpdate"
BROKEN: list[tuple[str, str, Dialect, Change]] = [
    ("LINT001", "foreign-domain", TENSORRT, set_opset("com.microsoft", 1)),
    ("LINT008", "symbolic-capacity", TENSORRT, symbolic_cache),
    ("LINT008", "symbolic-capacity, own", OWN, symbolic_cache),
    ("LINT009", "swapped-caches", OWN, swapped_caches),
    ("LINT009", "no-write-index", TENSORRT, set_input(UPDATE, 2, "")),
    ("LINT017", "upper-left", TENSORRT, set_attribute(TRT, "causal_kind", "upper_left")),
    ("LINT017", "packed", TENSORRT, set_attribute(TRT, "query_form", "packed_nhd")),
    ("LINT017", "no-lengths", TENSORRT, set_input(TRT, 5, "")),
    ("LINT017", "long-lengths", TENSORRT, set_input(TRT, 5, "write_index")),
    ("LINT017", "later-lengths", TENSORRT, set_input(TRT, 6, "kv_lengths")),
    ("LINT017", "mask", TENSORRT, set_input(TRT, 3, "kv_positions")),
    ("LINT017", "other-axis", TENSORRT, set_attribute(UPDATE, "axis", 1)),
    ("LINT017", "long-index", TENSORRT, set_input(UPDATE, 2, "write_index")),
    ("LINT018", "domain", OWN, set_domain(GQA, "")),
    ("LINT018", "no-query-seqlens", OWN, set_input(GQA, 16, "")),
    ("LINT018", "no-scale", OWN, set_attribute(GQA, "scale", None)),
    ("LINT018", "half-tables", OWN, half_precision_tables),
    ("LINT018", "no-position-ids", OWN, set_input(GQA, 9, "")),
]


@pytest.fixture
def graph(make_spec: Any, export: Any) -> Callable[[Dialect], Any]:
    return lambda dialect: export(make_spec(head_dim=16), dialect=dialect).graph


@pytest.mark.parametrize(("code", "dialect", "change"), [pytest.param(c, d, f, id=f"{c}-{n}") for c, n, d, f in BROKEN])
def test_a_broken_rule_is_reported(graph: Any, code: str, dialect: Dialect, change: Change) -> None:
    path = graph(dialect)
    model = onnx.load(path, load_external_data=False)
    change(model)
    assert code in {line.split()[0] for line in lint(model, path.parent, dialect)}


def test_every_rule_has_a_violation() -> None:
    assert {code for code, *_ in (*VIOLATIONS, *BROKEN)} == RULES.keys()


def test_a_dialects_operators_are_refused_in_others(graph: Any) -> None:
    found = {}
    for dialect in (TENSORRT, OWN):
        path = graph(dialect)
        found[dialect] = {line.split()[0] for line in lint(onnx.load(path, load_external_data=False), path.parent)}
    assert found == {TENSORRT: {"LINT017"}, OWN: {"LINT001"}}


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("position", ["rope", "none"])
def test_our_graphs_are_clean(make_spec: Any, export: Any, target: str, precision: str, position: str) -> None:
    """Also where nothing but the mask would read a position."""
    fields = make_spec(head_dim=16).model_dump()
    fields["model"]["layer"]["attention"]["position"] = {"kind": position}
    spec = Spec.model_validate(fields)
    dialect = Dialect(target=target, fusions=ALL if precision != "float16" else ())
    model = export(spec, tensor=2, precision=precision, dialect=dialect)
    for rank in range(2):
        path = model.folder / f"rank{rank}" / "stage0.onnx"
        onnx.checker.check_model(str(path))
        assert lint(onnx.load(path, load_external_data=False), path.parent, dialect) == []
