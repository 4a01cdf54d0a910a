"""Every rule of the linter fires on a graph that breaks it, and only that rule."""

import os
from collections.abc import Callable

import onnx
import pytest
from onnx import GraphProto, ModelProto, TensorProto, helper

from archwright.compiler.targets.linter import lint

Change = Callable[[ModelProto], None]


def node_of(graph: GraphProto, op: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.op_type == op)


def set_attribute(op: str, name: str, value: object) -> Change:
    """Give the first node of a kind an attribute; None takes it away."""

    def change(model: ModelProto) -> None:
        node = node_of(model.graph, op)
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend(kept + ([] if value is None else [helper.make_attribute(name, value)]))

    return change


def set_groups(groups: list[int], size: int) -> Change:
    """Among whom the first collective adds up."""

    def change(model: ModelProto) -> None:
        set_attribute("DistCollective", "groups", groups)(model)
        set_attribute("DistCollective", "group_size", size)(model)

    return change


def set_input(op: str, index: int, name: str) -> Change:
    def change(model: ModelProto) -> None:
        node = node_of(model.graph, op)
        node.input.extend([""] * (index + 1 - len(node.input)))
        node.input[index] = name

    return change


def add_input(name: str, *, read_by: str | None = None) -> Change:
    def change(model: ModelProto) -> None:
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, ["batch"]))
        if read_by is not None:
            set_input(read_by, 6, name)(model)

    return change


def symbolic_cache(model: ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        if value.name.endswith(".0.key"):
            value.type.tensor_type.shape.dim[2].dim_param = "capacity"


def forget_output(name: str) -> Change:
    def change(model: ModelProto) -> None:
        model.graph.output.remove(next(value for value in model.graph.output if value.name == name))

    return change


def rename_output(model: ModelProto) -> None:
    for node in model.graph.node:
        node.output[:] = [name.replace("present.0.key", "present.0.other") for name in node.output]
        node.input[:] = [name.replace("present.0.key", "present.0.other") for name in node.input]
    next(value for value in model.graph.output if value.name == "present.0.key").name = "present.0.other"


def read_the_cache_twice(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["past.0.key"], ["again"], name="again"))


