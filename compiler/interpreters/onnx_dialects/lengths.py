"""What the dialects share: how far each row has come as values of the graph, and leaving out what nothing needs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from archwright.compiler.interpreters.onnx_ops import OnnxOps, Tensor
from archwright.compiler.ir import Step


@dataclass(kw_only=True)
class LengthOps(OnnxOps):
    """`OnnxOps` for operators that take lengths in place of masks. B batch, S sequence."""

    def finish(self, outputs: Sequence[ir.Value]) -> list[ir.Node]:
        return needed(self.nodes, outputs)

    def _once(self, name: str, make: Callable[[str], Tensor]) -> Tensor:
        """A value that all layers share, made at the first one's."""
        if name not in self._shared:
            with self.scope(""):
                self._shared[name] = make(name)
        return self._shared[name]

    def _sequence(self, step: Step[Tensor]) -> Tensor:
        """[1]: S."""
        return self._once(
            "sequence",
            lambda name: self.emit("Shape", [step.positions_BS], name=name, shape=(1,), start=1, end=2),
        )

    def _ends(self, step: Step[Tensor]) -> Tensor:
        """[B]: write_index + S, the rows of the cache that hold a key once this step's are written."""
        index = step.write_index_B
        assert index is not None, "exported graphs have a cache"
        return self._once("ends", lambda name: self.emit("Add", [index, self._sequence(step)], name=name))

    def _narrow(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A shared value as int32, which is how both runtimes take lengths."""
        return self._once(name, lambda name: self.cast(make(), ir.DataType.INT32, name=name))


def needed(nodes: Sequence[ir.Node], outputs: Iterable[ir.Value]) -> list[ir.Node]:
    """Those of `nodes`, which stand in an order in which they can run, that an output depends on.

    A lowering that joins what earlier ones gave leaves their nodes behind; so none of these must know of it.
    """
    wanted = {id(value) for value in outputs}
    kept: list[ir.Node] = []
    for node in reversed(nodes):
        if any(id(value) in wanted for value in node.outputs):
            kept.append(node)
            wanted |= {id(value) for value in node.inputs if value is not None}
    return kept[::-1]
