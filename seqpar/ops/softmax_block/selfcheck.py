"""The kernels against the reference on a small problem: what ``impl="auto"`` asks where a compiler is in doubt."""

import torch

from seqpar.ops.softmax_block import reference
from seqpar.ops.softmax_block.bands import Band

BANDS = (Band(None, 0), Band(-90, 20))
DIMS = (64, 128)
TOKENS = 300


def check(device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of outputs, log-sum-exps and gradients; NaN if there is any."""
    errors = [_error(dim, band, device, dtype) for dim in DIMS for band in BANDS]
    return float(torch.tensor(errors).max())  # max() of floats may lose a NaN


@torch.no_grad()
def _error(dim: int, band: Band, device: torch.device, dtype: torch.dtype) -> float:
    from seqpar.ops.softmax_block import kernel, kernel_backward

    random = torch.Generator().manual_seed(dim)
    n, m = TOKENS, TOKENS - TOKENS // 15
    shapes = ((1, n, 4, dim), (1, m, 2, dim), (1, m, 2, dim), (1, n, 4, dim), (1, n, 4))
    q, k, v, d_out, d_lse = (torch.randn(shape, generator=random).to(device, dtype) for shape in shapes)
    scale, d_lse = dim**-0.5, d_lse.float()
    out, lse = kernel.attend(q, k, v, band, scale)
    got = kernel_backward.attend_backward(d_out, q, k, v, out, lse, band, scale, d_lse)
    q, k, v, d_out, d_lse = (x.double() for x in (q, k, v, d_out, d_lse))
    right_out, right_lse = reference.attend(q, k, v, band, scale)
    right = reference.attend_backward(d_out, q, k, v, right_out, right_lse, band, scale, d_lse)
    errors = [(x.double() - y).norm() / y.norm() for x, y in zip((out, lse, *got), (right_out, right_lse, *right))]
    return float(torch.stack(errors).max())
