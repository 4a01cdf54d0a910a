"""Communication volumes and times, worked out by hand."""

from dataclasses import replace

import pytest

from archwright.compiler.ir import Degrees
from archwright.compiler.passes import lower
from archwright.compiler.planning.constants import DEFAULTS
from archwright.compiler.planning.layout import Layouts
from archwright.compiler.planning.machines import parse_cluster
from archwright.compiler.planning.rings import Group, collective_s, groups, send_s, sent_bytes
from archwright.compiler.planning.training import estimate
from archwright.spec import load

GB = 10**9
FREE = {**DEFAULTS, "nvlink_fraction": 1.0, "network_fraction": 1.0}
FREE |= {"node_latency_s": 0.0, "network_latency_s": 0.0, "collective_s": 0.0, "ramp_bytes": 0.0, "overlap_cost": 0.0}
CLUSTER = replace(parse_cluster("64xH100"), constants=FREE)
"""450 GB/s inside a node of 8, 50 GB/s out of it for each GPU."""


def test_what_a_ring_sends() -> None:
    assert sent_bytes("all_gather", 8 * GB, 8) == sent_bytes("reduce_scatter", 8 * GB, 8) == 7 * GB
    assert sent_bytes("all_reduce", 8 * GB, 8) == 14 * GB
    assert sent_bytes("all_to_all", 8 * GB, 8) == 7 * GB
    assert sent_bytes("all_reduce", GB, 1) == 0


@pytest.mark.parametrize(
    ("degree", "stride", "seconds"),
    [
        (8, 1, 7 / 450),  # a node
        (4, 2, 6 / 450),  # every other GPU of a node
        (16, 1, 7.5 / 400),  # two nodes: eight adapters each
        (16, 4, 7.5 / 100),  # eight nodes: two members in each
        (8, 8, 7 / 50),  # one member in each
    ],
)
def test_a_ring_runs_at_its_slowest_link(degree: int, stride: int, seconds: float) -> None:
    group = Group(axis="data_shard", degree=degree, stride=stride)
    assert collective_s("all_gather", 8 * GB, group, CLUSTER) == pytest.approx(seconds)
    assert collective_s("all_reduce", 8 * GB, group, CLUSTER) == pytest.approx(2 * seconds)


def test_the_first_bytes_take_twice_as_long() -> None:
    cluster = replace(CLUSTER, constants={**FREE, "ramp_bytes": 10e6})
    group = Group(axis="tensor", degree=2, stride=1)
    assert collective_s("all_gather", 8e6, group, cluster) == pytest.approx(2 * 4e6 / 450e9)
    assert collective_s("all_gather", 80e6, group, cluster) == pytest.approx((40e6 + 10e6) / 450e9)


def test_latency_counts_hops() -> None:
    constants = {**FREE, "collective_s": 1.0, "node_latency_s": 0.01, "network_latency_s": 0.1}
    cluster = replace(CLUSTER, constants=constants)
    assert collective_s("all_gather", 0, Group(axis="t", degree=8, stride=1), cluster) == pytest.approx(1.07)
    assert collective_s("all_gather", 0, Group(axis="t", degree=16, stride=1), cluster) == pytest.approx(1.24)
    assert collective_s("all_reduce", 0, Group(axis="t", degree=8, stride=8), cluster) == pytest.approx(2.4)
    assert send_s(0, Group(axis="t", degree=2, stride=1), cluster) == pytest.approx(0.01)
    assert send_s(0, Group(axis="t", degree=2, stride=8), cluster) == pytest.approx(0.1)


def test_groups_lie_as_the_mesh_does() -> None:
    found = groups(Degrees(pipeline=2, data_replicate=2, expert=2, data_shard=2, context=2, tensor=2))
    assert {name: (group.degree, group.stride) for name, group in found.items()} == {
        "tensor": (2, 1), "context": (2, 2), "data_shard": (2, 4), "expert": (2, 8), "data_replicate": (2, 16),
        "pipeline": (2, 32), "shard": (8, 2), "expert_shard": (4, 2),
    }  # fmt: skip


def exchanged(degrees: Degrees, **settings: object) -> dict[str, float]:
    """GB that a rank sends in a step of the 8B model, 8 sequences of 4,096 tokens a data rank, in bfloat16."""
    train = {"kind": "pretrain", "precision": "bfloat16", "batch_size": 8 * degrees.data, "sequence_length": 4096}
    spec = load("preset:llama3.1-8b", {"train": {**train, **settings}})
    assert spec.train is not None
    layout = Layouts(lower(spec), sequence=4096, muon=False).at(degrees)
    found = estimate(
        layout, spec.parallel, spec.train, replace(CLUSTER, count=degrees.world)
    )  # fmt: skip
    assert found.time is not None
    return {axis: each.bytes for axis, each in found.time.exchanges.items() if each.bytes}


LAYERS, ENDS = 32 * 218_112_000, 2 * 128_256 * 4096 + 4096


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_fsdp_gathers_layers_twice_and_reduces_once(micro_batches: int) -> None:
    """2 bytes a value gathered, 4 reduced; embedding, norm and head are gathered once."""
    found = exchanged(Degrees(data_shard=8), micro_batches=micro_batches)
    assert found == {"data_shard": pytest.approx(micro_batches * 7 / 8 * (LAYERS * (4 + 4) + ENDS * (2 + 4)))}


def test_copies_add_up_their_shards() -> None:
    found = exchanged(Degrees(data_shard=4, data_replicate=2))
    assert found["data_shard"] == pytest.approx(3 / 4 * (LAYERS * 8 + ENDS * 6))
    assert found["data_replicate"] == pytest.approx((LAYERS + ENDS) / 4 * 4)


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_ranks_exchange_what_megatrons_do(sequence: bool) -> None:
    """4 all-reduces a layer of b · S · D (Shoeybi et al. 2019), or as many pairs of gather and scatter: equal bytes.
    Embedding and head add two, the loss 3 floats a token, `sequence` the gradients of the norms."""
    found = exchanged(Degrees(tensor=4, sequence=sequence))["tensor"]
    values = 8 * 4096 * 4096 * 2
    norms = (2 * 32 + 1) * 4096 * 4 if sequence else 0
    loss = 3 * 8 * 4096 * 2
    once = (32 * 4 + 2) * values
    assert found == pytest.approx(2 * 3 / 4 * (once + norms + loss))


def test_context_ranks_gather_keys_and_values() -> None:
    found = exchanged(Degrees(context=4))
    keys = 2 * 8 * 4096 * 1024 * 2
    assert found["context"] == pytest.approx(32 * 2 * 3 / 4 * keys)
    assert exchanged(Degrees(context=4, ring=True))["context"] == pytest.approx(32 * 3 * 3 / 4 * keys)
