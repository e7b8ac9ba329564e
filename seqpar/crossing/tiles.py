"""Which of my queries see which of the keys: pieces of the same document, cut into tiles. Integers only.

Within two pieces of one document what is visible is always a band, whatever the layout: query ``i`` sees key ``j`` if
``low <= j - i <= high``. Causal, full, windowed, zigzag and striped differ in these two numbers only.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from seqpar.collectives.planned import Planned
from seqpar.collectives.rows import Range
from seqpar.crossing.meetings import EVERYTHING, Meetings
from seqpar.ops.softmax_block import Band
from seqpar.sharding.columns import Column, counted

SMALL = 256  # tiles of at most this many rows and keys are worth joining under one mask
FEW = 8  # as many tiles are looked at one by one: a column costs more


@dataclass(frozen=True)
class Tile:
    """Some query rows against some key rows of a block, and the band that is visible (in tile coordinates)."""

    rows: Range
    keys: Range
    band: Band

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.keys[1] - self.keys[0]


@dataclass(frozen=True, eq=False)
class Mosaic:
    """Several small tiles computed as one, under a mask: short documents would drown in calls."""

    rows: Range
    keys: Range
    tiles: Column  # [tiles, 6]: the corners of each

    def mask(self, device: torch.device) -> Tensor:
        """``[rows, keys]`` bool: what is visible."""
        return _mask(self).on(device)


Tiles = tuple[Tile | Mosaic, ...]


@lru_cache(maxsize=1024)  # of at most 64 KiB each
def _mask(mosaic: Mosaic) -> Planned:
    """Each row of a tile sees keys that follow each other: +1 where they begin, -1 where they end."""
    first, end, first_key, end_key, low, high = mosaic.tiles.T
    row = np.repeat(first, end - first) + counted(end - first)
    first, first_key, end_key, low, high = (
        np.repeat(each, end - first) for each in (first, first_key, end_key, low, high)
    )
    begins = np.clip(first_key + row - first + low, first_key, end_key)
    ends = np.clip(first_key + row - first + high + 1, begins, end_key)
    edges = np.zeros((mosaic.rows[1] - mosaic.rows[0], mosaic.keys[1] - mosaic.keys[0] + 1), np.int64)
    np.add.at(edges, (row - mosaic.rows[0], begins - mosaic.keys[0]), 1)
    np.add.at(edges, (row - mosaic.rows[0], ends - mosaic.keys[0]), -1)
    return Planned(np.cumsum(edges, 1)[:, :-1] > 0)


def laid(met: Meetings) -> Tiles:
    """The tiles of what meets in one block, in the order given; small ones joined."""
    return _mosaics(_join_full(met.corners()))


def _join_full(corners: Column) -> Column:
    """Join neighbours of which everything is visible: the two halves of a zigzag shard make one rectangle."""
    if not len(corners):
        return corners
    same, begins = corners[1:] == corners[:-1], corners[1:, (0, 2)] == corners[:-1, (1, 3)]
    full = (corners[:, 4:] == EVERYTHING).all(1)
    may = full[1:] & full[:-1] & (same[:, 3] & begins[:, 0] | same[:, 1] & begins[:, 1])  # whatever was joined before
    if not may.any():
        return corners
    first, last = _chains(may)
    whole = corners[first]
    whole[:, (1, 3)] = corners[last][:, (1, 3)]
    down, along = same[:, 2] & same[:, 3] & begins[:, 0], same[:, 0] & same[:, 1] & begins[:, 1]
    chain = np.append(0, np.cumsum(~may))
    links = np.array([np.bincount(chain[1:][may & way], minlength=len(first)) for way in (down, along)])
    straight = (links == last - first).any(0)  # all of them go one way: a rectangle, however long
    if straight.all():
        return whole
    places, joined = _one_by_one(corners, np.flatnonzero(~straight[chain]), may)
    order = np.argsort(np.concatenate([first[straight], places]), kind="stable")
    return np.concatenate([whole[straight], joined])[order]


def _chains(may: Column) -> tuple[Column, Column]:
    """First and last of what hangs together, ``may``: each but the first with the one before it."""
    first = np.flatnonzero(np.append(True, ~may))
    return first, np.append(first[1:], len(may) + 1) - 1


def _one_by_one(corners: Column, beside: Column, may: Column) -> tuple[Column, Column]:
    """Those ``beside`` each other joined as long as they make a rectangle: where it begins, and what it is."""
    joined: list[list[int]] = []
    places: list[int] = []
    after = np.append(False, may)[beside].tolist()  # beside[0] is after none
    for place, tile, may_grow in zip(beside.tolist(), corners[beside].tolist(), after):
        if not (may_grow and _grown(joined[-1], tile)):
            joined.append(tile)
            places.append(place)
    return np.array(places), np.array(joined)


def _grown(last: list[int], tile: list[int]) -> bool:
    """Whether two tiles of which everything is visible are a rectangle; ``last`` becomes it."""
    first, end, first_key, end_key, _, _ = tile
    if last[1] == first and last[2] == first_key and last[3] == end_key:
        last[1] = end
        return True
    if last[3] == first_key and last[0] == first and last[1] == end:
        last[3] = end_key
        return True
    return False


def _mosaics(corners: Column) -> Tiles:
    """Join runs of small tiles into mosaics of at most ``SMALL`` rows and keys."""
    result: list[Tile | Mosaic] = []
    pairs = np.maximum(corners[1:, (1, 3)], corners[:-1, (1, 3)]) - np.minimum(
        corners[1:, (0, 2)], corners[:-1, (0, 2)]
    )
    apart = (np.flatnonzero((pairs > SMALL).any(1)) + 1).tolist()
    for begin, end in pairwise([0, *apart, len(corners)]):
        while begin < end:
            size, (first, last, first_key, last_key) = _fitting(corners[begin:end])
            some = corners[begin : begin + size]
            result.append(_tile(some[0]) if size == 1 else Mosaic((first, last), (first_key, last_key), some))
            begin += size
    return tuple(result)


def _fitting(corners: Column) -> tuple[int, tuple[int, int, int, int]]:
    """How many of the first tiles fit under one mask, at least one, and their box; looks at few more than fit."""
    few = corners[:FEW, :4].tolist()
    first, end, first_key, end_key = few[0]
    for size, (row, last, key, last_key) in enumerate(few):
        box = min(first, row), max(end, last), min(first_key, key), max(end_key, last_key)
        if size and (box[1] - box[0] > SMALL or box[3] - box[2] > SMALL):
            return size, (first, end, first_key, end_key)
        first, end, first_key, end_key = box
    return (len(few), (first, end, first_key, end_key)) if len(few) == len(corners) else _fitting_many(corners)


def _fitting_many(corners: Column) -> tuple[int, tuple[int, int, int, int]]:
    """The same where more than ``FEW`` fit; looks at twice as many at most."""
    size = 4 * FEW
    while True:
        some = corners[:size]
        first, end = np.minimum.accumulate(some[:, (0, 2)]), np.maximum.accumulate(some[:, (1, 3)])
        beyond = np.flatnonzero((end - first > SMALL).any(1))
        if len(beyond) or size >= len(corners):
            fit = int(beyond[0]) if len(beyond) else len(some)
            (row, key), (last, last_key) = first[fit - 1].tolist(), end[fit - 1].tolist()
            return fit, (row, last, key, last_key)
        size *= 2


def _tile(corners: Column) -> Tile:
    first, end, first_key, end_key, low, high = corners.tolist()
    return Tile((first, end), (first_key, end_key), _band(low, high))


def _band(low: int, high: int) -> Band:
    return Band(None if low == EVERYTHING[0] else low, None if high == EVERYTHING[1] else high)
