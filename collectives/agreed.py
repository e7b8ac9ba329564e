"""What the ranks of a group agree on as they go: which function they are in, with which options.

The first time that a group comes to a *place* (a public function) with some options, its ranks compare them: one small
all-gather, and one ``ValueError`` on every rank if they differ. Later calls send nothing. They move the group's
*course*, a number that depends on all places and options so far, and every message says under which course it was
sent: ranks that went other ways, among places all known, cannot take each other's next message for the one expected.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from seqpar.collectives.group import Group, GroupError

KNOWN = 4096  # so many places and options are kept in mind; then all ranks forget them alike


class Disagreement(ValueError):  # noqa: N818 - says what happened
    """Ranks called one function with other arguments, or other functions: the same on every rank."""


@dataclass
class Agreed:
    """How far one group has come, as one rank sees it. ``every``: compare at every call, not only at the first."""

    every: bool = False
    call: str = ""
    place: str = ""
    course: int = 0
    known: set[int] = field(default_factory=set)

    def move(self, who: str, place: str, what: str, gather: Callable[[Tensor], Sequence[Tensor]]) -> None:
        """Go to ``place``; ``gather`` gives everyone's number."""
        number = number_of(f"{place} {what}")
        if self.every or number not in self.known:
            before, self.place = self.place, place
            _compare(who, place, what, [int(each) for each in gather(torch.tensor([number]))], before)
            if len(self.known) >= KNOWN:
                self.known.clear()
            self.known.add(number)
        self.place = place
        self.course = (self.course * 0x5851F42D4C957F2D + number) & 0xFFFFFFFFFFFFFFFF


def agree(group: Group, place: str, what: object) -> None:
    """All ranks of ``group`` call the function ``place``, and ``what`` must be the same on each.

    ``what`` is compared by its text, so it holds plain values: options, shapes, dtypes. Raises :class:`Disagreement`, a
    ``ValueError``, on every rank. Groups that cannot compare (a user's own) are left alone.
    """
    move = getattr(group, "agree", None)
    if move is not None and group.size > 1:
        move(place, str(what))


def note(group: Group, call: str) -> None:
    """From here on errors of ``group`` say that this is ``call``, as in "call 4 of the model"."""
    say = getattr(group, "note", None)
    if say is not None:
        say(call)


@contextmanager
def tell_of_errors(group: Group, place: str) -> Iterator[None]:
    """Ranks that wait for this one hear of an error that it raises in ``place``, instead of waiting for the time-out.

    If all of them raise one, too, nobody waits, and the group stays as it is.
    """
    try:
        yield
    except Exception as error:
        leave = getattr(group, "leave", None)
        if leave is not None and not isinstance(error, GroupError):
            leave(f"{type(error).__name__} in {place}: {str(error)[:300]}")
        raise


def number_of(text: str) -> int:
    """63 bits that depend on ``text``; the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def kind_of(verb: str, tensor: Tensor) -> str:
    """What a message is, in words."""
    return _kind_of(verb, tensor.shape, tensor.dtype)


@lru_cache(maxsize=1024)
def _kind_of(verb: str, shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{verb} of {list(shape)} {dtype}"


def tag_of(number: int, kind: str, course: int) -> int:
    """31 bits that two messages between the same ranks share only if they are the same one."""
    return zlib.crc32(f"{number} {course} {kind}".encode()) & 0x7FFFFFFF


def _compare(who: str, place: str, what: str, column: Sequence[int], before: str) -> None:
    if len(set(column)) == 1:
        return
    usual = max(column, key=lambda number: (column.count(number), number == column[0]))
    odd = [rank for rank, number in enumerate(column) if number != usual]
    theirs = f"rank {odd[0]}'s differs" if len(odd) == 1 else f"those of ranks {', '.join(map(str, odd))} differ"
    after = f", after {before}" if before and before != place else ""
    raise Disagreement(
        f"{who}: all ranks must call one function with the same options, but {theirs} from "
        f"{'the others' if 0 in odd else 'rank 0'}'s; mine: {place} with {what}{after}"
    )


def closed(who: str, what: str, why: str) -> GroupError:
    """The error of a verb of a group that an earlier error has closed."""
    return GroupError(f"{who}: {what}: the group is closed, since {why}")
