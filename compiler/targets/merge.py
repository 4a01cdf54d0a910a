"""The rank graphs of a stage joined into one graph: proves a sharded export on one CPU, without collectives.

rank 0   ──MatMul──all_reduce──Add──          rank0/MatMul ──┐      ┌── rank0/Add
                                      ──▶                   Sum ────┤
rank 1   ──MatMul──all_reduce──Add──          rank1/MatMul ──┘      └── rank1/Add
"""

from collections.abc import Sequence
from pathlib import Path

import onnx

from archwright.compiler.interpreters.onnx_ops import DOMAIN
from archwright.spec import ArchwrightError

COLLECTIVE = "DistCollective"
CACHES = ("past.", "present.")


def merge_ranks(folder: Path, *, stage: int = 0) -> onnx.ModelProto:
    """Join `rank*/stage{stage}.onnx` of an artifact folder into one graph of the same meaning.

    The values of rank r are called `rank{r}/NAME`; inputs but the caches are shared by all ranks. Each all_reduce
    becomes a Sum. Outputs: `logits` of rank 0, `rank{r}/logits` of the others, and the caches
    `rank{r}/present.0.key`. External data keep their files, now relative to `folder`: ONNX Runtime opens the graph
    from bytes with that folder as `session.model_external_initializers_file_folder_path`. One rank is joined likewise.

    Raises ArchwrightError BUILD020 where graphs are missing, BUILD021 where the ranks do not have the same collectives
    in the same order (running them would hang), BUILD022 where a collective is not a sum over all ranks.
    """
    models = load_ranks(folder, stage)
    merged = onnx.ModelProto(ir_version=models[0].ir_version, producer_name=models[0].producer_name)
    merged.graph.name = f"stage{stage}_merged"
    pieces = [_pieces(model.graph) for model in models]
    _check_collectives(pieces, folder)
    names = [_names(model.graph, rank) for rank, model in enumerate(models)]
    for rank, model in enumerate(models):
        _join_declarations(merged.graph, model.graph, rank, names[rank])
    for position, first in enumerate(pieces[0]):
        for rank in range(len(models)):
            merged.graph.node.extend(_renamed(node, names[rank], rank) for node in pieces[rank][position][:-1])
        ends = [_renamed(pieces[rank][position][-1], names[rank], rank) for rank in range(len(models))]
        merged.graph.node.extend([_sum(ends, names)] if first[-1].op_type == COLLECTIVE else ends)
    domains = {node.domain for node in merged.graph.node}
    merged.opset_import.extend(o for o in models[0].opset_import if o.domain != DOMAIN or DOMAIN in domains)
    return merged


def load_ranks(folder: Path, stage: int = 0) -> list[onnx.ModelProto]:
    """The graphs of `rank0`, `rank1`, ... without their data. Raises ArchwrightError BUILD020 if one is missing."""
    ranks = sorted(int(path.name[4:]) for path in folder.glob("rank*") if path.name[4:].isdecimal())
    paths = [folder / f"rank{rank}" / f"stage{stage}.onnx" for rank in range(max(ranks, default=0) + 1)]
    for path in paths:
        if not path.is_file():
            help = "build the artifact again; every rank has a graph"
            raise ArchwrightError("BUILD020", "the rank's graph is missing", where=str(path), help=help)
    return [onnx.load(path, load_external_data=False) for path in paths]


def collectives(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The collectives of a graph in the order in which it runs them."""
    return [node for node in graph.node if node.op_type == COLLECTIVE]


def _pieces(graph: onnx.GraphProto) -> list[list[onnx.NodeProto]]:
    """The nodes cut behind each collective: piece i of every rank can run once the first i sums are done."""
    pieces: list[list[onnx.NodeProto]] = [[]]
    for node in graph.node:
        pieces[-1].append(node)
        if node.op_type == COLLECTIVE:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _check_collectives(pieces: Sequence[list[list[onnx.NodeProto]]], folder: Path) -> None:
    first, *others = ([p[-1] for p in rank if p[-1].op_type == COLLECTIVE] for rank in pieces)
    for rank, nodes in enumerate(others, 1):
        for expected, node in zip(first, nodes, strict=False):
            if (node.name, node.attribute) != (expected.name, expected.attribute):
                _mismatch(folder, rank, f"runs `{node.name}` where rank 0 runs `{expected.name}`")
        if len(nodes) != len(first):
            _mismatch(folder, rank, f"has {len(nodes)} collectives, rank 0 has {len(first)}")
    for node in first:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        kind, reduce_op = attributes.get("collective_operation"), attributes.get("reduce_op")
        if (kind, reduce_op) != (b"all_reduce", b"sum") or attributes.get("nb_rank") != len(pieces):
            raise ArchwrightError(
                "BUILD022",
                f"`{node.name}` is not an all_reduce with sum over all {len(pieces)} ranks",
                where=str(folder),
                help="only graphs that reduce over every rank of the stage can be joined",
            )


def _mismatch(folder: Path, rank: int, what: str) -> None:
    help = "build the artifact again; its ranks come from different builds"
    raise ArchwrightError("BUILD021", f"rank {rank} {what}", where=str(folder), help=help)


def _names(graph: onnx.GraphProto, rank: int) -> dict[str, str]:
    """Old name → new name of every value; the results of a collective are one value for all ranks."""
    shared = {value.name for value in graph.input if not value.name.startswith(CACHES)}
    shared |= {"logits"} if rank == 0 else set()
    local = {value.name for value in (*graph.input, *graph.initializer)} - shared
    names = dict.fromkeys(shared) | dict.fromkeys(local)
    result = {name: name if name in shared else f"rank{rank}/{name}" for name in names}
    for node in graph.node:
        for name in node.output:
            result.setdefault(name, name if node.op_type == COLLECTIVE else f"rank{rank}/{name}")
    return result | {"": ""}  # of optional inputs and outputs that are left out


def _join_declarations(merged: onnx.GraphProto, graph: onnx.GraphProto, rank: int, names: dict[str, str]) -> None:
    """Take over a rank's inputs, outputs, initializers and types."""
    known = {value.name for value in (*merged.input, *merged.value_info)}
    for source, target in (
        (graph.input, merged.input),
        (graph.output, merged.output),
        (graph.value_info, merged.value_info),
    ):
        for value in source:
            name = names.get(value.name, value.name)  # what no node makes is found by whoever opens the graph
            if name not in known:
                target.add().CopyFrom(value)
                target[-1].name = name
    for tensor in graph.initializer:
        copy = merged.initializer.add()
        copy.CopyFrom(tensor)
        copy.name = names[tensor.name]
        for entry in copy.external_data:
            if entry.key == "location":
                entry.value = f"rank{rank}/{entry.value}"


def _renamed(node: onnx.NodeProto, names: dict[str, str], rank: int) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = f"rank{rank}/{node.name}"
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names[name] for name in node.output]
    return copy


def _sum(nodes: Sequence[onnx.NodeProto], names: Sequence[dict[str, str]]) -> onnx.NodeProto:
    inputs = [node.input[0] for node in nodes]
    output = nodes[0].output[0]
    return onnx.helper.make_node("Sum", inputs, [output], name=output)
