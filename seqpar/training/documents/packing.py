"""Documents put together into sequences of at most so many tokens: whole, cut where a sequence ends, or in windows.

Everything follows from the place in the order of documents where a sequence begins, so a few numbers are all that a run
needs to go on, at any number of ranks.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from seqpar.training.documents.order import shuffled
from seqpar.training.documents.source import Source

CUT, WHOLE, WINDOWS = PACKINGS = ("cut", "whole", "windows")
_ORDERED = 1024  # places of the order that are computed together


@dataclass(frozen=True)
class Packing:
    """How documents become sequences of at most ``tokens`` tokens.

    ``how``: ``"cut"``: one behind the other, each sequence full; what does not fit begins the next one, as a document
    of its own. ``"whole"``: none is cut; a longer one is refused, or left out where ``leave_out`` says so.
    ``"windows"``: a longer one is read in windows of ``tokens`` tokens, each beginning ``overlap`` tokens before the
    end of the one before it; what a window repeats is no target, so that with an overlap of at least 1 every token but
    a document's first is a target once. Whole documents and windows are put together from the next ``together``
    sequences' worth of them, the largest first, each where the least room is left.

    Raises ``ValueError`` for what does not fit together.
    """

    tokens: int
    how: str = CUT
    overlap: int = 0
    leave_out: bool = False
    together: int = 16

    def __post_init__(self) -> None:
        if self.how not in PACKINGS:
            raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, got {self.how!r}")
        if self.tokens < 1 or self.together < 1:
            raise ValueError(f"a sequence needs at least 1 token, got {self.tokens} (together: {self.together})")
        if not 0 <= self.overlap < self.tokens:
            raise ValueError(f"windows of {self.tokens} tokens overlap by 0 to {self.tokens - 1}, got {self.overlap}")
        if self.overlap and self.how != WINDOWS:
            raise ValueError(f"only windows overlap, and the packing is {self.how!r}")
        if self.leave_out and self.how != WHOLE:
            raise ValueError(f"only where documents stay whole can long ones be left out; the packing is {self.how!r}")


@dataclass(frozen=True)
class Piece:
    """Tokens ``start`` to ``stop`` of a document; the first ``context`` of them are read and not predicted."""

    document: int
    start: int
    stop: int
    context: int = 0

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Place:
    """Where a sequence begins: before the document at ``position`` of the order of an ``epoch``.

    ``taken``: where documents are cut, the tokens of this document that came before; else how many sequences of those
    that are put together from here on came before.
    """

    epoch: int = 0
    position: int = 0
    taken: int = 0


class Packer:
    """Gives the sequence that begins at a place. ``seed`` of the order; None: as they are, in every epoch. ``epochs``:
    how many there are (None: no end)."""

    def __init__(self, source: Source, packing: Packing, seed: int | None, epochs: int | None = None) -> None:
        self._source, self._packing, self._seed, self._num = source, packing, seed, len(source)
        self._epochs = epochs
        self._orders: OrderedDict[tuple[int, int], list[int]] = OrderedDict()
        self._group: tuple[tuple[int, int], list[list[Piece]], int] | None = None

    def next(self, place: Place) -> tuple[list[Piece], Place]:
        """The pieces of the sequence at ``place``, and the place after it; none after the last epoch.

        Sequences end with an epoch, and hold a token at least: what is left of an epoch may be empty documents.
        Raises ``ValueError`` if no document of an epoch has a token, if one is too long, and, where epochs do not end,
        if all together do not fill one sequence.
        """
        found: list[Piece] = []
        first, begun = place, place.epoch
        while not found and (self._epochs is None or place.epoch < self._epochs):
            if place.epoch > begun + 1:
                raise ValueError(f"no token in {self._num} documents ({self._source.name(0)}, ...)")
            found, place = self._cut(place) if self._packing.how == CUT else self._together(place)
        if self._epochs is None and first == Place(begun) and place == Place(begun + 1):
            self._check_full(sum(piece.size for piece in found))
        return found, place

    def _check_full(self, tokens: int) -> None:
        if tokens < self._packing.tokens:
            raise ValueError(
                f"{self._num} documents ({self._source.name(0)}, ...) hold {tokens} tokens together, which do not fill "
                f"one sequence of {self._packing.tokens}"
            )

    def _document(self, epoch: int, position: int) -> int:
        """Which document stands at a position of an epoch."""
        if self._seed is None:
            return position
        first = position - position % _ORDERED
        found = self._orders.get((epoch, first))
        if found is None:
            places = np.arange(first, min(first + _ORDERED, self._num))
            found = self._orders[epoch, first] = shuffled(places, self._num, self._seed, epoch).tolist()
            if len(self._orders) > 4:
                self._orders.popitem(last=False)
        return found[position - first]

    def _placed(self, epoch: int, position: int, taken: int) -> Place:
        """The place, or the beginning of the next epoch where this one has ended."""
        return Place(epoch, position, taken) if position < self._num else Place(epoch + 1)

    def _cut(self, place: Place) -> tuple[list[Piece], Place]:
        room, pieces, position, taken = self._packing.tokens, [], place.position, place.taken
        while room and position < self._num:
            document = self._document(place.epoch, position)
            length = self._source.length(document)
            stop = min(length, taken + room)
            if stop > taken:
                pieces.append(Piece(document, taken, stop))
            room -= stop - taken
            position, taken = (position + 1, 0) if stop == length else (position, stop)
        return pieces, self._placed(place.epoch, position, taken)

    def _together(self, place: Place) -> tuple[list[Piece], Place]:
        key = (place.epoch, place.position)
        if self._group is None or self._group[0] != key:
            pieces, position = self._windows(place)
            self._group = key, best_fit(pieces, self._packing.tokens), position
        _, sequences, position = self._group
        if place.taken + 1 < len(sequences):
            return sequences[place.taken], Place(place.epoch, place.position, place.taken + 1)
        return (sequences[place.taken] if sequences else []), self._placed(place.epoch, position, 0)

    def _windows(self, place: Place) -> tuple[list[Piece], int]:
        """The pieces of the next documents that have enough tokens for ``together`` sequences, and where these end."""
        position, pieces, held = place.position, [], 0
        while position < self._num and held < self._packing.together * self._packing.tokens:
            mine = self._pieces(self._document(place.epoch, position))
            pieces += mine
            held += sum(piece.size for piece in mine)
            position += 1
        return pieces, position

    def _pieces(self, document: int) -> list[Piece]:
        length, most, overlap = self._source.length(document), self._packing.tokens, self._packing.overlap
        if length <= most:
            return [Piece(document, 0, length)] if length else []
        if self._packing.how == WHOLE:
            if self._packing.leave_out:
                return []
            raise ValueError(
                f"{self._source.name(document)}: has {length} tokens, a sequence holds {most}, and documents are to "
                "stay whole: cut it, read it in windows, leave it out, or take longer sequences"
            )
        starts = range(0, length - overlap, most - overlap)
        return [Piece(document, start, min(start + most, length), overlap if start else 0) for start in starts]


def best_fit(pieces: Sequence[Piece], tokens: int) -> list[list[Piece]]:
    """Sequences of at most ``tokens`` tokens, in the order of their first pieces: the largest piece goes first, each to
    the sequence in which it leaves the least room."""
    sequences: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what is left in which sequence, in order
    for number in sorted(range(len(pieces)), key=lambda each: -pieces[each].size):
        size = pieces[number].size
        place = bisect_left(rooms, (size, -1))
        left, sequence = rooms.pop(place) if place < len(rooms) else (tokens, len(sequences))
        if sequence == len(sequences):
            sequences.append([])
        sequences[sequence].append(number)
        insort(rooms, (left - size, sequence))
    return [[pieces[number] for number in sorted(each)] for each in sorted(sequences, key=min)]
