"""Shapes, placements and cost of a Program, without numbers: plain Python, no arrays.

A value knows its shape and where it lies on the mesh; each operation checks both and counts its FLOPs. The verifier
reads the checks, `plan` the counts.

B batch, S sequence, D hidden, N query heads, K key/value heads, H head_dim, V vocabulary, L visible positions.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from archwright.compiler.blocks import Embedding, PositionedEmbedding
from archwright.compiler.interpreters.cost_moe import MoeCosts
from archwright.compiler.interpreters.shapes import Collective, CollectiveKind, Cost, Disagreement, Shaped, place, read
from archwright.compiler.ir import (
    Block,
    Boundary,
    Instance,
    Mask,
    Param,
    Program,
    RopeTable,
    Segment,
    Split,
    Step,
    Window,
)
from archwright.spec import ArchwrightError


class CostScope(Instance):
    """An instance of a block that records which of its parameters and children are read."""

    _ops: "CostOps"

    def __call__(self, *args: Any) -> Any:
        if self.block.enter is None:
            return super().__call__(*args)
        number = self.block.num_entering
        with self._ops.scope(self.path):
            entered = [self._ops.enter(x, self.block.enter) for x in args[:number]]
        return super().__call__(*entered, *args[number:])

    def __getattr__(self, name: str) -> Any:
        if not isinstance(getattr(self.block, name, None), Block | Param):
            known = ", ".join([*self.block.children(), *self.block.params()])
            raise Disagreement("IR006", f"`m.{name}` is neither a child nor a parameter of the block; it has {known}")
        self._ops.reads.add((self.path, name))
        return super().__getattr__(name)


class CostOps(MoeCosts):
    """Ops over `Shaped` values.

    splits: canonical name → how the parameter is cut, for Programs of local sizes; None: as the parameters say.
    """

    def __init__(self, splits: Mapping[str, tuple[Split, ...]] | None = None) -> None:
        self.costs: list[Cost] = []
        self.reads: set[tuple[str, str]] = set()
        self.states: list[tuple[str, str]] = []
        self._splits = splits
        self._paths: list[str] = []

    @contextmanager
    def scope(self, path: str) -> Iterator[None]:
        self._paths.append(path)
        try:
            yield
        except Disagreement as error:
            raise ArchwrightError(error.code, error.message, where=path or "the last segment") from None
        finally:
            self._paths.pop()

    def param(self, name: str, param: Param) -> Shaped:
        splits = param.splits if self._splits is None else self._splits[name]
        return Shaped(shape=param.shape, splits=splits, partial=param.partial)

    def enter(self, x: Shaped, boundary: Boundary) -> Shaped:
        axis, tokens = boundary.group, boundary.tokens
        if x.spread != (axis if tokens else None) or x.sharded is not None:
            raise Disagreement("IR009", f"a value {place(x)} enters `{boundary}`")
        forward, backward = ("all_gather", "reduce_scatter") if tokens else (None, "all_reduce")
        self._exchange("enter", x, axis, forward, None if x.integer else backward)
        return replace(x.plain(), entered=axis, spread=None)

    def linear(
        self,
        x: Shaped,
        weight: Shaped,
        bias: Shaped | None,
        *,
        reduce: Boundary | None,
        gather: Boundary | None = None,
    ) -> Shaped:
        if len(weight.shape) != 2 or x.shape[-1] != weight.shape[1]:
            raise Disagreement("IR008", f"{list(x.shape)} meets a matrix {list(weight.shape)} of [out, in]")
        y = replace(
            self._linear_placement(x, weight, reduce and reduce.mesh_axis), shape=(*x.shape[:-1], weight.shape[0])
        )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise Disagreement("IR008", f"a bias {list(bias.shape)} meets a matrix {list(weight.shape)} of [out, in]")
        self._count("linear", 2 * prod(x.shape) * weight.shape[0])
        if reduce is not None:
            y = self._reduce("linear", y, reduce)
        if bias is not None and (bias.split and bias.split.mesh_axis) != y.sharded:
            raise Disagreement("IR009", f"the output is {place(y)}, and the bias is cut otherwise")
        if bias is not None:
            read(bias, y)
        return y if gather is None else self._gather(y, gather)

    def dequantize(self, weight: Shaped, scale: Shaped) -> Shaped:
        *rows, columns = weight.shape
        if list(scale.shape[:-1]) != rows or columns % scale.shape[-1]:
            raise Disagreement("IR008", f"a matrix {list(weight.shape)} meets scales {list(scale.shape)}")
        last = len(rows)
        cut, scaled = ({(s.dim, s.mesh_axis, s.parts) for s in each.splits} for each in (weight, scale))
        by_rows = {each for each in cut if each[0] != last}
        if scaled != cut and not (scale.shape[-1] == 1 and scaled == by_rows):
            raise Disagreement("IR009", "a matrix and its scales are cut differently")
        return weight

    def round_to_float8(self, x: Shaped, scale_11: Shaped) -> Shaped:
        if scale_11.shape != (1, 1):
            raise Disagreement("IR008", f"an input's scale is {list(scale_11.shape)}, not one number")
        return x

    def _reduce(self, op: str, y: Shaped, boundary: Boundary) -> Shaped:
        axis, tokens = boundary.group, boundary.tokens
        self._exchange(op, y, axis, *(("reduce_scatter", "all_gather") if tokens else ("all_reduce", None)))
        return replace(y, spread=axis if tokens else None)

    def _gather(self, y: Shaped, boundary: Boundary) -> Shaped:
        if y.sharded != boundary.mesh_axis:
            raise Disagreement("IR009", f"a value {place(y)} is gathered over `{boundary}`")
        self._exchange("gather", y, boundary.mesh_axis, "all_gather", None)
        return replace(y, sharded=None)

    def _linear_placement(self, x: Shaped, weight: Shaped, reduce: str | None) -> Shaped:
        """x with the output's placement; checks that `enter` and `reduce` stand exactly where they must."""
        split = weight.split
        contracted = split.mesh_axis if split and split.dim == 1 else None
        if reduce != contracted:
            raise Disagreement("IR009", f"`reduce` is {reduce}, and the contraction runs over {contracted}")
        if x.sharded != contracted:
            raise Disagreement("IR009", f"the input is {place(x)}, the weight's columns are cut over {contracted}")
        if split is None or contracted:
            if contracted is None:
                read(weight, x)
            return replace(x.plain(), sharded=None)
        if x.entered != split.mesh_axis:
            raise Disagreement(
                "IR009", f"the rows are cut over `{split.mesh_axis}`, but the parent has no such `enter`"
            )
        return replace(x, sharded=split.mesh_axis, entered=None)

    def embed(self, ids_BS: Shaped, weight_VD: Shaped, *, reduce: Boundary | None) -> Shaped:
        split = weight_VD.split
        if (split and split.mesh_axis) != (reduce and reduce.mesh_axis) or (split and split.dim != 0):
            raise Disagreement("IR009", f"a table cut over {split and split.mesh_axis} is reduced over {reduce}")
        y = Shaped(shape=(*ids_BS.shape, weight_VD.shape[1]))
        return y if reduce is None else self._reduce("embed", y, reduce)

    def rms_norm(self, x_BSD: Shaped, weight_D: Shaped, eps: float) -> Shaped:
        return self._norm(x_BSD, weight_D)

    def layer_norm(self, x_BSD: Shaped, weight_D: Shaped, bias_D: Shaped | None, eps: float) -> Shaped:
        return self._norm(x_BSD, weight_D, *([] if bias_D is None else [bias_D]))

    def _norm(self, x_BSD: Shaped, *vectors: Shaped) -> Shaped:
        for vector in vectors:
            if vector.shape != x_BSD.shape[-1:]:
                raise Disagreement("IR008", f"{list(x_BSD.shape)} meets a norm of {list(vector.shape)}")
            if x_BSD.sharded or vector.split:
                raise Disagreement("IR009", "a norm over a sharded dim")
            read(vector, x_BSD)
        return x_BSD.plain()

    def silu(self, x: Shaped) -> Shaped:
        return x.plain()

    def gelu(self, x: Shaped, approximation: str) -> Shaped:
        return x.plain()

    def channels(self, x: Shaped, start: int, stop: int) -> Shaped:
        if not 0 <= start < stop <= x.shape[-1]:
            raise Disagreement("IR008", f"channels {start} to {stop} of {x.shape[-1]}")
        return replace(x.plain(), shape=(*x.shape[:-1], stop - start))

    def split_heads(self, x: Shaped, head_dim: int) -> Shaped:
        batch, sequence, width = x.shape
        if width % head_dim:
            raise Disagreement("IR008", f"{width} is not a whole number of heads of {head_dim}")
        return replace(x.plain(), shape=(batch, width // head_dim, sequence, head_dim))

    def merge_heads(self, x: Shaped) -> Shaped:
        batch, heads, sequence, head_dim = x.shape
        return replace(x.plain(), shape=(batch, sequence, heads * head_dim))

    def rope(self, x_BNSH: Shaped, table: RopeTable, step: Step[Shaped]) -> Shaped:
        if x_BNSH.shape[-1] != table.head_dim or table.head_dim % 2:
            raise Disagreement("IR008", f"heads of {x_BNSH.shape[-1]} meet a rotation of {table.head_dim}")
        return x_BNSH.plain()

    def kv_update(self, m: Any, name: str, x_BKSH: Shaped, step: Step[Shaped]) -> Shaped:
        state = m.block.state().get(name)
        if state is None:
            raise Disagreement("IR006", f"state `{name}` is not declared")
        if step.kv_positions_L is None:
            return x_BKSH
        self.states.append((m.path, name))
        batch, kv_heads, _, head_dim = x_BKSH.shape
        if state.sizes != (0, kv_heads, 0, head_dim):
            raise Disagreement(
                "IR008", f"state `{name}` is declared {list(state.sizes)} and given {list(x_BKSH.shape)}"
            )
        return replace(x_BKSH, shape=(batch, kv_heads, step.kv_positions_L.shape[0], head_dim))

    def attention(
        self, q_BNSH: Shaped, k_BKLH: Shaped, v_BKLH: Shaped, *, mask: Mask, scale: float, step: Step[Shaped]
    ) -> Shaped:
        batch, heads, queries, head_dim = q_BNSH.shape
        _, kv_heads, keys, _ = k_BKLH.shape
        if k_BKLH.shape != v_BKLH.shape or (batch, head_dim) != (k_BKLH.shape[0], k_BKLH.shape[3]) or heads % kv_heads:
            shapes = ", ".join(str(list(value.shape)) for value in (q_BNSH, k_BKLH, v_BKLH))
            raise Disagreement("IR008", f"queries, keys and values {shapes} do not fit")
        if not q_BNSH.sharded == k_BKLH.sharded == v_BKLH.sharded:
            raise Disagreement("IR009", f"queries {place(q_BNSH)}, keys {place(k_BKLH)}, values {place(v_BKLH)}")
        per_pair = 4 * batch * heads * head_dim  # two matmuls, scores and weighted sum, 2 · H each
        causal = per_pair * queries * keys - per_pair // 2 * _twice_hidden(queries, keys, mask)
        self._count("attention", per_pair * queries * keys, causal=causal)
        return q_BNSH

    def take_token(self, x_BSD: Shaped, index_B: Shaped) -> Shaped:
        batch, _, width = x_BSD.shape
        if index_B.shape != (batch,):
            raise Disagreement("IR008", f"{list(x_BSD.shape)} meets indices {list(index_B.shape)} of rows")
        if x_BSD.sharded or x_BSD.spread:
            raise Disagreement("IR009", f"one token is taken of a value {place(x_BSD)}")
        return replace(x_BSD.plain(), shape=(batch, 1, width))

    def linear_cross_entropy(
        self, x_BSD: Shaped, weight_VD: Shaped, targets_BS: Shaped, *, gather: Boundary | None
    ) -> tuple[Shaped, Shaped]:
        if targets_BS.shape != x_BSD.shape[:-1]:
            raise Disagreement("IR008", f"{list(x_BSD.shape)} meets targets {list(targets_BS.shape)}")
        logits_BSV = self.linear(x_BSD, weight_VD, None, reduce=None)
        if logits_BSV.sharded != (gather and gather.mesh_axis) or logits_BSV.spread:
            raise Disagreement("IR009", f"the loss over logits {place(logits_BSV)} is gathered over {gather}")
        if gather is not None:  # of each token: the largest logit, the sum, the target's logit
            tokens = replace(logits_BSV, shape=(3, *targets_BS.shape))
            self._exchange("linear_cross_entropy", tokens, gather.mesh_axis, "all_reduce", None)
        return Shaped(shape=()), Shaped(shape=())

    def _count(self, op: str, flops: int, *, causal: int | None = None) -> None:
        causal = flops if causal is None else causal
        self.costs.append(Cost(segment=self._paths[0], path=self._paths[-1], op=op, flops=flops, causal_flops=causal))

    def _exchange(
        self, op: str, x: Shaped, axis: str, forward: CollectiveKind | None, backward: CollectiveKind | None
    ) -> None:
        kinds: dict[bool, CollectiveKind | None] = {False: forward, True: backward}
        collectives = [
            Collective(kind=kind, mesh_axis=axis, elements=prod(x.shape), backward=back)
            for back, kind in kinds.items()
            if kind is not None
        ]
        self.costs.append(Cost(segment=self._paths[0], path=self._paths[-1], op=op, collectives=tuple(collectives)))


def _twice_hidden(queries: int, keys: int, mask: Mask) -> int:
    """Twice the pairs of a query and a key that a mask hides, of S new tokens at the end of L visible positions.

    A causal mask hides the triangle over the new tokens: S² / 2 by the convention of MFU figures, S (S - 1) / 2
    exactly. A window of W hides d = L - W keys more from the last query and one less from each before it: the triangle
    d² / 2 for d ≤ S, and for d > S all S queries have lost keys, S (d - S) + S² / 2.
    """
    lost = keys - min(mask.size, keys) if isinstance(mask, Window) else 0
    return queries**2 + (lost**2 if lost <= queries else queries * (2 * lost - queries))


@dataclass(frozen=True, kw_only=True)
class ProgramCost:
    """What one forward takes on one rank. output: logits, or the pair of the loss.

    reads: (path, name) of each parameter and child that a block read. states: (path, name) of each cache written.
    """

    output: Shaped | tuple[Shaped, ...]
    costs: tuple[Cost, ...]
    reads: frozenset[tuple[str, str]]
    states: tuple[tuple[str, str], ...]

    @property
    def flops(self) -> int:
        return sum(cost.flops for cost in self.costs)

    @property
    def causal_flops(self) -> int:
        return sum(cost.causal_flops for cost in self.costs)

    @property
    def collectives(self) -> tuple[Collective, ...]:
        return tuple(collective for cost in self.costs for collective in cost.collectives)

    def of(self, segment: Segment) -> "ProgramCost":
        """The part of one segment; the final one, whose path is empty, has what no other has."""
        return replace(self, costs=tuple(cost for cost in self.costs if cost.segment == segment.path))


def run_cost(
    program: Program,
    *,
    batch: int,
    sequence: int,
    visible: int | None = None,
    targets: bool = False,
    last: bool = False,
    splits: Mapping[str, tuple[Split, ...]] | None = None,
) -> ProgramCost:
    """Run a Program (or a pipeline stage) over shapes: `sequence` new tokens in each of `batch` rows.

    visible: with a cache, the positions that attention reads. targets: end in the loss. last: the logits of one token a
    row alone. splits: see `CostOps`.
    FLOPs are those of the matrix products, 2 · m · n · k each; a backward takes twice as many again.
    Raises ArchwrightError IR006, IR008 or IR009 where a block is not consistent.
    """
    ops = CostOps(splits)
    tokens_BS = Shaped(shape=(batch, sequence))
    step = Step(
        positions_BS=tokens_BS,
        write_index_B=None if visible is None else Shaped(shape=(batch,)),
        kv_positions_L=None if visible is None else Shaped(shape=(visible,)),
        targets_BS=tokens_BS if targets else None,
        logit_index_B=Shaped(shape=(batch,)) if last else None,
    )
    sites = program.sites()

    def bind(segment: Segment) -> Callable[..., Any]:
        return CostScope(segment.block, segment.path, ops, sites)

    x = tokens_BS
    if not isinstance(program.segments[0].block, Embedding | PositionedEmbedding):
        x = Shaped(shape=(batch, sequence, program.hidden_size), spread=program.spread)
    output = program.run(bind, x, step)
    return ProgramCost(output=output, costs=tuple(ops.costs), reads=frozenset(ops.reads), states=tuple(ops.states))


def _hidden_size(program: Program) -> int:
    return next(
        size
        for param in program.params().values()
        for size, axis in zip(param.shape, param.axes, strict=True)
        if axis == "embed"
    )
