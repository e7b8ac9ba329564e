"""Swap plans: checked by a step laid out in time, the same bytes out and in, and one clear line for anything else."""

import json
import math
import random
from dataclasses import fields, replace

import pytest

from seqpar.offload.planning import swap_plan
from seqpar.offload.planning.decoders import decoder, gpu, machine_of, profile_of
from seqpar.offload.planning.plan import SwapPlan, from_json
from seqpar.offload.planning.profile import at_length, bucket
from seqpar.offload.planning.strategies import STRATEGIES, Fractions, predict
from seqpar.offload.planning.swap_check import SwapPlanRefusedError, check_swap_plan
from seqpar.offload.planning.swap_plan import compare, plan_swap, plans_by_bucket
from seqpar.offload.planning.swap_report import WIDTH, text
from tests.offload.planning.swap_profiles import random_problem, tiny

pytest.importorskip("pulp")
pytest.importorskip("highspy")

K, GIB = 1024, 2**30
H100 = gpu("h100")
LLAMA = profile_of(decoder("llama-8b"), 256 * K, 8, H100, resident_bytes=12e9)
TIGHT = replace(machine_of(H100, host_bytes=600 * GIB), device_bytes=40 * GIB)
FITTING = STRATEGIES[1:]


@pytest.fixture(scope="module")
def plans():
    return {strategy: plan_swap(LLAMA, TIGHT, strategy) for strategy in FITTING}


# The checker.


@pytest.mark.sampled(3)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_closed_forms_agree_with_a_step_laid_out_in_time(strategy):
    """``plan_swap`` refuses its own plan where formula and simulation differ."""
    exposed = 0
    for seed in range(100):
        profile, machine = random_problem(seed)
        roomy = replace(machine, host_bytes=math.inf)
        if strategy not in ("memo", "auto"):
            roomy = replace(roomy, device_bytes=math.inf)
        exposed += plan_swap(profile, roomy, strategy).exposed_seconds > 0
    assert exposed > 5 or strategy in ("keep", "recompute"), "copies that never show say nothing"


def by_hand(profile, machine, swapped, again):
    """A step of five layers, event by event: the ends of forwards f, copies out c, copies back r, backwards b."""
    out, back = swapped / machine.d2h_bytes_per_second, swapped / machine.h2d_bytes_per_second
    forward, backward = profile.forward_seconds, profile.backward_seconds
    f0 = forward
    c0 = f0 + out
    f1 = f0 + forward
    c1 = max(f1, c0) + out
    f2 = max(f1, c0) + forward
    c2 = max(f2, c1) + out
    f3 = max(f2, c1) + forward
    f4 = max(f3, c2) + forward
    b4 = f4 + backward
    r2 = b4 + back
    b3 = b4 + backward
    r1 = max(b3, r2) + back
    b2 = max(b3, r2) + again + backward
    r0 = max(b2, r1) + back
    b1 = max(b2, r1) + again + backward
    return max(b1, r0) + again + backward


@pytest.mark.parametrize("seed", range(20))
def test_five_layers_take_what_they_take_by_hand(seed):
    profile, machine = tiny(seed)
    profile = replace(profile, layers=5)
    machine = replace(machine, host_bytes=math.inf, device_bytes=2 * profile.layer_bytes)
    for strategy in ("memo", "auto"):
        plan = plan_swap(profile, machine, strategy)
        swapped = sum(10 * tensor.bytes_per_token * plan.of(tensor.name).swap for tensor in profile.saved)
        again = sum(
            10 * tensor.recompute_seconds_per_token * plan.of(tensor.name).recompute for tensor in profile.saved
        )
        assert plan.step_seconds == pytest.approx(by_hand(profile, machine, swapped, again), rel=1e-12)
        assert plan.step_seconds == pytest.approx(150 + plan.recompute_seconds + plan.exposed_seconds, rel=1e-12)


