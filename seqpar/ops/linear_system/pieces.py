"""Which tokens are worked on together: runs of tokens of one document, as matmuls like them."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from seqpar.ops.kept import kept

LARGEST = 64


@dataclass(frozen=True, eq=False)
class Pieces:
    """Documents (or what is left of them), each in pieces from its first token on.

    Those whose state matters to others than their own tokens, and those that are longer, are cut into pieces of
    ``chunk`` tokens, the last of which may be shorter: so what passes through a piece always meets the same matrix,
    except in a document's last piece, after which no one asks for its state, unless the run ends there: ``last`` tokens
    are in that one. Any other document is a piece of its own, among those of about its length: ``short`` has, for each
    such length, how many pieces there are and the places that each has. No state enters or leaves these.

    ``count``: how many pieces of ``chunk`` tokens there are; ``rows``: the token at each place of these, then of the
    others, ``t`` where there is none. ``places [t]``: the reverse. ``depth [count]``: how many pieces of the same
    document come before, at most ``deepest``. ``continues``: the run's first document began before it.
    """

    chunk: int
    count: int
    short: tuple[tuple[int, int], ...]
    rows: Tensor
    places: Tensor
    depth: Tensor
    deepest: int
    last: int
    continues: bool

    @property
    def longest(self) -> int:
        """Places of the longest piece."""
        return max(self.chunk, *(length for _, length in self.short), 1)

    def apart(self, x: Tensor) -> list[Tensor]:
        """``[b, t, ...]`` as ``[b, pieces, places, ...]``: pieces of ``chunk`` tokens, then those of each length in
        ``short``; zeros where there is no token."""
        padded = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], 1)
        shapes = ((self.count, self.chunk), *self.short)
        parts = padded.index_select(1, self.rows).split([count * length for count, length in shapes], 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes)]

    def joined(self, parts: list[Tensor]) -> Tensor:
        """What :meth:`apart` took apart."""
        flat = [part.flatten(1, 2) for part in parts]
        return (flat[0] if len(flat) == 1 else torch.cat(flat, 1)).index_select(1, self.places)


@kept()
def pieces_of(tokens: int, starts: tuple[int, ...], device: torch.device) -> Pieces:
    """The pieces of a run of at least one token, in which documents start at ``starts``."""
    bounds, continues = sorted({0, *starts, tokens}), starts[:1] != (0,)
    begin, end = torch.tensor(list(pairwise(bounds)), dtype=torch.int64).unbind(1)
    passes = end - begin > LARGEST
    passes[-1] = True
    passes[0] |= continues
    chunk = _chunk(int((end - begin)[passes].sum()), int(passes.sum()))
    first, depth = _cut(begin[passes], end[passes], chunk)
    rows = [_rows(first, end[passes].repeat_interleave(-(-(end - begin)[passes] // chunk)), chunk, tokens)]
    short, left = [], ~passes
    for length in (2**level for level in range(LARGEST.bit_length())):
        fits = left & (end - begin <= length)
        left = left & ~fits
        if fits.any():
            short.append((int(fits.sum()), length))
            rows.append(_rows(begin[fits], end[fits], length, tokens))
    table = torch.cat(rows)
    there = (table < tokens).nonzero().flatten()
    places = torch.empty(tokens, dtype=torch.int64)
    places[table[there]] = there
    last, deepest = int(tokens - first[-1]), int(depth.max())
    table, places, depth = (each.to(device) for each in (table, places, depth))
    return Pieces(chunk, len(first), tuple(short), table, places, depth, deepest, last, continues)


def _cut(begin: Tensor, end: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The first token of every piece, and how many come before it in its document."""
    counts = -(-(end - begin) // chunk)
    depth = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return begin.repeat_interleave(counts) + chunk * depth, depth


def _rows(begin: Tensor, end: Tensor, length: int, nothing: int) -> Tensor:
    """The token at each of so many places from ``begin`` on, ``nothing`` from ``end`` on."""
    rows = begin[:, None] + torch.arange(length)
    return torch.where(rows < end[:, None], rows, nothing).flatten()


def _chunk(tokens: int, documents: int) -> int:
    """A power of two: the fewer tokens a document has, the smaller, so that at most half of all places are empty or
    so."""
    chunk = LARGEST
    while chunk > 1 and chunk * documents > tokens:
        chunk //= 2
    return chunk
