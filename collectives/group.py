"""The protocol that ranks speak: a rank, a size and five verbs.

Every verb starts at once and returns a :class:`Pending`; ``wait()`` gives the result. On CUDA waiting is a stream
wait, never a device synchronize. Ranks are ranks of the group. A group of size 1 is legal and sends nothing. All ranks
of a group call the same verbs in the same order.

Two makers: :func:`seqpar.collectives.run_ranks` (ranks are threads) and :func:`seqpar.collectives.connect` (ranks are
processes).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, NoReturn, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

VERBS = ("exchange", "all_gather", "all_to_all", "reduce_scatter", "all_reduce", "subgroup", "partition", "close")
T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Pending(Protocol[T_co]):
    """Something that is under way."""

    def wait(self) -> T_co:
        """The result; blocks until it is there. May be called once."""
        ...


class Later(Generic[T]):
    """A :class:`Pending` whose result ``finish`` computes when it is waited for."""

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish = finish

    def wait(self) -> T:
        return self._finish()


def done(value: T) -> Later[T]:
    """A :class:`Pending` that is already there."""
    return Later(lambda: value)


@runtime_checkable
class Group(Protocol):
    """The ranks that share one sequence, seen from one of them."""

    @property
    def rank(self) -> int:
        """My number, 0 to ``size - 1``."""
        ...

    @property
    def size(self) -> int:
        """How many ranks we are."""
        ...

    def exchange(
        self, send: Tensor | None, to: int | None, receive: Tensor | None, source: int | None
    ) -> Pending[Tensor | None]:
        """Send ``send`` to ``to`` and fill ``receive`` (an empty tensor) from ``source``; either may be absent."""
        ...

    def all_gather(self, tensor: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> Pending[list[Tensor]]:
        """Every rank's tensor, in rank order; ``shapes`` gives the shape of each where they differ."""
        ...

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Pending[list[Tensor]]:
        """``sends[r]`` goes to rank ``r``, ``receives[r]`` (empty) is filled from it; without elements, no message."""
        ...

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Pending[Tensor]:
        """The sum over all ranks of their ``parts[my rank]``, added in rank order."""
        ...

    def all_reduce(self, tensor: Tensor) -> Pending[Tensor]:
        """The sum over all ranks: the same bits on each."""
        ...

    def subgroup(self, ranks: Sequence[int]) -> "Group":
        """The group of these ranks, in this order; only they call this. Made at the first call, then the same one."""
        ...

    def partition(self, groups: Sequence[Sequence[int]]) -> "Group":
        """The subgroup that holds me, of ``groups`` that split all ranks; every rank calls this alike."""
        ...

    def close(self) -> None:
        """Give back what the group and its subgroups hold; all its ranks call this, a second time does nothing.

        Afterwards every verb raises ``ValueError``. Returns once every rank has come here; while an error is raised,
        at once.
        """
        ...


class GroupError(RuntimeError):
    """A message did not come, or was not the one expected: says who waited for whom, in which verb, and why."""


class PeerFailed(GroupError):  # noqa: N818 - says what happened
    """Another rank failed first; its own error is the one to read."""


@contextmanager
def group_errors(who: str, verb: str, peer: str) -> Iterator[None]:
    """Turn an error of ``torch.distributed`` into one that names rank, verb and peer."""
    try:
        yield
    except GroupError:
        raise
    except RuntimeError as error:
        raise GroupError(
            f"{who}: {verb} with {peer} failed: {cause_of(error)} (did another rank fail first?)"
        ) from error


def cause_of(error: RuntimeError) -> str:
    """What ``torch.distributed`` says, without its addresses and advice."""
    return re.sub(r"^\[\S+?:\d+\] ", "", str(error)).split(". This is typically")[0]


def where(group: Group) -> str:
    """``rank r of n``, for error messages."""
    return f"rank {group.rank} of {group.size}"


def partition(group: Group, groups: Sequence[Sequence[int]]) -> Group:
    """What :meth:`Group.partition` does; raises ``ValueError`` unless ``groups`` hold each rank once."""
    if sorted(rank for ranks in groups for rank in ranks) != list(range(group.size)):
        got = [list(ranks) for ranks in groups]
        raise ValueError(f"the groups must hold each of the ranks 0 to {group.size - 1} once, got {got}")
    return group.subgroup(next(ranks for ranks in groups if group.rank in ranks))


def check_subgroup(group: Group, ranks: Sequence[int]) -> tuple[int, ...]:
    """The ranks; ``ValueError`` unless they are ranks of the group, each once, and I am one of them."""
    found = tuple(ranks)
    if group.rank not in found or len(set(found)) < len(found) or not set(found) <= set(range(group.size)):
        raise ValueError(
            f"{where(group)}: a subgroup holds ranks of 0 to {group.size - 1}, each once, and mine, got {list(found)}"
        )
    return found


