"""A cost model goes to JSON and back unchanged, and what is not one is refused by the name of the field."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar.planner import Cluster, CostModel, GroupKind, Options, plan_batch, published_cluster, published_costs
from seqpar.planner.problem.files import costs_from_json, costs_to_json, read_costs
from tests.planner.problems import small_problem

seconds = st.floats(0, 1e6)
kinds = st.builds(
    GroupKind,
    st.integers(1, 64),
    st.sampled_from(["ring", "all_to_all", "none", "ü 環"]),
    *[seconds] * 6,
)
models = st.builds(
    CostModel,
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.lists(kinds, min_size=1, max_size=5, unique_by=lambda kind: (kind.degree, kind.transport)).map(tuple),
    st.floats(1e-3, 1e9),
    st.floats(0, 1e15),
    st.integers(0, 2**60),
)
clusters = st.builds(
    lambda node, nodes, bytes_, cached: Cluster(f"{nodes} nodes", node * nodes, node, bytes_, cached),
    st.integers(1, 8),
    st.integers(1, 9),
    st.integers(1, 2**60),
    st.integers(0, 2**40),
)


@given(models, clusters)
def test_json_and_back_is_the_same(costs: CostModel, cluster: Cluster) -> None:
    text = costs_to_json(costs, cluster)
    assert costs_from_json(text) == (costs, cluster)
    assert costs_to_json(*costs_from_json(text)) == text


def published() -> tuple[CostModel, Cluster]:
    cluster = published_cluster(64)
    return published_costs("gpt-7b-384k", cluster), cluster


def test_equal_models_have_equal_bytes() -> None:
    costs, cluster = published()
    kinds = (GroupKind(2, "ring", 1, 2, 3), GroupKind(1, "none", 0, 1, 0))
    whole = CostModel("m", kinds, 5, 7)
    other = CostModel("m", tuple(reversed(kinds)), np.float64(5.0), 7.0)
    assert costs_to_json(whole, cluster) == costs_to_json(other, replace(cluster, memory_bytes=np.int64(2**35 - 2**31)))
    assert costs_to_json(costs, cluster) == costs_to_json(*published())
    assert "-0.0" not in costs_to_json(replace(whole, state_bytes=-0.0), cluster)


def test_a_fraction_of_a_byte_is_not_dropped_in_silence() -> None:
    costs, cluster = published()
    with pytest.raises(ValueError, match="memory_bytes of Cluster"):
        costs_to_json(costs, replace(cluster, memory_bytes=1000.5))  # type: ignore[arg-type]


def changed(path: list[str | int], value: Any) -> str:
    content = json.loads(costs_to_json(*published()))
    place = content
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (["cluster", "devices"], 1.5, "devices of Cluster"),
        (["cluster", "devices"], True, "devices of Cluster"),
        (["cluster", "devices"], -1, "at least 1 device"),
        (["cluster", "memory_bytes"], None, "memory_bytes"),
        (["cluster"], [], "Cluster"),
        (["costs", "name"], 3, "name of CostModel"),
        (["costs", "bytes_per_token"], "3", "bytes_per_token of CostModel"),
        (["costs", "bytes_per_token"], float("nan"), "bytes_per_token of CostModel cannot be nan"),
        (["costs", "state_bytes"], float("inf"), "state_bytes of CostModel cannot be inf"),
        (["costs", "state_bytes"], 10**400, "state_bytes of CostModel"),
        (["costs", "speed"], 1, "speed"),
        (["costs", "kinds"], {}, "'kinds'"),
        (["costs", "kinds"], [], "no kind of group"),
        (["costs"], 7, "'kinds'"),
        (["costs", "kinds", 1], 7, "GroupKind"),
        (["costs", "kinds", 1, "degree"], "2", "degree of GroupKind"),
        (["costs", "kinds", 1, "degree"], 4, "same degree and transport twice"),
        (["costs", "kinds", 1, "message_seconds"], -1.0, "at least 0"),
        (["costs", "kinds", 1, "message_seconds"], None, "message_seconds"),
        (["format"], 2, "not a cost model"),
        (["format"], True, "not a cost model"),
        (["cluster_name"], "x", "cluster_name"),
        (["costs"], None, "not a cost model"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(path: list[str | int], value: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        costs_from_json(changed(path, value))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', "[" * 200_000, '{"format": 1, "costs": 1e'])
def test_what_is_no_cost_model_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not JSON|not a cost model"):
        costs_from_json(text)


def test_a_plan_is_no_cost_model() -> None:
    with pytest.raises(ValueError, match="not a cost model"):
        costs_from_json(plan_batch(small_problem([40, 5]), Options(seconds=0.1)).to_json())


def test_a_file_is_read_and_its_errors_name_it(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    with pytest.raises(ValueError, match=r"cannot read .*costs\.json: No such file"):
        read_costs(str(path))
    with pytest.raises(ValueError, match="cannot read"):
        read_costs(str(tmp_path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"costs\.json is not text"):
        read_costs(str(path))
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"costs\.json: this is not a cost model"):
        read_costs(str(path))
    path.write_text(costs_to_json(*published()))
    assert read_costs(str(path)) == published()