def damaged(plan):
    """The plan with each of its figures a little off, and what that is."""
    for field in fields(SwapPlan):
        value = getattr(plan, field.name)
        if type(value) is int and field.name != "hides_from_tokens":
            yield field.name, replace(plan, **{field.name: value + max(3, value // 1000)})
        elif type(value) is float:
            yield field.name, replace(plan, **{field.name: value * 1.001 + 1e-3})
    for number, (name, shares) in enumerate(plan.fractions):
        for keep, swap, recompute in ((0.02, -0.02, 0.0), (-0.02, 0.0, 0.02), (0.0, 0.01, 0.0)):
            other = Fractions(shares.keep + keep, shares.swap + swap, shares.recompute + recompute)
            changed = (*plan.fractions[:number], (name, other), *plan.fractions[number + 1 :])
            yield name, replace(plan, fractions=changed)
    yield "order", replace(plan, fractions=plan.fractions[::-1])
    yield "missing", replace(plan, fractions=plan.fractions[1:])


@pytest.mark.parametrize("strategy", FITTING)
def test_the_checker_refuses_every_figure_that_is_off(strategy, plans):
    check_swap_plan(plans[strategy], LLAMA, TIGHT)
    cases = list(damaged(plans[strategy]))
    assert len(cases) > 30
    for what, plan in cases:
        with pytest.raises(SwapPlanRefusedError) as caught:
            check_swap_plan(plan, LLAMA, TIGHT)
        assert caught.value.faults, what


@pytest.mark.parametrize("change", [{"host_bytes": 590 * GIB}, {"cgroup_bytes": 400 * GIB}, {"device_bytes": 39 * GIB}])
def test_a_plan_for_a_larger_machine_is_refused(change, plans):
    with pytest.raises(SwapPlanRefusedError, match="and the limit is"):
        check_swap_plan(plans["auto"], LLAMA, replace(TIGHT, **change))


def test_a_plan_for_another_machine_or_layer_is_refused(plans):
    for strategy in ("memo", "auto"):
        with pytest.raises(SwapPlanRefusedError, match="exposed_seconds"):
            check_swap_plan(plans[strategy], LLAMA, replace(TIGHT, d2h_bytes_per_second=5e9))
        with pytest.raises(SwapPlanRefusedError, match="host_peak_bytes"):
            check_swap_plan(plans[strategy], LLAMA, replace(TIGHT, host_bytes=900 * GIB, pinned="power_of_two"))
    with pytest.raises(SwapPlanRefusedError, match="tokens is 32768, expected 4096"):
        check_swap_plan(plans["memo"], at_length(LLAMA, 4096), TIGHT)


@pytest.mark.parametrize("strategy", FITTING)
def test_a_plan_under_another_name_is_refused(strategy, plans):
    for other in STRATEGIES:
        if other not in (strategy, "auto"):
            with pytest.raises(SwapPlanRefusedError):
                check_swap_plan(replace(plans[strategy], strategy=other), LLAMA, TIGHT)


def test_what_mixes_tokens_is_never_computed_again_from_a_slice(plans):
    shares = tuple((name, Fractions(0.0, 0.0, 1.0)) for name, _ in plans["auto"].fractions)
    with pytest.raises(SwapPlanRefusedError) as caught:
        check_swap_plan(replace(plans["auto"], fractions=shares), LLAMA, TIGHT)
    words = "\n".join(caught.value.faults)
    assert "'input' cannot be computed again" in words and "'attention' cannot be computed again" in words


@pytest.mark.parametrize("name", ["device_peak_bytes", "host_peak_bytes", "recompute_seconds", "exposed_seconds"])
def test_a_wrong_prediction_never_leaves_plan_swap(name, monkeypatch):
    def wrong(*arguments):
        right = predict(*arguments)
        return replace(right, **{name: type(getattr(right, name))(getattr(right, name) * 1.001 + 5)})

    monkeypatch.setattr(swap_plan, "predict", wrong)
    with pytest.raises(SwapPlanRefusedError, match=name):
        plan_swap(LLAMA, TIGHT, "memo")


# A plan as a value.


@pytest.mark.parametrize("strategy", FITTING)
def test_a_plan_comes_back_from_its_json_with_the_same_bytes(strategy, plans):
    plan = plans[strategy]
    again = from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan) and again.to_json() == plan.to_json()
    assert "\n" not in plan.to_json() and json.loads(plan.to_json())["fractions"][0]["name"] == "input"


@pytest.mark.parametrize("strategy", FITTING)
def test_the_same_input_gives_the_same_plan(strategy, plans):
    assert plan_swap(LLAMA, TIGHT, strategy).to_json() == plans[strategy].to_json()


def test_shares_are_found_by_name(plans):
    assert plans["memo"].of("attention") == Fractions(0.0, 1.0, 0.0)
    assert plans["memo"].of("gate").swap == plans["memo"].alpha
    with pytest.raises(ValueError, match="no saved tensor 'gates'; there are: input, attention_norm"):
        plans["memo"].of("gates")


WRONG = [None, True, "x", -1, -0.5, 1.5, [], {}, [1], math.inf, math.nan, 10**400, "9" * 5000]


@pytest.mark.parametrize("field", [field.name for field in fields(SwapPlan)])
def test_a_field_of_another_type_is_refused_by_name(field, plans):
    content = json.loads(plans["memo"].to_json())
    allowed = {
        "alpha": [None], "hides_from_tokens": [None], "binds": [[]], "context_tokens": [1.5],
        "recompute_seconds": [1.5], "exposed_seconds": [1.5], "step_seconds": [1.5],
        "tokens": [10**400], "layers": [10**400], "saved_bytes_per_layer": [10**400],
        "device_peak_bytes": [10**400], "host_peak_bytes": [10**400],
    }.get(field, [])  # fmt: skip
    for value in WRONG:
        if any(value is good or value == good for good in allowed if type(value) is type(good)):
            continue
        if field == "hides_from_tokens" and value == 10**400:
            continue
        with pytest.raises(ValueError, match=field) as caught:
            from_json(json.dumps({**content, field: value}))
        assert len(str(caught.value)) < 300


def test_a_missing_or_unknown_field_is_refused_by_name(plans):
    content = json.loads(plans["memo"].to_json())
    for name in content:
        less = {key: value for key, value in content.items() if key != name}
        with pytest.raises(ValueError, match=name):
            from_json(json.dumps(less))
    with pytest.raises(ValueError, match="missing or unknown: gap"):
        from_json(json.dumps({**content, "gap": 0}))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"name": "a", "keep": 0.5, "swap": 0.5}, "missing or unknown: recompute"),
        ({"name": "a", "keep": 0.5, "swap": 0.6, "recompute": 0.0}, "of 'a' sum to 1"),
        ({"name": "a", "keep": -0.5, "swap": 1.0, "recompute": 0.5}, "keep of 'a' is a finite number >= 0"),
        ({"name": "a", "keep": 1.5, "swap": 0.0, "recompute": 0.0}, "keep of 'a' is at most 1"),
        ({"name": 3, "keep": 1, "swap": 0, "recompute": 0}, "a name is text, got 3"),
        ({"name": "input", "keep": 1, "swap": 0, "recompute": 0}, "a tensor twice: input"),
        ([], "expected an object"),
    ],
)
def test_fractions_that_are_none_are_refused(row, words, plans):
    content = json.loads(plans["memo"].to_json())
    content["fractions"][1] = row
    with pytest.raises(ValueError, match=words):
        from_json(json.dumps(content))


