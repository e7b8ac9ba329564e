"""Softmax attention in fp64, one query token at a time: the meaning that the fast paths are compared with.

Everything is differentiable by autograd. Shapes are [batch, tokens, heads, dim]; head i uses key/value head
``i // (h // g)``.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int] | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention within each of the packed documents that ``lengths`` gives; one document without it.

    A token sees the tokens of its document: up to itself if ``causal``, and of those to its left only the nearest
    ``window - 1``, so that a causal window counts the token itself. Returns [b, s, h, v] in fp64.
    """
    seen = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    start = 0
    for length in lengths if lengths is not None else [q.shape[1]]:
        for i in range(start, start + length):
            first = start if window is None else max(start, i - window + 1)
            seen[i, first : i + 1 if causal else start + length] = True
        start += length
    assert start == q.shape[1], "the lengths must add up to the tokens"
    return masked_attention(q, k, v, seen, scale)[0]


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the keys where the boolean ``seen`` [n, m] is True, and the log-sum-exp of their scores.

    Returns [b, n, h, v] and [b, n, h] in fp64; a query that sees no key has output 0 and log-sum-exp -inf.
    """
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    share = q.shape[2] // k.shape[2]
    q, k, v = q.double(), k.double(), v.double()
    k, v = k.repeat_interleave(share, 2), v.repeat_interleave(share, 2)
    outs, lses = [], []
    for i in range(q.shape[1]):
        if not bool(seen[i].any()):
            outs.append(q[:, i] @ q.new_zeros(q.shape[3], v.shape[3]))
            lses.append(q.new_full((q.shape[0], q.shape[2]), -math.inf))
            continue
        keys, values = k[:, seen[i]], v[:, seen[i]]
        scores = (q[:, i].unsqueeze(1) * keys).sum(-1) * scale
        top = scores.amax(1, keepdim=True).detach()
        weights = (scores - top).exp()
        norm = weights.sum(1)
        outs.append((weights.unsqueeze(-1) * values).sum(1) / norm.unsqueeze(-1))
        lses.append(norm.log() + top.squeeze(1))
    if not outs:
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3])
    return torch.stack(outs, 1), torch.stack(lses, 1)
