"""How the tokens of a run are cut into chunks, and the work into tiles.

A tile holds some chunks of some sequences and heads, [batch, heads, chunks, tokens of a chunk, dim]. On CPU it is small
enough to stay in the cache, so no temporary is ever as large as the inputs; on a GPU it is large enough to fill it.
Results lie in the same order, so that a matmul can write them where they stay.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64
CHUNK_WIDE = 128  # for dims above CHUNK, where the states of short chunks would take more room than the tokens
TILE_BYTES_CPU = 1 << 20
TILE_BYTES_GPU = 1 << 27


@dataclass(frozen=True)
class Tile:
    """Which sequences, heads and chunks; ``masked`` if a document starts in one of the chunks."""

    batch: slice
    heads: slice
    chunks: slice
    masked: bool

    def of(self, x: Tensor, extra: int = 0) -> Tensor:
        """My part of ``x`` [b or 1, h or 1, n or 1, ...], with ``extra`` more chunks."""
        chunks = slice(self.chunks.start, self.chunks.stop + extra)
        for dim, part in enumerate((self.batch, self.heads, chunks)):
            if x.shape[dim] > 1:
                x = x[(slice(None),) * dim + (part,)]
        return x


@dataclass(frozen=True)
class Cut:
    """``tokens`` tokens in ``num_chunks`` chunks of ``chunk`` tokens; the last one is padded.

    ``tiles`` hold as many chunks of a head as fit, so that results lie in one piece. ``columns`` hold as many heads of
    a chunk as fit and follow each other in time, so that one step takes the states of all heads a chunk further.
    """

    tokens: int
    chunk: int
    num_chunks: int
    tiles: tuple[Tile, ...]
    columns: tuple[Tile, ...] = ()


def cut_tokens(q: Tensor, dim: int, starts: tuple[int, ...], chunk: int = CHUNK) -> Cut:
    """Cut the tokens of ``q`` [b, t, h, k] into chunks of ``chunk``, shorter if there are only few tokens.

    ``dim`` is the larger of key and value dim.
    """
    batch, tokens, heads, _ = q.shape
    while chunk >= 2 * max(tokens, 8):
        chunk //= 2
    num_chunks = -(-tokens // chunk)
    bytes_ = TILE_BYTES_GPU if q.is_cuda else TILE_BYTES_CPU
    limit = max(1, bytes_ // (chunk * max(chunk, dim) * max(4, q.element_size())))  # in chunks, computed in fp32
    started = {start // chunk for start in starts if start > 0}
    sizes = (batch, heads, num_chunks)
    tiles = _tiles(sizes, (limit // max(1, num_chunks * heads), limit // max(1, num_chunks), limit), started)
    columns = _tiles(sizes, (limit, limit // max(1, batch), limit // max(1, batch * heads)), started)
    return Cut(tokens, chunk, num_chunks, tiles, columns)


def _tiles(sizes: tuple[int, int, int], steps: tuple[int, int, int], started: set[int]) -> tuple[Tile, ...]:
    """Tiles of up to ``steps`` sequences, heads and chunks; ``started``: the chunks in which a document starts."""
    batch, heads, chunks = (list(_slices(size, max(1, step))) for size, step in zip(sizes, steps))
    return tuple(
        Tile(in_batch, in_heads, in_chunks, not started.isdisjoint(range(in_chunks.start, in_chunks.stop)))
        for in_batch in batch
        for in_heads in heads
        for in_chunks in chunks
    )


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, size)) for first in range(0, size, step))


class Scratch:
    """Memory that the tiles of one stage use again and again, so that it stays in the cache.

    What :meth:`room` gives under a name is good until the next call with that name.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._rooms: dict[tuple[str, torch.dtype], Tensor] = {}

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor with anything in it."""
        size, found = math.prod(shape), self._rooms.get((name, dtype))
        if found is None or found.numel() < size:
            found = self._rooms[name, dtype] = self._like.new_empty(size, dtype=dtype)
        return found[:size].view(shape)

    def copy(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous copy of ``x`` in ``dtype``."""
        return self.room(name, x.shape, dtype).copy_(x)

    def convert(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` in ``dtype``: a copy only if it has another one."""
        return x if x.dtype == dtype else self.copy(name, x, dtype)


def load(
    x: Tensor,
    cut: Cut,
    tile: Tile,
    scratch: Scratch | None = None,
    name: str = "loaded",
    factor: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The tile of ``x`` [b, t, h, d], times ``factor``, in ``dtype`` (None: its own); tokens beyond the last are zero.

    A copy, without ``scratch`` in memory of its own: matmuls read contiguous rows faster. The product is taken in the
    dtype of the factor and rounded once.
    """
    scratch = scratch or Scratch(x)
    begin, end = tile.chunks.start * cut.chunk, tile.chunks.stop * cut.chunk
    piece = x[tile.batch if x.shape[0] > 1 else slice(None), begin : min(end, cut.tokens), tile.heads].transpose(1, 2)
    size, dtype = piece.shape[2], dtype or x.dtype
    room = scratch.room(
        name, (*piece.shape[:2], end - begin, piece.shape[3]), dtype if factor is None else factor.dtype
    )
    head = room[:, :, :size] if size < end - begin else room
    if factor is None:
        head.copy_(piece)
    else:
        same = factor.dtype == piece.dtype
        torch.mul(piece if same else head.copy_(piece), factor.flatten(2, 3)[:, :, :size], out=head)
    if size < end - begin:
        room[:, :, size:] = 0
    return scratch.convert(name, room, dtype).unflatten(2, (-1, cut.chunk))


def new_tiles(cut: Cut, x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Room for tiles over the batch and heads of ``x`` [b, t, h, ...]: [b, h, n, C, dim]."""
    return x.new_empty(x.shape[0], x.shape[2], cut.num_chunks, cut.chunk, dim, dtype=dtype)


def tokens_of(tiles: Tensor, cut: Cut) -> Tensor:
    """The tensor [b, t, h, d], a view, whose tiles are ``tiles`` [b, h, n, C, d]."""
    return tiles.flatten(2, 3)[:, :, : cut.tokens].transpose(1, 2)


def sum_chunks(x: Tensor, cut: Cut, dtype: torch.dtype) -> Tensor:
    """Sums over the tokens of each chunk: [b, t, h, d] -> [b, h, n, d, 1]."""
    whole = cut.tokens // cut.chunk * cut.chunk
    sums = x[:, :whole].unflatten(1, (whole // cut.chunk, cut.chunk)).sum(2, dtype=dtype)
    if whole < cut.tokens:
        sums = torch.cat([sums, x[:, whole:].sum(1, keepdim=True, dtype=dtype)], 1)
    return sums.transpose(1, 2).unsqueeze(-1)


@dataclass(frozen=True)
class Masks:
    """Which tokens the state passes by, from the document starts (1 or 0, in the dtype of the state).

    ``into`` [1, 1, n, C, 1]: the token still sees the state that enters its chunk. ``out`` (same shape): the token
    reaches the state that leaves it. ``across`` [1, 1, n, 1, 1]: the entering state reaches the leaving one.
    ``document`` [1, 1, n, C]: number of starts in the chunk up to and with the token.
    """

    into: Tensor
    out: Tensor
    across: Tensor
    document: Tensor


def build_masks(cut: Cut, starts: tuple[int, ...], like: Tensor) -> Masks:
    """The masks of all chunks, on the device and in the dtype of ``like``."""
    flags = torch.zeros(cut.num_chunks * cut.chunk, dtype=torch.int32)
    flags[list(starts)] = 1
    document = flags.view(1, 1, cut.num_chunks, cut.chunk).cumsum(-1).to(like.device)
    into = (document == 0).to(like.dtype).unsqueeze(-1)
    out = (document == document[..., -1:]).to(like.dtype).unsqueeze(-1)
    return Masks(into, out, into[..., -1:, :], document)


def same_document(masks: Masks, tile: Tile) -> Tensor:
    """[1, 1, n, C, C]: do both tokens belong to one document?"""
    document = tile.of(masks.document)
    return (document.unsqueeze(-1) == document.unsqueeze(-2)).to(masks.into.dtype)


def matrices(x: Tensor) -> Tensor:
    return x.flatten(0, -3)


def matmul(left: Tensor, right: Tensor, scratch: Scratch, name: str = "product") -> Tensor:
    """``left @ right`` in their dtype."""
    a, b = matrices(left), matrices(right)
    room = scratch.room(name, (*a.shape[:2], b.shape[2]), a.dtype)
    return torch.bmm(a, b, out=room).unflatten(0, left.shape[:-2])


def product_into(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Write ``left @ right`` to ``target``, contiguous and of their dtype."""
    torch.bmm(matrices(left), matrices(right), out=matrices(target))


def add_product_(total: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float) -> None:
    """``beta * total + alpha * (left @ right)`` in place."""
    matrices(total).baddbmm_(matrices(left), matrices(right), beta=beta, alpha=alpha)
