"""Float32 copies of half-precision graphs."""

import onnx
import pytest

from archwright.compiler.targets.retype import as_float32

HALVES = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_nothing_is_computed_in_half_precision(make_spec, export, precision):
    model = export(make_spec(layers=1, tied=True), precision=precision)
    original = onnx.load(model.graph, load_external_data=False)
    copy = as_float32(original)
    path = model.graph.with_name("float32.onnx")
    path.write_bytes(copy.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    stored = {tensor.name for tensor in copy.graph.initializer if tensor.data_type in HALVES}
    inferred = onnx.shape_inference.infer_shapes(copy, strict_mode=True).graph
    values = (*inferred.input, *inferred.output, *inferred.value_info)
    assert {value.name for value in values if value.type.tensor_type.elem_type in HALVES} <= stored
    readers = [node for node in copy.graph.node if stored & set(node.input)]
    assert {node.op_type for node in readers} == {"Cast"}
    assert len(readers) == len(stored)


def test_the_original_is_left_alone_and_float32_is_kept(make_spec, export):
    half = onnx.load(export(make_spec(layers=1), precision="float16").graph, load_external_data=False)
    before = half.SerializeToString()
    as_float32(half)
    assert half.SerializeToString() == before
    single = onnx.load(export(make_spec(layers=1)).graph, load_external_data=False)
    assert as_float32(single) == single
