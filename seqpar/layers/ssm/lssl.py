"""LSSL, the linear state-space layer (Gu et al. 2021, arXiv 2110.13985)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import positive
from seqpar.layers.parts.fp32 import Fp32Parameters
from seqpar.layers.ssm.state_space import bilinear, exact_dtype, hippo_legs, log_steps
from seqpar.sharding.cut import Cut


class LSSL(Fp32Parameters):
    """Each channel drives a linear system of its own, ``h' = A h + B x``, with a dense matrix, at first HiPPO-LegS.

    Sampled by the bilinear rule with a step ``dt`` per channel: ``h_t = (I - dt/2 A)^-1 ((I + dt/2 A) h_{t-1} + dt B
    x_t)``. ``channels`` linear maps read each state, ``y = C h + D x``, and ``out(gelu(y))`` mixes them all. Steps
    (from 0.001 to 0.1), A, B, C (normal) and D are learned; freeze ``a`` and ``log_step`` for the paper's
    LSSL-fixed. ``x [b, t, dim]`` my tokens, and so is the result.

    One state travels; every rank knows what a rank does to it: a power of a matrix, computed in fp64, because HiPPO's
    is so far from normal that its eigenvectors are of no use.
    """

    fp32 = ("a", "b", "log_step")

    def __init__(self, dim: int, *, state_dim: int = 64, channels: int = 1) -> None:
        super().__init__()
        positive(dim=dim, state_dim=state_dim, channels=channels)
        a, b = hippo_legs(state_dim)
        self.a = nn.Parameter(a.float().repeat(dim, 1, 1))
        self.b = nn.Parameter(b.float().repeat(dim, 1))
        self.c = nn.Parameter(torch.randn(dim, channels, state_dim) * state_dim**-0.5)
        self.skip = nn.Parameter(torch.randn(dim, channels))
        self.log_step = nn.Parameter(log_steps(dim))
        self.out = nn.Linear(dim * channels, dim)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix((x,), cut), x)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The systems, which mix tokens, and what is read of them: ``[b, t, dim channels]``."""
        (x,), here = parts, Here.of(cut, self)
        a, b = bilinear(self.a.double(), self.b.double(), self.log_step.double().exp())
        u = x.to(exact_dtype(x))[..., None]
        y = here.linear_system(u, a, b, self.c.double())[..., 0] + self.skip.to(u.dtype) * u
        return y.flatten(2).to(x.dtype)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The channels mixed, token by token."""
        return self.out(functional.gelu(o))
