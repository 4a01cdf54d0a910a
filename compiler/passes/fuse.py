"""Program → the same Program with fewer, larger matrices. Each pass says how its parameters are made of those before.

    q_proj  [N·H, D] ┐                     gate_proj [F, D] ┐
    k_proj  [K·H, D] ┼─ qkv_proj           up_proj   [F, D] ┴─ gate_up_proj
    v_proj  [K·H, D] ┘

They work on the Program of one rank: of a matrix that ranks share, the rank's rows of q stand before its rows of k, so
that the fused matrix of all ranks is no matrix that is cut into ranges of rows. Checkpoints never have fused names.

Quantized matrices are fused as they are stored: a scale belongs to one row, or to a group of input channels of one row,
so scales [out, groups] lie behind each other as the rows do, and no value is rounded again. What AWQ multiplied is in
the matrices and in what comes before them; matrices that read one input have the same multipliers, and nothing is left
for a graph to multiply by.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from archwright.compiler.blocks import FusedAttention, FusedSwiGLU, GroupedQueryAttention, Linear, SwiGLU
from archwright.compiler.blocks.quantized import QuantLinear
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
    """A Program, and how its parameters are made of the canonical ones.

    unfused: path of each block whose matrices could not be joined → why.
    """

    program: Program
    weights: WeightMap
    unfused: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class _Changes:
    """What a pass gathers on its way: the fields of `Fused`."""

    weights: dict[str, tuple[Part, ...]] = field(default_factory=dict[str, tuple[Part, ...]])
    unfused: dict[str, str] = field(default_factory=dict[str, str])


def fuse(program: Program, fusions: tuple[Fusion, ...]) -> Fused:
    """Apply passes in order. program: of one rank, its parameters of local sizes."""
    done = Fused(program=program, weights={})
    for name in fusions:
        after = PASSES[name](done.program)
        weights = _composed(done.weights, after.weights)
        done = Fused(program=after.program, weights=weights, unfused={**done.unfused, **after.unfused})
    return done


def fold_scale(program: Program) -> Fused:
    """1/sqrt(H) into the queries' matrix and bias, where it is a power of two: then no product is rounded.

    RoPE is linear, so it turns the scaled queries into the scaled turned ones. Not for float16, whose smallest numbers
    a power of two may lose, nor for quantized queries, whose scales may be the smallest normal ones of their type.
    """

    def change(path: str, block: Block, found: _Changes) -> Block:
        if not isinstance(block, GroupedQueryAttention) or block.scale is not None or type(block.q_proj) is not Linear:
            return block
        scale = block.head_dim**-0.5
        if math.frexp(scale)[0] != 0.5:
            return block
        found.weights.update(
            {
                f"{path}.q_proj.{name}": (Part(name=f"{path}.q_proj.{name}", scale=scale),)
                for name in block.q_proj.params()
            }
        )
        return replace(block, scale=1.0)

    return _each(program, change)


def fuse_qkv(program: Program) -> Fused:
    """One matrix for queries, keys and values."""

    def change(path: str, block: Block, found: _Changes) -> Block:
        if not isinstance(block, GroupedQueryAttention):
            return block
        joined = _joined(
            path, {"q_proj": block.q_proj, "k_proj": block.k_proj, "v_proj": block.v_proj}, "qkv_proj", found
        )
        if joined is None:
            return block
        heads, kv_heads = (linear.weight.shape[0] // block.head_dim for linear in (block.q_proj, block.k_proj))
        return FusedAttention(
            enter=block.enter,
            qkv_proj=joined,
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

    def change(path: str, block: Block, found: _Changes) -> Block:
        if not isinstance(block, SwiGLU):
            return block
        joined = _joined(path, {"gate_proj": block.gate_proj, "up_proj": block.up_proj}, "gate_up_proj", found)
        if joined is None:
            return block
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


def _joined(path: str, linears: Mapping[str, Linear], name: str, found: _Changes) -> Linear | None:
    """The Linear whose rows are those of several, called `name`, its parts noted; None, with the reason noted, where
    they cannot be one."""
    reason = _reason(linears.values())
    if reason is not None:
        found.unfused[path] = f"{', '.join(linears)}: {reason}"
        return None
    first = next(iter(linears.values()))
    params: dict[str, Param] = {}
    for kind, param in first.params().items():
        assert not param.splits, "matrices are fused on each rank, once they are cut"
        rows = sum(linear.params()[kind].shape[0] for linear in linears.values())
        params[kind] = replace(param, shape=(rows, *param.shape[1:]))
        found.weights[f"{path}.{name}.{kind}"] = tuple(Part(name=f"{path}.{part}.{kind}") for part in linears)
    return replace(first, **params)


def _reason(linears: Collection[Linear]) -> str | None:
    """Why matrices that read one input cannot be one, None where they can: all have all their bits, or as few of them
    and as many groups of input channels."""
    forms = {
        (linear.weight.storage, linear.weight_scale.shape[1:] if isinstance(linear, QuantLinear) else ())
        for linear in linears
    }
    if len(forms) > 1:
        return "they are not stored alike"
    if any(isinstance(linear, QuantLinear) and linear.input_scale is not None for linear in linears):
        return "each rounds its inputs with a scale of its own, and a Program does not say that these are equal"
    return None


def _each(program: Program, change: Callable[[str, Block, _Changes], Block]) -> Fused:
    """Rebuild every block bottom-up, at each of its paths."""
    found = _Changes()

    def visit(path: str, block: Block) -> Block:
        subs = {name: visit(block.child_path(name, path), sub) for name, sub in block.children().items()}
        return change(path, replace(block, **subs), found)

    segments = tuple(replace(segment, block=visit(segment.path, segment.block)) for segment in program.segments)
    return Fused(program=replace(program, segments=segments), weights=found.weights, unfused=found.unfused)


def _composed(first: WeightMap, second: WeightMap) -> WeightMap:
    """The map of two passes, one after the other."""
    found: dict[str, tuple[Part, ...]] = {}
    for name, parts in second.items():
        expanded = [(part, inner) for part in parts for inner in first.get(part.name, (Part(name=part.name),))]
        found[name] = tuple(Part(name=inner.name, scale=inner.scale * part.scale) for part, inner in expanded)
    consumed = {part.name for parts in second.values() for part in parts}
    return {name: parts for name, parts in first.items() if name not in consumed} | found
