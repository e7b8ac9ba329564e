"""What the kernels are told about decay, chunk by chunk.

A document starts with a decay of zero, whose logarithm is -inf: exactly, and without harm, for logarithms are added and
no sum of them is ever subtracted from another.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gates:
    """Decay of the tokens of all chunks, fp32; the channels c are none for gates that all key channels share.

    ``steps`` [b, h, n, C, c]: logarithms, None where nothing decays. ``into`` (same shape): decay of the state that
    enters a chunk on its way to a token. ``out``: of what a token wrote on its way to the end of the chunk.
    ``across`` [b, h, n, c]: of the chunk.
    """

    steps: Tensor | None
    into: Tensor
    out: Tensor
    across: Tensor


def build_gates(q: Tensor, log_decay: Tensor | None, starts: tuple[int, ...], chunk: int) -> Gates:
    """The gates of the tokens of q [b, t, h, k], in chunks."""
    b, t, h, _ = q.shape
    num_chunks = -(-t // chunk)
    channels = () if log_decay is None else log_decay.shape[3:]
    if log_decay is None and not starts:
        ones = q.new_ones(b, h, num_chunks, chunk, dtype=torch.float32)
        return Gates(None, ones, ones, ones[..., 0].contiguous())
    steps = q.new_zeros(b, h, num_chunks * chunk, *channels, dtype=torch.float32)
    if log_decay is not None:
        steps[:, :, :t] = log_decay.transpose(1, 2)
    steps[:, :, list(starts)] = -math.inf
    steps = steps.unflatten(2, (num_chunks, chunk))
    later = torch.zeros_like(steps)
    later[:, :, :, :-1] = steps[:, :, :, 1:].flip(3).cumsum(3).flip(3)
    into = steps.cumsum(3).exp_()
    return Gates(steps, into, later.exp_(), into[:, :, :, -1].contiguous())
