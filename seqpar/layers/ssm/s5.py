"""S5, the state-space model with one diagonal state for all channels (Smith et al. 2022, arXiv 2208.04933)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import positive
from seqpar.layers.parts.fp32 import Fp32Parameters
from seqpar.layers.ssm.state_space import exact_dtype, held, log_steps
from seqpar.sharding.cut import Cut


class S5(Fp32Parameters):
    """A linear system whose ``state_dim`` states all channels write to and read: diagonal, in conjugate pairs.

    ``h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A B x_t`` with a step ``dt`` for each pair (a zero-order hold), then
    ``y = 2 Re(C h) + D x`` and ``o sigmoid(gate(o))`` of ``o = gelu(y)``, which is called half a GLU. Only one of each
    pair is computed. The real parts of A are ``-exp(log_rate)``, so the system is stable whatever is learned.

    The state is zero before the first token of every document, so that token is read by a fresh state: with packed
    episodes as documents this is the resettable S5 of arXiv 2303.03982. It starts as ``blocks`` copies of HiPPO-N on
    the diagonal, in its own basis. ``x [b, t, dim]`` my tokens, and so is the result.

    ``state_dim / 2`` complex numbers travel, 8 bytes each; every rank knows what a rank does to them.
    """

    fp32 = ("log_rate", "frequency", "log_step")

    def __init__(self, dim: int, *, state_dim: int = 256, blocks: int = 8) -> None:
        super().__init__()
        positive(dim=dim, state_dim=state_dim, blocks=blocks)
        if state_dim % (2 * blocks):
            raise ValueError(f"state_dim must be a multiple of 2 * blocks, got {state_dim} and {blocks} blocks")
        half, size = state_dim // 2, state_dim // blocks
        frequency, basis = hippo_normal(size)
        inputs = torch.randn(blocks, size, dim) * dim**-0.5
        outputs = torch.randn(dim, blocks, size) * state_dim**-0.5
        b = torch.einsum("sp,jsd->jpd", basis.conj(), inputs.to(basis.dtype)).flatten(0, 1)
        c = torch.einsum("djs,sp->djp", outputs.to(basis.dtype), basis).flatten(1)
        self.log_rate = nn.Parameter(torch.full((half,), math.log(0.5)))
        self.frequency = nn.Parameter(frequency.repeat(blocks))
        self.log_step = nn.Parameter(log_steps(half))
        self.b = nn.Parameter(torch.stack([b.real, b.imag], 1))  # [state_dim / 2, 2, dim]
        self.c = nn.Parameter(torch.view_as_real(c).clone())  # [dim, state_dim / 2, 2]
        self.skip = nn.Parameter(torch.randn(dim))
        self.gate = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """``B x``, real and imaginary parts in turn: ``[b, t, state_dim]``."""
        return (functional.linear(x, self.b.flatten(0, 1)),)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The scan, which mixes tokens: the states ``[b, t, state_dim]``, real and imaginary parts in turn."""
        (drive,), here = parts, Here.of(cut, self)
        exact = exact_dtype(drive)
        log_a, weight = held(self.log_rate, self.frequency, self.log_step, exact)
        inputs = weight * torch.view_as_complex(drive.to(exact).unflatten(-1, (-1, 2)))
        return torch.view_as_real(here.diagonal_scan(inputs, log_a)).flatten(-2).to(drive.dtype)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """What the channels read of the states, gated, token by token."""
        signs = torch.tensor([2.0, -2.0], device=o.device, dtype=self.c.dtype)  # 2 Re(c h) = 2 re re - 2 im im
        y = functional.gelu(functional.linear(o, (self.c * signs).flatten(1)) + self.skip * x)
        return y * torch.sigmoid(self.gate(y))


def hippo_normal(size: int) -> tuple[Tensor, Tensor]:
    """The positive imaginary parts of HiPPO-N's eigenvalues ``[size / 2]`` (the real ones are all -1/2) and their
    eigenvectors, ``[size, size / 2]``."""
    roots = (2 * torch.arange(size, dtype=torch.float64) + 1).sqrt()
    skew = torch.outer(roots, roots) / 2
    skew = skew.triu(1) - skew.tril(-1)
    frequency, basis = torch.linalg.eigh(-1j * skew)
    return frequency[size // 2 :].float(), basis[:, size // 2 :].to(torch.complex64)
