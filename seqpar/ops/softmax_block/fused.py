"""A softmax block by torch's own fused kernels, which return the log-sum-exp and take it back.

A band is cut into rectangles (:mod:`seqpar.ops.softmax_block.bands`), each one kernel call, merged by the online
softmax. The flash kernels need the key dim and the value dim to be equal: zeros are appended to the smaller, which
changes neither scores nor outputs. Tensors are passed as transposed views, so nothing is copied for its layout.

The kernels: Dao, 2023, "FlashAttention-2".
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from seqpar.ops.softmax_block import reference
from seqpar.ops.softmax_block.bands import Band, Rectangle, rectangles
from seqpar.ops.softmax_block.reference import Mask, merge, working_dtype

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CUDA_DTYPES = (torch.bfloat16, torch.float16)
_CUDA_MAX_DIM = 256
_CUDA_DIM_MULTIPLE = 8
_CUDA_CAPABILITY = (8, 0)

# What one kernel call may see: everything, an aligned causal square, a band (CUDA), or an additive mask (CPU).
_Seen = str | Band | Tensor


def supports(q: Tensor, v: Tensor, mask: Mask) -> bool:
    """Whether this device has a fused kernel for these tensors and this kind of mask."""
    if q.device.type == "cpu":
        return q.dtype in _CPU_DTYPES
    if q.device.type != "cuda" or q.dtype not in _CUDA_DTYPES or not isinstance(mask, Band):
        return False
    fits = max(q.shape[3], v.shape[3]) <= _CUDA_MAX_DIM
    return fits and torch.cuda.get_device_capability(q.device) >= _CUDA_CAPABILITY


def folds(q: Tensor, v: Tensor) -> bool:
    """Whether a gradient of the log-sum-exp can be handed to the kernel; fp16 could overflow on the way."""
    dim = max(q.shape[3], v.shape[3] + _columns(q.dtype))
    return q.dtype != torch.float16 and (q.device.type == "cpu" or dim <= _CUDA_MAX_DIM)


def in_one_call(q: Tensor, k: Tensor, band: Band) -> bool:
    """Whether the kernel takes the block as it is, so that nothing is merged."""
    n, m = q.shape[1], k.shape[1]
    pieces = rectangles(n, m, band)
    return len(pieces) == 1 and _covers(pieces[0], n, m) and not isinstance(pieces[0].mask, Band)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of ``q`` over ``k``, ``v``, and its log-sum-exp; see :func:`seqpar.ops.softmax_block.attend`."""
    q, k, v = (_precise(x) for x in (q, k, v))
    dtype, dim, value_dim = working_dtype(q.dtype), _kernel_dim(q, v), v.shape[3]
    heads = [_heads_first(x, dim) for x in (q, k, v)]
    pieces = _pieces(q, k, mask)
    if len(pieces) == 1 and _length(pieces[0][0].rows) == q.shape[1]:
        out, lse = _forward(*pieces[0], heads, scale)
        out = out[..., :value_dim].to(dtype).contiguous()
        return out, lse.contiguous() if isinstance(mask, Band) else _no_key_rows(lse, mask)
    out = torch.zeros(*q.shape[:3], value_dim, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=dtype, device=q.device)
    for piece, seen in pieces:
        piece_out, piece_lse = _forward(piece, seen, heads, scale)
        merge(out, lse, piece_out[..., :value_dim], piece_lse, piece.rows)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's share of the gradients; see :func:`seqpar.ops.softmax_block.attend_backward`."""
    q, k, v = (_precise(x) for x in (q, k, v))
    dtype, value_dim = working_dtype(q.dtype), v.shape[3]
    if d_lse is not None:
        d_out, v, out = _fold(d_out.to(q.dtype), v, out.to(q.dtype), d_lse)
    dim = _kernel_dim(q, v)
    heads = [_heads_first(x.to(q.dtype), dim) for x in (d_out, q, k, v, out)]
    if isinstance(mask, Tensor):  # +inf gives a row without any key the weights exp(-inf) = 0
        lse = lse.masked_fill(lse == -math.inf, math.inf)
    heads.append(lse.transpose(1, 2))
    pieces = _pieces(q, k, mask)
    if len(pieces) == 1 and _covers(pieces[0][0], q.shape[1], k.shape[1]):
        grads = _backward(*pieces[0], heads, scale)
        sizes = (q.shape[3], k.shape[3], value_dim)
        dq, dk, dv = (grad[..., :size].to(dtype) for grad, size in zip(grads, sizes))
        return dq, dk, dv
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v[..., :value_dim]))
    for piece, seen in pieces:
        piece_dq, piece_dk, piece_dv = _backward(piece, seen, heads, scale)
        dq[:, piece.rows] += piece_dq[..., : q.shape[3]]
        dk[:, piece.keys] += piece_dk[..., : k.shape[3]]
        dv[:, piece.keys] += piece_dv[..., :value_dim]
    return dq, dk, dv


def _precise(x: Tensor) -> Tensor:
    """On the CPU in fp32: its 16-bit kernels round weights, outputs and gradients more than once. A tensor without
    numbers stays as it is: a dry run stands for the device that it is made for."""
    return x.float() if x.device.type == "cpu" and x.dtype.itemsize == 2 and not isinstance(x, FakeTensor) else x


