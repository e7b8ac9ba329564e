"""Ranks as processes: a pool that is started once, and anew after a failure."""

import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch

from seqpar.collectives import connect
from tests.worlds.body import MESSAGE_SECONDS, Body, Outcome, attempt, conclude, groups_by_size

GRACE_SECONDS = 60.0
"""How long a rank that only saw a peer leave waits for that peer's own error."""


@dataclass(frozen=True)
class Worker:
    process: BaseProcess
    pipe: Connection


class Processes:
    max_size = 4

    def __init__(self) -> None:
        self._workers: list[Worker] = []

    def run(self, size: int, body: Body, arguments: dict[str, Any]) -> None:
        if not self._workers:
            self._workers = start_workers(self.max_size)
        try:
            for worker in self._workers[:size]:
                worker.pipe.send((sys.path, size, body, arguments))
            conclude(outcomes_of(self._workers[:size]))
        except pytest.skip.Exception:
            raise
        except BaseException:
            self._stop()
            raise

    def _stop(self) -> None:
        for worker in self._workers:
            worker.process.kill()  # all at once: those left would see rank 0's store go, and say so
        for worker in self._workers:
            worker.process.join()
        self._workers = []

    def close(self, session: pytest.Session) -> None:
        self._stop()


def start_workers(size: int) -> list[Worker]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "hypothesis", "torch.distributed", "collectives"])
    workers = []
    for rank in range(size):
        here, there = context.Pipe()
        process = context.Process(target=work, args=(rank, size, port, there), name=f"rank {rank}", daemon=True)
        process.start()
        there.close()
        workers.append(Worker(process, here))
    return workers


def work(rank: int, size: int, port: int, pipe: Connection) -> None:
    """A rank's life: join the others as under torchrun, then run what comes."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    groups = groups_by_size(connect("gloo", timeout_seconds=MESSAGE_SECONDS))
    # Installs pytest's import hook, so that a bare assert says what it compared.
    pytest.Config.fromdictargs({}, ["-c", os.devnull, "--noconftest"])
    while True:
        try:
            sys.path[:], group_size, body, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(groups[group_size], body.function(), arguments))


def outcomes_of(workers: list[Worker]) -> list[Outcome]:
    """What the ranks report, until all have passed or one has failed."""
    outcomes = [Outcome("passed")] * len(workers)
    waiting: dict[Any, int] = {worker.pipe: rank for rank, worker in enumerate(workers)}
    deadline = float("inf")
    while waiting and time.monotonic() < deadline:
        left = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        for pipe in multiprocessing.connection.wait(list(waiting), left):
            rank = waiting.pop(pipe)
            outcomes[rank] = outcome_of(workers[rank])
            if outcomes[rank].kind == "failed":
                return outcomes
            if outcomes[rank].kind == "left":
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return outcomes


def outcome_of(worker: Worker) -> Outcome:
    try:
        return worker.pipe.recv()
    except EOFError:
        worker.process.join()
        return Outcome("failed", f"the process died with exit code {worker.process.exitcode}")
