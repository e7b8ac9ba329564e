"""Softmax attention of some queries over some keys, with its log-sum-exp: the block of ring attention.

Law: over any split of the keys, the blocks' outputs merged by their log-sum-exp are attention over all keys, and the
blocks' gradients, each given the merged output and log-sum-exp, add up to its gradients.

``reference.py`` is the meaning, ``fused.py`` the speed (torch's own flash kernels), this file the choice. fp64, and
whatever the kernels of a device cannot do, goes to the reference.
(Liu, Zaharia and Abbeel, 2023, "Ring Attention with Blockwise Transformers"; Dao, 2023, "FlashAttention-2".)
"""

import math

import torch
from torch import Tensor

from seqpar.ops.softmax_block import fused, reference
from seqpar.ops.softmax_block.bands import Band, Rectangle, area, rectangles
from seqpar.ops.softmax_block.reference import Mask, merge, working_dtype

__all__ = ["Band", "Mask", "Rectangle", "area", "attend", "attend_backward", "merge", "rectangles"]


@torch.no_grad()
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the queries over the keys that ``mask`` lets them see, and the log-sum-exp of their scores.

    ``q`` [b, n, h, k], ``k`` [b, m, g, k], ``v`` [b, m, g, v]; head i uses key/value head ``i // (h // g)``.
    ``mask`` is a :class:`Band` or a boolean [n, m], True where seen. Returns the output [b, n, h, v] and the
    log-sum-exp [b, n, h], fp32 (fp64 for fp64). A query that sees no key has output 0 and log-sum-exp -inf; n or m
    may be 0. Raises ``ValueError`` where shapes or dtypes do not fit.
    """
    _check(q, k, v, mask)
    if q.numel() == 0 or k.numel() == 0:
        dtype = working_dtype(q.dtype)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
        return out, torch.full(q.shape[:3], -math.inf, dtype=dtype, device=q.device)
    path = fused if fused.supports(q, v, mask) else reference
    return path.attend(q, k, v, mask, scale)


@torch.no_grad()
def attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What this block of keys adds to the gradients of ``q``, ``k`` and ``v``.

    ``out`` and ``lse`` are those of the whole softmax, all blocks merged; ``d_out`` [b, n, h, v] is the gradient of
    ``out``. Returns fp32 (fp64 for fp64) tensors shaped like ``q``, ``k``, ``v``; those of keys and values are summed
    over the query heads that share them. A query that sees no key here adds nothing.
    Raises ``ValueError`` where shapes or dtypes do not fit.
    """
    _check(q, k, v, mask)
    shape = (*q.shape[:3], v.shape[3])
    if d_out.shape != shape or out.shape != shape or lse.shape != q.shape[:3]:
        raise ValueError(
            f"d_out and out must be {list(shape)} and lse {list(q.shape[:3])}, got {list(d_out.shape)}, "
            f"{list(out.shape)} and {list(lse.shape)}; pass what attend() returned, merged over the blocks"
        )
    if q.numel() == 0 or k.numel() == 0:
        dq, dk, dv = (torch.zeros(x.shape, dtype=working_dtype(q.dtype), device=q.device) for x in (q, k, v))
        return dq, dk, dv
    path = fused if fused.supports(q, v, mask) else reference
    return path.attend_backward(d_out, q, k, v, out, lse, mask, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
    """Raise ``ValueError`` unless the tensors fit each other."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if any(x.dim() != 4 for x in (q, k, v)):
        raise ValueError(f"q, k and v must be [batch, tokens, heads, dim], got {shapes}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must share batch and dim, k and v batch, tokens and heads, got {shapes}")
    if q.shape[2] % max(k.shape[2], 1) or (q.shape[2] and not k.shape[2]):
        raise ValueError(f"the query heads must be a multiple of the key/value heads, got {shapes}")
    if not (q.dtype == k.dtype == v.dtype) or not (q.device == k.device == v.device):
        got = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k and v must share dtype and device, got {got}; cast or move them first")
    if isinstance(mask, Tensor) and (mask.dtype != torch.bool or mask.shape != (q.shape[1], k.shape[1])):
        raise ValueError(
            f"a mask tensor must be boolean [{q.shape[1]}, {k.shape[1]}] (True where seen), "
            f"got {mask.dtype} {list(mask.shape)}; pass a Band for causal or windowed attention"
        )
