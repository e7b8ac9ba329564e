"""Which tokens are worked on together: runs of tokens of one document, as matmuls like them."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

LARGEST = 64


@dataclass(frozen=True, eq=False)
class Pieces:
    """Each document (or what is left of it) in pieces of ``chunk`` tokens from its first one; its last may be shorter.

    So what passes through a piece always meets the same matrix, except in a document's last piece, after which no one
    asks for its state, unless the run ends there: ``last`` tokens are in that one.
    ``rows [pieces * chunk]``: the token at each place, ``t`` where there is none. ``places [t]``: the reverse.
    ``depth [pieces]``: how many pieces of the same document come before. ``continues``: the run's first document began
    before it.
    """

    chunk: int
    rows: Tensor
    places: Tensor
    depth: Tensor
    last: int
    continues: bool

    def apart(self, x: Tensor) -> Tensor:
        """``[b, t, ...]`` as ``[b, pieces, chunk, ...]``, zeros where there is no token."""
        padded = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], 1)
        return padded.index_select(1, self.rows.to(x.device)).unflatten(1, (-1, self.chunk))

    def joined(self, x: Tensor) -> Tensor:
        """What :meth:`apart` took apart."""
        return x.flatten(1, 2).index_select(1, self.places.to(x.device))


@lru_cache(maxsize=64)
def pieces_of(tokens: int, starts: tuple[int, ...]) -> Pieces:
    """The pieces of a run of at least one token, in which documents start at ``starts``."""
    bounds = sorted({0, *starts, tokens})
    chunk = _chunk(tokens, len(bounds) - 1)
    first = [(begin, end, row) for begin, end in pairwise(bounds) for row in range(begin, end, chunk)]
    begins, ends, firsts = (torch.tensor(column, dtype=torch.int64) for column in zip(*first))
    rows = firsts[:, None] + torch.arange(chunk)
    there = rows < ends[:, None]
    places = there.flatten().nonzero().flatten()
    depth = (firsts - begins) // chunk
    rows = rows.where(there, tokens).flatten()
    return Pieces(chunk, rows, places, depth, int(tokens - firsts[-1]), starts[:1] != (0,))


def _chunk(tokens: int, documents: int) -> int:
    """A power of two: the fewer tokens a document has, the smaller, so that at most half of all places are empty or
    so."""
    chunk = LARGEST
    while chunk > 1 and chunk * documents > tokens:
        chunk //= 2
    return chunk
