"""Ranks that share experts: whom each adds up with, which experts it computes, and what happens where that is wrong."""

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from archwright.compiler.targets.linter import lint
from archwright.compiler.targets.merge import group_of, merge_ranks
from archwright.compiler.tolerances import TOLERANCES, largest_error
from archwright.spec import ArchwrightError

TOLERANCE = TOLERANCES["onnxruntime", "float32"]
ROUTER = {"score": "sigmoid", "normalize": False, "scale": 1.5}
MOE = {"kind": "moe", "experts": 6, "experts_per_token": 3, "hidden_size": 8, "router": ROUTER}
ATTENTION = {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8, "position": {"kind": "rope"}}
LAYER = {"attention": ATTENTION, "ffn": {**MOE, "shared": {"hidden_size": 12}}}
IDS_BS = np.random.default_rng(0).integers(0, 61, (2, 13))


@pytest.fixture
def experts(make_spec, export):
    """`experts(expert=2, ...)`: the export of a model with experts in both layers."""
    return lambda **degrees: export(make_spec(layer=LAYER), **degrees)


def collectives(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == "DistCollective"]


def edit(model: Any, rank: int, change: Any) -> None:
    graph = onnx.load(model.graph_at(rank), load_external_data=False)
    change(graph.graph)
    model.graph_at(rank).write_bytes(graph.SerializeToString())


def set_group(group: list[int]) -> Any:
    """Of the first collective, which adds up attention over the tensor ranks."""

    def change(graph: onnx.GraphProto) -> None:
        attributes = collectives(graph)[0].attribute
        index = next(index for index, attribute in enumerate(attributes) if attribute.name == "groups")
        attributes[index].CopyFrom(helper.make_attribute("groups", group))

    return change


@pytest.mark.parametrize("moe", ["dense", "gathered"])
@pytest.mark.parametrize(("pipeline", "expert", "tensor"), [(1, 1, 1), (1, 3, 1), (1, 2, 2), (2, 2, 1)])
def test_experts_on_several_ranks_are_the_model(experts, moe, pipeline, expert, tensor):
    model = experts(pipeline=pipeline, expert=expert, tensor=tensor, moe=moe)
    assert largest_error(model.backend().whole(IDS_BS), model.oracle(IDS_BS)) < TOLERANCE


def test_ranks_add_up_experts_together_and_the_rest_in_their_group(experts):
    """Of each layer: attention and shared expert over the tensor ranks, the experts once over all four."""
    model = experts(expert=2, tensor=2)
    for rank in range(4):
        graph = onnx.load(model.graph_at(rank), load_external_data=False)
        assert lint(graph, model.graph_at(rank).parent) == []
        own = (0, 1) if rank < 2 else (2, 3)
        groups = Counter(group_of(node, 4) for node in collectives(graph.graph))
        assert groups == {own: 4, (0, 1, 2, 3): 2}
        sizes = {(a.name, a.i) for node in collectives(graph.graph) for a in node.attribute if a.name == "nb_rank"}
        assert sizes == {("nb_rank", 2), ("nb_rank", 4)}
    merged = merge_ranks(model.folder)
    sums = [node for node in merged.graph.node if node.op_type == "Sum"]
    assert Counter(len(node.input) for node in sums) == {2: 8, 4: 2}, "a Sum for each group"
    assert model.planned.collectives == 6


def test_tensor_ranks_of_one_expert_rank_have_one_graph(experts):
    model = experts(expert=2, tensor=2)
    graphs = [onnx.load(model.graph_at(rank), load_external_data=False).graph for rank in range(4)]
    assert graphs[0] == graphs[1] and graphs[2] == graphs[3] and graphs[0] != graphs[2]
    data = [model.graph_at(rank).with_suffix(".data").read_bytes() for rank in range(4)]
    assert len(set(data)) == 4


@pytest.mark.parametrize("moe", ["dense", "gathered"])
def test_a_rank_stores_the_experts_that_it_computes(experts, moe):
    model = experts(expert=3, moe=moe)
    for rank in range(3):
        (tensor,) = (
            t
            for t in onnx.load(model.graph_at(rank), load_external_data=False).graph.initializer
            if t.name == "model.layers.1.mlp.experts.down_proj.T"
        )
        place = {entry.key: entry.value for entry in tensor.external_data}
        start, length = int(place["offset"]), int(place["length"])
        found = np.frombuffer(model.graph_at(rank).with_suffix(".data").read_bytes()[start : start + length], "<f4")
        whole_EDF = model.arrays["model.layers.1.mlp.experts.down_proj"]
        own_EFD = whole_EDF[2 * rank : 2 * rank + 2].swapaxes(1, 2)
        assert tuple(tensor.dims) == ((2, 8, 24) if moe == "gathered" else (16, 24))
        np.testing.assert_array_equal(found.reshape(own_EFD.shape), own_EFD)


def overwrite(model: Any, rank: int, name: str, value: float, where: slice = slice(None)) -> None:
    """Of a stored tensor, along its first dim."""
    graph = onnx.load(model.graph_at(rank), load_external_data=False).graph
    (tensor,) = (tensor for tensor in graph.initializer if tensor.name == name)
    place = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
    path = model.graph_at(rank).with_suffix(".data")
    content = bytearray(path.read_bytes())
    values = np.frombuffer(content, "<f4", count=place["length"] // 4, offset=place["offset"])
    values.reshape(tuple(tensor.dims))[where] = value
    path.write_bytes(content)


def test_what_another_rank_computes_may_be_infinite_here(experts):
    """Equal logits choose experts 0 to 2, which rank 0 has; what stands in for them on rank 1 overflows."""
    model = experts(expert=2, moe="gathered")
    for layer in range(2):
        for rank in range(2):
            overwrite(model, rank, f"model.layers.{layer}.mlp.gate.weight.T", 0.0)
        overwrite(model, 1, f"model.layers.{layer}.mlp.experts.up_proj.T", 3e38, slice(0, 1))
    assert np.isfinite(model.backend().whole(IDS_BS)).all()
    overwrite(model, 0, "model.layers.0.mlp.experts.up_proj.T", 3e38, slice(0, 1))
    assert not np.isfinite(model.backend().whole(IDS_BS)).all(), "expert 0 is chosen"


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({3: [0, 1]}, r"rank 2 adds up `.*o_proj/all_reduce` with \[2, 3\], where other ranks do not"),
        ({0: [0, 2], 1: [1, 3]}, "rank 0 adds up"),
        ({0: [0, 7]}, "rank 0 adds up"),
    ],
)
def test_groups_that_do_not_fit_together_are_refused(experts, groups, message):
    model = experts(expert=2, tensor=2)
    for rank, group in groups.items():
        edit(model, rank, set_group(group))
    with pytest.raises(ArchwrightError, match="BUILD021 " + message):
        merge_ranks(model.folder)


def test_a_group_whose_size_is_not_its_number_of_ranks_is_refused(experts):
    model = experts(expert=2, tensor=2)
    for rank in range(4):
        edit(model, rank, set_group([rank]))
    with pytest.raises(ArchwrightError, match="BUILD022"):
        merge_ranks(model.folder)
