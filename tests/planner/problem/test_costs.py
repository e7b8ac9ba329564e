"""Published constants as they were published, capacities, analytic models, and who may stand where."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar.planner import Cluster, CostModel, GroupKind, Problem, named_problem, published_cluster, published_costs
from seqpar.planner.placement import place
from seqpar.planner.problem.costs import table
from seqpar.planner.problem.models import DECODERS, analytic_cluster, analytic_costs
from tests.planner import oracle
from tests.planner.problems import flexsp_costs, problems, published


@pytest.mark.parametrize("model", ["gpt-7b", "gpt-13b", "gpt-30b"])
@pytest.mark.parametrize("context", ["192k", "384k"])
def test_costs_are_the_published_formulas(model: str, context: str) -> None:
    data = flexsp_costs()
    row, cluster = data["models"][model], data["cluster"]
    costs = published_costs(f"{model}-{context}", published_cluster())
    state_mb = row["parameters"][context.upper()] * 16 / cluster["devices"] * 1024
    capacity = int((cluster["memory_limit_gb"] * 1024 - state_mb) // row["memory_per_token"])
    problem = Problem((1000, 48_000), published_cluster(), costs)
    assert problem.capacity == capacity
    for kind in costs.kinds:
        for s in (1000, 48_000):
            compute = (row["alpha1"] * s * s + row["alpha2"] * s) / kind.degree + row["beta1"]
            message = 0.0
            if kind.degree > 1:
                bandwidth = data["all_to_all_bandwidth"][str(kind.degree)]
                message = 16 * row["layers"] * row["hidden"] * s / 2**20 / kind.degree / bandwidth
            seconds = (
                kind.fixed_seconds + kind.quadratic_seconds * s * s + (kind.linear_seconds + kind.message_seconds) * s
            )
            assert seconds * 1e3 == pytest.approx(compute + message, rel=1e-12)
    assert {kind.degree for kind in costs.kinds} == {1, 2, 4, 8, 16, 32, 64}


def test_published_capacities() -> None:
    expected = {"gpt-7b-192k": 6449, "gpt-7b-384k": 6407, "gpt-13b-192k": 6483, "gpt-13b-384k": 6427,
                "gpt-30b-192k": 6627, "gpt-30b-384k": 6538}  # fmt: skip
    assert {name: published([1], name).capacity for name in expected} == expected


@given(problems())
def test_the_table_is_the_formulas(problem: Problem) -> None:
    rows = table(problem)
    for row, document in enumerate(rows.order.tolist()):
        assert rows.tokens[row] == problem.lengths[document]
        for kind, group in enumerate(problem.costs.kinds):
            if group.degree <= problem.lengths[document]:
                seconds = rows.seconds[row, kind] + rows.fixed[kind]
                assert seconds == pytest.approx(oracle.group_seconds(problem, kind, [document]))


@given(st.sampled_from([(8, 8), (16, 8), (64, 8), (8, 4), (12, 6), (18, 6), (24, 8), (7, 7)]), st.data())
def test_groups_are_placed_apart_aligned_and_inside_their_node(shape: tuple[int, int], data: st.DataObject) -> None:
    cluster = Cluster("c", *shape, 1)
    degrees = [degree for degree in range(1, cluster.devices + 1) if cluster.stride(degree)]
    chosen = data.draw(st.lists(st.sampled_from(degrees), max_size=8))
    starts = place(chosen, cluster)
    if starts is None:
        return
    taken = [rank for start, degree in zip(starts, chosen) for rank in range(start, start + degree)]
    assert len(taken) == len(set(taken))
    assert all(0 <= rank < cluster.devices for rank in taken)
    for start, degree in zip(starts, chosen):
        if degree <= cluster.devices_per_node:
            assert start // cluster.devices_per_node == (start + degree - 1) // cluster.devices_per_node
        if cluster.devices_per_node % degree == 0 or (
            cluster.devices % degree == 0 and degree > cluster.devices_per_node
        ):
            assert start % degree == 0


def test_groups_are_aligned_also_beside_odd_ones() -> None:
    assert place([5, 2], Cluster("c", 8, 8, 1)) == (0, 6)
    assert place([7, 7, 1, 1], Cluster("c", 16, 8, 1)) == (0, 8, 7, 15)
    assert place([16, 24], Cluster("c", 64, 8, 1)) == (32, 0)
    assert place([5, 4], Cluster("c", 8, 8, 1)) is None


@given(st.sampled_from([8, 16, 64]), st.data())
def test_powers_of_two_always_find_places(devices: int, data: st.DataObject) -> None:
    cluster, left, chosen = Cluster("c", devices, 8, 1), devices, []
    while left:
        degree = 2 ** data.draw(st.integers(0, left.bit_length() - 1))
        chosen.append(degree)
        left -= degree
    assert place(chosen, cluster) is not None


def test_communicators_take_memory() -> None:
    kinds = tuple(GroupKind(degree, "all_to_all", 0.0, 1e-3, 0.1) for degree in (1, 2, 3, 4, 8))
    costs = CostModel("c", kinds, 1.0, 10.0)
    without = Problem((1,), Cluster("c", 16, 8, 1000), costs)
    charged = Problem((1,), Cluster("c", 16, 8, 1000, communicator_bytes=100), costs)
    # A rank can be in one group of 2, of 4 and of 8, and in three of 3, which start anywhere.
    assert without.capacity - charged.capacity == 600


def test_hybrids_pay_for_attention_in_their_softmax_layers_only() -> None:
    cluster = analytic_cluster(64, "H100-80G")
    full, hybrid, linear = (analytic_costs(name, DECODERS[name], "H100-80G", cluster)
                            for name in ("llama-8b", "hybrid-8b", "linear-8b"))  # fmt: skip
    at = {(kind.degree, kind.transport): kind for kind in full.kinds}
    for kind in hybrid.kinds:
        twin = at[kind.degree, kind.transport]
        assert kind.quadratic_seconds == pytest.approx(twin.quadratic_seconds / 4)
        assert kind.message_seconds == pytest.approx(twin.message_seconds / 4)
        if kind.degree > 1:
            assert kind.latency_seconds > 0
    assert all(kind.quadratic_seconds == kind.message_seconds == 0 for kind in linear.kinds)
    assert {kind.transport for kind in linear.kinds} == {"none", "scan"}


def test_heads_limit_all_to_all_and_not_the_ring() -> None:
    model = named_problem((10_000,), "llama-1b", "64xA100-80G").costs
    spread = {kind.degree for kind in model.kinds if kind.transport == "all_to_all"}
    assert all(32 % degree == 0 for degree in spread)
    rings = {kind.degree for kind in model.kinds if kind.transport == "ring"}
    assert {3, 6, 24, 64} <= rings


NINE = CostModel("nine", (GroupKind(9, "ring", 0.0, 0.0, 1.0),), 1.0, 0.0)
NONSENSE: dict[str, Callable[[], object]] = {
    "no devices": lambda: Cluster("c", 0, 8, 1),
    "half a node": lambda: Cluster("c", 12, 8, 1),
    "no memory": lambda: Cluster("c", 8, 8, 0),
    "degree 0": lambda: GroupKind(0, "ring", 0.0, 0.0, 0.0),
    "negative cost": lambda: GroupKind(1, "ring", -1.0, 0.0, 0.0),
    "cost not a number": lambda: GroupKind(1, "ring", 0.0, float("nan"), 0.0),
    "no kinds": lambda: CostModel("m", (), 1.0, 0.0),
    "a kind twice": lambda: CostModel("m", NINE.kinds * 2, 1.0, 0.0),
    "a degree without a place": lambda: Problem((1,), Cluster("c", 8, 8, 9), NINE),
    "no documents": lambda: published([]),
    "an empty document": lambda: published([0]),
    "half a token": lambda: published([1.5]),  # type: ignore[list-item]
    "a truth value": lambda: published([True]),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_what_makes_no_sense_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected|impossible|no kind|twice|give|fits no place|not whole"):
        NONSENSE[name]()


def test_a_message_that_hides_costs_nothing_and_gives_nothing_back() -> None:
    ring = GroupKind(2, "ring", 1e-6, 1e-4, 0.05, 2e-4, 4e-6)
    problem = Problem((180, 50, 49, 20), Cluster("c", 8, 4, 110), CostModel("c", (ring,), 1.0, 10.0))
    rows = table(problem)
    for row, length in enumerate(problem.lengths):
        shown = 2e-4 * length - 4e-6 * length**2 if length < 50 else 0.0
        assert rows.seconds[row, 0] == pytest.approx(1e-6 * length**2 + 1e-4 * length + shown)
