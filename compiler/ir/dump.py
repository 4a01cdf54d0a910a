"""A Program as text, for people and for golden files."""

from dataclasses import fields
from itertools import groupby

from archwright.compiler.ir.block import Block
from archwright.compiler.ir.param import Param
from archwright.compiler.ir.program import Program, Segment


def dump_program(program: Program) -> str:
    """One line a block or parameter; neighbouring segments with equal blocks are written once, as `layers.{0..15}`."""
    lines = [
        f"program: {program.num_params():,} parameters, vocab_size {program.vocab_size}, "
        f"max_positions {program.max_positions}"
    ]
    for _, run in groupby(program.segments, key=lambda segment: segment.block):
        segments = list(run)
        _visit(segments[0].block, _heading(segments), 0, lines)
    return "\n".join(lines)


def _heading(segments: list[Segment]) -> str:
    first, last = segments[0].path, segments[-1].path
    if len(segments) == 1:
        return first or "(root)"
    parent, _, start = first.rpartition(".")
    return f"{parent}.{{{start}..{last.rpartition('.')[2]}}}"


def _visit(block: Block, name: str, depth: int, lines: list[str]) -> None:
    indent = "  " * depth
    plain = [
        f"{f.name}={value}"
        for f in fields(block)
        if not isinstance(value := getattr(block, f.name), Block | Param) and value is not None
    ]
    lines.append(f"{indent}{name}: {' '.join([type(block).__name__, *plain])}")
    lines += [f"{indent}  {key}: {_param(param)}" for key, param in block.params().items()]
    for key, sub in block.children().items():
        _visit(sub, block.child_path(key, ""), depth + 1, lines)


def _param(param: Param) -> str:
    dims = ", ".join(f"{axis} {size}" for axis, size in zip(param.axes, param.shape, strict=True))
    text = f"[{dims}] {param.init}"
    if param.storage is not None:
        text += f", stored as {param.storage}"
    if param.share is not None:
        text += f", shared as {param.share}"
    for split in param.splits:
        text += f", {param.axes[split.dim]} in {split.parts} parts over {split.degree} {split.mesh_axis} ranks"
    if param.partial is not None:
        text += f", read for other tokens by each {param.partial} rank"
    return text
