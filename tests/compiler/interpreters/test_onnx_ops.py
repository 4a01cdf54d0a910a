"""The emitted form, node by node."""

import onnx
import pytest

from archwright.compiler.ir import Degrees
from archwright.compiler.passes import run_passes
from archwright.compiler.targets.onnx_graph import emit_graph
from archwright.compiler.targets.stages import whole_program
from archwright.spec import Spec

MODEL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "max_positions": 64,
    "layers": 2,
    "layer": {
        "attention": {"kind": "gqa", "heads": 4, "kv_heads": 2, "position": {"kind": "rope"}},
        "ffn": {"kind": "swiglu", "hidden_size": 24},
    },
}


def emit(*, tensor: int = 1, precision: str = "float32", **model: object) -> onnx.GraphProto:
    spec = Spec.model_validate({"version": 1, "name": "tiny", "model": MODEL | model})
    plan = run_passes(spec, Degrees(tensor=tensor))
    degrees = {"tensor": plan.degrees.tensor}
    return emit_graph(whole_program(plan.local), precision=precision, capacity=32, degrees=degrees).model.graph


def described(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    sizes = [dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim]
    return f"{value.name}: {onnx.TensorProto.DataType.Name(tensor.elem_type).lower()}[{', '.join(sizes)}]"


def summary(graph: onnx.GraphProto) -> str:
    """Inputs, initializers, nodes with their inputs and attributes, outputs."""
    types = {value.name: described(value).split(": ")[1] for value in (*graph.value_info, *graph.output)}
    lines = [f"input {described(value)}" for value in graph.input]
    for tensor in graph.initializer:
        dtype = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        lines.append(f"initializer {tensor.name}: {dtype}{list(tensor.dims)}")
    for node in graph.node:
        attributes = [f"{a.name}={onnx.helper.get_attribute_value(a)!r}" for a in node.attribute]
        lines.append(f"{node.name} = {node.op_type}({', '.join([*node.input, *attributes])}): {types[node.output[0]]}")
    return "\n".join([*lines, *(f"output {described(value)}" for value in graph.output)]) + "\n"


def test_the_graph_of_one_rank(golden):
    golden("one_rank_float32.txt", summary(emit(layers=1)))


def test_the_graph_of_two_ranks(golden):
    golden("two_ranks_float16_tied.txt", summary(emit(layers=1, tensor=2, precision="float16", tied_embeddings=True)))


def test_onnx_infers_the_shapes_that_we_declare():
    """Strict inference raises where a declared type or shape contradicts the operators."""
    for precision in ("float32", "float16", "bfloat16"):
        graph = emit(precision=precision)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=12)
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        declared = {value.name: described(value) for value in (*graph.value_info, *graph.output)}
        for value in inferred.graph.value_info:
            assert described(value) == declared[value.name]


def test_the_mask_and_the_length_are_made_once():
    ops = [node.op_type for node in emit().node]
    assert ops.count("LessOrEqual") == 1
    assert ops.count("Shape") == 1
    assert ops.count("Attention") == 2


def test_names_are_the_paths_of_the_spec():
    names = {node.name for node in emit(tensor=2).node}
    assert {
        "model.embed_tokens/embed",
        "model.layers.1.self_attn.q_proj/linear",
        "model.layers.1.self_attn/attention",
        "model.layers.1.mlp.down_proj/all_reduce",
        "model.norm/rms_norm",
        "lm_head/linear",
    } <= names


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_collectives_come_from_the_plan_alone(tensor):
    graph = emit(tensor=tensor)
    sums = [node.name for node in graph.node if node.op_type == "DistCollective"]
    per_layer = ("self_attn.o_proj/all_reduce", "mlp.down_proj/all_reduce")
    expected = [f"model.layers.{layer}.{name}" for layer in range(2) for name in per_layer]
    assert sums == (expected if tensor > 1 else [])


def test_a_tied_table_is_stored_once():
    graph = emit(tied_embeddings=True)
    tables = [tensor.name for tensor in graph.initializer if 50 in tensor.dims]
    assert tables == ["model.embed_tokens.weight"]
