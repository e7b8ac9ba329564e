"""LMU, the Legendre memory unit (Voelker et al., NeurIPS 2019), as run in parallel (Chilkuri and Eliasmith 2021).

The parallel form is of arXiv 2102.11417; LMUFormer (arXiv 2402.04882) is made of it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import positive
from seqpar.layers.ssm.state_space import hold
from seqpar.ops.kept import kept
from seqpar.sharding.cut import Cut


class LMU(nn.Module):
    """One channel, ``u = relu(encode(x))``, is kept as the coefficients of its last ``theta`` tokens: ``m_t = A m_{t-1}
    + B u_t``, of Legendre polynomials up to degree ``memory_dim - 1``; then ``relu(out([m, x]))``.

    A and B are constants: the memory's, sampled once per token with a zero-order hold. The memories are never there
    all at once: what ``out`` reads of them is computed instead. ``x [b, t, dim]`` my tokens, and so is the result.

    One memory travels; every rank knows what a rank does to it. The published code fixes the length of a sequence in
    advance; here any will do, and documents may be packed.
    """

    def __init__(self, dim: int, *, memory_dim: int = 256, theta: float = 128.0) -> None:
        super().__init__()
        positive(dim=dim, memory_dim=memory_dim)
        if not theta > 0:
            raise ValueError(f"theta must be above 0 tokens, got {theta}")
        self.encode = nn.Linear(dim, 1)
        self.out = nn.Linear(memory_dim + dim, dim)
        self.memory_dim, self.theta = memory_dim, theta

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """What the memory keeps, ``[b, t, 1]``."""
        return (functional.relu(self.encode(x)),)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The memory, which mixes tokens, as ``out`` reads it: ``[b, t, dim]``."""
        (u,), here = parts, Here.of(cut, self)
        a, b = legendre_memory(self.memory_dim, self.theta, u.device)
        read = self.out.weight[None, :, : self.memory_dim].double()
        return here.linear_system(u[..., None], a, b, read)[:, :, 0, :, 0]

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """What ``out`` reads of the input besides, token by token."""
        return functional.relu(o + functional.linear(x, self.out.weight[:, self.memory_dim :], self.out.bias))


@kept()
def legendre_memory(size: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """A ``[1, size, size]`` and B ``[1, size]`` of the memory of ``theta`` tokens, for a step of one, in fp64."""
    row, column = torch.arange(size)[:, None], torch.arange(size)
    scale = (2 * row.double() + 1) / theta
    a = scale * torch.where(row < column, -1.0, 1.0 - 2.0 * ((row - column + 1) % 2)).double()
    b = scale * (1.0 - 2.0 * (row % 2))
    a, b = hold(a[None], b[:, 0][None], torch.ones(1, dtype=torch.float64))
    return a.to(device), b.to(device)
