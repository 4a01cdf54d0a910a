"""Graphs of the tensorrt dialect in operators that ONNX Runtime has, by what TensorRT's documentation says of its own.

    TRT_KVCacheUpdate(past, new, index)        TensorScatter on the same axis
    TRT_Attention(q, k, v, -, -, kv_lengths)   Attention without scaling, under the mask  j ≤ kv_length - S + i

lower_right means that the last of S queries sees the last key, and each earlier one a key less; keys behind a row's
length are not seen. What runs on a CPU is therefore the graph and its weights, not TensorRT's kernels.

B batch, S sequence, L visible positions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from archwright.compiler.interpreters.onnx_ops import DOMAIN
from archwright.spec import ArchwrightError

OWN = ("TRT_Attention", "TRT_KVCacheUpdate")
"""TensorRT's operators, which this module can say otherwise."""
_ATTENTION = {"query_form": b"padded_bhnd", "kv_form": b"padded_bhnd", "causal_kind": b"lower_right"}
_UPDATE = {"update_form": b"padded_bhnd", "mode": b"linear", "axis": -2}


def needs_rewriting(model: onnx.ModelProto) -> bool:
    """Whether a graph has operators that only TensorRT has."""
    return any(node.op_type in OWN for node in model.graph.node)


def as_portable(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without TensorRT's operators; a graph that has none comes back as it is.

    Raises ArchwrightError BUILD023 where one has a form that this version does not write.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if not needs_rewriting(copy):
        return copy
    rewriting = _Rewriting()
    nodes = [new for node in copy.graph.node for new in rewriting.of(node)]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    copy.graph.initializer.extend(rewriting.constants)
    if not any(node.domain == DOMAIN for node in nodes):
        others = [entry for entry in copy.opset_import if entry.domain != DOMAIN]
        del copy.opset_import[:]
        copy.opset_import.extend(others)
    return copy


@dataclass
class _Rewriting:
    """The nodes that take the place of others. masks: made so far, by the names of lengths, queries and keys."""

    constants: list[TensorProto] = field(default_factory=list[TensorProto])
    masks: dict[str, str] = field(default_factory=dict[str, str])

    def of(self, node: NodeProto) -> Iterator[NodeProto]:
        if node.op_type == "TRT_KVCacheUpdate":
            _check(node, _UPDATE, num_inputs=3)
            past, new, index = node.input
            yield helper.make_node(
                "Cast", [index], [f"{node.name}/index"], name=f"{node.name}/index", to=TensorProto.INT64
            )
            inputs = [past, new, f"{node.name}/index"]
            yield helper.make_node("TensorScatter", inputs, node.output, name=node.name, axis=2, mode="linear")
        elif node.op_type == "TRT_Attention":
            _check(node, _ATTENTION, num_inputs=6)
            q, k, v, mask, query_lengths, lengths = node.input
            if mask or query_lengths or not lengths:
                raise _unknown(node, f"inputs {list(node.input)}")
            if lengths not in self.masks:
                yield from self._mask(lengths, q, k)
            yield helper.make_node("Attention", [q, k, v, self.masks[lengths]], node.output, name=node.name, scale=1.0)
        else:
            yield node

    def _mask(self, lengths: str, q: str, k: str) -> Iterator[NodeProto]:
        """Boolean [B, 1, S, L]: j ≤ length - S + i. Lengths, S and L are those of all layers that share the lengths."""
        base = f"{lengths}/mask"
        zero, one, axes = (
            self._constant(f"{base}/{name}", value) for name, value in (("zero", 0), ("one", 1), ("axes", [1, 2, 3]))
        )

        def made(op: str, inputs: list[str], name: str, **attributes: Any) -> NodeProto:
            return helper.make_node(op, inputs, [f"{base}/{name}"], name=f"{base}/{name}", **attributes)

        for name, source in (("S", q), ("L", k)):
            yield made("Shape", [source], f"{name}/shape", start=2, end=3)
            yield made("Squeeze", [f"{base}/{name}/shape"], name)
            yield made("Range", [zero, f"{base}/{name}", one], f"{name}/range")
        yield made("Cast", [lengths], "lengths", to=TensorProto.INT64)
        yield made("Sub", [f"{base}/lengths", f"{base}/S"], "before")
        yield made("Unsqueeze", [f"{base}/before", axes], "before/B111")
        rows = self._constant(f"{base}/rows", [1])
        yield made("Unsqueeze", [f"{base}/S/range", rows], "S/S1")
        yield made("Add", [f"{base}/before/B111", f"{base}/S/S1"], "last")
        yield made("LessOrEqual", [f"{base}/L/range", f"{base}/last"], "seen")
        self.masks[lengths] = f"{base}/seen"

    def _constant(self, name: str, value: object) -> str:
        self.constants.append(numpy_helper.from_array(np.array(value, np.int64), name))
        return name


def _check(node: NodeProto, expected: Mapping[str, bytes | int], *, num_inputs: int) -> None:
    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if found != expected:
        raise _unknown(node, f"attributes {found}")
    if len(node.input) != num_inputs:
        raise _unknown(node, f"inputs {list(node.input)}")


def _unknown(node: NodeProto, what: str) -> ArchwrightError:
    help = "build the artifact again with this version of archwright"
    return ArchwrightError(
        "BUILD023", f"{node.op_type} has {what}, which is not written here", where=node.name, help=help
    )
