"""Decay between the tokens of a chunk, and its gradient, in sums of terms that each carry their own decay.

``steps`` [..., C, c] are the factors of the tokens, 0 where a document starts; c is 1 or the key dim. A product of
steps is never a quotient of two longer ones, and no gradient is a difference of two sums:
as they fade, so do their errors.
"""

import torch
from torch import Tensor

from seqpar.ops.decayed_linear_attention.chunks import Cut
from seqpar.ops.decayed_linear_attention.decay import (
    decay_matrix,
    passing_sums,
    vector_scores,
    vector_scores_backward,
)


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
        _, *grads = vector_scores_backward(rows, keys, steps.expand(*rows.shape[:-1], -1), d_scores)
        d_rows, d_keys, d_gates = grads
        return d_rows, d_keys, d_gates
    raw = d_scores * decay_matrix(steps)
    return raw @ keys, raw.mT @ rows, passing_sums(raw * (rows @ keys.mT))
