"""Mamba, the selective state-space model (Gu and Dao 2023, arXiv 2312.00752)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import positive
from seqpar.layers.parts.fp32 import Fp32Parameters
from seqpar.layers.ssm.state_space import exact_dtype, log_steps
from seqpar.sharding.cut import Cut


class Mamba(Fp32Parameters):
    """A state-space model whose steps, inputs and outputs each token chooses: ``state_dim`` states for every channel.

    ``u = silu(conv(inner(x)))``, a causal convolution of ``width`` tokens; of ``u`` come ``B``, ``C`` and the steps
    ``dt = softplus(W u + dt_bias)``, whose ``W`` has rank ``dt_rank`` (default: ``dim / 16``, rounded up). Then
    ``h_t = exp(dt A) h_{t-1} + dt B u`` with ``A = -exp(log_a)``, ``y = C h_t + D u``, and ``out(y silu(gate(x)))``.
    ``x [b, t, dim]`` my tokens, and so is the result. Gradients of states that leave a call are whole, and no token is
    padding, so no step is taken for one.

    The state ``[expand dim, state_dim]`` travels, the sum of each channel's steps unless a chain carries it, and
    ``width - 1`` rows before the convolution. Every document starts with a state and a convolution of zeros. The start
    is the paper's: A from -1 to ``-state_dim``, steps from 0.001 to 0.1, D at 1.
    """

    own_initialisation: tuple[str, ...] = ("dt",)

    fp32 = ("dt_bias", "log_a")

    def __init__(
        self, dim: int, *, expand: int = 2, state_dim: int = 16, width: int = 4, dt_rank: int | None = None
    ) -> None:
        super().__init__()
        dt_rank = -(-dim // 16) if dt_rank is None else dt_rank
        positive(dim=dim, expand=expand, state_dim=state_dim, width=width, dt_rank=dt_rank)
        inner = expand * dim
        self.inner = nn.Linear(dim, inner, bias=False)
        self.gate = nn.Linear(dim, inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(inner, width).uniform_(-(width**-0.5), width**-0.5))
        self.conv_bias = nn.Parameter(torch.empty(inner).uniform_(-(width**-0.5), width**-0.5))
        self.selection = nn.Linear(inner, dt_rank + 2 * state_dim, bias=False)
        self.dt = nn.Linear(dt_rank, inner, bias=False)
        nn.init.uniform_(self.dt.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        steps = log_steps(inner).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(steps + (-torch.expm1(-steps)).log())  # the inverse of softplus
        self.log_a = nn.Parameter(torch.arange(1.0, state_dim + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, dim, bias=False)
        self.widths = (dt_rank, state_dim, state_dim)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """What the convolution reads, ``[b, t, expand dim]``."""
        return (self.inner(x),)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """What mixes tokens, the convolution and the scan: ``y [b, t, expand dim]``."""
        here = Here.of(cut, self)
        u = functional.silu(here.causal_conv(parts[0], self.conv_weight, self.conv_bias))
        steps, b, c = self.selection(u).split(self.widths, -1)
        exact = exact_dtype(u)
        delta = functional.softplus(self.dt(steps).to(exact) + self.dt_bias.to(exact))
        y = here.selective_scan(u, delta, -self.log_a.to(exact).exp(), b, c)
        return y + (self.skip * u).to(y.dtype)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """Gated and put together, token by token."""
        return self.out(o * functional.silu(self.gate(x)))
