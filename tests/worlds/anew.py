"""Ranks as processes that get a new group for every case, since most cases close theirs."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from seqpar.collectives import Group, connect, group_of

FAR = 100_000.0
"""A time-out far beyond that of any test: waiting for it would hang the test."""

Attempt = Callable[[Group, str], str]


def run_cases(attempt: Attempt, cases: Iterable[str], size: int) -> Iterator[tuple[str, list[str], float]]:
    """Each case with what ``attempt(group, case)`` gave on every rank, and the seconds until the last one was there.

    Where a process ended, every outcome says so.
    """
    ranks: list[tuple[Any, Any]] = []
    try:
        for case in cases:
            ranks = ranks or _start(attempt, size)
            for _, pipe in ranks:
                pipe.send(case)
            try:
                told = [pipe.recv() for _, pipe in ranks]
            except EOFError:
                codes = [process.join(5) or process.exitcode for process, _ in ranks]
                _stop(ranks)
                yield case, [f"unexpected end of processes, exit codes {codes}"] * size, 0.0
            else:
                yield case, [outcome for outcome, _ in told], max(seconds for _, seconds in told)
    finally:
        _stop(ranks)


def _start(attempt: Attempt, size: int) -> list[tuple[Any, Any]]:
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(size):
        here, there = context.Pipe()
        process = context.Process(target=_live, args=(attempt, rank, size, port, there), daemon=True)
        process.start()
        there.close()
        ranks.append((process, here))
    return ranks


def _live(attempt: Attempt, rank: int, size: int, port: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    connect("gloo", timeout_seconds=FAR)
    while True:
        case = pipe.recv()
        group = group_of(dist.new_group(timeout=timedelta(seconds=FAR)))
        begin = time.monotonic()
        outcome = attempt(group, case)
        pipe.send((outcome, time.monotonic() - begin))


def _stop(ranks: list[tuple[Any, Any]]) -> None:
    for process, pipe in ranks:
        pipe.close()
        process.kill()
        process.join()
    ranks.clear()
