"""Scores inside chunks under vector gates, and their gradients: what the kernels are given.

``scores[i, j] = sum_c q[i, c] k[j, c] exp(sum of log_decay[l, c] over j < l <= i)`` for j <= i in one document and one
chunk, else zero. With ``dq`` and ``dk`` of :func:`scores_backward` the gradient of ``log_decay`` at token l, as far as
it comes from these scores, is the sum of ``q * dq - k * dk`` from l to the end of the chunk.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seqpar.ops import launch
from seqpar.ops.decayed_linear_attention.chunks import Cut

# by architecture: 16-bit elements of a [16, k] tile per warp of the scores, and (channels, warps) of their gradients
TILES: dict[str, tuple[int, tuple[int, int]]] = {
    "cpu": (4096, (64, 1)),
    "sm_80": (1024, (32, 1)),
    "sm_90": (1024, (32, 2)),
    "gfx942": (1024, (32, 1)),
}
SAFE = (512, (32, 1))


def scores(q: Tensor, k: Tensor, log_decay: Tensor, documents: Tensor | None, cut: Cut) -> Tensor:
    """The decayed scores inside the chunks: [b, h, n, C, C] in the dtype of q.

    ``q, k, log_decay`` [b, t, h, k]; ``documents`` [t] int32, the number of each token's document, None for one.
    ``cut``: chunks of 16, 32 or 64 tokens. Rows and columns of tokens that are not there are zero.
    Secondary chunking, Yang et al. 2023 (arXiv:2312.06635).
    """
    kernels = _kernels()
    batch, _, heads, _ = q.shape
    out = q.new_empty(batch, heads, cut.num_chunks, cut.chunk, cut.chunk)
    block = _power(q.shape[3])
    elements = TILES.get(launch.architecture(q), SAFE)[0]
    dense = q.element_size() > 2 or block > 128  # takes more registers
    warps = max(1, 16 * block // (elements // 2 if dense else elements))
    inputs, numbers, constants = _arguments(q, k, log_decay, documents, cut, block)
    grid = (_programs(q, cut),)
    launch.launch(kernels.scores_kernel, grid, *inputs, out, *numbers, *constants, num_warps=warps, num_stages=1)
    return out


def scores_backward(
    q: Tensor, k: Tensor, log_decay: Tensor, documents: Tensor | None, cut: Cut, d_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """dq and dk [b, h, n, C, k], fp32 (fp64 for fp64), from the gradient ``d_scores`` [b, h, n, C, C] of the scores.

    What ``d_scores`` holds where the scores are zero by definition is not looked at. Rows of tokens that are not there
    are zero.
    """
    kernels = _kernels()
    batch, _, heads, dim = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq, dk = (q.new_empty(batch, heads, cut.num_chunks, cut.chunk, dim, dtype=dtype) for _ in range(2))
    block, warps = TILES.get(launch.architecture(q), SAFE)[1]
    block = min(block, _power(dim))
    inputs, numbers, constants = _arguments(q, k, log_decay, documents, cut, block)
    tensors = (*inputs, d_scores.contiguous(), dq, dk)
    grid = (2 * _programs(q, cut), -(-dim // block))  # one for dq, one for dk
    launch.launch(kernels.scores_backward_kernel, grid, *tensors, *numbers, *constants, num_warps=warps, num_stages=1)
    return dq, dk


def _kernels() -> ModuleType:
    from seqpar.ops.decayed_linear_attention import kernel_vector

    return kernel_vector


def _power(dim: int) -> int:
    """The power of two that holds ``dim`` channels, at least what matrix units take."""
    return max(16, 1 << (dim - 1).bit_length())


def _programs(q: Tensor, cut: Cut) -> int:
    assert cut.chunk in (16, 32, 64)
    return q.shape[0] * q.shape[2] * cut.num_chunks * (cut.chunk // 16)


def _arguments(
    q: Tensor, k: Tensor, log_decay: Tensor, documents: Tensor | None, cut: Cut, block: int
) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[Any, ...]]:
    """What both kernels take first, second (strides and sizes) and last (constants)."""
    inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, log_decay)]
    strides = [stride for x in inputs for stride in x.stride()[:3]]
    tensors = (*inputs, inputs[0] if documents is None else documents)
    numbers = (*strides, q.shape[1], cut.num_chunks, q.shape[2])
    return tensors, numbers, (q.shape[3], cut.chunk, block, documents is not None, q.dtype == torch.float64)
