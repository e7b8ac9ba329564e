"""How many rows of a batch a program of the recurrent kernels takes, and how much of a matrix it reads at a time.

A program goes through all steps of one head for some documents side by side. What a step multiplies by lies in
registers if it is one slice (`slice` at least the dim), else it is read again at every step, from the nearest cache.
"""

from typing import NamedTuple

LARGEST_DIM = 128  # of a head
MULTIPLE = 16  # of which dims are, so that neighbours are loaded together
ROWS = 16  # the fewest that matrix units multiply


class Tile(NamedTuple):
    """``slice``: how many numbers of a row are multiplied at a time."""

    slice: int
    warps: int


_INTERPRETED = Tile(16, 1)  # dims above 16 take several slices, so that tests see both
# {architecture: {bytes of an element: ((largest head dim, tile), ...)}}
_TABLE: dict[str, dict[int, tuple[tuple[int, Tile], ...]]] = {
    "cpu": dict.fromkeys((2, 4, 8), ((LARGEST_DIM, _INTERPRETED),)),
}
_GPU = {
    2: ((16, Tile(16, 4)), (32, Tile(32, 2)), (64, Tile(64, 4)), (LARGEST_DIM, Tile(32, 8))),
    4: ((16, Tile(16, 1)), (32, Tile(16, 2)), (64, Tile(16, 4)), (LARGEST_DIM, Tile(16, 8))),
}


def width_of(dim: int) -> int:
    """A power of two, as all tiles are."""
    return 1 << (dim - 1).bit_length()


def tile_of(architecture: str, bytes_: int, dim: int) -> Tile:
    """The row for matrices of elements of ``bytes_`` and heads of up to ``dim``."""
    rows = _TABLE.get(architecture, _GPU)[bytes_]
    return next(tile for largest, tile in rows if dim <= largest)
