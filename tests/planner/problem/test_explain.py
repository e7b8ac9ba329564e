"""What cannot be planned is explained: every document that is too long, and what there is room for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar.planner import Cluster, CostModel, InfeasibleError, Options, Problem, named_problem, plan_batch
from seqpar.planner.problem.explain import largest, reasons, require_feasible
from tests.planner.problems import kind, small_problem


@settings(max_examples=60, derandomize=True)
@given(st.lists(st.integers(1, 1200), min_size=1, max_size=12))
def test_there_is_a_line_for_every_document_that_is_too_long_and_no_other(lengths: list[int]) -> None:
    problem = small_problem(lengths)
    found = reasons(problem)
    too_long = [index for index, length in enumerate(lengths) if length > 800]
    assert [line.split(" has ")[0] for line in found] == [f"document {index}" for index in too_long]
    for line, index in zip(found, too_long):
        assert f"{lengths[index]:,} tokens: one device holds 100 tokens" in line
        assert "the largest group of 8 holds 800" in line


def test_what_the_largest_group_holds_is_no_problem_and_one_token_more_is() -> None:
    require_feasible(small_problem([800]))
    assert plan_batch(small_problem([800]), Options(seconds=0.1)).micro_batches[0].groups[0].tokens_per_device == 100
    with pytest.raises(InfeasibleError, match="document 0 has 801 tokens: one device holds 100 tokens"):
        plan_batch(small_problem([801]))


def test_the_message_is_one_line_and_counts_the_others() -> None:
    with pytest.raises(InfeasibleError, match=r"^document 1 .*\(and 2 more: see --why\)$") as refused:
        require_feasible(small_problem([1, 900, 900, 3, 900]))
    assert len(refused.value.reasons) == 3
    assert "\n" not in str(refused.value)
    with pytest.raises(InfeasibleError) as alone:
        require_feasible(small_problem([900]))
    assert "more" not in str(alone.value)


def test_memory_that_the_state_fills_is_the_reason() -> None:
    problem = named_problem((100,), "llama-70b", "8xA100-40G")
    (line,) = reasons(problem)
    assert line.startswith("no token fits on a device of 8xA100-40G")
    assert "of 36.0 GiB" in line
    with pytest.raises(InfeasibleError, match="use more devices or memory"):
        plan_batch(problem)


def test_communicators_can_fill_the_memory_too() -> None:
    costs = CostModel("c", (kind(1), kind(2), kind(4)), 1.0, 10.0)
    assert not reasons(Problem((5,), Cluster("c", 4, 4, 100, communicator_bytes=40), costs))
    (line,) = reasons(Problem((5,), Cluster("c", 4, 4, 100, communicator_bytes=45), costs))
    assert "model state and communicators" in line


def test_fewer_tokens_than_the_smallest_group_has_ranks_are_explained() -> None:
    problem = small_problem([1, 1], degrees=(4, 8))
    assert reasons(problem) == ("2 tokens leave ranks of a group of 4 without any; offer degree 1",)
    assert reasons(small_problem([2, 2], degrees=(4, 8))) == ()
    assert (largest(problem).degree, largest(problem).tokens) == (8, 800)


def test_tokens_that_no_choice_of_groups_spreads_are_refused_with_a_reason() -> None:
    # A group of 4 holds 400 tokens, and the second one would have 3 for its 4 ranks.
    problem = small_problem([399, 3], devices=4, degrees=(4,))
    with pytest.raises(InfeasibleError, match=r"no plan was found: .* without a token"):
        plan_batch(problem, Options(seconds=0.2))
