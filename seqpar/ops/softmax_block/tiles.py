"""Tile sizes of the attention kernels: a plain table per architecture, no search.

A row is looked up by architecture, by the bytes of an element and by the larger head dim, and gives a tile for each
of the three kernels. Larger tiles reuse more of what they load, until accumulators no longer fit into registers or
tiles into shared memory; rows for 16 bits do not spill, nor do those for fp32 and dims up to 64.
"""

from typing import NamedTuple

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_DIM = 256
LARGEST_TILE = 128  # tokens


class Tile(NamedTuple):
    """How one program works: ``own`` tokens stay with it, ``visited`` tokens pass by at a time."""

    own: int
    visited: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tiles of forward (own queries), of the gradient of queries and of that of keys and values (own keys)."""

    forward: Tile
    queries: Tile
    keys: Tile


_LARGE_DIM = Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 16, 4, 1))
_FP32 = ((64, Tiles(*[Tile(32, 32, 8, 1)] * 3)), (256, Tiles(*[Tile(16, 16, 8, 1)] * 3)))
_INTERPRETED = Tiles(Tile(64, 32, 1, 1), Tile(32, 64, 1, 1), Tile(64, 32, 1, 1))  # unequal, so that tests see a mix-up

# {architecture: {bytes of an element: ((largest head dim, tiles), ...)}}
_TABLE: dict[str, dict[int, tuple[tuple[int, Tiles], ...]]] = {
    "cpu": {2: ((256, _INTERPRETED),), 4: ((256, _INTERPRETED),)},
    "sm_80": {
        2: (
            (64, Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2))),
            (128, Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2))),
            (256, _LARGE_DIM),
        ),
        4: _FP32,
    },
    "sm_90": {
        2: (
            (64, Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(128, 64, 8, 2))),
            (128, Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2))),
            (256, _LARGE_DIM),
        ),
        4: _FP32,
    },
    "gfx942": {
        2: (
            (64, Tiles(Tile(128, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1))),
            (128, Tiles(Tile(64, 64, 4, 1), Tile(64, 32, 4, 1), Tile(64, 16, 4, 1))),
            (256, _LARGE_DIM),
        ),
        4: (_FP32[0], (256, Tiles(*[Tile(16, 16, 4, 1)] * 3))),
    },
}
_UNKNOWN = {2: ((256, _LARGE_DIM),), 4: ((256, Tiles(*[Tile(16, 16, 8, 1)] * 3)),)}  # fits on any


def tiles(architecture: str, bytes_: int, dim: int) -> Tiles:
    """The row for elements of ``bytes_`` and head dims up to ``dim``; a safe one for an unknown architecture."""
    rows = _TABLE.get(architecture, _UNKNOWN)[bytes_]
    return next(row for largest, row in rows if dim <= largest)
