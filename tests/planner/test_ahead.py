"""Plans from another process: the same as here, in order, on time, and something to go on with whatever happens."""

import os
import signal
import time

import pytest

from seqpar.planner import Ahead, Options, check, plan_batch, problem_of, static_plan
from seqpar.planner.serve import answers, planned, question, refusal
from tests.planner.problems import published

OPTIONS = Options(seconds=0.5)
BATCHES = [(700, 900, 12_000), (64,) * 30, (30_000, 100, 100, 2_000)]


@pytest.fixture
def problem():
    return published((1,))


@pytest.fixture
def ahead(problem):
    with Ahead(problem.costs, problem.cluster, OPTIONS) as asked:
        yield asked


def test_plans_come_in_order_and_are_those_that_would_be_made_here(ahead, problem):
    for lengths in BATCHES:
        ahead.ask(lengths)
    for lengths in BATCHES:
        found, here = ahead.plan(), problem_of(lengths, problem.cluster, problem.costs)
        check(here, found)
        expected = plan_batch(here, OPTIONS)
        if "deadline" not in (found.stopped_by, expected.stopped_by):
            assert found == expected


def test_planning_goes_on_while_nobody_waits(ahead):
    """Once the process is there, a plan that was asked for earlier is there at once."""
    ahead.ask(BATCHES[0])
    ahead.plan()
    ahead.ask(BATCHES[1])
    time.sleep(3)
    begin = time.monotonic()
    ahead.plan()
    assert time.monotonic() - begin < 0.4, "less than planning takes"


def test_a_batch_without_a_plan_is_a_value_error_and_the_next_one_has_its_plan(ahead):
    ahead.ask((10**9, 5))
    ahead.ask(BATCHES[1])
    with pytest.raises(ValueError, match="document 0 has 1,000,000,000 tokens and needs"):
        ahead.plan()
    assert ahead.plan().num_documents == 30


def test_a_plan_that_is_late_is_replaced_and_the_late_one_is_nobody_elses(problem):
    """The process stands still: the best static plans take the place of two plans; the third is the planned one."""
    with Ahead(problem.costs, problem.cluster, Options(seconds=0.2)) as ahead:
        ahead.ask(BATCHES[0])
        ahead.plan()
        process = ahead._process._popen.pid
        os.kill(process, signal.SIGSTOP)
        begin = time.monotonic()
        for lengths in BATCHES[:2]:
            ahead.ask(lengths)
            late, here = ahead.plan(), problem_of(lengths, problem.cluster, problem.costs)
            assert late == static_plan(
                here, Options(seconds=0.2), "the planning process was late: this is the best static plan"
            )
        assert 0.4 <= time.monotonic() - begin < 10
        os.kill(process, signal.SIGCONT)
        ahead.ask(BATCHES[2])
        time.sleep(5)
        found = ahead.plan()
        assert found.num_documents == len(BATCHES[2])
        assert not found.note


def test_a_process_that_ends_is_replaced(ahead):
    for lengths in BATCHES:
        ahead.ask(lengths)
    ahead._process._popen.kill()
    found = [ahead.plan() for _ in BATCHES]
    assert [plan.num_documents for plan in found] == [len(lengths) for lengths in BATCHES]
    assert found[0].note == "the planning process ended with code -9: this is the best static plan"
    assert [plan.note for plan in found[1:]] == ["", ""]


def test_the_process_ends_with_the_one_that_asks(problem):
    ahead = Ahead(problem.costs, problem.cluster, OPTIONS)
    ahead.ask(BATCHES[0])
    ahead.plan()
    ahead._process._mouth.close()
    assert ahead._process._popen.wait(timeout=10) == 0
    ahead.close()
    with Ahead(problem.costs, problem.cluster, OPTIONS) as closed:
        pass
    assert closed._process._popen.returncode is not None


def test_what_is_served(problem):
    from seqpar.planner import costs_to_json

    costs = costs_to_json(problem.costs, problem.cluster).replace("\n", " ")
    lines = [costs, question(7, BATCHES[0], OPTIONS), question(8, (0,), OPTIONS)]
    plan, refused = (answer.partition(" ") for answer in answers(lines))
    assert (plan[0], refused[0]) == ("7", "8")
    assert planned(plan[2]).num_documents == 3
    with pytest.raises(ValueError, match="document 0: expected a whole number of tokens, at least 1, got 0"):
        planned(refused[2])
    with pytest.raises(ValueError, match='says "why"'):
        planned(refusal('says "why"'))


def test_static_plans_have_one_degree_and_are_the_best_of_those():
    problem = published((100_000, 48_000, 48_000, 48_000, 48_000))
    plan = static_plan(problem)
    check(problem, plan)
    degrees = {group.degree for batch in plan.micro_batches for group in batch.groups}
    assert plan.stage == f"static degree {degrees.pop()}" and not degrees
    assert plan.step_seconds == pytest.approx(min(baseline.seconds for baseline in plan.baselines))
    assert plan.step_seconds > plan_batch(problem, OPTIONS).step_seconds
    with pytest.raises(ValueError, match="needs"):
        static_plan(published((10**9,)))
