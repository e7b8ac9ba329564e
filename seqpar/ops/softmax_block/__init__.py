"""Softmax attention of some queries over some keys, with its log-sum-exp: the block of ring attention.

Law: over any split of the keys, the blocks' outputs merged by their log-sum-exp are attention over all keys, and the
blocks' gradients, each given the merged output and log-sum-exp, add up to its gradients.

``reference.py`` is the meaning; ``fused.py`` (torch's own flash kernels) and ``kernel.py`` (Triton) are the speed, and
this file is the choice between them.
(Liu, Zaharia and Abbeel, 2023, "Ring Attention with Blockwise Transformers"; Dao, 2023, "FlashAttention-2".)
"""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seqpar.collectives.first_order import first_order
from seqpar.ops import choice
from seqpar.ops.precision import exactly
from seqpar.ops.softmax_block import fused, reference
from seqpar.ops.softmax_block.bands import Band, Rectangle, area, rectangles
from seqpar.ops.softmax_block.reference import Mask, merge, working_dtype
from seqpar.ops.softmax_block.scores import PLAIN, Scores, Terms
from seqpar.ops.softmax_block.selfcheck import check
from seqpar.ops.softmax_block.tiles import DTYPES, LARGEST_DIM

__all__ = [
    "Band",
    "Mask",
    "Rectangle",
    "Scores",
    "Terms",
    "area",
    "attend",
    "attend_backward",
    "block_attention",
    "check_impl",
    "merge",
    "rectangles",
]


@exactly
@torch.no_grad()
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float,
    *,
    impl: str = "auto",
    whole: bool = False,
    terms: Terms = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Attention of the queries over the keys that ``mask`` lets them see, and the log-sum-exp of their scores.

    ``q`` [b, n, h, k], ``k`` [b, m, g, k], ``v`` [b, m, g, v]; head i uses key/value head ``i // (h // g)``.
    ``mask`` is a :class:`Band` or a boolean [n, m], True where seen. Returns the output [b, n, h, v] and the
    log-sum-exp [b, n, h], fp32 (fp64 for fp64). A query that sees no key has output 0 and log-sum-exp -inf; n or m
    may be 0. ``impl``: ``"auto"``, ``"reference"`` (torch) or ``"triton"``. ``whole`` says that nothing will be merged
    with the result, so that a kernel may round it to the dtype of ``q``. ``terms``: what scores become before the
    softmax; only the reference knows them.
    Raises ``ValueError`` where shapes or dtypes do not fit, or where the kernels cannot run.
    """
    _check(q, k, v, mask)
    path = _path(q, k, v, mask, impl, whole, terms=terms)
    if q.numel() == 0 or k.numel() == 0:
        dtype = working_dtype(q.dtype)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
        return out, torch.full(q.shape[:3], -math.inf, dtype=dtype, device=q.device)
    if path == "triton":
        from seqpar.ops.softmax_block import kernel

        return kernel.attend(q, k, v, mask, scale)
    if not terms.plain:
        return reference.attend(q, k, v, mask, scale, terms)
    return _TORCH[path].attend(q, k, v, mask, scale)


@exactly
@torch.no_grad()
def attend_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    scale: float,
    *,
    d_lse: Tensor | None = None,
    impl: str = "auto",
    whole: bool = False,
    terms: Terms = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """What this block of keys adds to the gradients of ``q``, ``k`` and ``v``.

    ``out`` and ``lse`` are those of the whole softmax, all blocks merged; ``d_out`` [b, n, h, v] is the gradient of
    ``out`` and ``d_lse`` [b, n, h], where given, that of ``lse``. Returns fp32 (fp64 for fp64) tensors shaped like
    ``q``, ``k``, ``v``; those of keys and values are summed over the query heads that share them. A query that sees no
    key here adds nothing. ``impl``, ``whole`` (no other block adds to these gradients) and ``terms`` as for
    :func:`attend`.
    Raises ``ValueError`` where shapes or dtypes do not fit, or where the kernels cannot run.
    """
    _check(q, k, v, mask)
    _check_results(d_out, q, v, out, lse, d_lse)
    path = _path(q, k, v, mask, impl, whole, d_lse is not None, terms)
    if q.numel() == 0 or k.numel() == 0:
        dq, dk, dv = (torch.zeros(x.shape, dtype=working_dtype(q.dtype), device=q.device) for x in (q, k, v))
        return dq, dk, dv
    if d_lse is not None:  # the log-sum-exp of nothing is a constant, whatever is said of its gradient
        d_lse = d_lse.to(lse.dtype).masked_fill(lse == -math.inf, 0)
    if path == "triton":
        from seqpar.ops.softmax_block import kernel_backward

        return kernel_backward.attend_backward(d_out, q, k, v, out, lse, mask, scale, d_lse)
    if not terms.plain:
        return reference.attend_backward(d_out, q, k, v, out, lse, mask, scale, d_lse, terms)
    return _TORCH[path].attend_backward(d_out, q, k, v, out, lse, mask, scale, d_lse)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """:func:`attend` on one device with gradients through both of its results.

    Law: for any use of output and log-sum-exp, such as a merge with other blocks, with sinks or with another mixer by
    their log-sum-exp, the gradients are those of that use of plain attention.
    Shapes, dtypes, ``impl`` and errors as for :func:`attend`; gradients have the dtypes of ``q``, ``k`` and ``v``.
    """
    out, lse = _Block.apply(q, k, v, mask, scale, impl)
    return out, lse


@first_order("block_attention")
class _Block(torch.autograd.Function):
    """A block that is its own whole softmax; what is made of it later arrives as the gradient of ``lse``."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, impl: str
    ) -> tuple[Tensor, Tensor]:
        out, lse = attend(q, k, v, mask, scale, impl=impl)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.job = (mask, scale, impl)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        mask, scale, impl = ctx.job
        if d_out is None:
            d_out = torch.zeros_like(out)
        grads = attend_backward(d_out, q, k, v, out, lse, mask, scale, d_lse=d_lse, impl=impl)
        dq, dk, dv = (grad.to(x.dtype) for grad, x in zip(grads, (q, k, v)))
        return dq, dk, dv, None, None, None


