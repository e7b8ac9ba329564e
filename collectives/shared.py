"""What a group of processes and its subgroups share, and how it ends.

Process groups are known here by weak references: torch holds them, and once it lets one go its threads end.
"""

import math
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch

from seqpar.collectives.agreed import closed
from seqpar.collectives.group import Group, shut
from seqpar.collectives.watch import Family, Watch

Wait = Callable[[], None]


@dataclass
class Shared:
    """What a group and its subgroups share: the messages on their way out, sums under way, and the process groups."""

    timeout: timedelta | None
    references: list["weakref.ref[Any]"] = field(default_factory=list)
    made: Counter[str] = field(default_factory=Counter)
    verbs: int = 0
    sent: deque[tuple[int, Wait]] = field(default_factory=deque)
    sums: deque[tuple[int, Wait]] = field(default_factory=deque)
    every: bool = False
    family: Family = field(default_factory=lambda: Family(0))
    watch: Watch | None = None

    @property
    def process_groups(self) -> list[Any]:
        """Those that were neither closed nor disconnected: the one given, then those of its subgroups."""
        return living(self.references)

    def begin(self, who: str, verb: str) -> int:
        """The number of a verb that starts now; an error if the group was closed."""
        if self.family.why:
            raise closed(who, verb, self.family.why)
        self.family.left = ""
        self.verbs += 1
        return self.verbs

    def finish_sends(self, before: float) -> None:
        """Wait until what verbs before number ``before`` sent has left."""
        while self.sent and self.sent[0][0] < before:
            self.sent.popleft()[1]()

    def go_on(self, before: float) -> None:
        """Second halves of sums that began before: peers may need mine, whatever I wait for."""
        while self.sums and self.sums[0][0] < before:
            self.sums.popleft()[1]()

    def fail(self, why: str) -> str:
        """Close the group and tell the others why, or learn from them why it was closed before."""
        if self.watch is not None:
            return self.watch.fail(why)
        return why


def living(references: Sequence["weakref.ref[Any]"]) -> list[Any]:
    """The process groups that are still there."""
    return [found for reference in list(references) if (found := reference()) is not None]


def hang_up(references: Sequence["weakref.ref[Any]"]) -> None:
    """Close their connections: whoever waits for this rank, here or there, ends at once.

    Gloo closes all of a group when a receive runs out of time. One from a rank that has left fails before that, so
    every peer is tried.
    """
    for process_group in living(references):
        rank, size = process_group.rank(), process_group.size()
        for peer in ((rank + step) % size for step in range(1, size)):
            try:
                process_group.recv([torch.empty(1)], peer, 0x7FFFFFFF).wait(timedelta(milliseconds=1))
            except RuntimeError:
                continue


def alive(reference: "weakref.ref[Any]", who: str) -> Any:
    """The process group; ``ValueError`` if there is none any more."""
    process_group = reference()
    if process_group is None:
        raise ValueError(f"{who}: the group was disconnected, so no message can travel")
    return process_group


class _Closing(Group, Protocol):
    """What :func:`close` knows of a group of processes."""

    on_gpus: bool
    shared: Shared
    reference: "weakref.ref[Any]"
    messages: Any


def close(group: _Closing, subgroups: Mapping[tuple[int, ...], Group], destroy: Callable[[Any], None]) -> None:
    """What :meth:`Group.close` does: last of all, once nobody waits for a message, the process group goes."""
    for _, part in sorted(subgroups.items()):  # in one order on all ranks, since each waits for its ranks
        part.close()
    shared, process_group = group.shared, group.reference()
    try:
        if process_group is not None and sys.exc_info()[0] is None:
            int(group.all_reduce(torch.zeros(1, device="cuda" if group.on_gpus else "cpu")).wait())
            shared.finish_sends(before=math.inf)  # mine of this sum as well: others may still wait for it
    finally:
        shut(group)
        if group.reference is not shared.references[0]:  # that one is torch's, or the user's own
            shared.references.remove(group.reference)
            shared.family.forget(group.messages.name)
            if process_group is not None:
                destroy(process_group)
        elif shared.watch is not None:
            shared.watch.stop()
