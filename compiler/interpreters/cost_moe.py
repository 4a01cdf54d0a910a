"""Shapes and cost of the operations of a mixture of experts.

B batch, S sequence, D hidden, E experts (of this rank, where they are spread), X experts of a token, F inner width.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from math import prod

from archwright.compiler.interpreters.shapes import CollectiveKind, Disagreement, Shaped, place
from archwright.compiler.ir import Boundary, Penalties, Routing


class MoeCosts(ABC):
    """A part of `CostOps`."""

    @abstractmethod
    def _count(self, op: str, flops: int, *, causal: int | None = None) -> None: ...

    @abstractmethod
    def _exchange(
        self, op: str, x: Shaped, axis: str, forward: CollectiveKind | None, backward: CollectiveKind | None
    ) -> None: ...

    @abstractmethod
    def _reduce(self, op: str, y: Shaped, boundary: Boundary) -> Shaped: ...

    def top_k(self, x_BSE: Shaped, number: int) -> Shaped:
        if not 1 <= number <= x_BSE.shape[-1] or x_BSE.sharded:
            raise Disagreement("IR008", f"the {number} largest of {x_BSE.shape[-1]} values {place(x_BSE)}")
        return replace(x_BSE.plain(), shape=(*x_BSE.shape[:-1], number), integer=True)

    def routing_weights(self, logits_BSE: Shaped, indices_BSX: Shaped, routing: Routing) -> Shaped:
        _check_choice(logits_BSE, indices_BSX)
        return replace(logits_BSE.plain(), shape=indices_BSX.shape)

    def experts(
        self,
        x_BSD: Shaped,
        weights_BSX: Shaped,
        indices_BSX: Shaped,
        gate_EFD: Shaped,
        up_EFD: Shaped,
        down_EDF: Shaped,
        *,
        dispatch: str | None,
        reduce: Boundary | None,
    ) -> Shaped:
        _check_experts(x_BSD, weights_BSX, indices_BSX, gate_EFD, up_EFD, down_EDF)
        cuts = {split.dim: split.mesh_axis for split in gate_EFD.splits}
        for matrices, dims in ((gate_EFD, (0, 1, 2)), (up_EFD, (0, 1, 2)), (down_EDF, (0, 2, 1))):
            if {dims[split.dim]: split.mesh_axis for split in matrices.splits} != cuts or 2 in cuts:
                raise Disagreement("IR009", "the experts' matrices are cut differently")
        parts = cuts if dispatch is None else {dim: axis for dim, axis in cuts.items() if dim != 0}
        summed = tuple(parts[dim] for dim in sorted(parts))
        if (reduce.axes if reduce else ()) != summed or (dispatch is not None and dispatch != cuts.get(0)):
            raise Disagreement(
                "IR009",
                f"experts spread over {cuts.get(0)} and cut over {cuts.get(1)} have dispatch {dispatch}, "
                f"reduce {reduce}",
            )
        for value in (x_BSD, weights_BSX, indices_BSX):
            if value.entered != (reduce and reduce.group) or value.sharded or value.spread:
                raise Disagreement("IR009", f"a value {place(value)} that entered {value.entered} meets such experts")
        chosen = Shaped(shape=(prod(indices_BSX.shape), x_BSD.shape[-1]))
        if dispatch is not None:  # to the experts and back, as if they were evenly used
            self._exchange("experts", chosen, dispatch, "all_to_all", "all_to_all")
            self._exchange("experts", chosen, dispatch, "all_to_all", "all_to_all")
        # Of experts that are summed a rank has its share of the choices, as if they were evenly used.
        shares = [split.degree for split in gate_EFD.splits if split.dim == 0 and dispatch is None]
        self._count("experts", 3 * 2 * prod(chosen.shape) * gate_EFD.shape[1] // prod(shares))
        y_BSD = Shaped(shape=x_BSD.shape)
        return y_BSD if reduce is None else self._reduce("experts", y_BSD, reduce)

    def router_penalty(
        self,
        logits_BSE: Shaped,
        indices_BSX: Shaped,
        routing: Routing,
        penalties: Penalties,
        *,
        spread: str | None,
    ) -> Shaped:
        _check_choice(logits_BSE, indices_BSX)
        if logits_BSE.spread != spread:
            raise Disagreement("IR009", f"the penalty of logits {place(logits_BSE)} is formed over {spread}")
        batch, _, experts = logits_BSE.plain().shape
        if spread is not None:  # of each sequence: choices, scores, logsumexp²
            self._exchange("router_penalty", Shaped(shape=(batch, 2 * experts + 1)), spread, "all_reduce", None)
        return Shaped(shape=(batch,))

    def sum_over_targets(self, penalty_B: Shaped, targets_BS: Shaped) -> Shaped:
        if penalty_B.shape != targets_BS.shape[:1]:
            raise Disagreement("IR008", f"penalties {list(penalty_B.shape)} meet targets {list(targets_BS.shape)}")
        return Shaped(shape=())


def _check_choice(logits_BSE: Shaped, indices_BSX: Shaped) -> None:
    if logits_BSE.shape[:-1] != indices_BSX.shape[:-1]:
        raise Disagreement("IR008", f"logits {list(logits_BSE.shape)} meet indices {list(indices_BSX.shape)}")
    if logits_BSE.spread != indices_BSX.spread or logits_BSE.sharded:
        raise Disagreement("IR009", f"logits {place(logits_BSE)} meet indices {place(indices_BSX)}")


def _check_experts(
    x_BSD: Shaped, weights_BSX: Shaped, indices_BSX: Shaped, gate_EFD: Shaped, up_EFD: Shaped, down_EDF: Shaped
) -> None:
    experts, inner, hidden = gate_EFD.shape
    matrices = [list(value.shape) for value in (gate_EFD, up_EFD, down_EDF)]
    if up_EFD.shape != gate_EFD.shape or down_EDF.shape != (experts, hidden, inner) or x_BSD.shape[-1] != hidden:
        raise Disagreement("IR008", f"{list(x_BSD.shape)} meets experts' matrices {matrices}")
    if weights_BSX.shape != indices_BSX.shape or weights_BSX.shape[:-1] != x_BSD.shape[:-1]:
        shapes = [list(value.shape) for value in (x_BSD, weights_BSX, indices_BSX)]
        raise Disagreement("IR008", f"tokens, weights and indices {shapes} do not fit")
