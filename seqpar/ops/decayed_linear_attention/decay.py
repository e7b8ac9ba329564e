"""Decay inside a chunk, as products of per-token factors that are never larger than one.

Blocks of tokens double in size: 1, 2, 4, ... For blocks of m tokens, ``into[i]`` is the product of the factors from the
first token of the block to i, and ``out[j]`` that of the factors after j to its last token. Two neighbouring blocks
meet in one matmul: the decay from j in the earlier to i in the later one is ``out[j] * into[i]``. No sum of logarithms
is ever subtracted from another, so nothing overflows and nothing cancels, however strong the decay (the secondary
chunking of Yang et al. 2023, arXiv:2312.06635, carried to its end).

Tensors end in [tokens of a chunk, channels]; channels is 1 for gates that all key channels share.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.ops.decayed_linear_attention.chunks import (
    Cut,
    Masks,
    Scratch,
    Tile,
    build_masks,
    load,
    same_document,
    sum_chunks,
)

ELEMENTWISE = 2  # blocks up to it are multiplied and summed without a matmul


def halves(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Views of the earlier and the later block of each pair: [..., C, d] -> two of [..., C / 2m, m, d]."""
    pairs = x.unflatten(-2, (-1, 2, block))
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def quadrant(matrix: Tensor, block: int) -> Tensor:
    """View of the entries (later block, earlier block) of each pair: [..., C, C] -> [..., C / 2m, m, m]."""
    blocks = matrix.unflatten(-1, (-1, 2, block)).unflatten(-4, (-1, 2, block))
    return blocks[..., 1, :, :, 0, :].diagonal(0, -4, -2).movedim(-1, -3)


