"""Problems for the tests: small clusters with costs one can follow, corpora, and the real lengths where they are."""

import json
import math
import random
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from seqpar.planner import Cluster, CostModel, GroupKind, Problem, problem_of, published_cluster, published_costs

DATA = Path(__file__).resolve().parents[2] / "bench" / "data"
CAPACITY = 100


def kind(degree: int, transport: str = "all_to_all", hidden: float = 0.0) -> GroupKind:
    """Costs that grow with the degree as communication does, with a fixed cost that matters."""
    message = 0.0 if degree == 1 else 2e-4 * math.log2(2 * degree) / degree
    return GroupKind(degree, transport, 3e-6 / degree, 1e-3 / degree, 0.05, message, hidden / degree)


def small_cluster(devices: int = 8, node: int = 4, capacity: int = CAPACITY, communicator: int = 0) -> Cluster:
    """A cluster whose devices hold ``capacity`` tokens of a byte each, next to a state of 10 bytes."""
    return Cluster(f"{devices}x{node}", devices, node, capacity + 10, communicator)


def small_problem(
    lengths: list[int], devices: int = 8, node: int = 4, degrees: tuple[int, ...] = (1, 2, 4, 8)
) -> Problem:
    """Documents on a small cluster with these degrees."""
    costs = CostModel("small", tuple(kind(degree) for degree in degrees), 1.0, 10.0)
    return problem_of(lengths, small_cluster(devices, node), costs)


def published(lengths: list[int], model: str = "gpt-7b-384k", devices: int = 64) -> Problem:
    """Documents on the published cluster, or one like it."""
    cluster = published_cluster(devices)
    return problem_of(lengths, cluster, published_costs(model, cluster))


def lognormal(count: int, median: float, sigma: float, seed: int, context: int = 384_000) -> list[int]:
    """A synthetic corpus: lognormal, padded to 128, without documents beyond the context."""
    draw, lengths = random.Random(seed), []
    while len(lengths) < count:
        length = -(-max(1, int(draw.lognormvariate(math.log(median), sigma))) // 128) * 128
        if length <= context - 128:
            lengths.append(length)
    return lengths


def wikipedia(batch: int, size: int = 512) -> list[int]:
    """A batch of the real lengths, padded to 128 as published."""
    lengths = [int(line) for line in (DATA / "wikipedia_lengths.txt").read_text().split()]
    return [-(-length // 128) * 128 for length in lengths[batch * size : (batch + 1) * size]]


def flexsp_costs() -> Any:
    """The published constants as they were handed over."""
    return json.loads((DATA / "flexsp_costs.json").read_text())


@st.composite
def problems(draw: st.DrawFn, most: int = 12) -> Problem:
    """Small problems of every shape: nodes and degrees that divide or do not, communicators, one or two transports."""
    node = draw(st.sampled_from([2, 3, 4, 6, 8]))
    devices = node * draw(st.integers(1, 3))
    choices = [degree for degree in range(1, devices + 1) if Cluster("c", devices, node, 1).stride(degree)]
    degrees = draw(st.lists(st.sampled_from(choices), unique=True, max_size=4))
    transports = {1: ["none"], **{degree: draw(st.sampled_from([["all_to_all"], ["ring"], ["all_to_all", "ring"]]))
                                  for degree in degrees if degree > 1}}  # fmt: skip
    hidden = draw(st.sampled_from([0.0, 1e-6]))
    kinds = tuple(
        kind(degree, name, hidden if name == "ring" else 0.0) for degree, names in transports.items() for name in names
    )
    cluster = small_cluster(devices, node, communicator=draw(st.sampled_from([0, 1])))
    costs = CostModel("drawn", kinds, 1.0, 10.0)
    largest = max(kind.degree for kind in kinds) * Problem((1,), cluster, costs).capacity
    lengths = draw(st.lists(st.integers(1, max(1, largest)), min_size=1, max_size=most))
    return Problem(tuple(lengths), cluster, costs)
