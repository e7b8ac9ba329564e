"""Ranks as threads of one process: what tests, documentation and a laptop use.

Messages are copies, so a rank cannot see what another does to a tensor it sent. Between two ranks they are numbered in
the order of the calls, whatever the order of the waits. A message says what it is (verb, shape, dtype, and the course
of :mod:`seqpar.collectives.agreed`); a rank that expects another one raises at once and closes the group, so a wrong
order of calls cannot pass silently. So does the last rank to wait where all wait for each other or for one that has
ended.
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from seqpar.collectives.agreed import Agreed, kind_of
from seqpar.collectives.group import (
    Group,
    GroupError,
    Later,
    PeerFailed,
    Pending,
    check_apart,
    check_count,
    check_peer,
    check_shapes,
    check_subgroup,
    done,
    empty_like_shape,
    is_shut,
    partition,
    shut,
    sum_in_order,
    where,
)
from seqpar.collectives.joined import join

T = TypeVar("T")


@dataclass(frozen=True)
class _Message:
    kind: str
    tensor: Tensor


_SKIPPED = "did a rank skip, repeat or reorder a call?"


class _PostOffice:
    """Messages between threads, and the news that one of them failed."""

    def __init__(self, size: int, timeout_seconds: float, every: bool) -> None:
        self.timeout_seconds, self.every = timeout_seconds, every
        self._messages: dict[tuple[Any, ...], _Message] = {}
        self._changed = threading.Condition()
        self._running = size
        self._threads: set[int] = set()  # one a rank: what other threads of a user do is not known
        self._waiting: dict[int, tuple[Any, ...]] = {}  # by thread: the address of what it waits for
        self._failed_rank: int | None = None
        self._why = ""

    def post(self, address: tuple[Any, ...], message: _Message) -> None:
        with self._changed:
            self._messages[address] = message
            self._changed.notify_all()

    def collect(self, address: tuple[Any, ...], who: str, what: str) -> _Message:
        deadline = time.monotonic() + self.timeout_seconds
        with self._changed:
            if threading.get_ident() in self._threads:
                self._waiting[threading.get_ident()] = address
            try:
                while address not in self._messages:
                    self.check_open(who, f"waited for {what}")
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise GroupError(f"{who} waited {self.timeout_seconds:g} s for {what}: it never came")
                    if self._in_vain():
                        self.close(f"{who} waits for {what}, and all ranks wait or have ended: {_SKIPPED}")
                        raise GroupError(self._why)
                    self._changed.wait(left)
            finally:
                self._waiting.pop(threading.get_ident(), None)
            return self._messages.pop(address)

    def _in_vain(self) -> bool:
        """Whether all that still run wait for what is not there."""
        return len(self._waiting) >= self._running and not any(a in self._messages for a in self._waiting.values())

    def check_open(self, who: str, what: str) -> None:
        """Raise what closed the group, if it is closed."""
        with self._changed:
            if self._failed_rank is not None:
                raise PeerFailed(f"{who} {what}, but rank {self._failed_rank} failed first{self._cause()}")
            if self._why:
                raise PeerFailed(f"{who} {what}: the group is closed, since {self._why}")

    def _cause(self) -> str:
        return f" ({self._why})" if self._why else ""

    def close(self, why: str) -> None:
        """No message comes any more, for what was said first."""
        with self._changed:
            self._why = self._why or why
            self._changed.notify_all()

    def begin(self) -> None:
        """A rank begins, in this thread."""
        with self._changed:
            self._threads.add(threading.get_ident())

    def end(self) -> None:
        """A rank has come to the end of its body."""
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def fail(self, rank: int) -> None:
        with self._changed:
            if self._failed_rank is None:
                self._failed_rank = rank
            self._changed.notify_all()


class ThreadGroup:
    """One thread's view of the ranks that run beside it."""

    def __init__(self, rank: int, size: int, office: _PostOffice, name: tuple[Any, ...] = ()) -> None:
        self.rank = rank
        self.size = size
        self._office = office
        self._name = name
        self._sent: Counter[int] = Counter()
        self._expected: Counter[int] = Counter()
        self._subgroups: dict[tuple[int, ...], Group] = {}
        self._made: Counter[tuple[int, ...]] = Counter()
        self._agreed = Agreed(office.every)

    def _kind(self, verb: str, tensor: Tensor) -> str:
        course = f" in {self._agreed.place}, course {self._agreed.course:016x}" if self._agreed.course else ""
        return kind_of(verb, tensor) + course

    def _post(self, verb: str, tensor: Tensor, to: int) -> None:
        check_peer(self, verb, to)
        self._office.check_open(where(self), verb)
        self._sent[to] += 1
        message = _Message(self._kind(verb, tensor), tensor.detach().clone())
        self._office.post((self._name, self.rank, to, self._sent[to]), message)

    def _expect(self, verb: str, buffer: Tensor, source: int) -> Pending[Tensor]:
        """The next message from ``source``, to fill ``buffer``."""
        check_peer(self, verb, source)
        self._expected[source] += 1
        address = (self._name, source, self.rank, self._expected[source])
        expected = self._kind(verb, buffer)

        def collect() -> Tensor:
            message = self._office.collect(address, where(self), f"{expected} from rank {source}")
            if message.kind != expected:
                call = f" in {self._agreed.call}" if self._agreed.call else ""
                why = f"{where(self)}{call} waits for {expected} from rank {source}, which sent {message.kind}"
                self._office.close(why)
                raise GroupError(why)
            return buffer.copy_(message.tensor)

        return Later(collect)

    def exchange(
        self, send: Tensor | None, to: int | None, receive: Tensor | None, source: int | None
    ) -> Pending[Tensor | None]:
        if send is not None and to is not None:
            self._post("exchange", send, to)
        if receive is None or source is None:
            return done(None)
        return self._expect("exchange", receive, source)

    def all_gather(self, tensor: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> Pending[list[Tensor]]:
        mine = tensor.detach()
        buffers = [empty_like_shape(shape, mine) for shape in check_shapes(self, mine, shapes)]
        return self._swap("all_gather", [mine] * self.size, buffers)

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Pending[list[Tensor]]:
        return self._swap("all_to_all", sends, receives)

    def _swap(self, verb: str, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Pending[list[Tensor]]:
        """One tensor to each peer and one from each; those without elements are no messages."""
        check_count(self, verb, "tensors to send", len(sends))
        check_count(self, verb, "tensors to receive", len(receives))
        check_apart(self, verb, receives)
        arriving: list[Pending[Tensor]] = []
        for peer, (leaving, buffer) in enumerate(zip(sends, receives)):
            if peer != self.rank and leaving.numel():
                self._post(verb, leaving, peer)
            here = sends[peer] if peer == self.rank else buffer
            arriving.append(self._expect(verb, buffer, peer) if peer != self.rank and buffer.numel() else done(here))
        return Later(lambda: [pending.wait() for pending in arriving])

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Pending[Tensor]:
        check_count(self, "reduce_scatter", "parts", len(parts))
        mine = parts[self.rank]
        arriving = self._swap("reduce_scatter", parts, [empty_like_shape(mine.shape, mine) for _ in parts])
        return Later(lambda: sum_in_order(arriving.wait()))

    def all_reduce(self, tensor: Tensor) -> Pending[Tensor]:
        arriving = self.all_gather(tensor)
        return Later(lambda: sum_in_order(arriving.wait()))

    def agree(self, place: str, what: str) -> None:
        """All go to one public function with the same options (:mod:`seqpar.collectives.agreed`)."""
        self._agreed.move(
            where(self),
            place,
            what,
            lambda number: self._swap(
                "agree", [number] * self.size, [torch.empty_like(number) for _ in range(self.size)]
            ).wait(),
        )

    def note(self, call: str) -> None:
        """What errors say that this is."""
        self._agreed.call = call

    def subgroup(self, ranks: Sequence[int]) -> Group:
        members = check_subgroup(self, ranks)
        if members not in self._subgroups or is_shut(self._subgroups[members]):
            self._made[members] += 1
            name = (*self._name, members, self._made[members])
            self._subgroups[members] = ThreadGroup(members.index(self.rank), len(members), self._office, name)
        return self._subgroups[members]

    def partition(self, groups: Sequence[Sequence[int]]) -> Group:
        return partition(self, groups)

    def close(self) -> None:
        for _, part in sorted(self._subgroups.items()):
            part.close()
        if sys.exc_info()[0] is None:
            self.all_reduce(torch.zeros(1)).wait()
        shut(self)


def run_ranks(
    size: int, body: Callable[..., T], *args: Any, timeout_seconds: float = 60.0, debug: bool = False
) -> list[T]:
    """Run ``body(group, *args)`` once per rank, each in a thread, and return the results in rank order.

    The first real error is raised with its rank noted, not the time-outs of its peers. ``timeout_seconds`` bounds how
    long a rank waits for one message; computing may take as long as it likes. ``debug`` compares what ranks call at
    every call, not only the first time that they come to it.

    >>> run_ranks(3, lambda group, x: group.rank * x, 10)
    [0, 10, 20]
    """
    if size < 1:
        raise ValueError(f"a group has at least one rank, got size={size}")
    office = _PostOffice(size, timeout_seconds, debug)
    results: list[Any] = [None] * size
    errors: list[tuple[int, BaseException]] = []

    def run(rank: int) -> None:
        try:
            office.begin()
            # Each rank's backward runs in its own thread: one engine thread for all would wait for itself.
            with torch.autograd.set_multithreading_enabled(False):
                results[rank] = body(ThreadGroup(rank, size, office), *args)
        except BaseException as error:
            errors.append((rank, error))
            office.fail(rank)
        finally:
            office.end()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        join(thread)
    if errors:
        rank, error = next((e for e in errors if not isinstance(e[1], PeerFailed)), errors[0])
        error.add_note(f"raised on rank {rank} of {size}")
        raise error
    return results
