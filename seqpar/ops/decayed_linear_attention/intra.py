"""Decay inside a chunk, as products of per-token factors that are never larger than one.

Blocks of tokens double in size: 1, 2, 4, ... For blocks of m tokens, ``into[i]`` is the product of the factors from the
first token of the block to i, and ``out[j]`` that of the factors after j to its last token. Two neighbouring blocks meet
in one matmul: the decay from j in the earlier to i in the later one is ``out[j] * into[i]``. No sum of logarithms is
ever subtracted from another, so nothing overflows and nothing cancels, however strong the decay (the secondary
chunking of Yang et al. 2023, arXiv:2312.06635, carried to its end).

Tensors end in [tokens of a chunk, channels]; channels is 1 for gates that all key channels share.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


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


def decay_matrix(factors: Tensor) -> Tensor:
    """[..., C, C]: the decay from token j to token i, zero for j after i, of ``factors`` [..., C, 1]."""
    matrix = torch.zeros_like(factors).expand(*factors.shape[:-1], factors.shape[-2]).contiguous()
    matrix.diagonal(0, -2, -1).fill_(1)
    for block, into, out in double_blocks(factors):
        if block < factors.shape[-2]:
            quadrant(matrix, block).copy_(halves(into, block)[1] * halves(out, block)[0].mT)
    return matrix


def vector_scores(q: Tensor, k: Tensor, factors: Tensor) -> Tensor:
    """``sum_c q_ic k_jc decay_ijc`` for j up to i, else zero: [..., C, C] in the dtype of q."""
    scores = q.new_zeros(*q.shape[:-1], q.shape[-2])
    scores.diagonal(0, -2, -1).copy_((q * k).sum(-1))
    for block, into, out in double_blocks(factors):
        if block < q.shape[-2]:
            later, earlier = meet(q, k, into, out, block)
            quadrant(scores, block).copy_(later @ earlier.mT)
    return scores


def meet(q: Tensor, k: Tensor, into: Tensor, out: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The decayed queries of the later and keys of the earlier blocks, rounded once to their dtype."""
    later = (halves(q, block)[1] * halves(into, block)[1]).to(q.dtype)
    earlier = (halves(k, block)[0] * halves(out, block)[0]).to(k.dtype)
    return later, earlier


def vector_scores_backward(
    q: Tensor, k: Tensor, factors: Tensor, d_scores: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores again, and dq and dk (dtype of ``factors``) from their gradient ``d_scores`` (zero for j after i)."""
    scores = q.new_zeros(*q.shape[:-1], q.shape[-2])
    scores.diagonal(0, -2, -1).copy_((q * k).sum(-1))
    d_diagonal = d_scores.diagonal(0, -2, -1).unsqueeze(-1).to(factors.dtype)
    dq, dk = d_diagonal * k, d_diagonal * q
    for block, into, out in double_blocks(factors):
        if block < q.shape[-2]:
            later, earlier = meet(q, k, into, out, block)
            quadrant(scores, block).copy_(later @ earlier.mT)
            d_quadrant = quadrant(d_scores, block).contiguous()
            halves(dq, block)[1].addcmul_(halves(into, block)[1], (d_quadrant @ earlier).to(dq.dtype))
            halves(dk, block)[0].addcmul_(halves(out, block)[0], (d_quadrant.mT @ later).to(dk.dtype))
    return scores, dq, dk


def suffix_sum_(x: Tensor) -> Tensor:
    """Replace each entry by the sum from it to the end of the chunk: x [..., C, d]."""
    block = 1
    while block < x.shape[-2]:
        earlier, later = halves(x, block)
        earlier.add_(later[..., :1, :])
        block *= 2
    return x
