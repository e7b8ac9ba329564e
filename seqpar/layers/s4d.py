"""S4D, the diagonal state-space model (Gu et al. 2022, arXiv 2206.11893)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.cut import Cut
from seqpar.here import Here
from seqpar.layers.checks import positive
from seqpar.layers.state_space import exact_dtype, held, log_steps


class S4D(nn.Module):
    """A long convolution of each channel with a sum of damped waves, computed as a scan of complex states.

    With ``state_dim / 2`` rates ``A_n = -1/2 + i pi n`` for every channel (and their conjugates, which need not be
    computed), a step ``dt`` per channel and a zero-order hold:
    ``y_t = D x_t + sum_s 2 Re(sum_n C_n (exp(dt A_n) - 1) / A_n exp((t - s) dt A_n)) x_s`` over the tokens ``s`` up to
    ``t`` of the same document; then ``glu(out(gelu(y)))`` with ``out`` twice as wide as ``dim``. Rates (S4D-Lin), steps
    (from 0.001 to 0.1), C (normal) and D are learned; the paper's B is 1. Nothing in it depends on how long a sequence
    is, and documents may be packed, which a convolution by FFT cannot do. ``x [b, t, dim]`` my tokens, and so is the
    result. A token has ``dim state_dim / 2`` complex states while the layer works.

    Those states travel, 8 bytes a number; every rank knows what a rank does to them.
    """

    def __init__(self, dim: int, *, state_dim: int = 64) -> None:
        super().__init__()
        positive(dim=dim, state_dim=state_dim)
        if state_dim % 2:
            raise ValueError(f"state_dim counts conjugate pairs and must be even, got {state_dim}")
        half = state_dim // 2
        self.log_rate = nn.Parameter(torch.full((dim, half), math.log(0.5)))
        self.frequency = nn.Parameter(torch.arange(float(half)).mul(math.pi).repeat(dim, 1))
        self.log_step = nn.Parameter(log_steps(dim))
        self.c = nn.Parameter(torch.randn(dim, half, 2) * 0.5**0.5)  # real and imaginary part
        self.skip = nn.Parameter(torch.randn(dim))
        self.out = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix((x,), cut), x)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The scan, which mixes tokens, and what it says of each channel: ``y [b, t, dim]``."""
        (x,), here = parts, Here.of(cut, self)
        exact = exact_dtype(x)
        log_a, weight = held(self.log_rate, self.frequency, self.log_step[:, None], exact)
        weight = torch.view_as_real(2 * weight * torch.view_as_complex(self.c.to(exact)))
        inputs = x.to(log_a.dtype)[..., None].expand(*x.shape, log_a.shape[-1])
        states = torch.view_as_real(here.diagonal_scan(inputs.flatten(2), log_a.flatten()))
        real, imaginary = states.unflatten(2, log_a.shape).unbind(-1)
        y = (real * weight[..., 0] - imaginary * weight[..., 1]).sum(-1)
        return (y + self.skip.to(exact) * x.to(exact)).to(x.dtype)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The channels mixed, token by token."""
        return functional.glu(self.out(functional.gelu(o)), -1)