@pytest.mark.parametrize("words", ["", "{", "[]", "3", "null", '{"format": 2}', '{"format": true}', "[" * 100_000])
def test_what_is_no_plan_is_refused_in_one_line(words):
    with pytest.raises(ValueError, match="this is not a swap plan"):
        from_json(words)


def test_a_torn_or_scrambled_plan_is_refused_or_the_same(plans):
    draw, whole = random.Random(0), plans["auto"].to_json()
    for _ in range(300):
        at = draw.randrange(len(whole))
        torn = draw.choice([whole[:at], whole[:at] + draw.choice('"{}[],:x-') + whole[at + 1 :]])
        try:
            found = from_json(torn)
        except ValueError:
            continue
        assert isinstance(found, SwapPlan)
        assert found == plans["auto"] or found.to_json() != whole


# Buckets.


def test_a_plan_is_kept_under_its_bucket_and_holds_for_all_lengths_in_it():
    lengths = [9000, 9100, 9216, 20_000, 40_000]
    kept = plans_by_bucket(LLAMA, TIGHT, lengths)
    assert sorted(kept) == sorted({bucket(length) for length in lengths}) == [9216, 20480, 40960]
    for length in lengths:
        plan = kept[bucket(length)]
        assert plan.bucket == plan.tokens == bucket(length)
        shares = tuple(shares for _, shares in plan.fractions)
        predicted = predict(at_length(LLAMA, length), TIGHT, "auto", shares)
        assert predicted.host_peak_bytes <= plan.host_peak_bytes <= TIGHT.host_share_bytes + 1
        assert predicted.device_peak_bytes <= plan.device_peak_bytes <= TIGHT.device_bytes + 1


# All strategies side by side.


def test_every_strategy_is_compared_and_the_refused_one_says_why():
    rows = compare(LLAMA, TIGHT)
    assert [row.strategy for row in rows] == list(STRATEGIES)
    assert rows[0].plan is None and "device memory too small for strategy 'keep'" in rows[0].refused
    step = {row.strategy: row.plan.step_seconds for row in rows if row.plan is not None}
    assert min(step, key=step.get) == "auto" and step["auto"] < step["memo"] < step["recompute"]
    assert all(row.plan == plan_swap(LLAMA, TIGHT, row.strategy) for row in rows[1:])


def test_the_table_shows_every_strategy_its_length_and_the_fractions():
    page = text(compare(LLAMA, TIGHT))
    assert all(len(line) <= WIDTH for line in page.splitlines())
    for words in ("never", "50,252", "99,752", "cannot be", "of a sequence of 262,144", "activation", "used up"):
        assert words in page, page
    for strategy in STRATEGIES:
        assert strategy in page
    assert page == text(compare(LLAMA, TIGHT))


def test_the_table_without_the_chosen_plan_has_no_fractions():
    endless = text(compare(LLAMA, replace(TIGHT, device_bytes=1.0)))
    assert endless.count("cannot be") == len(STRATEGIES) and "▓" not in endless
