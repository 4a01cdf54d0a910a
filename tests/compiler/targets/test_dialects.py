"""What graphs of each dialect are made of, and what they compute. B batch, S sequence, V vocabulary."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from archwright.compiler.interpreters.onnx_dialects import ALL, Dialect
from archwright.compiler.targets.merge import merge_ranks
from archwright.compiler.targets.portable_form import as_portable, needs_rewriting
from archwright.compiler.targets.retype import as_float32
from archwright.compiler.tolerances import TOLERANCES, largest_error
from archwright.spec import ArchwrightError, Spec

TENSORRT, OWN = Dialect(target="tensorrt"), Dialect(target="onnxruntime")


def with_attention(spec: Spec, **attention: Any) -> Spec:
    fields = spec.model_dump()
    fields["model"]["layer"]["attention"] |= attention
    return Spec.model_validate(fields)


def load(export: Any) -> onnx.ModelProto:
    return onnx.load(export.graph, load_external_data=False)


def operators(export: Any) -> Counter[str]:
    return Counter(node.op_type for node in load(export).graph.node)


def node_of(export: Any, op: str) -> onnx.NodeProto:
    return next(node for node in load(export).graph.node if node.op_type == op)


def test_a_layer_is_few_operators_of_onnx_runtime(make_spec: Any, export: Callable[..., Any]) -> None:
    """Rotation, caches, masks and residual sums have no operators of their own."""
    counts = operators(export(make_spec(head_dim=16, layers=3), dialect=OWN))
    assert counts["GroupQueryAttention"] == 3 and counts["SkipSimplifiedLayerNormalization"] == 6
    gone = {"RotaryEmbedding", "TensorScatter", "Slice", "Attention", "Reshape", "Transpose", "LessOrEqual"}
    assert not gone & counts.keys()
    assert counts["Add"] == 1, "of write_index and S"
    assert counts["RMSNormalization"] == 1, "the first"


def test_fused_queries_keys_and_values_go_in_as_one(make_spec: Any, export: Callable[..., Any]) -> None:
    fused = Dialect(target="onnxruntime", fusions=("qkv",))
    whole = export(make_spec(head_dim=16), dialect=fused)
    assert list(node_of(whole, "GroupQueryAttention").input[1:3]) == ["", ""] and "Slice" not in operators(whole)
    # Turned outside, queries and keys are values of their own.
    half = export(make_spec(head_dim=16), dialect=fused, precision="float16")
    assert all(node_of(half, "GroupQueryAttention").input[:5]) and operators(half)["Slice"] == 3 * 2


def test_rotation_stays_in_float32(make_spec: Any, export: Callable[..., Any]) -> None:
    for head_dim, precision in ((16, "bfloat16"), (8, "float32")):
        made = export(make_spec(head_dim=head_dim), dialect=OWN, precision=precision)
        attributes = {
            a.name: onnx.helper.get_attribute_value(a) for a in node_of(made, "GroupQueryAttention").attribute
        }
        assert attributes["do_rotary"] == 0 and operators(made)["RotaryEmbedding"] == 2 * 2
        tables = [t for t in load(made).graph.initializer if t.name.endswith(("/cos", "/sin"))]
        assert tables and all(tensor.data_type == TensorProto.FLOAT for tensor in tables)


@pytest.mark.parametrize("position", ["rope", "none"])
@pytest.mark.parametrize(("head_dim", "exact"), [(16, True), (24, False)])
def test_the_scale_is_rounded_to_no_half_precision(
    make_spec: Any, export: Callable[..., Any], position: str, head_dim: int, exact: bool
) -> None:
    """1/4 is a number of bfloat16; 1/sqrt(24) is not, and is multiplied in float32, before the one rounding."""
    spec = with_attention(make_spec(head_dim=head_dim), position={"kind": position})
    model = load(export(spec, dialect=TENSORRT, precision="bfloat16"))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    makers = {name: node for node in model.graph.node for name in node.output}
    query = makers[next(node for node in model.graph.node if node.op_type == "TRT_Attention").input[0]]
    product = query if exact else makers[query.input[0]]
    assert (query.op_type, product.op_type) == (("Mul", "Mul") if exact else ("Cast", "Mul"))
    assert types[product.output[0]] == (TensorProto.BFLOAT16 if exact else TensorProto.FLOAT)
    if position == "rope" and not exact:
        assert makers[product.input[0]].op_type == "RotaryEmbedding", "not rounded in between"
    folded = load(export(spec, dialect=Dialect(target="tensorrt", fusions=("scale",)), precision="bfloat16"))
    assert any("attention/scaled" in node.name for node in folded.graph.node) is not exact


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "mask"),
    [(64, 1, {"kind": "causal"}), (24, 2, {"kind": "window", "size": 1}), (128, 4, {"kind": "window", "size": 4})],
)
@pytest.mark.parametrize("dialect", [TENSORRT, OWN, Dialect(target="onnxruntime", fusions=ALL)])
def test_heads_and_windows_through_the_cache(
    make_spec: Any, export: Any, running: Any, dialect: Dialect, head_dim: int, kv_heads: int, mask: dict[str, Any]
) -> None:
    """A prompt, then three tokens in each row at places of its own; the model is read to its capacity. Several tokens
    at a time, but for GroupQueryAttention.
    """
    model = export(with_attention(make_spec(head_dim=head_dim, kv_heads=kv_heads), mask=mask), dialect=dialect)
    ids_BS = np.random.default_rng(0).integers(0, 61, (3, 32))
    expected_BSV = model.oracle(ids_BS)
    graph = as_float32(as_portable(merge_ranks(model.folder)))
    session = running(graph.SerializeToString(), folder=model.folder, batch=3)
    starts_B = np.array([0, 11, 29])
    session.step(ids_BS[:, :29], np.zeros(3, np.int64), 29)
    rows_BS = starts_B[:, None] + np.arange(3)
    size = 1 if dialect.target == "onnxruntime" else 3
    pieces = [
        session.step(np.take_along_axis(ids_BS, rows_BS[:, at : at + size], axis=1), starts_B + at, 32)["logits"]
        for at in range(0, 3, size)
    ]
    found_BSV = np.concatenate(pieces, axis=1)
    wanted_BSV = np.take_along_axis(expected_BSV, rows_BS[:, :, None], axis=1)
    assert largest_error(found_BSV, wanted_BSV) < TOLERANCES["onnxruntime", "float32"]


def test_only_what_is_written_is_rewritten(make_spec: Any, export: Callable[..., Any]) -> None:
    portable = load(export(make_spec()))
    assert not needs_rewriting(portable) and as_portable(portable) == portable
    model = load(export(make_spec(), dialect=TENSORRT))
    assert needs_rewriting(model) and not needs_rewriting(as_portable(model))

    def refused(change: Callable[[onnx.NodeProto], None], op: str) -> str:
        edited = onnx.ModelProto()
        edited.CopyFrom(model)
        change(next(node for node in edited.graph.node if node.op_type == op))
        with pytest.raises(ArchwrightError) as caught:
            as_portable(edited)
        assert caught.value.code == "BUILD023" and caught.value.where
        return caught.value.message

    def upper_left(node: onnx.NodeProto) -> None:
        next(a for a in node.attribute if a.name == "causal_kind").s = b"upper_left"

    def no_lengths(node: onnx.NodeProto) -> None:
        node.input[5] = ""

    assert "upper_left" in refused(upper_left, "TRT_Attention")
    assert "inputs" in refused(no_lengths, "TRT_Attention")
    assert "inputs" in refused(lambda node: node.input.pop() and None, "TRT_KVCacheUpdate")
