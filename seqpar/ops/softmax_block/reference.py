"""The meaning of a softmax block in plain torch: exact, any device and dtype, tiled over queries to bound memory.

Rows that see no key have output 0 and log-sum-exp -inf; nothing here becomes NaN because of them.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from seqpar.ops.softmax_block.bands import Band
from seqpar.ops.softmax_block.scores import PLAIN, Terms

SCORES_PER_TILE = 2**22  # elements of one head's score matrix that are held at once

Mask = Band | Tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, outputs and gradients: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor, rows: slice) -> None:
    """Fold a block's output and log-sum-exp into those of ``rows``, in place: the online softmax.

    Law: merging the blocks of a split of the keys, in any order, gives attention over all keys.
    ``out`` [b, t, h, v] starts as 0 and ``lse`` [b, t, h] as -inf; ``block_out`` [b, n, h, v], ``block_lse`` [b, n, h].
    (Milakov and Gimelshein, 2018, "Online normalizer calculation for softmax"; Rabe and Staats, 2021.)
    """
    total = lse[:, rows]
    # The share of the block in the sum. Clamping makes (-inf) - (-inf) a share of 0, and lets true NaN through.
    share = torch.sub(block_lse, total.clamp(min=torch.finfo(total.dtype).min)).sigmoid_()
    out[:, rows].lerp_(block_out.to(out.dtype), share.unsqueeze(-1))
    torch.logaddexp(total, block_lse, out=total)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, terms: Terms = PLAIN) -> tuple[Tensor, Tensor]:
    """Attention of ``q`` over ``k``, ``v``, and its log-sum-exp; see :func:`seqpar.ops.softmax_block.attend`."""
    dtype = working_dtype(q.dtype)
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=dtype, device=q.device)
    for rows, keys, seen in _tiles(q.shape[1], k.shape[1], mask, q.device):
        scores = _hidden(terms.bend(_scores(q[:, rows], k[:, keys], scale)), seen)
        top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
        weights = scores.sub_(top).exp_()
        norm = weights.sum(-1, keepdim=True)
        lse[:, rows] = _tokens_first((top + norm.log()).squeeze(-1))
        weights /= norm.clamp(min=1)  # the largest weight is 1, so this only spares rows without keys
        out[:, rows] = torch.einsum("bgrts,bsgv->btgrv", weights, v[:, keys].to(dtype)).flatten(2, 3)
    return out, lse


def attend_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    scale: float,
    d_lse: Tensor | None = None,
    terms: Terms = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's share of the gradients; see :func:`seqpar.ops.softmax_block.attend_backward`."""
    dtype = working_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    g = k.shape[2]
    for rows, keys, seen in _tiles(q.shape[1], k.shape[1], mask, q.device):
        grad = d_out[:, rows].to(dtype)
        delta = (grad * out[:, rows].to(dtype)).sum(-1)
        if d_lse is not None:
            delta -= d_lse[:, rows]
        scores = terms.bend(_scores(q[:, rows], k[:, keys], scale))
        weights = _weights(scores if terms.plain else scores.clone(), seen, lse[:, rows], g)
        grad = grad.unflatten(2, (g, -1))
        dv[:, keys] += torch.einsum("bgrts,btgrv->bsgv", weights, grad)
        d_scores = torch.einsum("btgrv,bsgv->bgrts", grad, v[:, keys].to(dtype))
        d_scores -= _heads_first(delta, g).unsqueeze(-1)
        d_scores *= weights
        d_scores = terms.unbend(d_scores, scores).mul_(scale)
        dq[:, rows] = torch.einsum("bgrts,bsgk->btgrk", d_scores, k[:, keys].to(dtype)).flatten(2, 3)
        dk[:, keys] += torch.einsum("bgrts,btgrk->bsgk", d_scores, q[:, rows].to(dtype).unflatten(2, (g, -1)))
    return dq, dk, dv


def _tiles(n: int, m: int, mask: Mask, device: torch.device) -> Iterator[tuple[slice, slice, Tensor]]:
    """Runs of queries, the keys they may see, and which they do see."""
    width = m
    if isinstance(mask, Band) and mask.low is not None and mask.high is not None:
        width = min(m, max(0, mask.high - mask.low + 1))
    step = max(1, min(math.isqrt(SCORES_PER_TILE // 2), SCORES_PER_TILE // (2 * max(1, width))))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        keys = mask.keys_of(rows, m) if isinstance(mask, Band) else slice(0, m)
        if keys.stop == keys.start:
            continue
        if isinstance(mask, Band):
            yield rows, keys, mask.within(rows, keys).mask(rows.stop - start, keys.stop - keys.start, device)
        else:
            yield rows, keys, mask[rows]


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled scores [b, g, h // g, n, m]."""
    dtype = working_dtype(q.dtype)
    grouped = q.to(dtype).unflatten(2, (k.shape[2], -1))
    return torch.einsum("btgrk,bsgk->bgrts", grouped, k.to(dtype)).mul_(scale)


def _hidden(scores: Tensor, seen: Tensor) -> Tensor:
    """-inf where not seen, in place."""
    return scores.masked_fill_(seen.logical_not(), -math.inf)


def _weights(scores: Tensor, seen: Tensor, lse: Tensor, g: int) -> Tensor:
    """Weights under the whole softmax, in place of the scores; 0 for rows that see no key in any block."""
    lse = _heads_first(lse, g).clamp(min=torch.finfo(lse.dtype).min)
    return _hidden(scores, seen).sub_(lse.unsqueeze(-1)).exp_()


def _heads_first(x: Tensor, g: int) -> Tensor:
    """[b, n, h] to [b, g, h // g, n]."""
    return x.unflatten(2, (g, -1)).permute(0, 2, 3, 1)


def _tokens_first(x: Tensor) -> Tensor:
    """[b, g, h // g, n] to [b, n, h]."""
    return x.permute(0, 3, 1, 2).flatten(2, 3)
