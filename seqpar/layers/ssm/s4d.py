"""S4D, the diagonal state-space model (Gu et al. 2022, arXiv 2206.11893)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import positive
from seqpar.layers.parts.fp32 import Fp32Parameters
from seqpar.layers.ssm.state_space import exact_dtype, held, log_steps
from seqpar.sharding.cut import Cut


class S4D(Fp32Parameters):
    """A long convolution of each channel with a sum of damped waves, computed in chunks from complex states.

    With ``state_dim / 2`` rates ``A_n = -1/2 + i pi n`` for every channel (and their conjugates, which need not be
    computed), a step ``dt`` per channel and a zero-order hold:
    ``y_t = D x_t + sum_s 2 Re(sum_n C_n (exp(dt A_n) - 1) / A_n exp((t - s) dt A_n)) x_s`` over the tokens ``s`` up to
    ``t`` of the same document; then ``glu(out(gelu(y)))`` with ``out`` twice as wide as ``dim``. Rates (S4D-Lin), steps
    (from 0.001 to 0.1), C (normal) and D are learned; the paper's B is 1. Nothing in it depends on how long a sequence
    is, and documents may be packed, which a convolution by FFT cannot do. ``x [b, t, dim]`` my tokens, and so is the
    result.

    ``bidirectional``: a second C reads the states of the same system as it goes from the last token of each document to
    its first, and is added. (The published code's second kernel begins with the token after; as D is learned, too, that
    is the same family of layers.)

    Only the states travel, ``dim state_dim / 2`` complex numbers; every rank knows what a rank does to them.
    """

    fp32 = ("log_rate", "frequency", "log_step")

    def __init__(self, dim: int, *, state_dim: int = 64, bidirectional: bool = False) -> None:
        super().__init__()
        positive(dim=dim, state_dim=state_dim)
        if state_dim % 2:
            raise ValueError(f"state_dim counts conjugate pairs and must be even, got {state_dim}")
        half = state_dim // 2
        self.log_rate = nn.Parameter(torch.full((dim, half), math.log(0.5)))
        self.frequency = nn.Parameter(torch.arange(float(half)).mul(math.pi).repeat(dim, 1))
        self.log_step = nn.Parameter(log_steps(dim))
        self.c = nn.Parameter(torch.randn(dim, half, 2) * 0.5**0.5)  # real and imaginary part
        self.c_back = nn.Parameter(torch.randn(dim, half, 2) * 0.5**0.5) if bidirectional else None
        self.skip = nn.Parameter(torch.randn(dim))
        self.out = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix((x,), cut), x)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The one call that mixes tokens: ``y [b, t, dim]``."""
        (x,), here = parts, Here.of(cut, self)
        exact = x.to(exact_dtype(x))
        a, b, *reads = self.system()
        ways = [here.linear_system(exact[..., None], a, b, c, backwards=n > 0)[..., 0, 0] for n, c in enumerate(reads)]
        y = sum(ways[1:], ways[0])
        return (y + self.skip.to(exact.dtype) * exact).to(x.dtype)

    def system(self) -> tuple[Tensor, ...]:
        """A ``[dim, n / 2]`` complex, and B ``[dim, n]`` and C ``[dim, 1, n]`` (both ways two) of states ``[real parts,
        imaginary parts]``, in fp64."""
        log_a, b = held(self.log_rate, self.frequency, self.log_step[:, None], torch.float64)
        reads = [(2 * c.double()).unbind(-1) for c in (self.c, self.c_back) if c is not None]
        c = [torch.cat([real, -imaginary], -1)[:, None] for real, imaginary in reads]  # 2 Re(c h) = 2 re re - 2 im im
        return log_a.exp(), torch.cat([b.real, b.imag], -1), *c

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The channels mixed, token by token."""
        return functional.glu(self.out(functional.gelu(o)), -1)
