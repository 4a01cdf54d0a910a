"""The cheapest set of values to keep, by maximum flow (Dinic 1970; Ford & Fulkerson 1956)."""

from collections import deque
from collections.abc import Mapping, Sequence

_INFINITE = 1 << 62


class _Network:
    """Directed edges with capacities; edge i and i ^ 1 are each other's way back."""

    def __init__(self, size: int) -> None:
        self.out: list[list[int]] = [[] for _ in range(size)]
        self.to: list[int] = []
        self.left: list[int] = []

    def add(self, start: int, stop: int, capacity: int) -> None:
        for source, target, room in ((start, stop, capacity), (stop, start, 0)):
            self.out[source].append(len(self.to))
            self.to.append(target)
            self.left.append(room)

    def path(self, source: int, sink: int) -> list[int] | None:
        """A shortest path with room, as edges (Edmonds & Karp 1972); None once the flow is at its maximum."""
        came: dict[int, int] = {source: -1}
        queue = deque([source])
        while queue:
            at = queue.popleft()
            for edge in self.out[at]:
                target = self.to[edge]
                if self.left[edge] and target not in came:
                    came[target] = edge
                    queue.append(target)
        if sink not in came:
            self.reached = came.keys()
            return None
        edges: list[int] = []
        while sink != source:
            edges.append(came[sink])
            sink = self.to[came[sink] ^ 1]
        return edges


def cheapest_cut(
    inputs: Sequence[Sequence[int]], sizes: Sequence[int], fixed: set[int], needed: set[int]
) -> frozenset[int]:
    """Which nodes to keep so that every needed one is kept or can be made again from kept ones.

    inputs: node → the nodes that it is made of, smaller numbers first. fixed: nodes that nothing makes again.

    Each node is an edge of its size's capacity. Flow runs from the fixed nodes to the needed ones; the minimum cut is
    the set to keep (the way in which PyTorch's `min_cut_rematerialization_partition` chooses).
    """
    count = len(inputs)
    source, sink = 2 * count, 2 * count + 1
    network = _Network(2 * count + 2)
    for node, origins in enumerate(inputs):
        network.add(2 * node, 2 * node + 1, sizes[node])
        if node in fixed:
            network.add(source, 2 * node, _INFINITE)
        else:
            for origin in origins:
                network.add(2 * origin + 1, 2 * node, _INFINITE)
        if node in needed:
            network.add(2 * node + 1, sink, _INFINITE)
    while (path := network.path(source, sink)) is not None:
        amount = min(network.left[edge] for edge in path)
        for edge in path:
            network.left[edge] -= amount
            network.left[edge ^ 1] += amount
    reached: Mapping[int, int] | set[int] = set(network.reached)
    return frozenset(node for node in range(count) if 2 * node in reached and 2 * node + 1 not in reached)
