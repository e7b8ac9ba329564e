"""Ranks as threads of one process: what tests, documentation and a laptop use.

Messages are copies, so a rank cannot see what another does to a tensor it sent. A message says what it is (verb, shape,
dtype); a rank that expects another one raises at once, so a wrong order of calls cannot pass silently.
"""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from collectives.group import (
    Group,
    GroupError,
    Later,
    PeerFailed,
    Pending,
    check_partition,
    done,
    empty_like_shape,
    sum_in_order,
    where,
)

T = TypeVar("T")


@dataclass(frozen=True)
class _Message:
    verb: str
    tensor: Tensor

    def __str__(self) -> str:
        return f"{self.verb} of {list(self.tensor.shape)} {self.tensor.dtype}"


class _PostOffice:
    """Queues of messages between threads, and the news that one of them failed."""

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._queues: dict[tuple[Any, ...], deque[_Message]] = defaultdict(deque)
        self._changed = threading.Condition()
        self._failed_rank: int | None = None

    def post(self, address: tuple[Any, ...], message: _Message) -> None:
        with self._changed:
            self._queues[address].append(message)
            self._changed.notify_all()

    def collect(self, address: tuple[Any, ...], who: str, what: str) -> _Message:
        deadline = time.monotonic() + self.timeout_seconds
        with self._changed:
            while not self._queues[address]:
                if self._failed_rank is not None:
                    raise PeerFailed(f"{who} waited for {what}, but rank {self._failed_rank} failed first")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise GroupError(f"{who} waited {self.timeout_seconds:g} s for {what}: it never came")
                self._changed.wait(left)
            return self._queues[address].popleft()

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
        self._partitions = 0

    def _post(self, verb: str, tensor: Tensor, to: int) -> None:
        self._office.post((self._name, self.rank, to), _Message(verb, tensor.detach().clone()))

    def _collect(self, verb: str, shape: Sequence[int], dtype: torch.dtype, source: int) -> Tensor:
        expected = f"{verb} of {list(shape)} {dtype}"
        message = self._office.collect((self._name, source, self.rank), where(self), f"{expected} from rank {source}")
        if str(message) != expected:
            raise GroupError(f"{where(self)} waits for {expected} from rank {source}, which sent {message}")
        return message.tensor

    def exchange(
        self, send: Tensor | None, to: int | None, receive: Tensor | None, source: int | None
    ) -> Pending[Tensor | None]:
        if send is not None and to is not None:
            self._post("exchange", send, to)
        if receive is None or source is None:
            return done(None)
        shape, dtype = receive.shape, receive.dtype
        return Later(lambda: self._collect("exchange", shape, dtype, source))

    def all_gather(self, tensor: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> Pending[list[Tensor]]:
        all_shapes = shapes or [tensor.shape] * self.size
        for peer in range(self.size):
            if peer != self.rank:
                self._post("all_gather", tensor, peer)

        def finish() -> list[Tensor]:
            return [
                tensor if peer == self.rank else self._collect("all_gather", all_shapes[peer], tensor.dtype, peer)
                for peer in range(self.size)
            ]

        return Later(finish)

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Pending[list[Tensor]]:
        for peer, tensor in enumerate(sends):
            if peer != self.rank and tensor.numel():
                self._post("all_to_all", tensor, peer)

        def finish() -> list[Tensor]:
            return [self._received(peer, sends, receives) for peer in range(self.size)]

        return Later(finish)

    def _received(self, peer: int, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Tensor:
        if peer == self.rank:
            return sends[peer]
        buffer = receives[peer]
        return self._collect("all_to_all", buffer.shape, buffer.dtype, peer) if buffer.numel() else buffer

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Pending[Tensor]:
        mine = parts[self.rank]
        arriving = self.all_to_all(parts, [empty_like_shape(mine.shape, mine)] * self.size)
        return Later(lambda: sum_in_order(arriving.wait()))

    def all_reduce(self, tensor: Tensor) -> Pending[Tensor]:
        arriving = self.all_gather(tensor)
        return Later(lambda: sum_in_order(arriving.wait()))

    def partition(self, groups: Sequence[Sequence[int]]) -> Group:
        check_partition(groups, self.size)
        self._partitions += 1
        index = next(i for i, ranks in enumerate(groups) if self.rank in ranks)
        name = (*self._name, self._partitions, index)
        return ThreadGroup(list(groups[index]).index(self.rank), len(groups[index]), self._office, name)


def run_ranks(size: int, body: Callable[..., T], *args: Any, timeout_seconds: float = 60.0) -> list[T]:
    """Run ``body(group, *args)`` once per rank, each in a thread, and return the results in rank order.

    The first real error is raised with its rank noted, not the time-outs of its peers. ``timeout_seconds`` bounds how
    long a rank waits for one message; computing may take as long as it likes.

    >>> run_ranks(3, lambda group, x: group.rank * x, 10)
    [0, 10, 20]
    """
    if size < 1:
        raise ValueError(f"a group has at least one rank, got size={size}")
    office = _PostOffice(timeout_seconds)
    results: list[Any] = [None] * size
    errors: list[tuple[int, BaseException]] = []

    def run(rank: int) -> None:
        try:
            # Each rank's backward runs in its own thread: one engine thread for all would wait for itself.
            with torch.autograd.set_multithreading_enabled(False):
                results[rank] = body(ThreadGroup(rank, size, office), *args)
        except BaseException as error:
            errors.append((rank, error))
            office.fail(rank)

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        rank, error = next((e for e in errors if not isinstance(e[1], PeerFailed)), errors[0])
        error.add_note(f"raised on rank {rank} of {size}")
        raise error
    return results
