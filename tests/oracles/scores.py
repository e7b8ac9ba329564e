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
    q, k, v, lengths, *, causal=True, left=None, right=None, scale=None, softcap=None, sinks=None,
    slopes=None, table=None, embeddings=None, column=None, factor=None, seen=(), seeing=(), keys=None, values=None,
):  # fmt: skip
    """Output [b, s, h, v] and log-sum-exp [b, s, h]; a token sees ``left`` tokens before it, ``right`` after it.

    ``column(distance)``: of ``table [h, r]`` and ``embeddings [h, r, k]``; ``factor [s]``: of each query's scores.
    ``seen``, ``seeing``: places in the sequence that no window hides, or hides things from; ``keys [p, g, k]``,
    ``values [p, g, v]``: seen by all, without a place.
    """
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    share = q.shape[2] // k.shape[2]
    outs, lses = [], []
    start = 0
    for length in lengths:
        for i in range(length):
            may = [j for j in range(length) if not (causal and j > i)]
            at = [
                j for j in may
                if sees(i, j, causal, left, right) or start + j in seen or start + i in seeing
            ]  # fmt: skip
            rows = [start + j for j in at]
            for head in range(q.shape[2]):
                key = k[:, rows, head // share]
                if embeddings is not None:
                    key = key + torch.stack([embeddings[head, column(j - i)] for j in at])
                times = scale if factor is None else scale * factor[start + i]
                if keys is not None:
                    learned = keys[:, head // share].expand(len(q), -1, -1)
                    key = torch.cat([key, learned], 1)
                scores = (q[:, start + i, head].unsqueeze(1) * key).sum(-1) * times
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                some = v[:, rows, head // share]
                beside = scores[:, len(at) :]
                scores = scores[:, : len(at)]
                if table is not None:
                    scores = scores + torch.stack([table[head, column(j - i)] for j in at])
                if slopes is not None:
                    scores = scores - slopes[head] * torch.tensor([abs(j - i) for j in at])
                if keys is not None:
                    scores = torch.cat([scores, beside], 1)
                    some = torch.cat([some, values[:, head // share].expand(len(q), -1, -1)], 1)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head].expand(len(scores), 1)], 1)
                    some = torch.cat([some, torch.zeros_like(some[:, :1])], 1)
                outs.append((scores.softmax(1).unsqueeze(-1) * some).sum(1))
                lses.append(scores.logsumexp(1))
        start += length
    heads = (start, q.shape[2])
    return torch.stack(outs, 1).unflatten(1, heads), torch.stack(lses, 1).unflatten(1, heads)
