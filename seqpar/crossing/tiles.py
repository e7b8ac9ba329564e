"""Which of my queries see which of the keys: pieces of the same document, cut into tiles. Integers only.

Within two pieces of one document what is visible is always a band, whatever the layout: query ``i`` sees key ``j`` if
``low <= j - i <= high``. Causal, full, windowed, zigzag and striped differ in these two numbers only.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seqpar.collectives.rows import Range, Ranges, union
from seqpar.ops.softmax_block import Band
from seqpar.sharding.shard import Piece

SMALL = 256  # tiles of at most this many rows and keys are worth joining under one mask


@dataclass(frozen=True)
class Tile:
    """Some query rows against some key rows of a block, and the band that is visible (in tile coordinates)."""

    rows: Range
    keys: Range
    band: Band

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.keys[1] - self.keys[0]


@dataclass(frozen=True)
class Mosaic:
    """Several small tiles computed as one, under a mask: short documents would drown in calls."""

    rows: Range
    keys: Range
    tiles: tuple[Tile, ...]

    def mask(self, device: torch.device) -> Tensor:
        """``[rows, keys]`` bool: what is visible."""
        seen = torch.zeros(self.rows[1] - self.rows[0], self.keys[1] - self.keys[0], dtype=torch.bool)
        for tile in self.tiles:
            n, m = tile.shape
            top, left = tile.rows[0] - self.rows[0], tile.keys[0] - self.keys[0]
            seen[top : top + n, left : left + m] |= tile.band.mask(n, m)
        return seen.to(device)


def tiles(queries: Sequence[Piece], keys: Sequence[Piece], causal: bool, window: int | None) -> list[Tile]:
    """The visible tiles between two lists of pieces, in the order of the query rows."""
    by_document: dict[int, list[Piece]] = defaultdict(list)
    for key in keys:
        by_document[key.document].append(key)
    found = [_tile(query, key, causal, window) for query in queries for key in by_document[query.document]]
    return _join_full([tile for tile in found if tile is not None])


def _tile(query: Piece, key: Piece, causal: bool, window: int | None) -> Tile | None:
    """The part of two pieces where something is visible, or None."""
    n, m = query.count, key.count
    step = query.step if n > 1 else key.step
    assert n == 1 or m == 1 or query.step == key.step, "pieces of one document share their step"
    ahead = query.first - key.first
    high = ahead // step if causal else m - 1
    low = -((window - 1 - ahead) // step) if window is not None else 1 - n
    first_row, end_row = max(0, -high), min(n, m - low)
    first_key, end_key = max(0, first_row + low), min(m, end_row + high)
    if first_row >= end_row or first_key >= end_key:
        return None
    shift = first_row - first_key
    rows, width = end_row - first_row, end_key - first_key
    band = Band(
        low + shift if low + shift > 1 - rows else None,
        high + shift if high + shift < width - 1 else None,
    )
    return Tile((query.row + first_row, query.row + end_row), (key.row + first_key, key.row + end_key), band)


def _join_full(found: list[Tile]) -> list[Tile]:
    """Join neighbours of which everything is visible: the two halves of a zigzag shard make one rectangle."""
    joined: list[Tile] = []
    for tile in found:
        last = joined[-1] if joined else None
        if last and last.band == tile.band == Band():
            if last.keys == tile.keys and last.rows[1] == tile.rows[0]:
                joined[-1] = replace(last, rows=(last.rows[0], tile.rows[1]))
                continue
            if last.rows == tile.rows and last.keys[1] == tile.keys[0]:
                joined[-1] = replace(last, keys=(last.keys[0], tile.keys[1]))
                continue
        joined.append(tile)
    return joined


def needed_keys(found: Iterable[Tile]) -> Ranges:
    """The key rows that any tile reads."""
    return union(tile.keys for tile in found)


def mosaics(found: Sequence[Tile]) -> tuple[Tile | Mosaic, ...]:
    """Join runs of small tiles into mosaics of at most ``SMALL`` rows and keys."""
    result: list[Tile | Mosaic] = []
    pending: list[Tile] = []
    for tile in [*found, None]:
        if tile is not None and _fits([*pending, tile]):
            pending.append(tile)
            continue
        result.extend(pending if len(pending) < 2 else [_mosaic(pending)])
        pending = [] if tile is None else [tile]
    return tuple(result)


def _bounds(joined: Sequence[Tile]) -> tuple[Range, Range]:
    return (
        (min(t.rows[0] for t in joined), max(t.rows[1] for t in joined)),
        (min(t.keys[0] for t in joined), max(t.keys[1] for t in joined)),
    )


def _fits(joined: Sequence[Tile]) -> bool:
    return all(stop - start <= SMALL for start, stop in _bounds(joined))


def _mosaic(joined: Sequence[Tile]) -> Mosaic:
    rows, keys = _bounds(joined)
    return Mosaic(rows, keys, tuple(joined))
