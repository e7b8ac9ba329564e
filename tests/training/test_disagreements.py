"""One rank differs: every rank raises, none goes on with other numbers, none aborts, none waits for the time-out."""

import multiprocessing
import os
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from seqpar.collectives import connect, group_of, run_ranks
from tests.disagreements import CASES, SIZE, attempt, verdict

FAR = 100_000.0
"""A time-out far beyond that of any test: waiting for it would hang the test."""

EVERY = 17
"""One case in so many runs on processes in the ordinary suite."""


def test_there_are_as_many_cases_as_were_measured():
    assert len(CASES) >= 450


@pytest.mark.parametrize("function", sorted({case.split(":")[0] for case in CASES}))
def test_on_threads_every_rank_raises(function):
    wrong = []
    for case in CASES:
        if case.split(":")[0] == function:
            outcomes = run_ranks(SIZE, attempt, case, timeout_seconds=FAR)
            if found := verdict(outcomes):
                wrong.append(f"{case}: {found}")
    assert not wrong, "\n".join(wrong)


def rank_life(rank, port, pipe):
    """A process: for each case a new group, since most cases close theirs."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(SIZE), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    connect("gloo", timeout_seconds=FAR)
    for case in iter(pipe.recv, None):
        process_group = dist.new_group(timeout=timedelta(seconds=FAR))
        group = group_of(process_group)
        begin = time.monotonic()
        outcome = attempt(group, case)
        pipe.send((outcome, time.monotonic() - begin))
    os._exit(0)


def on_processes(cases):
    """What is wrong with each case on processes, and the seconds of each."""
    context = multiprocessing.get_context("forkserver")
    wrong, seconds, ranks = [], [], []
    for case in cases:
        if not ranks:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            for rank in range(SIZE):
                here, there = context.Pipe()
                process = context.Process(target=rank_life, args=(rank, port, there), daemon=True)
                process.start()
                there.close()
                ranks.append((process, here))
        for _, pipe in ranks:
            pipe.send(case)
        try:
            told = [pipe.recv() for _, pipe in ranks]
        except EOFError:
            codes = [process.join(5) or process.exitcode for process, _ in ranks]
            wrong.append(f"{case}: a process ended, exit codes {codes}")
            stop(ranks)
            continue
        if os.environ.get("DG"):
            print(case, [round(e[1], 2) for e in told], [e[0][:60] for e in told], flush=True)
        seconds.append(max(each[1] for each in told))
        if found := verdict([each[0] for each in told]):
            wrong.append(f"{case}: {found}")
    stop(ranks)
    return wrong, seconds


def stop(ranks):
    for process, pipe in ranks:
        pipe.close()
        process.kill()
        process.join()
    ranks.clear()


def test_on_processes_every_rank_raises():
    wrong, _ = on_processes(list(CASES)[::EVERY])
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_on_processes_every_rank_raises_in_all_cases():
    wrong, seconds = on_processes(CASES)
    print(
        f"{len(CASES)} cases, seconds until the last rank knew: median {sorted(seconds)[len(seconds) // 2]:.2f}, ",
        end="",
    )
    print(f"at most {max(seconds):.2f}")
    assert not wrong, "\n".join(wrong)
