"""Plans from another process: the same as here, in order, on time, and something to go on with whatever happens.

What is late is what has not come when a time-out of the test's own is over; where a plan has to come, there is none.
"""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from seqpar.planner import Ahead, Options, check, plan_batch, problem_of, static_plan
from seqpar.planner.serve import answers, planned, question, refusal
from tests.planner.problems import published

OPTIONS = Options(seconds=0.5)
NEVER = 1200.0  # seconds after which a plan that has to come is late
ROOT = Path(__file__).resolve().parents[2]
BATCHES = [(700, 900, 12_000), (64,) * 30, (30_000, 100, 100, 2_000)]


@pytest.fixture
def problem():
    return published((1,))


@pytest.fixture
def ahead(problem):
    with Ahead(problem.costs, problem.cluster, OPTIONS, timeout_seconds=NEVER) as asked:
        yield asked


def test_plans_come_in_order_and_are_those_that_would_be_made_here(ahead, problem):
    for lengths in BATCHES:
        ahead.ask(lengths)
    for lengths in BATCHES:
        found, here = ahead.plan(), problem_of(lengths, problem.cluster, problem.costs)
        check(here, found)
        assert found == plan_batch(here, OPTIONS)
        assert found.stopped_by == "work"


def said(ahead: Ahead, number: int) -> None:
    """Returns once the process has said something to this question, whoever listens."""
    heard = ahead._process._heard
    with heard.not_empty:
        assert heard.not_empty.wait_for(lambda: any(line.startswith(f"{number} ") for line in heard.queue), NEVER)


def test_planning_goes_on_while_nobody_waits(problem):
    """Once the process has planned, its plan is there for one who does not wait at all."""
    with Ahead(problem.costs, problem.cluster, OPTIONS, timeout_seconds=0.0, start_seconds=NEVER) as ahead:
        ahead.ask(BATCHES[0])
        assert not ahead.plan().note
        ahead.ask(BATCHES[1])
        said(ahead, 1)
        found = ahead.plan()
        assert found.num_documents == len(BATCHES[1])
        assert not found.note


def test_a_batch_without_a_plan_is_a_value_error_and_the_next_one_has_its_plan(ahead):
    ahead.ask((10**9, 5))
    ahead.ask(BATCHES[1])
    with pytest.raises(ValueError, match="document 0 has 1,000,000,000 tokens: one device holds"):
        ahead.plan()
    assert ahead.plan().num_documents == 30


def test_a_plan_that_is_late_is_replaced_and_the_late_one_is_nobody_elses(problem):
    """The process stands still: the best static plans take the place of two plans; the third is the planned one."""
    with Ahead(problem.costs, problem.cluster, OPTIONS, timeout_seconds=0.01, start_seconds=NEVER) as ahead:
        ahead.ask(BATCHES[0])
        ahead.plan()
        process = ahead._process._popen.pid
        os.kill(process, signal.SIGSTOP)
        for lengths in BATCHES[:2]:
            ahead.ask(lengths)
            late, here = ahead.plan(), problem_of(lengths, problem.cluster, problem.costs)
            assert late == static_plan(here, OPTIONS, "the planning process was late: this is the best static plan")
        os.kill(process, signal.SIGCONT)
        ahead.ask(BATCHES[2])
        said(ahead, 3)
        found = ahead.plan()
        assert found.num_documents == len(BATCHES[2])
        assert not found.note


def test_a_process_that_does_not_start_is_late_as_well(problem, monkeypatch):
    monkeypatch.setattr("seqpar.planner.ahead._command", lambda: ["sleep", "1200"])
    with Ahead(problem.costs, problem.cluster, OPTIONS, timeout_seconds=0.01, start_seconds=0.01) as ahead:
        ahead.ask(BATCHES[0])
        assert ahead.plan().note == "the planning process was late: this is the best static plan"


@pytest.mark.parametrize("wrong", [{"timeout_seconds": -1.0}, {"start_seconds": float("nan")}])
def test_time_outs_that_make_no_sense_are_refused(problem, wrong):
    with pytest.raises(ValueError, match="expected time-outs of at least 0 seconds"):
        Ahead(problem.costs, problem.cluster, OPTIONS, **wrong)


def test_a_process_that_ends_is_replaced(ahead):
    for lengths in BATCHES:
        ahead.ask(lengths)
    ahead._process._popen.kill()
    found = [ahead.plan() for _ in BATCHES]
    assert [plan.num_documents for plan in found] == [len(lengths) for lengths in BATCHES]
    assert found[0].note == "the planning process ended with code -9: this is the best static plan"
    assert [plan.note for plan in found[1:]] == ["", ""]


def test_the_process_ends_with_the_one_that_asks(problem):
    ahead = Ahead(problem.costs, problem.cluster, OPTIONS, timeout_seconds=NEVER)
    ahead.ask(BATCHES[0])
    ahead.plan()
    ahead._process._mouth.close()
    assert ahead._process._popen.wait(timeout=NEVER) == 0
    ahead.close()
    with Ahead(problem.costs, problem.cluster, OPTIONS) as closed:
        pass
    assert closed._process._popen.returncode is not None


def test_the_process_ends_where_nobody_closes_it(problem):
    ahead = Ahead(problem.costs, problem.cluster, OPTIONS)
    process = ahead._process
    del ahead
    gc.collect()
    assert process._popen.returncode is not None
    assert not process._listener.is_alive()


def test_a_program_that_forgets_to_close_leaves_no_process(problem):
    program = (
        "from seqpar.planner import Ahead, Options; from tests.planner.problems import published; p = published((1,)); "
        "a = Ahead(p.costs, p.cluster, Options()); print(a._process._popen.pid)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=NEVER)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_nothing_of_the_current_folder_is_run(problem, tmp_path, monkeypatch):
    """Modules with names of the standard library, of what planning needs, and of ours, in the folder of a user."""
    for name in ("json", "queue", "random", "numpy", "pulp", "planner", "seqpar", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))  # as for a program that lies in this folder
    with Ahead(problem.costs, problem.cluster, OPTIONS, timeout_seconds=NEVER) as ahead:
        ahead.ask(BATCHES[0])
        assert not ahead.plan().note
    assert not (tmp_path / "run").exists()


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
    with pytest.raises(ValueError, match="one device holds"):
        static_plan(published((10**9,)))
