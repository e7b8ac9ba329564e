"""Which of my queries see which of the keys: pieces of the same document, cut into tiles. Integers only.

Within two pieces of one document what is visible is always a band, whatever the layout: query ``i`` sees key ``j`` if
``low <= j - i <= high``. Causal, full, windowed, zigzag and striped differ in these two numbers only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from seqpar.collectives.rows import Range
from seqpar.columns import Column, counted
from seqpar.meetings import EVERYTHING, Meetings
from seqpar.ops.softmax_block import Band
from seqpar.planned import Planned

SMALL = 256  # tiles of at most this many rows and keys are worth joining under one mask

Corners = tuple[int, int, int, int, int, int]  # first and end row, first and end key, lowest and highest key - row


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


def _join_full(found: Sequence[Corners]) -> list[Corners]:
    """Join neighbours of which everything is visible: the two halves of a zigzag shard make one rectangle."""
    joined: list[Corners] = []
    for tile in found:
        last = joined[-1] if joined else None
        if last and last[4:] == tile[4:] == EVERYTHING:
            if last[2:4] == tile[2:4] and last[1] == tile[0]:
                joined[-1] = (last[0], *tile[1:])
                continue
            if last[:2] == tile[:2] and last[3] == tile[2]:
                joined[-1] = (*last[:3], *tile[3:])
                continue
        joined.append(tile)
    return joined


def _mosaics(found: Sequence[Corners]) -> Tiles:
    """Join runs of small tiles into mosaics of at most ``SMALL`` rows and keys."""
    result: list[Tile | Mosaic] = []
    begin, bounds = 0, (0, 0, 0, 0)
    for index, tile in enumerate(found):
        grown = _around(bounds, tile) if index > begin else tile[:4]
        if grown[1] - grown[0] <= SMALL and grown[3] - grown[2] <= SMALL:
            bounds = grown
            continue
        result.extend(_joined(found[begin:index], bounds))
        begin, bounds = index, tile[:4]
    result.extend(_joined(found[begin:], bounds))
    return tuple(result)


def _around(bounds: tuple[int, int, int, int], tile: Corners) -> tuple[int, int, int, int]:
    first, end, first_key, end_key = bounds
    return min(first, tile[0]), max(end, tile[1]), min(first_key, tile[2]), max(end_key, tile[3])


def _joined(tiles: Sequence[Corners], bounds: tuple[int, int, int, int]) -> list[Tile | Mosaic]:
    """The tiles as one, if there are several."""
    if len(tiles) > 1:
        return [Mosaic(bounds[:2], bounds[2:], np.array(tiles, np.int64))]
    return [Tile((first, end), (key, end_key), _band(low, high)) for first, end, key, end_key, low, high in tiles]


def _band(low: int, high: int) -> Band:
    return Band(None if low == EVERYTHING[0] else low, None if high == EVERYTHING[1] else high)
