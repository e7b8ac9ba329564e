"""A pre-norm residual block around any token mixer."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again_in_backward

from seqpar.cut import Cut
from seqpar.layers.mlp import SwiGLU
from seqpar.layers.norm import RMSNorm


class Mixer(Protocol):
    """A layer that mixes tokens: it is told where it stands."""

    def __call__(self, x: Tensor, cut: Cut) -> Tensor: ...


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``. ``x [b, t, dim]``, ``mixer`` any layer called with the cut.

    ``checkpoint``: keep only the input of the block and compute the rest again in backward. What crossed the cuts is
    kept, so the second time sends nothing. There is no dropout, so no random state is kept either.
    """

    def __init__(self, dim: int, mixer: nn.Module, hidden: int, *, checkpoint: bool = False) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = RMSNorm(dim), mixer
        self.mlp_norm, self.mlp = RMSNorm(dim), SwiGLU(dim, hidden)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        if self.checkpoint and torch.is_grad_enabled():
            return run_again_in_backward(self._run, x, cut, use_reentrant=False, preserve_rng_state=False)
        return self._run(x, cut)

    def _run(self, x: Tensor, cut: Cut) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), cut)
        return x + self.mlp(self.mlp_norm(x))
