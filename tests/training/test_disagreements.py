"""One rank differs: every rank raises, none goes on with other numbers, none aborts, none waits for the time-out."""

import pytest

from seqpar.collectives import run_ranks
from tests.disagreements import CASES, SIZE, attempt, verdict
from tests.worlds.anew import FAR, run_cases

EVERY = 37
"""One case in so many runs on processes in the ordinary suite."""


def test_there_are_as_many_cases_as_were_measured():
    assert len(CASES) >= 539


@pytest.mark.parametrize("function", sorted({case.split(":")[0] for case in CASES}))
def test_on_threads_every_rank_raises(function):
    wrong = []
    for case in CASES:
        if case.split(":")[0] == function:
            outcomes = run_ranks(SIZE, attempt, case, timeout_seconds=FAR)
            if found := verdict(outcomes):
                wrong.append(f"{case}: {found}")
    assert not wrong, "\n".join(wrong)


def on_processes(cases):
    """What is wrong with each case on processes, and the seconds of each."""
    wrong, seconds = [], {}
    for case, outcomes, took in run_cases(attempt, cases, SIZE):
        seconds[case] = took
        if found := verdict(outcomes):
            wrong.append(f"{case}: {found}")
    return wrong, seconds


def test_on_processes_every_rank_raises():
    wrong, _ = on_processes(list(CASES)[::EVERY])
    assert not wrong, "\n".join(wrong)


@pytest.mark.nightly
@pytest.mark.timeout(0)
def test_on_processes_every_rank_raises_in_all_cases():
    wrong, seconds = on_processes(CASES)
    in_order = sorted(seconds.values())
    print(f"{len(CASES)} cases, seconds until the last rank knew: median {in_order[len(in_order) // 2]:.2f}, ", end="")
    print(f"at most {in_order[-1]:.2f}")
    assert not wrong, "\n".join(wrong)
