"""Which ranks a group gets: aligned, side by side, and up to node size inside one node."""

from collections.abc import Sequence

from seqpar.planner.problem.problem import Cluster


def place(degrees: Sequence[int], cluster: Cluster) -> tuple[int, ...] | None:
    """The first rank of each group, or None if these degrees do not go side by side.

    Large groups are placed first, each at the first free aligned place. Where every degree divides the next (and the
    cluster) this succeeds whenever the degrees sum to at most the devices; other degrees may leave holes.
    """
    taken = bytearray(cluster.devices)
    starts = [0] * len(degrees)
    next_start: dict[int, int] = {}
    for index in sorted(range(len(degrees)), key=lambda i: (-degrees[i], i)):
        degree = degrees[index]
        start = _first_free(taken, next_start.get(degree, 0), degree, cluster)
        if start is None:
            return None
        taken[start : start + degree] = b"\1" * degree
        starts[index] = start
        next_start[degree] = start + cluster.stride(degree)
    return tuple(starts)


def _first_free(taken: bytearray, start: int, degree: int, cluster: Cluster) -> int | None:
    node, stride = cluster.devices_per_node, cluster.stride(degree)
    if not stride:
        return None
    while start + degree <= cluster.devices:
        node_left = node - start % node
        if (degree > node or degree <= node_left) and not any(taken[start : start + degree]):
            return start
        # Inside a node the grid of starts begins anew with each node.
        start += min(stride, node_left) if degree <= node else stride
    return None