_TORCH: dict[str, ModuleType] = {"fused": fused, "reference": reference}


def _path(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    impl: str,
    whole: bool,
    has_d_lse: bool = False,
    terms: Terms = PLAIN,
) -> str:
    """``"triton"``, ``"fused"`` or ``"reference"``.

    torch's fused kernels round what they return to 16 bits. For a whole softmax this is the one rounding at the end;
    parts that are merged are rounded once more. Against fp64 (bf16, 256 queries, 2048 keys, dim 64), the final output
    in bf16 has a relative error of 2.25e-3 by one fused call, and of 2.79e-3, 2.77e-3, 2.74e-3 and 2.70e-3 merged from
    2, 4, 8 and 16. The Triton kernel keeps fp32: interpreted, with 64 queries and 256 keys, its output differs by 8e-6
    from 1, 7e-6 from 4 and 7e-6 from 8 blocks, and by 1.65e-3 once in bf16, which is that rounding alone. So on CUDA
    the fused kernels serve a whole softmax in one call, Triton everything else, windows among it. On the CPU,
    where Triton has no speed, there is the fused kernel.
    """
    check_impl(q, v, impl, terms)
    if not terms.plain:
        return "reference"
    fits = fused.supports(q, v, mask) and not (has_d_lse and not fused.folds(q, v))
    one_call = fits and whole and q.is_cuda and isinstance(mask, Band) and fused.in_one_call(q, k, mask)
    if impl == "auto" and one_call:
        return "fused"
    if choice.use_kernel(impl, q, check=check) and _kernels_do(q, v):
        return "triton"
    return "fused" if fits and impl == "auto" else "reference"


def check_impl(q: Tensor, v: Tensor, impl: str, terms: Terms = PLAIN) -> None:
    """Raise ``ValueError`` for an ``impl`` that does not exist, or that cannot run on tensors like these."""
    choice.check_impl(impl, q)
    if impl == "triton" and not terms.plain:
        raise ValueError('the kernels do not cap or bias scores; pass impl="auto", which takes the reference')
    if impl == "triton" and not _kernels_do(q, v):
        raise ValueError(
            f"the kernels take fp32, bf16 and fp16 and head dims up to {LARGEST_DIM}, got {q.dtype} and dims "
            f'{q.shape[3]} (q, k) and {v.shape[3]} (v); pass impl="auto"'
        )


def _kernels_do(q: Tensor, v: Tensor) -> bool:
    return q.dtype in DTYPES and max(q.shape[3], v.shape[3]) <= LARGEST_DIM


def _check_results(d_out: Tensor, q: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_lse: Tensor | None) -> None:
    """Raise ``ValueError`` unless what ``attend`` returned and its gradients fit the inputs."""
    shape, sums = (*q.shape[:3], v.shape[3]), q.shape[:3]
    if d_out.shape != shape or out.shape != shape or lse.shape != sums:
        raise ValueError(
            f"d_out and out must be {list(shape)} and lse {list(sums)}, got {list(d_out.shape)}, "
            f"{list(out.shape)} and {list(lse.shape)}; pass what attend() returned, merged over the blocks"
        )
    if d_lse is not None and d_lse.shape != sums:
        raise ValueError(f"d_lse must be {list(sums)} like lse, got {list(d_lse.shape)}")


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
