"""Decay between the tokens of a chunk, and its gradient, in sums of terms that each carry their own decay.

``steps`` [..., C, c] are the factors of the tokens, 0 where a document starts; c is 1 or the key dim. A product of
steps is never a quotient of two longer ones, and no gradient is a difference of two sums:
as they fade, so do their errors.
"""

import torch
from torch import Tensor

from seqpar.ops.decayed_linear_attention.chunks import Cut
from seqpar.ops.decayed_linear_attention.decay import decay_matrix, double_blocks, halves, quadrant, vector_scores


def build_steps(log_decay: Tensor | None, starts: tuple[int, ...], cut: Cut, like: Tensor) -> Tensor:
    """The factor of each token, [b or 1, h or 1, n, C, 1 or k] in the dtype of ``like``; padding does not decay."""
    size = cut.num_chunks * cut.chunk
    if log_decay is None:
        steps = like.new_ones(1, size, 1, 1)
    else:
        gates = log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1)
        steps = like.new_ones(gates.shape[0], size, *gates.shape[2:])
        torch.exp(gates.to(like.dtype), out=steps[:, : cut.tokens])
    steps[:, list(starts)] = 0
    return steps.unflatten(1, (cut.num_chunks, cut.chunk)).permute(0, 3, 1, 2, 4).contiguous()


def scores(rows: Tensor, keys: Tensor, steps: Tensor) -> Tensor:
    """``sum_c rows_ic keys_jc decay_ijc`` for j up to i, else zero: [..., C, C]."""
    if steps.shape[-1] == 1:
        return (rows @ keys.mT).mul_(decay_matrix(steps))
    return vector_scores(rows, keys, steps.expand(*rows.shape[:-1], -1))


def scores_backward(rows: Tensor, keys: Tensor, steps: Tensor, d_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, keys and the logarithms of the steps; ``d_scores`` must be zero for j after i."""
    if steps.shape[-1] > 1:
        return _vector_backward(rows, keys, steps.expand(*rows.shape[:-1], -1), d_scores)
    raw = d_scores * decay_matrix(steps)
    passing = suffix_sums(raw * (rows @ keys.mT)).tril(-1)
    return raw @ keys, raw.mT @ rows, passing.sum(-1, keepdim=True)


def _vector_backward(rows: Tensor, keys: Tensor, steps: Tensor, d_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    diagonal = d_scores.diagonal(0, -2, -1).unsqueeze(-1)
    d_rows, d_keys, d_gates = diagonal * keys, diagonal * rows, torch.zeros_like(steps)
    for block, all_into, all_out in double_blocks(steps):
        if block == steps.shape[-2]:
            break
        into, out = halves(all_into, block)[1], halves(all_out, block)[0]
        later, earlier = halves(rows, block)[1] * into, halves(keys, block)[0] * out
        part = quadrant(d_scores, block)
        d_later, d_earlier = part @ earlier, part.mT @ later
        halves(d_rows, block)[1].addcmul_(into, d_later)
        halves(d_keys, block)[0].addcmul_(out, d_earlier)
        halves(d_gates, block)[1].add_(suffix_sums(later * d_later))
        halves(d_gates, block)[0].add_(prefix_sums(earlier * d_earlier))
    return d_rows, d_keys, d_gates


def suffix_sums(x: Tensor) -> Tensor:
    """From each row to the last: what the gates get from products that end at a row."""
    return x.flip(-2).cumsum(-2).flip(-2)


def prefix_sums(x: Tensor) -> Tensor:
    """From the first row to the one before each: what the gates get from products that begin after a row."""
    sums = x.cumsum(-2).roll(1, -2)
    sums[..., 0, :] = 0
    return sums


def per_gate(x: Tensor, steps: Tensor) -> Tensor:
    """Sum over the channels that a gate acts on."""
    return x.sum(-1, keepdim=True) if steps.shape[-1] == 1 else x