def double_blocks(factors: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Give (m, into, out) for m = 1, 2, 4, ..., C of ``factors`` [..., C, d]; both are updated in place between."""
    into, out = factors.clone(), torch.ones_like(factors)
    block = 1
    while True:
        yield block, into, out
        if block == factors.shape[-2]:
            return
        earlier, later = halves(into, block)
        halves(out, block)[0].mul_(later[..., -1:, :])
        later.mul_(earlier[..., -1:, :])
        block *= 2


def whole_chunk(factors: Tensor) -> tuple[Tensor, Tensor]:
    """``into`` and ``out`` for blocks of a whole chunk."""
    *_, (_, into, out) = double_blocks(factors)
    return into, out


@dataclass(frozen=True)
class Meetings:
    """Where neighbouring blocks of ``block`` tokens meet: ``into`` of the later ones, ``out`` of the earlier ones."""

    block: int
    into: Tensor
    out: Tensor


def meetings_of(factors: Tensor, dtype: torch.dtype) -> tuple[tuple[Meetings, ...], Tensor, Tensor]:
    """All meetings inside chunks of ``factors`` [..., C, d], in ``dtype``; and ``into`` and ``out`` of whole chunks."""
    found = []
    for block, into, out in double_blocks(factors):
        if block < factors.shape[-2]:
            parts = (halves(into, block)[1], halves(out, block)[0])
            found.append(Meetings(block, *(x.to(dtype, copy=True) for x in parts)))
    return tuple(found), into.to(dtype), out.to(dtype)


def fill_decay_matrix(matrix: Tensor, meetings: tuple[Meetings, ...]) -> Tensor:
    """Fill ``matrix`` [..., C, C]: the decay from token j to token i, zero for j after i, where channels d is 1."""
    matrix.zero_().diagonal(0, -2, -1).fill_(1)
    for meeting in meetings:
        torch.mul(meeting.into, meeting.out.mT, out=quadrant(matrix, meeting.block))
    return matrix


def decay_matrix(factors: Tensor) -> Tensor:
    """:func:`fill_decay_matrix` of ``factors`` [..., C, 1], in memory of its own."""
    matrix = factors.new_empty(*factors.shape[:-1], factors.shape[-2])
    return fill_decay_matrix(matrix, meetings_of(factors, factors.dtype)[0])


def vector_scores(q: Tensor, k: Tensor, factors: Tensor) -> Tensor:
    """``sum_c q_ic k_jc decay_ijc`` for j up to i, else zero: [..., C, C]; all in one dtype."""
    scores = q.new_zeros(*q.shape[:-1], q.shape[-2])
    for block, _, _, later, earlier in _meetings(q, k, factors, scores):
        quadrant(scores, block).copy_(_product_transposed(later, earlier))
    return scores


def vector_scores_backward(
    q: Tensor, k: Tensor, factors: Tensor, d_scores: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scores again, and from their gradient ``d_scores`` (zero for j after i) those of q, k and log factors."""
    scores, d_gates = q.new_zeros(*q.shape[:-1], q.shape[-2]), torch.zeros_like(factors)
    d_diagonal = d_scores.diagonal(0, -2, -1).unsqueeze(-1)
    dq, dk = d_diagonal * k, d_diagonal * q
    for block, into, out, later, earlier in _meetings(q, k, factors, scores):
        quadrant(scores, block).copy_(_product_transposed(later, earlier))
        d_quadrant = quadrant(d_scores, block).contiguous()
        d_later, d_earlier = _product(d_quadrant, earlier), _product(d_quadrant.mT, later)
        halves(dq, block)[1].addcmul_(into, d_later)
        halves(dk, block)[0].addcmul_(out, d_earlier)
        halves(d_gates, block)[1].add_(suffix_sums(d_later.mul_(later)))
        halves(d_gates, block)[0].add_(prefix_sums(d_earlier.mul_(earlier)))
    return scores, dq, dk, d_gates


def _meetings(
    q: Tensor, k: Tensor, factors: Tensor, scores: Tensor
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """For block sizes 1 to C / 2: the size, ``into`` of the later blocks, ``out`` of the earlier ones, the decayed
    queries of the later and keys of the earlier ones. Fills the diagonal of ``scores``."""
    scores.diagonal(0, -2, -1).copy_((q * k).sum(-1))
    for block, all_into, all_out in double_blocks(factors):
        if block == q.shape[-2]:
            return
        into, out = halves(all_into, block)[1], halves(all_out, block)[0]
        yield block, into, out, halves(q, block)[1] * into, halves(k, block)[0] * out


def _product(left: Tensor, right: Tensor) -> Tensor:
    if left.shape[-1] > ELEMENTWISE:
        return left @ right
    return (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)


def _product_transposed(left: Tensor, right: Tensor) -> Tensor:
    if left.shape[-2] > ELEMENTWISE:
        return left @ right.mT
    return (left.unsqueeze(-2) * right.unsqueeze(-3)).sum(-1)


def suffix_sums(x: Tensor) -> Tensor:
    """From each row to the last: what the gates get from products that end at a row."""
    return x if x.shape[-2] == 1 else x.flip(-2).cumsum(-2).flip(-2)


def prefix_sums(x: Tensor) -> Tensor:
    """From the first row to the one before each: what the gates get from products that begin after a row."""
    sums = torch.zeros_like(x)
    if x.shape[-2] > 1:
        torch.cumsum(x[..., :-1, :], -2, out=sums[..., 1:, :])
    return sums


def passing_sums(x: Tensor) -> Tensor:
    """For each l the sum of ``x_ij`` [..., C, C] over j < l <= i, what passes a gate: [..., C, 1]."""
    later = x.new_ones(x.shape[-2:]).triu_()
    return torch.matmul(later, x).tril_(-1).sum(-1, keepdim=True)


def per_gate(x: Tensor, channels: int) -> Tensor:
    """Sum over the key channels that a gate acts on: ``channels`` is 1 or the key dim."""
    return x.sum(-1, keepdim=True) if channels == 1 else x


@dataclass(frozen=True)
class Factors:
    """What decay and document bounds do in some chunks; None where they do nothing. Channels c is 1 or the key dim.

    ``into`` [b, h, n, C, c]: the decay of the entering state on its way to the token. ``out`` (same shape): that of the
    token on its way to the leaving state.
    """

    into: Tensor | None = None
    out: Tensor | None = None


@dataclass(frozen=True)
class Decay:
    """How a state fades and where it is reset.

    ``gates`` [b or 1, t, h, 1 or k]: log_decay. ``totals`` [b or 1, h, n, 1 or k, 1]: its sums over chunks. ``across``
    (same shape): what the state that enters a chunk is multiplied with. ``shared``: factors of all chunks, where all
    key channels decay alike; ``meetings``: there, where blocks inside chunks meet. ``matrix`` [1, h, 1, C, C]: decay
    from token to token, where all chunks decay alike.
    """

    starts: tuple[int, ...]
    cut: Cut
    dtype: torch.dtype
    masks: Masks | None
    gates: Tensor | None = None
    totals: Tensor | None = None
    across: Tensor | None = None
    shared: Factors | None = None
    meetings: tuple[Meetings, ...] = ()
    matrix: Tensor | None = None

    @property
    def is_vector(self) -> bool:
        """Does each key channel decay in its own way?"""
        return self.gates is not None and self.shared is None


def build_decay(q: Tensor, log_decay: Tensor | None, starts: tuple[int, ...], cut: Cut) -> Decay:
    """The decay of the tokens of ``q`` [b, t, h, k], from log_decay of any of the four kinds."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    masks = build_masks(cut, starts, q.new_empty(0, dtype=dtype)) if any(starts) else None
    if log_decay is None:
        return Decay(starts, cut, dtype, masks, across=None if masks is None else masks.across)
    gates, shared, matrix = log_decay, None, None
    meetings: tuple[Meetings, ...] = ()
    if log_decay.dim() == 1:
        gates = log_decay[None, None, :, None].expand(1, q.shape[1], -1, 1)
    elif log_decay.dim() == 3:
        gates = log_decay.unsqueeze(-1)
    totals = sum_chunks(gates, cut, dtype)
    if gates.shape[-1] == 1:  # small enough for fp64, in which a product of equal factors stays precise
        if log_decay.dim() == 1:
            shared, matrix = _constant_factors(log_decay, cut, masks, dtype)
        else:
            meetings, into, out = meetings_of(_steps(gates, cut, _whole(cut), torch.float64, Scratch(gates)), dtype)
            shared = _masked(into, out, masks, _whole(cut))
    across = totals.exp() if masks is None else totals.exp() * masks.across
    return Decay(starts, cut, dtype, masks, gates, totals, across, shared, meetings, matrix)


def _whole(cut: Cut) -> Tile:
    return Tile(slice(None), slice(None), slice(0, cut.num_chunks), True)


def _constant_factors(log_decay: Tensor, cut: Cut, masks: Masks | None, dtype: torch.dtype) -> tuple[Factors, Tensor]:
    """The factors of all chunks, taken from one and from a last one that is padded, and their one decay matrix."""
    steps = log_decay.double().exp()[None, :, None, None, None].repeat(1, 1, 1, cut.chunk, 1)
    meetings, into, out = meetings_of(steps, steps.dtype)
    matrix = fill_decay_matrix(steps.new_empty(*steps.shape[:-1], cut.chunk), meetings).to(dtype)
    into, out = (x.to(dtype).repeat(1, 1, cut.num_chunks, 1, 1) for x in (into, out))
    padding = cut.num_chunks * cut.chunk - cut.tokens
    if padding:
        steps[..., cut.chunk - padding :, :] = 1
        last_into, last_out = whole_chunk(steps)
        into[:, :, -1:], out[:, :, -1:] = last_into, last_out
    return _masked(into, out, masks, _whole(cut)), matrix


def tile_factors(decay: Decay, tile: Tile, scratch: Scratch) -> Factors:
    """The factors of the chunks of a tile."""
    if decay.shared is not None:
        return Factors(*(None if x is None else tile.of(x) for x in (decay.shared.into, decay.shared.out)))
    if decay.gates is not None:
        return _masked(*whole_chunk(tile_steps(decay, tile, scratch)), decay.masks, tile)
    if decay.masks is None or not tile.masked:
        return Factors()
    return Factors(tile.of(decay.masks.into), tile.of(decay.masks.out))


def tile_steps(decay: Decay, tile: Tile, scratch: Scratch) -> Tensor:
    """The decay of each token of a tile: [b, h, n, C, 1 or k]."""
    assert decay.gates is not None
    return _steps(decay.gates, decay.cut, tile, decay.dtype, scratch)


def tile_pairs(decay: Decay, tile: Tile, scratch: Scratch) -> Tensor | None:
    """What multiplies the scores, [b or 1, h or 1, n or 1, C, C]; None: only the causal mask."""
    pairs = None
    if decay.matrix is not None:
        pairs = tile.of(decay.matrix)
    elif decay.shared is not None and decay.shared.into is not None:
        into = tile.of(decay.shared.into)
        meetings = tuple(Meetings(x.block, tile.of(x.into), tile.of(x.out)) for x in decay.meetings)
        pairs = fill_decay_matrix(scratch.room("pairs", (*into.shape[:-1], into.shape[-2]), into.dtype), meetings)
    if decay.masks is None or not tile.masked:
        return pairs
    same = same_document(decay.masks, tile)
    return same.tril_() if pairs is None else same * pairs


def forward_reach(decay: Decay) -> Tensor | None:
    """What of the incoming state enters each chunk, and leaves the last: [b or 1, h, n + 1, 1 or k, 1]; None: all.

    Not for runs that start with a document: they see nothing of it.
    """
    if decay.totals is None and decay.masks is None:
        return None
    totals = _totals(decay)
    reach = torch.cat([torch.zeros_like(totals[:, :, :1]), totals.cumsum(2)], 2).exp_()
    if decay.starts:
        reach[:, :, decay.starts[0] // decay.cut.chunk + 1 :] = 0
    return reach


def backward_reach(decay: Decay) -> Tensor | None:
    """What of the state that enters each chunk, or leaves the last, reaches the final one: as :func:`forward_reach`."""
    if decay.totals is None and decay.masks is None:
        return None
    totals = _totals(decay)
    reach = torch.cat([totals.flip(2).cumsum(2).flip(2), torch.zeros_like(totals[:, :, :1])], 2).exp_()
    if any(decay.starts):
        reach[:, :, : decay.starts[-1] // decay.cut.chunk + 1] = 0
    return reach


def _totals(decay: Decay) -> Tensor:
    assert decay.totals is not None or decay.masks is not None
    return torch.zeros_like(decay.masks.across) if decay.totals is None else decay.totals  # type: ignore[union-attr]


def _masked(into: Tensor, out: Tensor, masks: Masks | None, tile: Tile) -> Factors:
    if masks is not None and tile.masked:
        into.mul_(tile.of(masks.into))
        out.mul_(tile.of(masks.out))
    return Factors(into, out)


def _steps(gates: Tensor, cut: Cut, tile: Tile, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    return load(gates, cut, tile, scratch, "steps", dtype=dtype).exp_()
