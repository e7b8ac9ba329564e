"""The ranks of a Slurm step count each other in, so that one that waits says for how many: srun itself would not."""

import sys
import time
from collections.abc import Callable
from typing import Protocol

from seqpar.collectives.group import GroupError
from seqpar.collectives.launcher import Place

_POLL_SECONDS = 0.1
_PATIENCE = 50  # polls, before a rank says that it waits


class Store(Protocol):
    """What all ranks share: ``add`` to a number, and get it back."""

    def add(self, key: str, amount: int, /) -> int: ...


def wait_for_all(
    store: Store,
    place: Place,
    timeout_seconds: float,
    *,
    sleep: Callable[[float], None] = time.sleep,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> None:
    """Return once all ranks have come; after a while rank 0 says for how many it waits. Looks, and sleeps between.

    Raises :class:`GroupError` once it has slept for ``timeout_seconds``.
    """
    missing = place.size - store.add("here", 1)
    for poll in range(max(1, round(timeout_seconds / _POLL_SECONDS))):
        if missing <= 0:
            return
        if poll == _PATIENCE and place.rank == 0:
            say(f"{_who(place)}: waiting for {_more(missing)} that {place.launcher} should have started")
        sleep(_POLL_SECONDS)
        missing = place.size - store.add("here", 0)
    if missing > 0:
        raise GroupError(f"{_who(place)}: connect failed: {_more(missing)} did not come within {timeout_seconds:g} s")


def _who(place: Place) -> str:
    return f"rank {place.rank} of {place.size}"


def _more(missing: int) -> str:
    return f"{missing} more rank{'s' if missing > 1 else ''}"
