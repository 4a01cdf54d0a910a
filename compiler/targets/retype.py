"""Half-precision graphs as float32 graphs: ONNX Runtime has no kernels of these types on CPUs."""

import onnx
from onnx import TensorProto

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def as_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a float16 or bfloat16 graph that computes in float32 with the same, already rounded, weights.

    Inputs, outputs, intermediate values and the targets of Casts become float32. Initializers keep their bytes, in
    their file: a Cast behind each widens it, and ONNX Runtime folds it when it opens the session. What the copy proves
    is the graph and the weights, not the rounding of activations. A float32 graph comes back as it is.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    widened = {t.name: f"{t.name}/float32" for t in graph.initializer if t.data_type in HALVES}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in HALVES and value.name not in widened:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        node.input[:] = [widened.get(name, name) for name in node.input]
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in HALVES:
                attribute.i = TensorProto.FLOAT
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend(
        onnx.helper.make_node("Cast", [name], [wide], name=wide, to=TensorProto.FLOAT) for name, wide in widened.items()
    )
    graph.node.extend(nodes)
    return copy
