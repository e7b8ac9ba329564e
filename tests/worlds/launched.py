"""Ranks that torchrun or mpiexec started: every rank runs pytest on the same tests, and they stay in step."""

import itertools
import json
from dataclasses import astuple
from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _pytest.config import create_terminal_writer

from seqpar.collectives import Group, connect, group_of
from seqpar.collectives.c10d import _new_process_group
from seqpar.collectives.launcher import this_place
from tests.worlds.body import MESSAGE_SECONDS, Body, Outcome, attempt, conclude, groups_by_size

STEP = timedelta(seconds=1000)
"""How long a rank waits for the others at the end of a test."""


class Launched:
    def __init__(self, config: pytest.Config) -> None:
        place = this_place()
        if place.size == 1:
            raise pytest.UsageError("--world torchrun and mpirun need ranks: start pytest with torchrun or mpiexec")
        torch.set_num_threads(1)
        self.rank, self.max_size = place.rank, place.size
        connect("gloo", timeout_seconds=MESSAGE_SECONDS)
        self._worlds = itertools.count()
        self._groups = self._new_groups()
        self._store = dist.PrefixStore("tests", dist.distributed_c10d._get_default_store())
        self._steps = itertools.count()
        if self.rank:
            reporter = config.pluginmanager.get_plugin("terminalreporter")
            reporter._tw = create_terminal_writer(config, StringIO())

    def run(self, size: int, body: Body, arguments: dict[str, Any]) -> None:
        takes_part = self.rank < size
        outcome = attempt(self._groups[size], body.function(), arguments) if takes_part else Outcome("passed")
        outcomes = self._agree(body, outcome)[:size]
        if any(outcome.kind in ("failed", "left") for outcome in outcomes):
            self._groups = self._new_groups()  # the old ones hung up
        conclude(outcomes)

    def _new_groups(self) -> dict[int, Group]:
        """Groups that no message went through: of a process group of their own, for a group that fails closes it."""
        timeout, name = timedelta(seconds=MESSAGE_SECONDS), f"tests {next(self._worlds)}"
        return groups_by_size(group_of(_new_process_group(range(self.max_size), dist.group.WORLD, name, timeout)))

    def _agree(self, body: Body, mine: Outcome) -> list[Outcome]:
        """Every rank's outcome, by way of the store; a rank that ran another test is not waited for."""
        step = f"{next(self._steps)} {body.test}"
        self._store.set(f"{step} {self.rank}", json.dumps(astuple(mine)))
        keys = [f"{step} {rank}" for rank in range(self.max_size)]
        try:
            self._store.wait(keys, STEP)
        except RuntimeError as error:
            pytest.exit(f"rank {self.rank} waited for the others to end {body.test}: {error}", returncode=1)
        return [Outcome(*json.loads(self._store.get(key))) for key in keys]

    def close(self, session: pytest.Session) -> None:
        """Rank 0 tells how it went, and leaves last: it may be the host of the store."""
        if self.rank:
            self._store.set(f"bye {self.rank}", "")
            session.exitstatus = 0
        else:
            self._store.wait([f"bye {rank}" for rank in range(1, self.max_size)], STEP)
