"""Batching: runs of documents are the best of all runs, and fewer micro-batches than the fewest hold no plan."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqpar.planner import Problem
from seqpar.planner.problem.costs import Table, table
from seqpar.planner.search.batching import (
    _interval_seconds,
    fewest_micro_batches,
    long_short,
    time_optimal,
    token_balanced,
)
from tests.planner import oracle
from tests.planner.problems import lognormal, problems, published, small_problem

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def tokens_of(rows: Table, chunk: "tuple[int, ...] | range") -> int:
    return int(rows.tokens[list(chunk)].sum())


@quick
@given(st.lists(st.integers(1, 800), min_size=1, max_size=9), st.integers(1, 9))
def test_no_runs_are_more_balanced_in_tokens(lengths: list[int], count: int) -> None:
    rows = table(small_problem(lengths))
    chunks = token_balanced(rows, count)
    if count > len(lengths):
        assert chunks == ()
        return
    assert [row for chunk in chunks for row in chunk] == list(range(len(lengths)))
    assert len(chunks) == count
    best = min(max(tokens_of(rows, run) for run in runs) for runs in oracle.runs(len(lengths), count))
    assert max(tokens_of(rows, chunk) for chunk in chunks) == best


@pytest.mark.parametrize("count", [2, 5, 11])
@pytest.mark.parametrize("seed", range(3))
def test_runs_of_many_documents_are_nearly_balanced(count: int, seed: int) -> None:
    # Of many documents not every cut is tried: a cut may be a 32nd of the tokens and one document off its place.
    rows = table(published(lognormal(700, 900, 1.2, seed)))
    chunks = token_balanced(rows, count)
    total, longest = int(rows.tokens.sum()), int(rows.tokens[0])
    assert len(chunks) == count
    assert [row for chunk in chunks for row in chunk] == list(range(700))
    assert max(tokens_of(rows, chunk) for chunk in chunks) <= total / count + total / 32 + longest


@quick
@given(problems(most=8), st.integers(1, 4))
def test_no_runs_have_a_smaller_sum_of_predicted_seconds(problem: Problem, count: int) -> None:
    rows = table(problem)
    predicted = predictions(rows)
    found = time_optimal(rows, [count])
    sums = [sum(predicted[run.start, run.stop] for run in runs) for runs in oracle.runs(rows.num_documents, count)]
    best = min(sums, default=float("inf"))
    assert bool(found) == bool(np.isfinite(best))
    for chunks, seconds in found:
        assert sum(seconds) == pytest.approx(best)
        assert seconds == [predicted[chunk[0], chunk[-1] + 1] for chunk in chunks]


def predictions(rows: Table) -> dict[tuple[int, int], float]:
    """Predicted seconds of every run of documents, by its start and end."""
    cuts = np.arange(rows.num_documents + 1)
    costs = _interval_seconds(rows, cuts)
    return {(start, end): float(costs[start, end]) for start, end in itertools.combinations(cuts.tolist(), 2)}


@quick
@given(problems(most=8))
def test_more_documents_are_never_predicted_to_take_less(problem: Problem) -> None:
    predicted = predictions(table(problem))
    for (start, end), seconds in predicted.items():
        assert seconds > 0
        for wider in ((start - 1, end), (start, end + 1)):
            assert predicted.get(wider, seconds) >= seconds


@quick
@given(problems(most=8), st.integers(1, 8))
def test_long_short_shares_tokens_out_and_starts_with_the_longest(problem: Problem, count: int) -> None:
    rows = table(problem)
    chunks = long_short(rows, count)
    everyone = [row for chunk in chunks for row in chunk]
    assert sorted(everyone) == list(range(rows.num_documents))
    assert 1 <= len(chunks) <= count
    assert chunks[0][0] == 0
    share, longest = sum(problem.lengths) / count, max(problem.lengths)
    for chunk in chunks:
        assert tokens_of(rows, chunk) <= share + 2 * longest


def test_long_short_gives_each_micro_batch_long_and_short_documents() -> None:
    rows = table(small_problem([100] * 10 + [1] * 1000))
    for chunk in long_short(rows, 4):
        lengths = rows.tokens[list(chunk)]
        assert {100, 1} <= set(lengths.tolist())


@quick
@given(st.lists(st.integers(30, 200), min_size=1, max_size=5))
def test_fewer_micro_batches_than_the_fewest_hold_no_plan(lengths: list[int]) -> None:
    problem = small_problem(lengths, devices=2, node=2, degrees=(1, 2))
    rows = table(problem)
    fewest = fewest_micro_batches(rows)
    assert fewest >= 1
    for count in range(1, fewest):
        assert oracle.shortest_step_in(problem, count) == float("inf")


def test_the_fewest_micro_batches_are_reached_where_memory_is_full_to_the_last_token() -> None:
    full = small_problem([100] * 16, devices=8, degrees=(1,))
    assert fewest_micro_batches(table(full)) == 2
    assert fewest_micro_batches(table(small_problem([100] * 16 + [1], devices=8, degrees=(1,)))) == 3
    tiny = small_problem([100, 100, 100, 100], devices=2, node=2, degrees=(1,))
    assert oracle.shortest_step_in(tiny, fewest_micro_batches(table(tiny))) < float("inf")


def test_runs_are_asked_for_several_counts_at_once() -> None:
    draw = random.Random(0)
    rows = table(small_problem([draw.randint(1, 90) for _ in range(12)]))
    together = time_optimal(rows, [1, 2, 3])
    assert together == [pair for count in (1, 2, 3) for pair in time_optimal(rows, [count])]
    assert time_optimal(rows, [13]) == []
