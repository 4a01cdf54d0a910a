"""How long collectives take: rings over the links of a machine.

A ring over n ranks moves (n - 1) / n of the tensor through every link in an all-gather or a reduce-scatter, twice that
in an all-reduce, in (n - 1) or 2 (n - 1) hops (Patarasuk & Yuan 2009; NCCL's `busbw`). In an all-to-all each rank sends
(n - 1) / n of what it has. A ring that leaves a node has one adapter for each of its members there, so it runs at the
slower of the link inside and the adapters together. The first bytes take twice as long, until all channels of the links
are full.
"""

from dataclasses import dataclass

from archwright.compiler.ir import Degrees
from archwright.compiler.planning.machines import Cluster

PASSES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1}
"""How often each kind moves (n - 1) / n of the tensor."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that communicate: `degree` of them, `stride` apart. axis: how the report calls it."""

    axis: str
    degree: int
    stride: int

    def members_per_node(self, node_size: int) -> int:
        return max(1, min(self.degree, node_size // self.stride))

    def is_within_node(self, node_size: int) -> bool:
        return self.degree * self.stride <= node_size or self.degree == 1


def groups(degrees: Degrees) -> dict[str, Group]:
    """The groups of every mesh axis, and two that join axes: `shard` (FSDP of ordinary parameters) and `expert_shard`
    (of experts'). All ranks of such a group are neighbours but for the tensor ranks inside."""
    result: dict[str, Group] = {}
    stride = 1
    for axis, degree in reversed(degrees.sizes.items()):
        result[axis] = Group(axis=axis, degree=degree, stride=stride)
        stride *= degree
    inner = degrees.context * degrees.data_shard
    result["shard"] = Group(axis="data_shard", degree=inner * degrees.expert, stride=degrees.tensor)
    result["expert_shard"] = Group(axis="data_shard", degree=inner, stride=degrees.tensor)
    return result


def sent_bytes(kind: str, whole_bytes: float, degree: int) -> float:
    """What a rank sends. whole_bytes: of the whole tensor (of an all-to-all: of what one rank has)."""
    return PASSES[kind] * whole_bytes * (degree - 1) / degree


def collective_s(kind: str, whole_bytes: float, group: Group, cluster: Cluster) -> float:
    """Seconds of one collective, by itself."""
    if group.degree == 1:
        return 0.0
    gpu, constants = cluster.gpu, cluster.constants
    bandwidth, latency_s = link_bytes_per_s(cluster), constants["node_latency_s"]
    if not group.is_within_node(gpu.node_size):
        members = group.members_per_node(gpu.node_size)
        network = members * gpu.network_bytes_per_s * constants["network_fraction"]
        bandwidth = network if members == 1 else min(bandwidth, network)
    hops = PASSES[kind] * (group.degree - 1)
    far = 0 if group.is_within_node(gpu.node_size) else PASSES[kind] * (
        group.degree // group.members_per_node(gpu.node_size) - 1
    )  # fmt: skip
    delay_s = constants["collective_s"] + (hops - far) * latency_s + far * constants["network_latency_s"]
    sent = sent_bytes(kind, whole_bytes, group.degree)
    slow = min(sent, constants["ramp_bytes"]) / link_bytes_per_s(cluster)
    return sent / bandwidth + slow + delay_s


def copied_s(kind: str, whole_bytes: float, group: Group, cluster: Cluster) -> float:
    """Seconds of an all-gather or a reduce-scatter inside a node as copies between memories, a barrier before them."""
    bandwidth = cluster.gpu.link_bytes_per_s * cluster.constants["copy_fraction"]
    return sent_bytes(kind, whole_bytes, group.degree) / bandwidth + cluster.constants["barrier_s"]


def link_bytes_per_s(cluster: Cluster) -> float:
    """Of large collectives inside a node."""
    return cluster.gpu.link_bytes_per_s * cluster.constants["nvlink_fraction"]


def send_s(whole_bytes: float, group: Group, cluster: Cluster) -> float:
    """Seconds from one rank to the next one of a group."""
    if group.degree == 1:
        return 0.0
    gpu, constants = cluster.gpu, cluster.constants
    if group.stride < gpu.node_size and group.is_within_node(gpu.node_size):
        return whole_bytes / link_bytes_per_s(cluster) + constants["node_latency_s"]
    return whole_bytes / (gpu.network_bytes_per_s * constants["network_fraction"]) + constants["network_latency_s"]
