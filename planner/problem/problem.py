"""What is to be planned: documents, a cluster, and what a group of ranks costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

ALL_TO_ALL = "all_to_all"
RING = "ring"


@dataclass(frozen=True)
class Cluster:
    """Devices in nodes, and the memory that one device may use.

    ``memory_bytes`` is the budget of one device. ``communicator_bytes`` is what one cached communicator of more than
    one rank takes on each of its devices; the capacity reserves room for every group that a rank can ever belong to.
    """

    name: str
    devices: int
    devices_per_node: int
    memory_bytes: int
    communicator_bytes: int = 0

    def __post_init__(self) -> None:
        if self.devices < 1 or self.devices_per_node < 1:
            raise ValueError(f"cluster {self.name}: expected at least 1 device and 1 device a node, got "
                             f"{self.devices} and {self.devices_per_node}")  # fmt: skip
        if self.devices % self.devices_per_node:
            raise ValueError(f"cluster {self.name}: {self.devices} devices are not whole nodes of "
                             f"{self.devices_per_node}; give a multiple")  # fmt: skip
        if self.memory_bytes <= 0 or self.communicator_bytes < 0:
            raise ValueError(f"cluster {self.name}: memory of {self.memory_bytes} bytes a device and "
                             f"{self.communicator_bytes} a communicator is impossible")  # fmt: skip

    def stride(self, degree: int) -> int:
        """Where groups of this degree may start: at multiples of this many ranks; 0 if the degree fits nowhere.

        A degree that divides the node (or, beyond it, is a number of nodes that divides the cluster) is aligned to
        itself, so a rank meets it in one group only. Up to node size a group never leaves its node.
        """
        node = self.devices_per_node
        if degree > self.devices:
            return 0
        if degree <= node:
            return math.gcd(degree, node)
        if degree % node:
            return 0
        return node * math.gcd(degree // node, self.devices // node)


@dataclass(frozen=True)
class GroupKind:
    """What one kind of group costs: ``degree`` ranks that share sequences over ``transport``.

    A document of s tokens takes ``quadratic_seconds * s**2 + linear_seconds * s`` of computation on each rank (already
    divided by the degree) and ``max(0, message_seconds * s - hidden_seconds * s**2)`` of communication that computation
    does not hide. A group takes ``fixed_seconds + latency_seconds`` on top, once per micro-batch.
    """

    degree: int
    transport: str
    quadratic_seconds: float
    linear_seconds: float
    fixed_seconds: float
    message_seconds: float = 0.0
    hidden_seconds: float = 0.0
    latency_seconds: float = 0.0

    def __post_init__(self) -> None:
        costs = (self.quadratic_seconds, self.linear_seconds, self.fixed_seconds, self.message_seconds,
                 self.hidden_seconds, self.latency_seconds)  # fmt: skip
        if self.degree < 1 or not all(math.isfinite(cost) and cost >= 0 for cost in costs):
            raise ValueError(f"degree {self.degree} over {self.transport}: expected a degree of at least 1 and finite "
                             f"costs of at least 0, got {costs}")  # fmt: skip


@dataclass(frozen=True)
class CostModel:
    """The kinds of groups on offer, from small to large degree, and what tokens and the model state take of a
    device's memory.

    ``context_tokens`` is the longest document that the model is trained on; 0 if it is not known.
    """

    name: str
    kinds: tuple[GroupKind, ...]
    bytes_per_token: float
    state_bytes: float
    context_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ValueError(f"cost model {self.name}: no kind of group is on offer; give at least one degree")
        if self.bytes_per_token <= 0 or self.state_bytes < 0:
            raise ValueError(f"cost model {self.name}: expected bytes per token above 0 and model state of at least 0, "
                             f"got {self.bytes_per_token} and {self.state_bytes}")  # fmt: skip
        names = [(kind.degree, kind.transport) for kind in self.kinds]
        if len(set(names)) < len(names):
            raise ValueError(f"cost model {self.name}: the same degree and transport twice in {names}")
        object.__setattr__(self, "kinds", tuple(sorted(self.kinds, key=lambda kind: (kind.degree, kind.transport))))


@dataclass(frozen=True)
class Problem:
    """One global batch to be planned: the length of each document in tokens, a cluster, and a cost model."""

    lengths: tuple[int, ...]
    cluster: Cluster
    costs: CostModel

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("no documents: give at least one length")
        for index, length in enumerate(self.lengths):
            if not isinstance(length, int) or isinstance(length, bool) or length < 1:
                raise ValueError(f"document {index}: expected a whole number of tokens, at least 1, got {length!r}")
        for kind in self.costs.kinds:
            if not self.cluster.stride(kind.degree):
                node, devices = self.cluster.devices_per_node, self.cluster.devices
                expected = f"expected at most {node}, or whole nodes of {node}, and at most {devices} devices"
                raise ValueError(f"degree {kind.degree} fits no place on {self.cluster.name}: {expected}")

    @property
    def reserved_bytes(self) -> float:
        """Memory of a device that no token can have: model state, and the communicators a rank can ever join."""
        degrees = {kind.degree for kind in self.costs.kinds if kind.degree > 1}
        joined = sum(degree // self.cluster.stride(degree) for degree in sorted(degrees))
        return self.costs.state_bytes + joined * self.cluster.communicator_bytes

    @property
    def capacity(self) -> int:
        """Tokens that one device can hold; a group of degree d holds d times as many."""
        left = self.cluster.memory_bytes - self.reserved_bytes
        return max(0, math.floor(left / self.costs.bytes_per_token))


def problem_of(lengths: Sequence[int], cluster: Cluster, costs: CostModel) -> Problem:
    """A problem of these lengths, leaving out the kinds of groups that have no place on the cluster."""
    kinds = tuple(kind for kind in costs.kinds if cluster.stride(kind.degree))
    kept = CostModel(costs.name, kinds, costs.bytes_per_token, costs.state_bytes, costs.context_tokens)
    return Problem(tuple(lengths), cluster, kept)
