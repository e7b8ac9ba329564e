"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467)."""

import torch
from torch import Tensor, nn

from seqpar.extras import rms_norm
from seqpar.layers.checks import positive


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last dim, then weigh each channel.

    Mixes no tokens, so it takes no cut. Any shape ``[..., dim]``; the weight starts at 1.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        positive(dim=dim)
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
