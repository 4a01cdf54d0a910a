"""The binding table of a rank: every tensor that an engine takes and gives, read off the rank's ONNX graph.

A cache goes in as `past.0.key` and comes out as `present.0.key` at one address: TensorRT updates it where it lies.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto

from archwright.compiler.targets.network_check import TYPES
from archwright.spec import ArchwrightError

PAST, PRESENT = "past.", "present."
IDS, HIDDEN, LOGITS, LOGIT_INDEX = "input_ids", "hidden", "logits", "logit_index"
INPUTS = (IDS, HIDDEN, "position_ids", "write_index", "kv_positions", LOGIT_INDEX)
OUTPUTS = (LOGITS, HIDDEN, "hidden.next")
"""A stage between two others takes `hidden` and gives `hidden.next`: no graph has one name twice."""
DTYPES: Mapping[int, np.dtype[Any]] = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    TensorProto.INT64: np.dtype(np.int64),
}


@dataclass(frozen=True, kw_only=True)
class Binding:
    """A tensor of an engine. dims: sizes, or the names of those that a call decides: batch, sequence, positions.

    engine_type: TensorRT's name for the type.
    """

    name: str
    is_input: bool
    dtype: np.dtype[Any]
    engine_type: str
    dims: tuple[int | str, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)

    def num_bytes(self, sizes: Mapping[str, int]) -> int:
        return prod(self.shape(sizes)) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class BindingTable:
    """Bindings by name. caches: past → present. output: what the stage gives beside them."""

    bindings: Mapping[str, Binding]
    caches: Mapping[str, str]
    output: str

    @property
    def takes_hidden(self) -> bool:
        """Whether another stage comes before."""
        return HIDDEN in self.bindings and self.bindings[HIDDEN].is_input

    @property
    def gives_logits(self) -> bool:
        return self.output == LOGITS

    @property
    def last_only(self) -> bool:
        """Whether logits are those of one token a row, which `logit_index` names."""
        return LOGIT_INDEX in self.bindings

    @property
    def received(self) -> Binding:
        """What the stage before hands over."""
        assert self.takes_hidden, "the first stage receives nothing"
        return self.bindings[HIDDEN]

    @property
    def given(self) -> Binding:
        return self.bindings[self.output]

    @property
    def capacity(self) -> int:
        """Rows of the caches."""
        rows = self.bindings[next(iter(self.caches))].dims[2]
        assert isinstance(rows, int), "caches have a static length"
        return rows


def read_bindings(graph: Path) -> BindingTable:
    """Raises ArchwrightError RUN046 where the graph has a tensor that this version does not know how to feed."""
    model = onnx.load(graph, load_external_data=False).graph
    inputs = [_binding(value, graph, is_input=True) for value in model.input]
    outputs = [_binding(value, graph, is_input=False) for value in model.output]
    caches = {b.name: PRESENT + b.name.removeprefix(PAST) for b in inputs if b.name.startswith(PAST)}
    given = [b.name for b in outputs if not b.name.startswith(PRESENT)]
    presents = {b.name for b in outputs if b.name.startswith(PRESENT)}
    unknown = [b.name for b in inputs if b.name not in (*INPUTS, *caches)]
    if unknown or len(given) != 1 or given[0] not in OUTPUTS or presents != set(caches.values()):
        names = ", ".join(f"`{name}`" for name in (*unknown, *given, *sorted(presents ^ set(caches.values()))))
        raise _wrong(graph, f"its tensors are not those of a rank graph: {names}")
    return BindingTable(bindings={b.name: b for b in (*inputs, *outputs)}, caches=caches, output=given[0])


def _binding(value: onnx.ValueInfoProto, graph: Path, *, is_input: bool) -> Binding:
    tensor = value.type.tensor_type
    if tensor.elem_type not in DTYPES:
        raise _wrong(graph, f"`{value.name}` has a type that is not bound to engines")
    return Binding(
        name=value.name,
        is_input=is_input,
        dtype=DTYPES[tensor.elem_type],
        engine_type=TYPES[tensor.elem_type],
        dims=tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim),
    )


def _wrong(graph: Path, message: str) -> ArchwrightError:
    help = "build the artifact again with this version of archwright"
    return ArchwrightError("RUN046", message, where=f"{graph.parent.name}/{graph.name}", help=help)


def differences(table: BindingTable, engine: Any) -> Iterator[str]:
    """Where an engine's tensors are not those of its graph, a sentence each. Binding them would compute anything."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    for name in sorted(table.bindings.keys() ^ set(names)):
        yield f"`{name}` is " + ("missing in the engine" if name in table.bindings else "not in the graph")
    for name in table.bindings.keys() & set(names):
        binding = table.bindings[name]
        mode = "INPUT" if binding.is_input else "OUTPUT"
        if (found := engine.get_tensor_mode(name).name) != mode:
            yield f"`{name}` is an {found.lower()} of the engine, an {mode.lower()} of the graph"
        if (found := engine.get_tensor_dtype(name).name) != binding.engine_type:
            yield f"`{name}` is {found} in the engine, {binding.engine_type} in the graph"
        sizes = [-1 if isinstance(dim, str) else dim for dim in binding.dims]
        if (found := list(engine.get_tensor_shape(name))) != sizes:
            yield f"`{name}` is {found} in the engine, {sizes} in the graph"
    for past, present in table.caches.items():
        if present in names and (found := engine.get_aliased_input_tensor(present)) != past:
            yield f"`{present}` is not an update of `{past}` in place but of {found!r}"
