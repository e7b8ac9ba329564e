"""A test body, what came of it on one rank, and what a world is."""

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import pytest
import torch

from seqpar.collectives import Group, GroupError
from seqpar.collectives.c10d import ProcessRanks

MESSAGE_SECONDS = 300.0  # against hangs: a rank on a busy machine computes for long before it sends
"""How long a rank of a test waits for a message."""


@dataclass(frozen=True)
class Body:
    """A test function by its name, so that it can be named to another process."""

    test: str
    module: str
    name: str
    is_hypothesis: bool

    @staticmethod
    def of(item: pytest.Function) -> "Body":
        if item.cls is not None:
            raise pytest.UsageError(f"{item.nodeid}: an spmd test is a function of a module, not a method")
        return Body(item.nodeid, item.module.__name__, item.originalname, hasattr(item.obj, "hypothesis"))

    def function(self) -> Callable[..., None]:
        function = getattr(importlib.import_module(self.module), self.name)
        return inspect.unwrap(function.hypothesis.inner_test) if self.is_hypothesis else function


class World(Protocol):
    """Where ranks come from."""

    max_size: int

    def run(self, size: int, body: Body, arguments: dict[str, Any]) -> None:
        """Run the body on ranks 0 to ``size - 1``; raise what the first of them to fail raised."""
        ...

    def close(self, session: pytest.Session) -> None:
        """The session is over."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What came of a body on one rank: passed, skipped, failed, or left, where only a peer's failure stopped it."""

    kind: str
    text: str = ""


def attempt(group: Group, function: Callable[..., None], arguments: dict[str, Any]) -> Outcome:
    """Run a body on this rank. After a failure the connections of ``group`` are gone, and its peers know at once."""
    try:
        function(group=group, **arguments)
        if isinstance(group, ProcessRanks):
            group.shared.finish_sends(before=math.inf)
        return Outcome("passed")
    except pytest.skip.Exception as skipped:
        return Outcome("skipped", str(skipped))
    except (Exception, pytest.fail.Exception) as error:
        hang_up(group)
        shown = str(pytest.ExceptionInfo.from_exception(error).getrepr(style="short"))
        return Outcome("left" if isinstance(error, GroupError) else "failed", shown)


def hang_up(group: Group) -> None:
    """Close this rank's connections: Gloo does so when a receive has run out of time."""
    if isinstance(group, ProcessRanks):
        for process_group in group.shared.process_groups[1:]:
            peer = (process_group.rank() + 1) % process_group.size()
            with suppress(RuntimeError):
                process_group.recv([torch.empty(1)], peer, 0).wait(timedelta(milliseconds=1))


def groups_by_size(world: Group) -> dict[int, Group]:
    """For each size the group of ranks 0 to size - 1, as seen from this rank; never ``world`` itself."""
    everyone = range(world.size)
    sizes = range(1, world.size + 1)
    return {size: world.partition([part for part in (everyone[:size], everyone[size:]) if part]) for size in sizes}


def conclude(outcomes: Sequence[Outcome]) -> None:
    """Skip or fail this test as its ranks did; a rank's own error goes before what it did to others."""
    for kind in ("failed", "left", "skipped"):
        for rank, outcome in enumerate(outcomes):
            if outcome.kind == kind == "skipped":
                pytest.skip(outcome.text)
            if outcome.kind == kind:
                pytest.fail(f"raised on rank {rank} of {len(outcomes)}\n{outcome.text}", pytrace=False)