def half_precision_tables(model: ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name.endswith(("/cos", "/sin")):
            tensor.data_type = TensorProto.FLOAT16
    for value in model.graph.value_info:
        if value.name.endswith(("/cos", "/sin")):
            value.type.tensor_type.elem_type = TensorProto.FLOAT16


def half_precision_rotation(model: ModelProto) -> None:
    half_precision_tables(model)
    rotated = {name for node in model.graph.node if node.op_type == "RotaryEmbedding" for name in node.input[:1]}
    for value in model.graph.value_info:
        if value.name in rotated:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16


def forget_shape(model: ModelProto) -> None:
    model.graph.output[0].type.tensor_type.ClearField("shape")


def nameless_size(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param")


def forget_type(model: ModelProto) -> None:
    model.graph.output[0].type.tensor_type.ClearField("elem_type")


def equal_node_names(model: ModelProto) -> None:
    model.graph.node[1].name = model.graph.node[0].name


def equal_value_names(model: ModelProto) -> None:
    model.graph.node[1].output[0] = model.graph.node[0].output[0]


def float_mask(model: ModelProto) -> None:
    mask = node_of(model.graph, "Attention").input[3]
    next(v for v in model.graph.value_info if v.name == mask).type.tensor_type.elem_type = TensorProto.FLOAT


def second_output(model: ModelProto) -> None:
    node_of(model.graph, "Attention").output.append("present_key")


def set_location(location: str) -> Change:
    def change(model: ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(entry for entry in tensor.external_data if entry.key == "location").value = location

    return change


def set_domain(model: ModelProto) -> None:
    node_of(model.graph, "DistCollective").domain = ""


def set_opset(domain: str, version: int) -> Change:
    def change(model: ModelProto) -> None:
        kept = [entry for entry in model.opset_import if entry.domain != domain]
        del model.opset_import[:]
        model.opset_import.extend([*kept, helper.make_opsetid(domain, version)])

    return change


VIOLATIONS: list[tuple[str, str, Change]] = [
    ("LINT001", "old-opset", set_opset("", 23)),
    ("LINT001", "foreign-domain", set_opset("com.microsoft", 1)),
    ("LINT002", "nonpad-kv-seqlen", set_input("Attention", 6, "write_index")),
    ("LINT003", "is-causal", set_attribute("Attention", "is_causal", 1)),
    ("LINT004", "no-mask", set_input("Attention", 3, "")),
    ("LINT004", "float-mask", float_mask),
    ("LINT005", "past-key", set_input("Attention", 4, "present.0.key")),
    ("LINT005", "past-value", set_input("Attention", 5, "present.0.value")),
    ("LINT005", "second-output", second_output),
    ("LINT006", "no-scale", set_attribute("Attention", "scale", None)),
    ("LINT007", "softcap", set_attribute("Attention", "softcap", 30.0)),
    ("LINT007", "softmax-precision", set_attribute("Attention", "softmax_precision", 1)),
    ("LINT007", "score-output", set_attribute("Attention", "qk_matmul_output_mode", 1)),
    ("LINT008", "symbolic-capacity", symbolic_cache),
    ("LINT009", "axis", set_attribute("TensorScatter", "axis", 1)),
    ("LINT009", "circular", set_attribute("TensorScatter", "mode", "circular")),
    ("LINT009", "no-write-index", set_input("TensorScatter", 2, "")),
    ("LINT009", "no-output", forget_output("present.0.key")),
    ("LINT009", "other-name", rename_output),
    ("LINT009", "read-twice", read_the_cache_twice),
    ("LINT010", "half-precision-tables", half_precision_tables),
    ("LINT010", "half-precision-rotation", half_precision_rotation),
    ("LINT010", "no-position-ids", set_input("RotaryEmbedding", 3, "")),
    ("LINT011", "operation", set_attribute("DistCollective", "collective_operation", "ALL_REDUCE")),
    ("LINT011", "reduce-op", set_attribute("DistCollective", "reduce_op", "none")),
    ("LINT011", "root", set_attribute("DistCollective", "root", 0)),
    ("LINT011", "no-root", set_attribute("DistCollective", "root", None)),
    ("LINT011", "no-rank-count", set_attribute("DistCollective", "nb_rank", None)),
    ("LINT011", "groups-without-size", set_attribute("DistCollective", "groups", [0, 1])),
    ("LINT011", "groups-of-all-ranks", set_groups([0, 1, 2, 3], 2)),
    ("LINT011", "groups-with-a-rank-twice", set_groups([1, 1], 2)),
    ("LINT011", "domain", set_domain),
    ("LINT012", "unused-input", add_input("lengths")),
    ("LINT013", "no-shape", forget_shape),
    ("LINT013", "no-type", forget_type),
    ("LINT013", "nameless-size", nameless_size),
    ("LINT014", "node-names", equal_node_names),
    ("LINT014", "value-names", equal_value_names),
    ("LINT015", "decomposable", set_attribute("Attention", "TRT_decomposable", 1)),
    ("LINT016", "parent", set_location("../stage0.data")),
    ("LINT016", "absolute", set_location("/stage0.data")),
    ("LINT016", "missing", set_location("other.data")),
]
# What else follows: a value that loses its maker cuts off what came before it.
ALSO = {"value-names": {"LINT012"}}


@pytest.fixture
def graph(make_spec, export):
    return export(make_spec(), tensor=2, precision="float16").graph


@pytest.mark.parametrize(("code", "change"), [pytest.param(c, f, id=f"{c}-{n}") for c, n, f in VIOLATIONS])
def test_a_broken_rule_is_reported(graph, code, change, request):
    model = onnx.load(graph, load_external_data=False)
    change(model)
    codes = {line.split()[0] for line in lint(model, graph.parent)}
    assert code in codes
    name = request.node.callspec.id.removeprefix(f"{code}-")
    assert codes - {code} <= ALSO.get(name, set())


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_our_graphs_are_clean(make_spec, export, tensor, precision):
    model = export(make_spec(tied=tensor == 2), tensor=tensor, precision=precision)
    for rank in range(tensor):
        path = model.folder / f"rank{rank}" / "stage0.onnx"
        assert lint(onnx.load(path, load_external_data=False), path.parent) == []


def test_a_problem_names_its_node(graph):
    model = onnx.load(graph, load_external_data=False)
    set_attribute("Attention", "scale", None)(model)
    (line,) = lint(model)
    assert line.startswith("LINT006 model.layers.0.self_attn/attention: has no scale")


def test_data_that_end_early_or_leave_the_folder_are_reported(graph, tmp_path):
    model = onnx.load(graph, load_external_data=False)
    data = graph.with_suffix(".data")
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    (line,) = lint(model, graph.parent)
    assert "LINT016" in line and "the tensor ends at" in line
    outside = tmp_path / "outside.data"
    outside.write_bytes(whole)
    data.unlink()
    os.symlink(outside, data)
    assert {line.split()[0] for line in lint(model, graph.parent)} == {"LINT016"}
