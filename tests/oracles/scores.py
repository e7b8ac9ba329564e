"""Softmax attention with everything that may be done to scores, in fp64, query by query and head by head.

The meaning that ``seqpar.attention`` is compared with. Nothing here knows of ranks, tiles or kernels; everything is
differentiable by autograd. Shapes are [batch, tokens, heads, dim]; head i uses key/value head ``i // (h // g)``.
"""

import math

import torch


def sees(i, j, causal, left, right):
    """Whether a token at position ``i`` of a document sees the one at ``j``."""
    if causal and j > i:
        return False
    return (left is None or j >= i - left) and (right is None or j <= i + right)


def scored_attention(
    q, k, v, lengths, *, causal=True, left=None, right=None, scale=None, softcap=None, sinks=None
):  # fmt: skip
    """Output [b, s, h, v] and log-sum-exp [b, s, h]; a token sees ``left`` tokens before it, ``right`` after it."""
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    share = q.shape[2] // k.shape[2]
    outs, lses = [], []
    start = 0
    for length in lengths:
        for i in range(length):
            keys = [j for j in range(length) if sees(i, j, causal, left, right)]
            rows = [start + j for j in keys]
            for head in range(q.shape[2]):
                scores = (q[:, start + i, head].unsqueeze(1) * k[:, rows, head // share]).sum(-1) * scale
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                values = v[:, rows, head // share]
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head].expand(len(scores), 1)], 1)
                    values = torch.cat([values, torch.zeros_like(values[:, :1])], 1)
                outs.append((scores.softmax(1).unsqueeze(-1) * values).sum(1))
                lses.append(scores.logsumexp(1))
        start += length
    heads = (start, q.shape[2])
    return torch.stack(outs, 1).unflatten(1, heads), torch.stack(lses, 1).unflatten(1, heads)
