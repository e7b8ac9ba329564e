"""Who waits for whom, and why in vain: ranks as processes watch themselves while they wait.

A message that is not the one expected never arrives (its tag differs), so a rank that waits longer than a moment asks:
a thread of each process compares, by way of the store that all ranks share, what the two ranks sent each other and what
they expect. Where that differs, where ranks wait for each other in a circle, or where the one waited for has left with
an error, the first rank to see it writes down why and closes the connections of all its groups; so every rank that
waits ends at once with the same reason. Ranks that do not wait are asked for nothing but whether they are asked.
"""

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from seqpar.collectives.joined import join

SECONDS = 0.2
"""How long a rank waits before it asks, and how often it looks whether it is asked. Who waits looks twice as often."""

PATIENCE = 1.0
"""The longest that a rank which goes on waiting, not in vain, leaves between two questions."""

Entry = tuple[str, int, int, str]
"""``"sent"`` or ``"expected"``, the other rank, the number of the message between the two, and what it is."""


class Waiting(NamedTuple):
    """``rank`` waits for message ``number`` of (``expected``) or to (``sent``) ``peer`` in a group."""

    serial: int
    group: str
    way: str
    peer: int
    number: int
    what: str
    since: float = 0.0


@dataclass
class Log:
    """The last messages of one group, by ranks of the whole job."""

    counts: Counter[tuple[str, int]] = field(default_factory=Counter)
    entries: deque[Entry] = field(default_factory=lambda: deque(maxlen=256))

    def add(self, way: str, peer: int, what: str, tag_of: Callable[[int], int]) -> tuple[int, int]:
        """The number of a new message, and its tag."""
        self.counts[way, peer] += 1
        number = self.counts[way, peer]
        self.entries.append((way, peer, number, what))
        return number, tag_of(number)

    def told(self) -> dict[str, Any]:
        """As JSON may hold it."""
        counts = [[way, peer, count] for (way, peer), count in list(self.counts.items())]
        return {"counts": counts, "entries": list(self.entries)}


@dataclass
class Family:
    """What the watch knows of a group and its subgroups on this rank."""

    rank: int
    logs: dict[str, Log] = field(default_factory=dict)
    waiting: Waiting | None = None
    serial: int = 0
    errors: int = 0
    left: str = ""
    why: str = ""

    def log(self, name: str) -> Log:
        """The log of the group ``name``."""
        return self.logs.setdefault(name, Log())

    def forget(self, name: str) -> None:
        """The group ``name`` was closed."""
        self.logs.pop(name, None)

    def leave(self, why: str) -> None:
        """An error is raised here, outside of any verb. If the others raise it, too, nobody waits and nothing is
        lost."""
        self.errors, self.left = self.errors + 1, why

    def state(self) -> dict[str, Any]:
        """What I tell a rank that asks."""
        waiting = self.waiting
        return {
            "waiting": None if waiting is None else list(waiting),
            "logs": {name: log.told() for name, log in list(self.logs.items())},
            "left": [self.errors, self.left],
        }


