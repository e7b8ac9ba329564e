"""The real-gated linear recurrent unit of Hawk and Griffin (De et al. 2024, arXiv 2402.19427)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import positive
from seqpar.layers.parts.fp32 import Fp32Parameters
from seqpar.layers.ssm.state_space import exact_dtype
from seqpar.sharding.cut import Cut

SHARPNESS = 8.0  # the paper's c


class RGLRU(Fp32Parameters):
    """The recurrent block of Hawk and Griffin: a gated branch, and one with a short convolution and the recurrence.

    ``u = conv(inner(x))`` over ``width`` tokens; gates ``r = sigmoid(W_r u + b_r)`` and ``i = sigmoid(W_i u + b_i)``
    with block-diagonal ``W``, one block per head; ``a_t = sigmoid(decay)^(8 r_t)``;
    ``h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t)``, and ``out(h gelu(gate(x)))``. The equation holds for the first
    token of a document, too (published code gives that one the weight 1 instead of ``sqrt(1 - a^2)``).
    ``x [b, t, dim]`` my tokens, and so is the result.

    The state, ``inner_dim`` numbers, travels, as many decays unless a chain carries it, and ``width - 1`` rows before
    the convolution. ``inner_dim`` (default: 4/3 ``dim``, rounded up to a multiple of ``heads``) is a multiple of
    ``heads``. The start is the paper's: ``sigmoid(decay)^8`` from 0.9 to 0.999.
    """

    fp32 = ("decay",)

    def __init__(self, dim: int, heads: int, *, inner_dim: int | None = None, width: int = 4) -> None:
        super().__init__()
        positive(dim=dim, heads=heads, width=width)
        inner = -(-4 * dim // (3 * heads)) * heads if inner_dim is None else inner_dim
        positive(inner_dim=inner)
        if inner % heads:
            raise ValueError(f"heads must divide inner_dim, got inner_dim={inner} and heads={heads}")
        block = inner // heads
        self.inner = nn.Linear(dim, inner, bias=False)
        self.gate = nn.Linear(dim, inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(inner, width).uniform_(-(width**-0.5), width**-0.5))
        self.conv_bias = nn.Parameter(torch.zeros(inner))
        self.gates = nn.Parameter(torch.randn(heads, block, 2 * block) * block**-0.5)  # r, then i
        self.gates_bias = nn.Parameter(torch.zeros(heads, 2 * block))
        kept = torch.empty(inner).uniform_(0.9, 0.999) ** (1 / SHARPNESS)
        self.decay = nn.Parameter(kept.log() - (1 - kept).log())
        self.out = nn.Linear(inner, dim, bias=False)
        self.heads = heads

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """What the convolution reads, ``[b, t, inner_dim]``."""
        return (self.inner(x),)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """What mixes tokens, the convolution and the scan: ``h [b, t, inner_dim]``."""
        here = Here.of(cut, self)
        u = here.causal_conv(parts[0], self.conv_weight, self.conv_bias)
        log_a, inputs = self._gated(u)
        return here.diagonal_scan(inputs, log_a)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """Gated and put together, token by token."""
        return self.out(o * functional.gelu(self.gate(x)))

    def _gated(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``log_a``, in fp32 (fp64 for fp64), and what the token adds to the state, in the dtype of ``u``."""
        exact = exact_dtype(u)
        products = torch.einsum("bthi,hij->bthj", u.unflatten(-1, (self.heads, -1)), self.gates)
        r, i = (products.to(exact) + self.gates_bias.to(exact)).sigmoid().chunk(2, -1)
        log_a = SHARPNESS * functional.logsigmoid(self.decay.to(exact)) * r.flatten(-2)
        # A gate that is shut makes 1 - a^2 zero, where a root has no gradient.
        share = (-torch.expm1(2 * log_a)).clamp(min=torch.finfo(exact).tiny).sqrt()
        return log_a, (share * i.flatten(-2) * u).to(u.dtype)
