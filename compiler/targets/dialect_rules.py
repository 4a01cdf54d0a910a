"""The linter's rules for operators that only one runtime has."""

from onnx import TensorProto

from archwright.compiler.interpreters.onnx_dialects.onnxruntime_dialect import MICROSOFT
from archwright.compiler.interpreters.onnx_ops import DOMAIN
from archwright.compiler.targets.linted import Graph, Problems, attributes, given

KNOWN_INPUTS = 16
"""Of GroupQueryAttention, those that ONNX Runtime 1.31 knows: the last that runs on GPUs."""
_FORMS = {
    "TRT_Attention": {"query_form": "padded_bhnd", "kv_form": "padded_bhnd", "causal_kind": "lower_right"},
    "TRT_KVCacheUpdate": {"update_form": "padded_bhnd", "mode": "linear", "axis": -2},
}


def lengths_attention(graph: Graph) -> Problems:
    """TensorRT's own operators, in the one form that is written."""
    for op, form in _FORMS.items():
        for node in graph.of(op):
            if graph.dialect.target != "tensorrt" or node.domain != DOMAIN:
                yield f"{node.name}: {op} belongs into graphs of target tensorrt, in domain `{DOMAIN}`"
            if attributes(node) != form:
                yield f"{node.name}: has {attributes(node)}, and not {form}"
    for node in graph.of("TRT_Attention"):
        if given(node.input, 3) or given(node.input, 4) or len(node.input) > 6:
            yield f"{node.name}: has inputs {list(node.input)}; its lengths are input 5, without a mask"
        elif not given(node.input, 5) or graph.dtypes.get(node.input[5]) != TensorProto.INT32:
            yield f"{node.name}: has no kv_lengths of int32 as its input 5, so it sees rows that are not written yet"
    for node in graph.of("TRT_KVCacheUpdate"):
        if given(node.input, 2) and graph.dtypes.get(node.input[2]) != TensorProto.INT32:
            yield f"{node.name}: its write_indices are not int32"


def grouped_attention(graph: Graph) -> Problems:
    """ONNX Runtime's own attention."""
    for node in graph.of("GroupQueryAttention"):
        values = attributes(node)
        if node.domain != MICROSOFT:
            yield f"{node.name}: is in domain `{node.domain}`, not in `{MICROSOFT}`"
        if len(node.input) > KNOWN_INPUTS:
            yield f"{node.name}: has {len(node.input)} inputs; ONNX Runtime 1.31 knows {KNOWN_INPUTS}"
        if not (given(node.input, 3) and given(node.input, 4)):
            yield f"{node.name}: has no caches"
        if "scale" not in values:
            yield f"{node.name}: has no scale"
        if values.get("do_rotary", 0):
            if any(graph.dtypes.get(name) != TensorProto.FLOAT for name in (node.input[0], *node.input[7:9])):
                yield f"{node.name}: does not rotate in float32, so each cosine is rounded once more"
            if not given(node.input, 9):
                yield f"{node.name}: rotates without position_ids"
