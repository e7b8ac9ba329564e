"""How the tokens of a run are cut into chunks, and the work into tiles.

A tile holds some chunks of some sequences and heads, [batch, heads, chunks, tokens of a chunk, dim]. On CPU it is small
enough to stay in the cache, so no temporary is ever as large as the inputs; on a GPU it is large enough to fill it.
Results lie in the same order, so that a matmul can write them where they stay.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64
TILE_BYTES_CPU = 1 << 19
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
    """``tokens`` tokens in ``num_chunks`` chunks of ``chunk`` tokens; the last one is padded."""

    tokens: int
    chunk: int
    num_chunks: int
    tiles: tuple[Tile, ...]


def cut_tokens(q: Tensor, dim: int, starts: tuple[int, ...]) -> Cut:
    """Cut the tokens of ``q`` [b, t, h, k]; ``dim`` is the larger of key and value dim."""
    batch, tokens, heads, _ = q.shape
    chunk = CHUNK
    while chunk >= 2 * max(tokens, 8):
        chunk //= 2
    num_chunks = -(-tokens // chunk)
    bytes_ = TILE_BYTES_GPU if q.is_cuda else TILE_BYTES_CPU
    limit = max(1, bytes_ // (chunk * max(chunk, dim) * q.element_size()))  # in chunks
    started = {start // chunk for start in starts if start > 0}
    steps = (max(1, limit // max(1, num_chunks * heads)), max(1, limit // max(1, num_chunks)), limit)
    tiles = [
        Tile(in_batch, in_heads, in_chunks, not started.isdisjoint(range(in_chunks.start, in_chunks.stop)))
        for in_batch in _slices(batch, steps[0])
        for in_heads in _slices(heads, steps[1])
        for in_chunks in _slices(num_chunks, steps[2])
    ]
    return Cut(tokens, chunk, num_chunks, tuple(tiles))


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, size)) for first in range(0, size, step))


def load(x: Tensor, cut: Cut, tile: Tile) -> Tensor:
    """The tile of ``x`` [b, t, h, d]; tokens beyond the last are zero. A view where matmuls read it as fast."""
    begin, end = tile.chunks.start * cut.chunk, tile.chunks.stop * cut.chunk
    piece = x[tile.batch if x.shape[0] > 1 else slice(None), begin : min(end, cut.tokens), tile.heads]
    if piece.shape[1] < end - begin:
        padded = x.new_zeros(piece.shape[0], end - begin, *piece.shape[2:])
        padded[:, : piece.shape[1]] = piece
        piece = padded
    num_chunks = tile.chunks.stop - tile.chunks.start
    chunks = piece.unflatten(1, (num_chunks, cut.chunk)).permute(0, 3, 1, 2, 4)
    one_head = chunks.shape[0] == chunks.shape[1] == 1
    strided = one_head and x.stride(-1) == 1 and x.dtype in (torch.float32, torch.float64) and not x.is_cuda
    return chunks if strided else chunks.contiguous()


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


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    """``x * factor``, multiplied in the dtype of the factor and rounded once to that of x."""
    return x if factor is None else (x * factor).to(x.dtype)


def matrices(x: Tensor) -> Tensor:
    return x.flatten(0, -3)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in their dtype."""
    return torch.bmm(matrices(left), matrices(right)).unflatten(0, left.shape[:-2])


def product_into(target: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1.0) -> None:
    """Write ``alpha * left @ right`` to ``target``; a target of higher precision keeps what the device gives."""
    a, b = matrices(left), matrices(right)
    if target.dtype == left.dtype and target.is_contiguous():
        torch.bmm(a, b, out=target.view(a.shape[0], *target.shape[-2:]))
    elif target.dtype != left.dtype and left.is_cuda:
        target.copy_(torch.bmm(a, b, out_dtype=target.dtype).view(target.shape))
    else:
        target.copy_(torch.bmm(a, b).view(target.shape))
    if alpha != 1:
        target.mul_(alpha)


def add_product_(
    total: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float, factor: Tensor | None = None
) -> None:
    """``beta * total + alpha * factor * (left @ right)`` in place; ``factor`` belongs to rows or to entries."""
    if factor is None or factor.shape[-1] == 1:
        rows = scaled(left, factor)
        total.view(-1, *total.shape[-2:]).baddbmm_(matrices(rows), matrices(right), beta=beta, alpha=alpha)
    else:
        added = matmul(left, right).to(factor.dtype).mul_(factor)
        total.mul_(beta).add_(added, alpha=alpha)
