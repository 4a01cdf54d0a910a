"""Program → the same Program with matrices of few bits: `Linear` → `QuantLinear`, and so on."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from archwright.compiler.blocks import Embedding, Experts, Head, Linear
from archwright.compiler.blocks.quantized import QuantEmbedding, QuantExperts, QuantHead, QuantLinear
from archwright.compiler.ir import Block, Ones, Param, Program, Storage
from archwright.spec.models import Quantize, QuantizeRule
from archwright.spec.quantization import EMBEDDING, HEAD, rule_for

STORAGE: Mapping[str, Storage] = {"int4": "int4", "int8": "int8", "fp8": "float8"}
"""Kind of a rule → how its matrices are stored."""
SCALE = "_scale"
"""Behind the name of a matrix: its scales."""
INPUT_SCALE = "input_scale"


def quantize(program: Program, chosen: Quantize | None) -> Program:
    """`program` with every matrix that a rule of `chosen` names quantized; routers and positions never are.

    A tied head follows the embedding. Which numbers the matrices hold is `weights.quantized`'s business.
    """
    if chosen is None:
        return program
    tied = any(place == f"{HEAD}.weight" and not site.owner for place, site in program.sites().items())

    def rule(path: str) -> QuantizeRule | None:
        return rule_for(chosen, EMBEDDING if tied and path == HEAD else path)

    segments = tuple(replace(s, block=_visit(s.block, s.path, rule)) for s in program.segments)
    return replace(program, segments=segments)


def calibrated_by(chosen: Quantize | None) -> str | None:
    """What in the rules needs calibration tokens, as the spec writes it; None where nothing does."""
    for rule in chosen.rules if chosen else ():
        if rule.kind == "fp8":
            return "kind: fp8"
        if rule.kind == "int4" and rule.method == "awq":
            return "method: awq"
    return None


def num_weights(program: Program) -> int:
    """Parameters without the scales that quantization added: as many as the model has."""
    params = program.params()
    scales = {f"{name}{SCALE}" for name, param in params.items() if param.storage is not None}
    return sum(p.size for name, p in params.items() if name not in scales and name.rpartition(".")[2] != INPUT_SCALE)


def rounds_inputs(program: Program) -> bool:
    """Whether matrices of a Program round their inputs to 8-bit floats."""
    return any(name.rpartition(".")[2] == INPUT_SCALE for name in program.params())


def _visit(block: Block, path: str, rule: Callable[[str], QuantizeRule | None]) -> Block:
    subs = {name: _visit(sub, block.child_path(name, path), rule) for name, sub in block.children().items()}
    block = replace(block, **subs)
    found = rule(path)
    return block if found is None else _quantized(block, found)


def _quantized(block: Block, rule: QuantizeRule) -> Block:
    if isinstance(block, Linear | Head | Embedding) and block.weight.axes[0] in ("router", "positions"):
        return block  # as `spec.quantization.matrices` says
    values: dict[str, Any] = {f.name: getattr(block, f.name) for f in fields(block)}
    if isinstance(block, Experts):
        for name in ("gate_proj", "up_proj", "down_proj"):
            values |= _pair(name, values[name], rule)
        return QuantExperts(**values)
    if isinstance(block, Embedding):
        values |= _pair("weight", block.weight, rule)
        return QuantEmbedding(**values)
    if not isinstance(block, Linear | Head):
        return block
    values |= _pair("weight", block.weight, rule)
    if rule.kind == "fp8":
        values[INPUT_SCALE] = Param(shape=(1, 1), axes=("one", "one"), init=Ones())
    return (QuantLinear if isinstance(block, Linear) else QuantHead)(**values)


def _pair(name: str, weight: Param, rule: QuantizeRule) -> dict[str, Param]:
    """A matrix of few bits and its scales."""
    return {name: replace(weight, storage=STORAGE[rule.kind]), f"{name}{SCALE}": _scale(weight, rule)}


def _scale(weight: Param, rule: QuantizeRule) -> Param:
    """[..., out, groups]. Groups lie along the input channels and are cut as these are."""
    *rows, columns = weight.shape
    grain = weight.grain or (1,) * len(weight.shape)
    share = None if weight.share is None else f"{weight.share}{SCALE}"
    if rule.kind != "int4":
        return Param(
            shape=(*rows, 1), axes=(*weight.axes[:-1], "one"), init=Ones(), grain=(*grain[:-1], 1), share=share
        )
    return Param(
        shape=(*rows, columns // rule.group_size), axes=weight.axes, init=Ones(), grain=(*grain[:-1], 1),
        share=share,
    )  # fmt: skip
