"""How the tokens of a run are cut into chunks, and chunks into segments that are worked on together.

A tile holds the chunks of one segment, [chunks, batch, heads, tokens of a chunk, dim], contiguous. On CPU a segment is
small enough to stay in the cache, so no temporary is ever as large as the inputs; on a GPU it is large enough to fill it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64
TILE_CPU = 1 << 18
TILE_GPU = 1 << 25


@dataclass(frozen=True)
class Segment:
    """The chunks ``first`` to ``stop - 1``; ``masked`` if a document starts in one of them."""

    first: int
    stop: int
    masked: bool

    @property
    def chunks(self) -> slice:
        return slice(self.first, self.stop)

    @property
    def following(self) -> slice:
        """Where the states that leave my chunks stand among those that enter chunks."""
        return slice(self.first + 1, self.stop + 1)


@dataclass(frozen=True)
class Cut:
    """``tokens`` tokens in ``num_chunks`` chunks of ``chunk`` tokens; the last one is padded."""

    tokens: int
    chunk: int
    num_chunks: int
    segments: tuple[Segment, ...]


def cut_tokens(tokens: int, row_elements: int, starts: tuple[int, ...], device: torch.device) -> Cut:
    """Cut ``tokens`` tokens; ``row_elements`` is the size of one token over batch, heads and dim."""
    chunk = CHUNK
    while chunk >= 2 * max(tokens, 8):
        chunk //= 2
    num_chunks = -(-tokens // chunk)
    tile_elements = TILE_GPU if device.type == "cuda" else TILE_CPU
    step = max(1, tile_elements // max(1, chunk * row_elements))
    started = {start // chunk for start in starts}
    segments = []
    for first in range(0, num_chunks, step):
        stop = min(first + step, num_chunks)
        segments.append(Segment(first, stop, not started.isdisjoint(range(first, stop))))
    return Cut(tokens, chunk, num_chunks, tuple(segments))


def load(x: Tensor, cut: Cut, segment: Segment) -> Tensor:
    """The tile of ``x`` [b, t, h, d]; tokens beyond the last are zero."""
    begin, end = segment.first * cut.chunk, segment.stop * cut.chunk
    piece = x[:, begin : min(end, cut.tokens)]
    if piece.shape[1] < end - begin:
        padded = x.new_zeros(x.shape[0], end - begin, *x.shape[2:])
        padded[:, : piece.shape[1]] = piece
        piece = padded
    return piece.unflatten(1, (-1, cut.chunk)).permute(1, 0, 3, 2, 4).contiguous()


def store(target: Tensor, tile: Tensor, cut: Cut, segment: Segment) -> None:
    """Write ``tile`` to its place in ``target`` [b, t, h, d], rounding to its dtype."""
    begin, end = segment.first * cut.chunk, segment.stop * cut.chunk
    tokens_first = tile.permute(1, 0, 3, 2, 4)
    if end <= cut.tokens:
        target[:, begin:end].unflatten(1, (-1, cut.chunk)).copy_(tokens_first)
    else:
        target[:, begin:].copy_(tokens_first.flatten(1, 2)[:, : cut.tokens - begin])


@dataclass(frozen=True)
class Masks:
    """Which tokens the state passes by, from the document starts (1 or 0, in the dtype of the state).

    ``into`` [n, 1, 1, C, 1]: the token still sees the state that enters its chunk. ``out`` (same shape): the token
    reaches the state that leaves it. ``across`` [n, 1, 1, 1, 1]: the entering state reaches the leaving one.
    ``document`` [n, 1, 1, C]: number of starts in the chunk up to and with the token.
    """

    into: Tensor
    out: Tensor
    across: Tensor
    document: Tensor


def build_masks(cut: Cut, starts: tuple[int, ...], like: Tensor) -> Masks:
    """The masks of all chunks, on the device and in the dtype of ``like``."""
    flags = torch.zeros(cut.num_chunks * cut.chunk, dtype=torch.int32)
    flags[list(starts)] = 1
    document = flags.view(cut.num_chunks, 1, 1, cut.chunk).cumsum(-1).to(like.device)
    into = (document == 0).to(like.dtype).unsqueeze(-1)
    out = (document == document[..., -1:]).to(like.dtype).unsqueeze(-1)
    return Masks(into, out, into[..., -1:, :], document)


def same_document(masks: Masks, segment: Segment) -> Tensor:
    """[n, 1, 1, C, C]: do both tokens belong to one document?"""
    document = masks.document[segment.chunks]
    return (document.unsqueeze(-1) == document.unsqueeze(-2)).to(masks.into.dtype)