def _fold(d_out: Tensor, v: Tensor, out: Tensor, d_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns that turn the kernel's own ``d_out . out`` into ``d_out . out - d_lse``; the values have zeros there.

    The kernel reads them in the dtype of ``out``, so 16 bits get three columns whose sum has the bits of fp32.
    """
    parts, rest = [], d_lse.neg()
    for _ in range(_columns(out.dtype)):
        parts.append(rest.to(out.dtype))
        rest = rest - parts[-1]
    columns = torch.stack(parts, -1)
    ones = torch.ones_like(columns)
    return torch.cat([d_out, ones], -1), functional.pad(v, (0, len(parts))), torch.cat([out, columns], -1)


def _columns(dtype: torch.dtype) -> int:
    return 3 if dtype.itemsize == 2 else 1


def _pieces(q: Tensor, k: Tensor, mask: Mask) -> list[tuple[Rectangle, _Seen]]:
    """The kernel calls of a block, each with what it sees; tiles of one shape share one mask."""
    n, m = q.shape[1], k.shape[1]
    if isinstance(mask, Tensor):
        return [(Rectangle(slice(0, n), slice(0, m), "full"), _additive(mask, q.dtype))]
    masks: dict[tuple[int, int, Band], Tensor] = {}
    pieces: list[tuple[Rectangle, _Seen]] = []
    for piece in rectangles(n, m, mask):
        seen: _Seen = piece.mask
        if isinstance(seen, Band) and q.device.type == "cpu":
            shape = (_length(piece.rows), _length(piece.keys), seen)
            if shape not in masks:
                masks[shape] = _additive(seen.mask(shape[0], shape[1]), q.dtype)
            seen = masks[shape]
        pieces.append((piece, seen))
    return pieces


def _forward(piece: Rectangle, seen: _Seen, heads: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Output [b, n, h, dim] and log-sum-exp [b, n, h] of one piece; ``heads`` are q, k, v, heads first."""
    q, k, v = heads[0][:, :, piece.rows], heads[1][:, :, piece.keys], heads[2][:, :, piece.keys]
    if isinstance(seen, Band):
        return reference.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen, scale)
    call = cpu_forward if q.device.type == "cpu" else cuda_forward
    out, lse = call(q, k, v, seen, scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _backward(piece: Rectangle, seen: _Seen, heads: Sequence[Tensor], scale: float) -> list[Tensor]:
    """Gradients of one piece, tokens first; ``heads`` are d_out, q, k, v, out, lse, heads first."""
    cuts = (piece.rows, piece.rows, piece.keys, piece.keys, piece.rows, piece.rows)
    d_out, q, k, v, out, lse = (x[:, :, cut] for x, cut in zip(heads, cuts))
    if isinstance(seen, Band):
        d_out, q, k, v, out, lse = (x.transpose(1, 2) for x in (d_out, q, k, v, out, lse))
        return list(reference.attend_backward(d_out, q, k, v, out, lse, seen, scale))
    call = cpu_backward if q.device.type == "cpu" else cuda_backward
    return [grad.transpose(1, 2) for grad in call(d_out, q, k, v, out, lse, seen, scale)]


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, seen: str | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [b, h, n, dim] and log-sum-exp [b, h, n] by the CPU's flash kernel."""
    mask = seen if isinstance(seen, Tensor) else None
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, mask is None and seen == "causal", attn_mask=mask, scale=scale
    )
    return out, lse


def cpu_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: str | Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v [b, heads, tokens, dim] by the CPU's flash kernel."""
    mask = seen if isinstance(seen, Tensor) else None
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, q, k, v, out, lse, 0.0, mask is None and seen == "causal", attn_mask=mask, scale=scale
    )
    return dq, dk, dv


def cuda_forward(q: Tensor, k: Tensor, v: Tensor, seen: str | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [b, h, n, dim] and log-sum-exp [b, h, n] by the CUDA flash kernel."""
    assert not isinstance(seen, Tensor)
    result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, seen == "causal", False, scale=scale)
    return result[0], result[1][:, :, : q.shape[2]]  # some kernels pad the rows of the log-sum-exp


def cuda_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: str | Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v [b, heads, tokens, dim] by the CUDA flash kernel."""
    assert not isinstance(seen, Tensor)
    # The state of the random generator is not read without dropout; None stands for "the batch is not ragged".
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)
    offset = torch.empty((), dtype=torch.uint64, device=q.device)
    n, m, causal = q.shape[2], k.shape[2], seen == "causal"
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        d_out, q, k, v, out, lse.contiguous(), None, None, n, m, 0.0, causal, seed, offset, scale=scale
    )
    return dq, dk, dv


def _kernel_dim(q: Tensor, v: Tensor) -> int:
    """The one dim that the kernel sees."""
    dim = max(q.shape[3], v.shape[3])
    return dim if q.device.type == "cpu" else -(-dim // _CUDA_DIM_MULTIPLE) * _CUDA_DIM_MULTIPLE


def _heads_first(x: Tensor, dim: int) -> Tensor:
    """[b, tokens, heads, d] as a view [b, heads, tokens, dim], with zeros appended where d is smaller."""
    if x.shape[3] < dim:
        x = functional.pad(x, (0, dim - x.shape[3]))
    elif x.stride(3) != 1:
        x = x.contiguous()
    return x.transpose(1, 2)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, else -inf."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(seen.logical_not(), -math.inf)


def _no_key_rows(lse: Tensor, mask: Tensor) -> Tensor:
    """The kernel calls the log-sum-exp of a fully masked row 0; it is -inf."""
    return lse.masked_fill(mask.any(1).logical_not().view(1, -1, 1), -math.inf)


def _covers(piece: Rectangle, n: int, m: int) -> bool:
    return _length(piece.rows) == n and _length(piece.keys) == m


def _length(run: slice) -> int:
    return int(run.stop - run.start)
