"""Program → the same Program with fewer, larger matrices. Each pass says how its parameters are made of those before.

    q_proj  [N·H, D] ┐                     gate_proj [F, D] ┐
    k_proj  [K·H, D] ┼─ qkv_proj           up_proj   [F, D] ┴─ gate_up_proj
    v_proj  [K·H, D] ┘

They work on the Program of one rank: of a matrix that ranks share, the rank's rows of q stand before its rows of k, so
that the fused matrix of all ranks is no matrix that is cut into ranges of rows. Checkpoints never have fused names.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from archwright.compiler.blocks import FusedAttention, FusedSwiGLU, GroupedQueryAttention, Linear, SwiGLU
from archwright.compiler.ir import Block, Param, Program, Split
from archwright.compiler.ir.verifier import verify_program

Fusion = Literal["scale", "qkv", "gate_up"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A canonical parameter inside a fused one. scale: what it is multiplied by, a power of two."""

    name: str
    scale: float = 1.0


WeightMap = Mapping[str, tuple[Part, ...]]
"""Name of a parameter → the canonical ones that lie behind each other in it along dim 0. Others are themselves."""


@dataclass(frozen=True, kw_only=True)
class Fused:
    """A Program, and how its parameters are made of the canonical ones."""

    program: Program
    weights: WeightMap


def fuse(program: Program, fusions: tuple[Fusion, ...]) -> Fused:
    """Apply passes in order. program: of one rank, its parameters of local sizes."""
    done = Fused(program=program, weights={})
    for name in fusions:
        after = PASSES[name](done.program)
        done = Fused(program=after.program, weights=_composed(done.weights, after.weights))
    return done


def fold_scale(program: Program) -> Fused:
    """1/sqrt(H) into the queries' matrix and bias, where it is a power of two: then no product is rounded.

    RoPE is linear, so it turns the scaled queries into the scaled turned ones. Not for float16, whose smallest numbers
    a power of two may lose.
    """

    def change(path: str, block: Block, weights: dict[str, tuple[Part, ...]]) -> Block:
        if not isinstance(block, GroupedQueryAttention) or block.scale is not None or not _are_plain(block.q_proj):
            return block
        scale = block.head_dim**-0.5
        if math.frexp(scale)[0] != 0.5:
            return block
        weights |= {
            f"{path}.q_proj.{name}": (Part(name=f"{path}.q_proj.{name}", scale=scale),)
            for name in block.q_proj.params()
        }
        return replace(block, scale=1.0)

    return _each(program, change)


def fuse_qkv(program: Program) -> Fused:
    """One matrix for queries, keys and values."""

    def change(path: str, block: Block, weights: dict[str, tuple[Part, ...]]) -> Block:
        if not isinstance(block, GroupedQueryAttention) or not _are_plain(block.q_proj, block.k_proj, block.v_proj):
            return block
        heads, kv_heads = (linear.weight.shape[0] // block.head_dim for linear in (block.q_proj, block.k_proj))
        return FusedAttention(
            enter=block.enter,
            qkv_proj=_joined(path, ("q_proj", "k_proj", "v_proj"), "qkv_proj", block, weights),
            o_proj=block.o_proj,
            position=block.position,
            mask=block.mask,
            head_dim=block.head_dim,
            num_heads=heads,
            num_kv_heads=kv_heads,
            scale=block.head_dim**-0.5 if block.scale is None else block.scale,
        )

    return _each(program, change)


def fuse_gate_up(program: Program) -> Fused:
    """One matrix for the gate and what it gates, in every SwiGLU but those of experts, which are stacks."""

    def change(path: str, block: Block, weights: dict[str, tuple[Part, ...]]) -> Block:
        if not isinstance(block, SwiGLU) or not _are_plain(block.gate_proj, block.up_proj):
            return block
        joined = _joined(path, ("gate_proj", "up_proj"), "gate_up_proj", block, weights)
        return FusedSwiGLU(enter=block.enter, gate_up_proj=joined, down_proj=block.down_proj)

    return _each(program, change)


PASSES: Mapping[Fusion, Callable[[Program], Fused]] = {
    "scale": fold_scale,
    "qkv": fuse_qkv,
    "gate_up": fuse_gate_up,
}


def verify_fused(fused: Fused, splits: Mapping[str, tuple[Split, ...]]) -> None:
    """Check the Program of a rank. splits: of the canonical parameters, which a fused one has from its first part.

    Raises what `verify_program` raises.
    """
    known = {name: splits[parts[0].name] for name, parts in fused.weights.items()}
    verify_program(fused.program, splits={**splits, **known})


def _are_plain(*linears: Linear) -> bool:
    """Whether matrices have all their bits. Quantized ones are left as they are: their scales would have to be joined
    as well, and a folded factor be rounded."""
    return all(type(linear) is Linear for linear in linears)


def _joined(
    path: str, names: tuple[str, ...], joined: str, block: Block, weights: dict[str, tuple[Part, ...]]
) -> Linear:
    """The Linear whose rows are those of several, and its parts into `weights`."""
    linears = [sub for name in names if isinstance(sub := block.children()[name], Linear)]
    params: dict[str, Param] = {}
    for kind, first in linears[0].params().items():
        assert not first.splits, "matrices are fused on each rank, once they are cut"
        rows = sum(linear.params()[kind].shape[0] for linear in linears)
        params[kind] = replace(first, shape=(rows, *first.shape[1:]))
        weights[f"{path}.{joined}.{kind}"] = tuple(Part(name=f"{path}.{name}.{kind}") for name in names)
    return Linear(weight=params["weight"], bias=params.get("bias"))


def _each(program: Program, change: Callable[[str, Block, dict[str, tuple[Part, ...]]], Block]) -> Fused:
    """Rebuild every block bottom-up, at each of its paths."""
    weights: dict[str, tuple[Part, ...]] = {}

    def visit(path: str, block: Block) -> Block:
        subs = {name: visit(block.child_path(name, path), sub) for name, sub in block.children().items()}
        return change(path, replace(block, **subs), weights)

    segments = tuple(replace(segment, block=visit(segment.path, segment.block)) for segment in program.segments)
    return Fused(program=replace(program, segments=segments), weights=weights)


def _composed(first: WeightMap, second: WeightMap) -> WeightMap:
    """The map of two passes, one after the other."""
    found: dict[str, tuple[Part, ...]] = {}
    for name, parts in second.items():
        expanded = [(part, inner) for part in parts for inner in first.get(part.name, (Part(name=part.name),))]
        found[name] = tuple(Part(name=inner.name, scale=inner.scale * part.scale) for part, inner in expanded)
    consumed = {part.name for parts in second.values() for part in parts}
    return {name: parts for name, parts in first.items() if name not in consumed} | found
