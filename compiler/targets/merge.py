"""The rank graphs of a stage joined into one graph: proves a sharded export on one CPU, without collectives.

rank 0   ──MatMul──all_reduce──Add──          rank0/MatMul ──┐      ┌── rank0/Add
                                      ──▶                   Sum ────┤
rank 1   ──MatMul──all_reduce──Add──          rank1/MatMul ──┘      └── rank1/Add

Where ranks add up in groups there is a Sum for each group.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from archwright.compiler.interpreters.onnx_ops import DOMAIN
from archwright.spec import ArchwrightError

COLLECTIVE = "DistCollective"
CACHES = ("past.", "present.")


def merge_ranks(folder: Path, *, stage: int = 0, ranks: Sequence[int] | None = None) -> onnx.ModelProto:
    """Join `rank*/stage{stage}.onnx` of an artifact folder into one graph of the same meaning.

    ranks: those of the stage, see `Plan.stage_ranks`; None: all that the folder has. The values of rank r are called
    `rank{r}/NAME`; inputs but the caches are shared by all ranks. Each all_reduce becomes a Sum, which is called as
    the value was, or of a group `rank{r}/NAME` by its first rank r. Outputs: `logits` or what else a stage gives of
    the first rank, `rank{r}/logits` of the others, and the caches `rank{r}/present.0.key`. External data keep their
    files, now relative to `folder`: ONNX Runtime opens the graph from bytes with that folder as
    `session.model_external_initializers_file_folder_path`. One rank is joined likewise.

    Raises ArchwrightError BUILD020 where graphs are missing, BUILD021 where the ranks do not have the same collectives
    in the same order, or groups that do not fit together (running them would hang), BUILD022 where a collective is not
    a sum over all ranks of the stage or of its group.
    """
    numbers = rank_numbers(folder) if ranks is None else ranks
    models = load_ranks(folder, stage, numbers)
    merged = onnx.ModelProto(ir_version=models[0].ir_version, producer_name=models[0].producer_name)
    merged.graph.name = f"stage{stage}_merged"
    pieces = [_pieces(model.graph) for model in models]
    _check_collectives(pieces, numbers, folder)
    names = [_names(model.graph, index, numbers) for index, model in enumerate(models)]
    for index, model in enumerate(models):
        _join_declarations(merged.graph, model.graph, numbers[index], names[index])
    for position in range(len(pieces[0])):
        for index, rank in enumerate(numbers):
            merged.graph.node.extend(_renamed(node, names[index], rank) for node in pieces[index][position][:-1])
        ends = [_renamed(pieces[index][position][-1], names[index], rank) for index, rank in enumerate(numbers)]
        merged.graph.node.extend(_sums(ends) if ends[0].op_type == COLLECTIVE else ends)
    domains = {node.domain for node in merged.graph.node}
    merged.opset_import.extend(o for o in models[0].opset_import if o.domain != DOMAIN or DOMAIN in domains)
    return merged


def rank_numbers(folder: Path) -> range:
    """0 up to the largest number of a `rank{r}` in a folder."""
    ranks = [int(path.name[4:]) for path in folder.glob("rank*") if path.name[4:].isdecimal()]
    return range(max(ranks, default=0) + 1)


def load_ranks(folder: Path, stage: int, ranks: Sequence[int]) -> list[onnx.ModelProto]:
    """The graphs of the ranks of a stage without their data. Raises ArchwrightError BUILD020 if one is missing."""
    paths = [folder / f"rank{rank}" / f"stage{stage}.onnx" for rank in ranks]
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


def _check_collectives(pieces: Sequence[list[list[onnx.NodeProto]]], ranks: Sequence[int], folder: Path) -> None:
    first, *others = ([p[-1] for p in rank if p[-1].op_type == COLLECTIVE] for rank in pieces)
    for rank, nodes in zip(ranks[1:], others, strict=True):
        for expected, node in zip(first, nodes, strict=False):
            if (node.name, _without_group(node)) != (expected.name, _without_group(expected)):
                _mismatch(folder, rank, f"runs `{node.name}` where rank {ranks[0]} runs `{expected.name}`")
        if len(nodes) != len(first):
            _mismatch(folder, rank, f"has {len(nodes)} collectives, rank {ranks[0]} has {len(first)}")
    for position, node in enumerate(first):
        groups = [group_of(nodes[position], len(pieces)) for nodes in (first, *others)]
        attributes = _attributes(node)
        kind, reduce_op = attributes.get("collective_operation"), attributes.get("reduce_op")
        if (kind, reduce_op) != (b"all_reduce", b"sum") or attributes.get("nb_rank") != len(groups[0]):
            raise ArchwrightError(
                "BUILD022",
                f"`{node.name}` is not an all_reduce with sum over all {len(groups[0])} ranks",
                where=str(folder),
                help="only graphs that reduce over every rank of the stage, or of a group of them, can be joined",
            )
        for index, (rank, group) in enumerate(zip(ranks, groups, strict=True)):
            if index not in group or any(not 0 <= each < len(groups) or groups[each] != group for each in group):
                _mismatch(folder, rank, f"adds up `{node.name}` with {list(group)}, where other ranks do not")


def group_of(node: onnx.NodeProto, size: int) -> tuple[int, ...]:
    """The ranks that a collective adds up, by their numbers in the stage's communicator, of `size` ranks."""
    return tuple(_attributes(node).get("groups") or range(size))


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _without_group(node: onnx.NodeProto) -> dict[str, Any]:
    return {name: value for name, value in _attributes(node).items() if name != "groups"}


def _mismatch(folder: Path, rank: int, what: str) -> None:
    help = "build the artifact again; its ranks come from different builds"
    raise ArchwrightError("BUILD021", f"rank {rank} {what}", where=str(folder), help=help)


def _names(graph: onnx.GraphProto, index: int, ranks: Sequence[int]) -> dict[str, str]:
    """Old name → new name of every value of the graph that is `index`th of its stage; the results of a collective are
    one value for all ranks that took part."""
    rank = ranks[index]
    shared = {value.name for value in graph.input if not value.name.startswith(CACHES)}
    if index == 0:
        shared |= {value.name for value in graph.output if not value.name.startswith(CACHES)}
    local = {value.name for value in (*graph.input, *graph.initializer)} - shared
    names = dict.fromkeys(shared) | dict.fromkeys(local)
    result = {name: name if name in shared else f"rank{rank}/{name}" for name in names}
    for node in graph.node:
        place = f"rank{rank}/"
        if node.op_type == COLLECTIVE:
            group = group_of(node, len(ranks))
            place = "" if len(group) == len(ranks) else f"rank{ranks[group[0]]}/"
        for name in node.output:
            result.setdefault(name, place + name)
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


def _sums(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The collectives that the ranks of a stage run together as a Sum for each group."""
    groups = dict.fromkeys(group_of(node, len(nodes)) for node in nodes)
    sums: list[onnx.NodeProto] = []
    for group in groups:
        output = nodes[group[0]].output[0]
        inputs = [nodes[member].input[0] for member in group]
        sums.append(onnx.helper.make_node("Sum", inputs, [output], name=output))
    return sums
