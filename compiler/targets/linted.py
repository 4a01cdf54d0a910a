"""A graph as the linter's rules see it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
from onnx import NodeProto, ValueInfoProto

from archwright.compiler.interpreters.onnx_dialects import PORTABLE, Dialect

Problems = Iterator[str]
"""One sentence a problem, beginning with the node or value that has it."""

WRITERS = {"TensorScatter": ((0, 0),), "TRT_KVCacheUpdate": ((0, 0),), "GroupQueryAttention": ((3, 1), (4, 2))}
"""Operators that write caches: the places of each cache among their inputs and outputs."""


@dataclass(frozen=True)
class Graph:
    """A model with what the rules look up."""

    model: onnx.ModelProto
    folder: Path | None
    dialect: Dialect = PORTABLE

    @cached_property
    def nodes(self) -> list[NodeProto]:
        return list(self.model.graph.node)

    def of(self, op: str) -> list[NodeProto]:
        return [node for node in self.nodes if node.op_type == op]

    @cached_property
    def inputs(self) -> dict[str, ValueInfoProto]:
        return {value.name: value for value in self.model.graph.input}

    @cached_property
    def outputs(self) -> dict[str, ValueInfoProto]:
        return {value.name: value for value in self.model.graph.output}

    @cached_property
    def dtypes(self) -> dict[str, int]:
        graph = self.model.graph
        values = (*graph.input, *graph.output, *graph.value_info)
        return {v.name: v.type.tensor_type.elem_type for v in values} | {t.name: t.data_type for t in graph.initializer}

    @cached_property
    def needed(self) -> set[str]:
        """Values that an output depends on."""
        makers = {name: node for node in self.nodes for name in node.output}
        found: set[str] = set()
        waiting = list(self.outputs)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += makers[name].input if name in makers else []
        return found

    def writes(self) -> Iterator[tuple[NodeProto, str, str]]:
        """(node, past, present) of every cache that is written; "" for a value that the node lacks."""
        for node in self.nodes:
            for past, present in WRITERS.get(node.op_type, ()):
                yield node, "".join(node.input[past : past + 1]), "".join(node.output[present : present + 1])


def attributes(node: NodeProto) -> dict[str, Any]:
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def given(names: Any, index: int) -> bool:
    return len(names) > index and names[index] != ""


def sizes(value: ValueInfoProto) -> list[int | str]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims]
