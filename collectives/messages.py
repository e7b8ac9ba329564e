"""Messages between ranks that are processes: each says, by its tag, what it is, so that no other is taken for it.

What travels between two ranks travels as bytes, so every dtype does. A tag is made of the message's number between its
two ranks, its verb, shape and dtype, and the group's course (:mod:`seqpar.collectives.agreed`): a message that is not
the one expected stays outside, and :mod:`seqpar.collectives.watch` finds out why nothing came. Nothing is sent for
this.

A message that was sent is kept until the receiver has it: a verb's ``wait()`` finishes what it receives and what
*earlier* verbs sent, so that no sender is held up by a receiver which has not come to the verb yet.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from seqpar.collectives.agreed import Agreed, kind_of, tag_of
from seqpar.collectives.group import GroupError, Later, Pending, as_bytes, cause_of, check_peer, sum_in_order
from seqpar.collectives.shared import Shared, Wait
from seqpar.collectives.watch import Waiting

T = TypeVar("T")
Message = tuple[Tensor, int]
"""A tensor and the rank it goes to or comes from."""

SMALL = 1 << 16
"""Up to so many bytes are summed whole by every rank; more in parts, one a rank."""


def after(arrived: Wait, result: Callable[[], T]) -> Pending[T]:
    """What ``result`` gives once ``arrived`` has returned."""

    def finish() -> T:
        arrived()
        return result()

    return Later(finish)


class Messages:
    """The messages of one group, sent and received between pairs of its ranks."""

    def __init__(
        self, who: str, process_group: Callable[[], Any], members: Sequence[int], shared: Shared, name: str
    ) -> None:
        """``process_group`` gives it, as long as it is there: torch alone holds it, so that its threads can end."""
        self.who, self.agreed = who, Agreed(shared.every)
        self._process_group, self._members, self._shared = process_group, members, shared
        self.named(name)

    def named(self, name: str) -> None:
        """The group has got its name, the same on all its ranks."""
        self.name, self.log = name, self._shared.family.log(name)

    def travel(self, verb: str, sends: Sequence[Message], receives: Sequence[Message], group: Any) -> Wait:
        """Start messages; what is returned waits for those that come in. No elements, no message."""
        number = self._shared.begin(self.who, verb)
        for tensor, peer in (*sends, *receives):
            if tensor.numel():
                check_peer(group, verb, peer)
        leaving = [self._start("sent", verb, tensor, peer) for tensor, peer in sends if tensor.numel()]
        arriving = [self._start("expected", verb, tensor, peer) for tensor, peer in receives if tensor.numel()]
        self._shared.sent.extend((number, wait) for wait in leaving)

        def finish() -> None:
            self._shared.go_on(before=number)
            for wait in arriving:
                wait()
            self._shared.finish_sends(before=number)

        return finish

    def add_up(self, total: Tensor, rank: int, size: int, group: Any) -> Pending[Tensor]:
        """The sum of everyone's ``total``, in rank order: the same bits on each rank. Spoils ``total``.

        A rank adds up its part of the numbers, and everyone gets it: ``2 (n - 1) / n`` of the tensor is sent, as round
        a ring, but in two steps. Small tensors go whole to everyone. Parts arrive where the numbers sent were: a rank
        that sends its sum has received what it is made of.
        """
        peers = [(rank + step) % size for step in range(1, size)]
        if total.numel() * total.element_size() > SMALL:
            return after(self._add_up_parts(total, rank, size, peers), lambda: total)
        whole = [total if peer == rank else torch.empty_like(total) for peer in range(size)]
        arrived = self.travel("all_reduce", [(total, p) for p in peers], [(whole[p], p) for p in peers], group)
        return after(arrived, lambda: sum_in_order(whole))

    def _add_up_parts(self, total: Tensor, rank: int, size: int, peers: Sequence[int]) -> Wait:
        number, parts = self._shared.begin(self.who, "all_reduce"), list(total.view(-1).tensor_split(size))
        mine, kind = parts[rank], f"all_reduce of {list(total.shape)} in parts"
        received = {peer: torch.empty_like(mine) for peer in peers}
        leaving = [self._start("sent", kind, parts[p], p) for p in peers if parts[p].numel()]
        first = [self._start("expected", kind, received[p], p) for p in peers if mine.numel()]
        second = [self._start("expected", kind, parts[p], p) for p in peers if parts[p].numel()]
        second_sends = [self._prepare("sent", kind, mine, p) for p in peers] if mine.numel() else []
        self._shared.sent.extend((number, wait) for wait in leaving)

        def half() -> None:
            for wait in first:
                wait()
            mine.copy_(sum_in_order([mine if peer == rank else received[peer] for peer in range(size)]))
            leaving = mine.clone()  # the caller may write into the result before everyone has it
            self._shared.sent.extend((number, start(leaving)) for start in second_sends)

        self._shared.sums.append((number, half))

        def finish() -> None:
            self._shared.go_on(before=number + 1)
            for wait in second:
                wait()
            self._shared.finish_sends(before=number)

        return finish

    def _start(self, way: str, verb: str, tensor: Tensor, peer: int) -> Wait:
        return self._prepare(way, verb, tensor, peer)(tensor)

    def _prepare(self, way: str, verb: str, like: Tensor, peer: int) -> Callable[[Tensor], Wait]:
        """A message that has its number, and can be started later."""
        what, course = kind_of(verb, like), self.agreed.course
        told = f"{what} in {self.agreed.place}, course {course:016x}" if course else what
        number, tag = self.log.add(way, self._members[peer], told, lambda number: tag_of(number, what, course))

        def start(tensor: Tensor) -> Wait:
            bytes_ = _sendable(tensor)
            process_group = self._process_group()
            begin = process_group.send if way == "sent" else process_group.recv
            try:
                work = begin([bytes_], peer, tag)
            except RuntimeError as error:
                self._failed(error, verb, peer)

            def wait(keep: Tensor = bytes_) -> None:
                self._await(work, way, verb, peer, number, told)

            return wait

        return start

    def _await(self, work: Any, way: str, verb: str, peer: int, number: int, told: str) -> None:
        family = self._shared.family
        family.serial += 1
        now, member = time.monotonic(), self._members[peer]
        family.waiting = Waiting(family.serial, self.name, way, member, number, told, now)
        try:
            work.wait()
        except RuntimeError as error:
            self._failed(error, verb, peer)
        finally:
            family.waiting = None

    def _failed(self, error: RuntimeError, verb: str, peer: int) -> NoReturn:
        """An error of a message closes the group, and says why: by what was found out, else by what torch says."""
        if isinstance(error, GroupError):
            raise error
        asked, place = f"{verb.split()[0]} with rank {peer}", self._place()
        cause = f"{cause_of(error)} (did another rank fail first?)"
        why = self._shared.fail(f"{self.who}: {asked}{place} failed: {cause}")
        if why.startswith(f"{self.who}: {asked}"):
            raise GroupError(why) from error
        raise GroupError(f"{self.who}: {asked}{place} failed: {why}") from error

    def _place(self) -> str:
        """Where I am, in words: the function, and in backward the autograd node."""
        node = torch._C._current_autograd_node() if torch._C._current_graph_task_id() != -1 else None
        backward = "" if node is None else f", in {node.name()} of the backward pass"
        places = [place for place in (self.agreed.place, self.agreed.call) if place]
        return (" in " + ", ".join(places) if places else "") + backward


def _sendable(tensor: Tensor) -> Tensor:
    """The numbers as they lie in memory: Gloo counts bytes, so most tensors go, and are filled, as they are."""
    plain = type(tensor) is Tensor and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
    return tensor if plain else as_bytes(tensor)
