"""LMUFormer: convolutions, then Legendre memories with batch norms (Liu et al. 2024, arXiv 2402.04882)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import positive
from seqpar.layers.parts.sequence_norm import SequenceBatchNorm
from seqpar.layers.ssm.lmu import LMU
from seqpar.sharding.cut import Cut


class ConvPatchEmbedding(nn.Module):
    """What LMUFormer begins with: ``layers`` times ``norm(relu(conv(x)))``, then ``x + conv(x)`` for the positions.

    Each convolution mixes all channels of 3 tokens of a document, the one before and the one after included, without a
    bias: one row crosses a cut either way. ``x [b, t, in_dim]`` my tokens; returns ``[b, t, dim]``.
    """

    def __init__(self, dim: int, *, in_dim: int | None = None, layers: int = 4) -> None:
        super().__init__()
        in_dim = dim if in_dim is None else in_dim
        positive(dim=dim, in_dim=in_dim, layers=layers)
        dims = (in_dim, *(dim for _ in range(layers)))
        self.convs = nn.ParameterList(_conv_weight(dim, before) for before in dims)
        self.norms = nn.ModuleList(SequenceBatchNorm(dim) for _ in range(layers))

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        here = Here.of(cut, self)
        *weights, positions = self.convs
        for weight, norm in zip(weights, self.norms):
            x = norm(functional.relu(here.symmetric_conv(x, weight)), cut)
        return x + here.symmetric_conv(x, positions)


class LMUFormer(nn.Module):
    """The part of LMUFormer's blocks that mixes tokens: ``norm(out(lmu(x)))``, its norm a batch norm over all tokens.

    ``embeds``: the first block, ``x + norm(out(lmu(x)))`` of ``x = embedding(x)`` (:class:`ConvPatchEmbedding`), whose
    convolutions see later tokens. Defaults are the paper's: ``memory_dim = dim`` and a memory of 128 tokens. The
    spiking variant is left out: its neurons are nonlinear from token to token, so no scan carries them. ``x [b, t,
    dim]`` my tokens, and so is the result.

    One memory and the sums of the norm cross a cut; with an embedding 5 rows either way, and the sums of 4 more norms.
    """

    def __init__(self, dim: int, *, memory_dim: int | None = None, theta: float = 128.0, embeds: bool = True) -> None:
        super().__init__()
        self.embedding = ConvPatchEmbedding(dim) if embeds else None
        self.lmu = LMU(dim, memory_dim=dim if memory_dim is None else memory_dim, theta=theta)
        self.out = nn.Linear(dim, dim)
        self.norm = SequenceBatchNorm(dim)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        if self.embedding is None:
            return self._mixed(x, cut)
        x = self.embedding(x, cut)
        return x + self._mixed(x, cut)

    def _mixed(self, x: Tensor, cut: Cut) -> Tensor:
        mixed: Tensor = self.norm(self.out(self.lmu(x, cut)), cut)
        return mixed


class ConvFFN(nn.Module):
    """The feed-forward part of LMUFormer's blocks, ``relu(norm(down(gelu(norm(up(x))))))``; blocks add it to ``x``.

    Its norms are batch norms over all tokens. ``hidden`` is ``4 dim`` by default.
    """

    def __init__(self, dim: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        positive(dim=dim, hidden=hidden)
        self.up, self.up_norm = nn.Linear(dim, hidden), SequenceBatchNorm(hidden)
        self.down, self.down_norm = nn.Linear(hidden, dim), SequenceBatchNorm(dim)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        inner = functional.gelu(self.up_norm(self.up(x), cut))
        return functional.relu(self.down_norm(self.down(inner), cut))


def _conv_weight(dim: int, in_dim: int) -> nn.Parameter:
    """As torch's convolutions start."""
    bound = (3 * in_dim) ** -0.5
    return nn.Parameter(torch.empty(dim, in_dim, 3).uniform_(-bound, bound))
