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

SMALLEST_16_BIT = 8  # blocks below it are multiplied in fp32: small 16-bit matmuls are slower
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


def decay_matrix(factors: Tensor) -> Tensor:
    """[..., C, C]: the decay from token j to token i, zero for j after i, of ``factors`` [..., C, 1]."""
    matrix = torch.zeros_like(factors).expand(*factors.shape[:-1], factors.shape[-2]).contiguous()
    matrix.diagonal(0, -2, -1).fill_(1)
    for block, into, out in double_blocks(factors):
        if block < factors.shape[-2]:
            torch.mul(halves(into, block)[1], halves(out, block)[0].mT, out=quadrant(matrix, block))
    return matrix


def vector_scores(q: Tensor, k: Tensor, factors: Tensor) -> Tensor:
    """``sum_c q_ic k_jc decay_ijc`` for j up to i, else zero: [..., C, C] in the dtype of q."""
    scores = q.new_zeros(*q.shape[:-1], q.shape[-2])
    for block, _, _, later, earlier in _meetings(q, k, factors, scores):
        quadrant(scores, block).copy_(_product_transposed(later, earlier))
    return scores


def vector_scores_backward(
    q: Tensor, k: Tensor, factors: Tensor, d_scores: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores again, and dq and dk (dtype of ``factors``) from their gradient ``d_scores`` (zero for j after i)."""
    scores = q.new_zeros(*q.shape[:-1], q.shape[-2])
    d_diagonal = d_scores.diagonal(0, -2, -1).unsqueeze(-1).to(factors.dtype)
    dq, dk = d_diagonal * k, d_diagonal * q
    for block, into, out, later, earlier in _meetings(q, k, factors, scores):
        quadrant(scores, block).copy_(_product_transposed(later, earlier))
        d_quadrant = quadrant(d_scores, block).to(later.dtype, memory_format=torch.contiguous_format)
        halves(dq, block)[1].addcmul_(into, _product(d_quadrant, earlier).to(dq.dtype))
        halves(dk, block)[0].addcmul_(out, _product(d_quadrant.mT, later).to(dk.dtype))
    return scores, dq, dk


def _meetings(
    q: Tensor, k: Tensor, factors: Tensor, scores: Tensor
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """For block sizes 1 to C / 2: the size, ``into`` of the later blocks, ``out`` of the earlier ones, the decayed
    queries of the later and keys of the earlier ones. Fills the diagonal of ``scores``."""
    dtype, size = q.dtype, q.shape[-2]
    q, k = q.to(factors.dtype), k.to(factors.dtype)
    scores.diagonal(0, -2, -1).copy_((q * k).sum(-1))
    for block, all_into, all_out in double_blocks(factors):
        if block == size:
            return
        into, out = halves(all_into, block)[1], halves(all_out, block)[0]
        later, earlier = halves(q, block)[1] * into, halves(k, block)[0] * out
        if block >= SMALLEST_16_BIT:
            later, earlier = later.to(dtype), earlier.to(dtype)
        yield block, into, out, later, earlier


def _product(left: Tensor, right: Tensor) -> Tensor:
    if left.shape[-1] > ELEMENTWISE:
        return left @ right
    return (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)


def _product_transposed(left: Tensor, right: Tensor) -> Tensor:
    if left.shape[-2] > ELEMENTWISE:
        return left @ right.mT
    return (left.unsqueeze(-2) * right.unsqueeze(-3)).sum(-1)


def suffix_sum_(x: Tensor) -> Tensor:
    """Replace each entry by the sum from it to the end of the chunk: x [..., C, d]."""
    block = 1
    while block < x.shape[-2]:
        earlier, later = halves(x, block)
        earlier.add_(later[..., :1, :])
        block *= 2
    return x
