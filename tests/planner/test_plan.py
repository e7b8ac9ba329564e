"""A plan goes to JSON and back unchanged, and what is not a plan is refused."""

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from seqpar.planner import Options, Problem, from_json, plan_batch
from tests.planner.problems import problems, small_problem


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems(most=20))
def test_json_and_back_is_the_same_plan(problem: Problem) -> None:
    plan = plan_batch(problem, Options(seconds=0.1))
    text = plan.to_json()
    again = from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert again.digest == plan.digest


def test_json_has_the_keys_that_others_read() -> None:
    content = json.loads(plan_batch(small_problem([350, 40, 5])).to_json())
    assert {"step_seconds", "lower_bound_seconds", "gap", "active_bound", "baselines", "micro_batches"} <= set(content)
    group = content["micro_batches"][0]["groups"][0]
    assert {"ranks", "degree", "transport", "documents", "seconds"} <= set(group)
    assert group["ranks"] == list(range(group["ranks"][0], group["ranks"][0] + group["degree"]))


def test_time_spent_is_no_part_of_a_plan() -> None:
    plan = plan_batch(small_problem([350, 40, 5]))
    slower = replace(plan, planning_seconds=99.0)
    assert slower == plan
    assert slower.to_json() == plan.to_json()
    assert hash(slower) == hash(plan)


def test_every_rank_sees_the_same_micro_batches() -> None:
    plan = plan_batch(small_problem([700, 350, 120, 40, 5]))
    for number, batch in enumerate(plan.micro_batches):
        for group in batch.groups:
            assert all(plan.groups_of(rank)[number] == group for rank in group.ranks)
    with pytest.raises(ValueError, match="rank 8 is not one"):
        plan.groups_of(8)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "baselines": 3}'])
def test_what_is_not_a_plan_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not JSON|not a plan|plan: "):
        from_json(text)


def changed(path: list[str | int], value: object) -> str:
    content = json.loads(plan_batch(small_problem([350, 40, 5])).to_json())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["step_seconds"], "3"),
        (["devices"], 1.5),
        (["devices"], True),
        (["extra"], 1),
        (["micro_batches", 0, "groups", 0, "ranks"], [0.5]),
        (["micro_batches", 0, "groups", 0, "documents"], "012"),
        (["micro_batches", 0, "groups", 0, "degree"], None),
        (["micro_batches", 0], 7),
    ],
)
def test_wrong_types_are_refused(path: list[str | int], value: object) -> None:
    with pytest.raises(ValueError, match="plan: "):
        from_json(changed(path, value))
