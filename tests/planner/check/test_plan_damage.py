"""Plans as JSON: byte for byte there and back, a digest over every field, and one ValueError for every damage."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar.planner import Options, Plan, from_json, plan_batch
from tests.planner.check.damage import at, changed_plans, field_names, places, unlike
from tests.planner.problems import lognormal, published, small_problem


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_batch(
        small_problem([350, 120, 90, 60, 40, 30, 20, 700, 5, 80, 90, 70], devices=16), Options(seconds=0.2)
    )


@pytest.fixture(scope="module")
def text(plan: Plan) -> str:
    return plan.to_json()


@pytest.mark.parametrize("seed", range(2))
def test_a_real_plan_is_the_same_bytes_there_and_back(seed: int) -> None:
    problem = published(lognormal(200, 900, 1.8, seed))
    plans = [plan_batch(problem, Options(seconds=0.3, seed=seed)) for _ in range(2)]
    for found in plans:
        again = from_json(found.to_json())
        assert again == found
        assert hash(again) == hash(found)
        assert again.to_json().encode() == found.to_json().encode()
        assert "\n" not in found.to_json()
        assert found.to_json().isascii()
    assert {found.stopped_by for found in plans} == {"work"}
    assert plans[0].to_json() == plans[1].to_json()


@pytest.mark.parametrize("name", field_names())
def test_the_digest_changes_with_every_field(plan: Plan, name: str) -> None:
    changed = dict(changed_plans(plan))[name]
    if name == "Plan.planning_seconds":
        assert (changed.digest, changed) == (plan.digest, plan)
    else:
        assert changed.digest != plan.digest
        assert changed != plan


def test_the_digest_is_of_the_bytes(plan: Plan, text: str) -> None:
    assert len(plan.digest) == 64
    assert from_json(text).digest == plan.digest
    assert from_json(f"  {text}\n").digest == plan.digest  # space around it is no damage


def test_each_value_of_another_type_is_refused(text: str) -> None:
    content = json.loads(text)
    looked_at = 0
    for path, value in places(content):
        if path[0] in ("format", "gap"):
            continue
        for wrong in unlike(value):
            if value == wrong or (isinstance(value, list) and wrong == [None] and not value):
                continue
            damaged = json.loads(text)
            at(damaged, path[:-1])[path[-1]] = wrong
            with pytest.raises(ValueError, match="plan: "):
                from_json(json.dumps(damaged))
            looked_at += 1
    assert looked_at > 300


def test_each_missing_and_each_extra_field_is_refused(text: str) -> None:
    content = json.loads(text)
    rows = [(), *(path for path, value in places(content) if isinstance(value, dict))]
    for path in rows:
        for key in at(content, path):
            damaged = json.loads(text)
            del at(damaged, path)[key]
            if key != "gap":
                with pytest.raises(ValueError, match=r"plan"):
                    from_json(json.dumps(damaged))
        damaged = json.loads(text)
        at(damaged, path)["surprise"] = 1
        with pytest.raises(ValueError, match="surprise"):
            from_json(json.dumps(damaged))


def test_a_plan_that_is_cut_off_anywhere_is_refused(text: str) -> None:
    for end in [*range(0, len(text), 97), len(text) - 1]:
        with pytest.raises(ValueError, match="not JSON"):
            from_json(text[:end])
    for more in ("}", text, "0"):
        with pytest.raises(ValueError, match="not JSON"):
            from_json(text + more)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 10**9))
def test_a_damaged_byte_is_refused_or_seen_in_the_digest(plan: Plan, text: str, seed: int) -> None:
    draw = random.Random(seed)
    place, sign = draw.randrange(len(text)), draw.choice('0123456789"{}[],:.-eE \\ntfNxyz')
    damaged = text[:place] + sign + text[place + 1 :]
    try:
        found = from_json(damaged)
    except ValueError:
        return
    same = found == plan
    assert (found.digest == plan.digest) == same
    assert not same or at_gap(text, place) or json.loads(damaged) == json.loads(text)


def at_gap(text: str, place: int) -> bool:
    """Whether this place is in the gap, which is for readers and is worked out anew."""
    start = text.index('"gap": ')
    return start <= place <= text.index(",", start)


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["format", "baselines", "x"]), inner),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(nested)
def test_what_never_was_a_plan_is_one_value_error(content: Any) -> None:
    with pytest.raises(ValueError, match=r"not a plan|plan: "):
        from_json(json.dumps(content))


def swapped(key: str, value: str) -> Callable[[str], str]:
    """The text with another value for a number at the top."""

    def swap(text: str) -> str:
        start = text.index(f'"{key}": ') + len(key) + 4
        return text[:start] + value + text[text.index(",", start) :]

    return swap


@pytest.mark.parametrize(
    "damage",
    [
        swapped("step_seconds", "NaN"),
        swapped("step_seconds", "Infinity"),
        swapped("lower_bound_seconds", "1e999"),
        swapped("step_seconds", "1" + "0" * 400),
        swapped("format", "true"),
        swapped("format", "1.0"),
        lambda text: text.replace('"micro_batches": ', '"micro_batches": ' + "[" * 100_000),
    ],
    ids=["nan", "infinity", "too large", "too many digits", "true format", "float format", "too deep"],
)  # fmt: skip
def test_a_number_that_is_none_and_a_plan_out_of_shape_are_one_value_error(
    text: str, damage: Callable[[str], str]
) -> None:
    assert damage(text) != text
    with pytest.raises(ValueError, match=r"plan|JSON"):
        from_json(damage(text))


def test_a_whole_number_of_seconds_is_seconds(text: str) -> None:
    assert from_json(swapped("step_seconds", "4")(text)).step_seconds == 4.0
    assert isinstance(from_json(swapped("step_seconds", "4")(text)).step_seconds, float)


def test_groups_of_a_rank_are_those_it_is_in(plan: Plan) -> None:
    for rank in range(plan.devices):
        for batch, group in zip(plan.micro_batches, plan.groups_of(rank)):
            mine = [other for other in batch.groups if rank in other.ranks]
            assert mine == ([] if group is None else [group])
    with pytest.raises(ValueError, match="rank -1"):
        plan.groups_of(-1)


def test_the_gap_is_a_share_of_the_bound_and_never_below_zero(plan: Plan) -> None:
    assert replace(plan, step_seconds=3.0, lower_bound_seconds=2.0).gap == pytest.approx(0.5)
    assert replace(plan, step_seconds=2.0, lower_bound_seconds=2.0 + 1e-9).gap == 0
