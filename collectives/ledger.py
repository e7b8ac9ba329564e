"""Counts what a group sends, so that the costs in papers become assertions in tests."""

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from seqpar.collectives.agreed import agree, note
from seqpar.collectives.group import Group, Pending, bytes_of, partition, shut


class Ledger:
    """A group that counts the messages and bytes this rank sends, per verb.

    A message is one tensor to one peer. ``all_gather`` sends my tensor to each peer; ``reduce_scatter`` each peer its
    part; ``all_reduce`` counts as its ring form, ``2 (n - 1) / n`` of the tensor in ``2 (n - 1)`` messages. What its
    subgroups send counts here too.

    >>> from collectives import run_ranks
    >>> import torch
    >>> def body(group):
    ...     ledger = Ledger(group)
    ...     ledger.all_gather(torch.zeros(4)).wait()
    ...     return ledger.bytes_, ledger.messages
    >>> run_ranks(3, body)
    [(32, 2), (32, 2), (32, 2)]
    """

    def __init__(self, group: Group, whole: "Ledger | None" = None) -> None:
        self._group = group
        self._whole = whole
        self._subgroups: dict[tuple[int, ...], Ledger] = {}
        self.bytes_by_verb: Counter[str] = Counter()
        self.messages_by_verb: Counter[str] = Counter()

    @property
    def rank(self) -> int:
        return self._group.rank

    @property
    def size(self) -> int:
        return self._group.size

    @property
    def global_ranks(self) -> tuple[int, ...] | None:
        """What the group's ranks are called outside of it, where they are processes."""
        return getattr(self._group, "global_ranks", None)

    @property
    def bytes_(self) -> int:
        """Bytes sent so far, all verbs."""
        return sum(self.bytes_by_verb.values())

    @property
    def messages(self) -> int:
        """Messages sent so far, all verbs."""
        return sum(self.messages_by_verb.values())

    def clear(self) -> None:
        """Start counting again from nothing."""
        self.bytes_by_verb.clear()
        self.messages_by_verb.clear()

    def _count(self, verb: str, bytes_: int, messages: int) -> None:
        if messages:
            self.bytes_by_verb[verb] += bytes_
            self.messages_by_verb[verb] += messages
        if self._whole is not None:
            self._whole._count(verb, bytes_, messages)

    def exchange(
        self, send: Tensor | None, to: int | None, receive: Tensor | None, source: int | None
    ) -> Pending[Tensor | None]:
        if send is not None and to is not None:
            self._count("exchange", bytes_of(send), 1)
        return self._group.exchange(send, to, receive, source)

    def all_gather(self, tensor: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> Pending[list[Tensor]]:
        self._count("all_gather", (self.size - 1) * bytes_of(tensor), self.size - 1)
        return self._group.all_gather(tensor, shapes)

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Pending[list[Tensor]]:
        leaving = [bytes_of(tensor) for peer, tensor in enumerate(sends) if peer != self.rank and tensor.numel()]
        self._count("all_to_all", sum(leaving), len(leaving))
        return self._group.all_to_all(sends, receives)

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Pending[Tensor]:
        leaving = [bytes_of(part) for peer, part in enumerate(parts) if peer != self.rank]
        self._count("reduce_scatter", sum(leaving), len(leaving))
        return self._group.reduce_scatter(parts)

    def all_reduce(self, tensor: Tensor) -> Pending[Tensor]:
        self._count("all_reduce", 2 * (self.size - 1) * bytes_of(tensor) // self.size, 2 * (self.size - 1))
        return self._group.all_reduce(tensor)

    def agree(self, place: str, what: str) -> None:
        """What ranks compare is not counted: it is sent the first time only."""
        agree(self._group, place, what)

    def note(self, call: str) -> None:
        note(self._group, call)

    def leave(self, why: str) -> None:
        leave = getattr(self._group, "leave", None)
        if leave is not None:
            leave(why)

    def subgroup(self, ranks: Sequence[int]) -> "Ledger":
        group, members = self._group.subgroup(ranks), tuple(ranks)
        known = self._subgroups.get(members)
        if known is None or known._group is not group:  # the one before was closed
            known = self._subgroups[members] = Ledger(group, whole=self)
        return known

    def partition(self, groups: Sequence[Sequence[int]]) -> Group:
        return partition(self, groups)

    def close(self) -> None:
        """Close the group that is counted, and its subgroups; the counts stay."""
        self._group.close()
        for part in self._subgroups.values():
            part.close()
        shut(self)