class Watch(threading.Thread):
    """A thread that looks, now and then, whether this rank waits in vain. ``hang_up`` ends all waiting at once."""

    def __init__(self, name: str, family: Family, store: Any, hang_up: Callable[[], None]) -> None:
        super().__init__(name=f"watch of {name}", daemon=True)
        self._prefix, self._family, self._store, self._hang_up = name, family, store, hang_up
        self._over = threading.Event()
        self._asked_at: dict[int, int] = {}
        self._seen: tuple[tuple[int, int], ...] = ()
        self._tick, self._lost = 0, False
        self._serial, self._next = -1, 0.0

    @staticmethod
    def all() -> "list[Watch]":
        """Those of this process."""
        return [thread for thread in threading.enumerate() if isinstance(thread, Watch)]

    @staticmethod
    def stop_all() -> None:
        """End those of this process, before what they speak through goes."""
        for watch in Watch.all():
            watch.stop()

    def leave(self, why: str) -> None:
        """This rank comes to no verb any more."""
        self._family.leave(why)

    def why(self) -> str:
        """Why the groups were closed; empty if they were not."""
        return self._family.why or self._first()

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        if self is not threading.current_thread():
            join(self, 50 * SECONDS)  # it may be waiting for the store

    def fail(self, why: str) -> str:
        """Close the family for ``why``, or for what was written down first; returns it."""
        family = self._family
        if not family.why:
            family.why = self._first() or why
            with suppress(RuntimeError):
                if not self._lost:
                    self._store.set(self._key("why"), family.why)
            self._hang_up()
        return family.why

    def _first(self) -> str:
        with suppress(RuntimeError):
            if not self._lost and self._store.check([self._key("why")]):
                return str(self._store.get(self._key("why")).decode())
        return ""

    def _key(self, what: str) -> str:
        return f"{self._prefix}/{what}"

    def run(self) -> None:
        while not self._over.wait(SECONDS / 2 if self._family.waiting else SECONDS):
            try:
                if not self._lost and not self._family.why:
                    self.look(time.monotonic())
            except RuntimeError:
                self._lost = True
            waiting = self._family.waiting
            if self._lost and waiting is not None and time.monotonic() - waiting.since >= SECONDS:
                self.fail("the process that holds the store of the job, rank 0 or its launcher, has ended")
            if self._family.why and waiting is not None and time.monotonic() - waiting.since >= SECONDS:
                self._hang_up()  # it began to wait as the group was closed

    def look(self, now: float) -> None:
        """Answer who asks; if this rank has waited for a while, go on asking, and close the family if it is in vain."""
        self._tick += 1
        family, asked = self._family, self._key(f"ask/{self._family.rank}")
        if self._store.check([asked]):
            self._store.delete_key(asked)
            self._store.set(self._key(f"state/{family.rank}"), json.dumps([self._tick, family.state()]))
        waiting = family.waiting
        serial = -1 if waiting is None else waiting.serial
        if serial != self._serial:
            self._serial, self._seen, self._asked_at, self._next = serial, (), {}, 0.0
        if waiting is None or now - waiting.since < SECONDS:
            return
        why: str | None = self._first()
        if not why and now >= self._next:
            why = self._in_vain(waiting)
            if why is not None and not why:
                # All have answered. Whoever waits for long asks less often: others may have more to compute.
                self._seen, self._asked_at = (), {}
                self._next = now + min((now - waiting.since) / 2, PATIENCE)
        if why and family.waiting is waiting:
            self.fail(why)

    def _ask(self, rank: int) -> dict[str, Any] | None:
        """The rank's state as it was after I began to wait; None until it is there. Asks again."""
        answer = None
        if self._store.check([self._key(f"state/{rank}")]):
            tick, state = json.loads(self._store.get(self._key(f"state/{rank}")))
            if rank in self._asked_at and tick > self._asked_at[rank]:
                answer = state
            self._asked_at.setdefault(rank, tick)
        else:
            self._asked_at.setdefault(rank, -1)
        self._store.set(self._key(f"ask/{rank}"), "")
        return answer

    def _in_vain(self, waiting: Waiting) -> str | None:
        """Why what I wait for will never come; empty if it may come, None while answers are outstanding."""
        family, mine = self._family, {**self._family.state(), "waiting": list(waiting)}
        path: list[tuple[int, int]] = [(family.rank, waiting.serial)]
        rank, state = family.rank, mine
        while True:
            if rank != family.rank and state["waiting"] is None:
                errors, left = state["left"]
                alone = left and errors > family.errors
                return f"rank {rank} left a call that others are in: {left}" if alone else ""
            found = Waiting(*state["waiting"])
            asked = self._ask(found.peer) if found.peer != family.rank else mine
            if asked is None:
                return None
            if words := differing(rank, state, found.peer, asked):
                return words
            theirs = "sent" if found.way == "expected" else "expected"
            if _count(asked, found.group, theirs, rank) >= found.number:
                return ""  # it is on its way
            if found.peer in (each for each, _ in path):
                return self._circle(path, found, waiting.what)
            rank, state = found.peer, asked
            path.append((rank, state["waiting"][0] if state["waiting"] else -1))

    def _circle(self, path: list[tuple[int, int]], last: Waiting, mine: str) -> str | None:
        """Ranks that wait for each other: in vain, if they still do when all are asked again."""
        seen, self._seen = self._seen, tuple(path)
        if seen != self._seen:
            self._asked_at = {}
            for rank, _ in path[1:]:
                self._ask(rank)
            return None
        ranks = " for ".join(f"rank {rank}" for rank, _ in path)
        return (
            f"ranks wait for each other: {ranks} for rank {last.peer}; rank {self._family.rank} waits for {mine}: "
            "did a rank skip, repeat or reorder a call?"
        )


def _count(state: dict[str, Any], group: str, way: str, peer: int) -> int:
    counts: Sequence[Any] = state["logs"].get(group, {"counts": []})["counts"]
    return next((count for each, other, count in counts if (each, other) == (way, peer)), 0)


def differing(one: int, ones: dict[str, Any], other: int, others: dict[str, Any]) -> str:
    """The first message between two ranks that is one thing to its sender and another to its receiver, in words."""
    for group in ones["logs"].keys() & others["logs"].keys():
        for sender, sent, receiver, expected in ((one, ones, other, others), (other, others, one, ones)):
            sends = {n: what for way, to, n, what in sent["logs"][group]["entries"] if (way, to) == ("sent", receiver)}
            for way, source, number, what in expected["logs"][group]["entries"]:
                if (way, source) == ("expected", sender) and sends.get(number, what) != what:
                    return (
                        f"rank {receiver} waits for {what} from rank {sender}, which sent {sends[number]} "
                        f"(message {number} between them)"
                    )
    return ""