def check_count(group: Group, verb: str, what: str, count: int) -> None:
    """Raise ``ValueError`` unless there is one of ``what`` per rank."""
    if count != group.size:
        raise ValueError(f"{where(group)}: {verb} takes {group.size} {what}, one per rank, got {count}")


def check_peer(group: Group, verb: str, peer: int) -> None:
    """Raise ``ValueError`` unless ``peer`` is another rank of the group."""
    if group.size == 1:
        raise ValueError(f"{where(group)} has no peer: {verb} with rank {peer}")
    if peer == group.rank or not 0 <= peer < group.size:
        raise ValueError(f"{where(group)}: {verb} with rank {peer}, expected another of ranks 0 to {group.size - 1}")


def check_apart(group: Group, verb: str, receives: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` if two peers' messages would fill one tensor."""
    filled = [tensor.data_ptr() for peer, tensor in enumerate(receives) if peer != group.rank and tensor.numel()]
    if len(set(filled)) < len(filled):
        raise ValueError(f"{where(group)}: {verb} would fill one tensor from several ranks: pass one to each")


def check_shapes(group: Group, tensor: Tensor, shapes: Sequence[Sequence[int]] | None) -> list[tuple[int, ...]]:
    """The shape of every rank's tensor; ``ValueError`` unless there is one per rank and mine is that of ``tensor``."""
    found = [tuple(shape) for shape in shapes or [tensor.shape] * group.size]
    check_count(group, "all_gather", "shapes", len(found))
    if found[group.rank] != tuple(tensor.shape):
        raise ValueError(f"{where(group)}: all_gather of {list(tensor.shape)}, but shapes say {found}")
    return found


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """The sum of ``parts`` from first to last: the same bits on every rank that adds the same parts."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def bytes_of(tensor: Tensor | None) -> int:
    """Size of a message in bytes."""
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


class Closed:
    """What is left of a group that was closed: every verb raises ``ValueError``."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def _refuse(self, verb: str) -> NoReturn:
        raise ValueError(f"{where(self)}: {verb} in a group that was closed: make a new one, or close it later")

    def exchange(
        self, send: Tensor | None, to: int | None, receive: Tensor | None, source: int | None
    ) -> Pending[Tensor | None]:
        self._refuse("exchange")

    def all_gather(self, tensor: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> Pending[list[Tensor]]:
        self._refuse("all_gather")

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Pending[list[Tensor]]:
        self._refuse("all_to_all")

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Pending[Tensor]:
        self._refuse("reduce_scatter")

    def all_reduce(self, tensor: Tensor) -> Pending[Tensor]:
        self._refuse("all_reduce")

    def subgroup(self, ranks: Sequence[int]) -> Group:
        self._refuse("subgroup")

    def partition(self, groups: Sequence[Sequence[int]]) -> Group:
        self._refuse("partition")

    def agree(self, place: str, what: str) -> None:
        self._refuse(place)

    def close(self) -> None:
        """Already done."""


def shut(group: Group) -> None:
    """From now on the verbs of ``group``, and closing it again, are those of :class:`Closed`."""
    closed = Closed(group.rank, group.size)
    for verb in (*VERBS, "agree"):
        setattr(group, verb, getattr(closed, verb))


def is_shut(group: Group) -> bool:
    """Whether :func:`shut` was called for this group."""
    return isinstance(getattr(group.close, "__self__", None), Closed)


class Alone:
    """The group of one: everything is already here."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self._inner: Group | None = None

    def exchange(
        self, send: Tensor | None, to: int | None, receive: Tensor | None, source: int | None
    ) -> Pending[Tensor | None]:
        for peer in (to, source):
            if peer is not None:
                check_peer(self, "exchange", peer)
        return done(None)

    def all_gather(self, tensor: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> Pending[list[Tensor]]:
        return done([tensor])

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Pending[list[Tensor]]:
        return done([sends[0]])

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Pending[Tensor]:
        return done(parts[0])

    def all_reduce(self, tensor: Tensor) -> Pending[Tensor]:
        return done(tensor.clone())

    def subgroup(self, ranks: Sequence[int]) -> Group:
        check_subgroup(self, ranks)
        if self._inner is None or is_shut(self._inner):
            self._inner = Alone()
        return self._inner

    def partition(self, groups: Sequence[Sequence[int]]) -> Group:
        return partition(self, groups)

    def close(self) -> None:
        if self._inner is not None:
            self._inner.close()
        shut(self)


def alone() -> Group:
    """The group of one rank: what a model runs in on one device."""
    return Alone()


def empty_like_shape(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of ``shape`` with the dtype and device of ``like``."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor seen as bytes; of another one a copy."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def contiguous(buffer: Tensor) -> Tensor:
    """An empty tensor itself if it is contiguous, else a new one like it."""
    return buffer if buffer.is_contiguous() else torch.empty_like(buffer, memory_format=torch.contiguous_format)
