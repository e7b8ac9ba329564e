"""S4, the structured state-space model (Gu et al. 2021, arXiv 2111.00396)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import one_of, positive
from seqpar.layers.parts.fp32 import Fp32Parameters
from seqpar.layers.ssm.s5 import hippo_normal
from seqpar.layers.ssm.state_space import bilinear, exact_dtype, hippo_legs, hold, log_steps
from seqpar.sharding.cut import Cut

SAMPLING = {"bilinear": bilinear, "zoh": hold}


class S4(Fp32Parameters):
    """Each channel drives a linear system of its own, ``h' = A h + B x``, whose matrix is a diagonal one and one of
    rank 1: ``A = Lambda - P Q*``. It starts as HiPPO-LegS, in the basis that makes it so.

    Sampled with a step ``dt`` per channel by the ``"bilinear"`` rule (the paper's) or a zero-order hold (``"zoh"``).
    Then ``y = C h + D x`` and ``glu(out(gelu(y)))`` with ``out`` twice as wide as ``dim``. States are ``state_dim / 2``
    conjugate pairs, computed as so many real and imaginary parts. Lambda (its real parts are ``-exp(log_rate)``), P, Q,
    B, C (normal), D and steps (from 0.001 to 0.1) are learned. ``tied``: Q is P, as in arXiv 2202.09729, so that the
    system is stable whatever is learned; untied, as in the paper, it may become unstable.

    ``bidirectional``: a second C reads the states of the same system as it goes from the last token of each document to
    its first, and is added. (The published code's second kernel begins with the token after; as D is learned, too, that
    is the same family of layers.)

    C is what reads a state. The published code learns ``C (I - A^L)`` for sequences of length ``L`` instead, so that
    its weights mean something else for every length; here nothing depends on how long a sequence or a shard is, and
    documents may be packed. ``x [b, t, dim]`` my tokens, and so is the result.

    One state travels, ``dim state_dim`` numbers; every rank knows what a rank does to it: a power of a matrix, in fp64.
    """

    fp32 = ("log_rate", "frequency", "log_step", "p", "q", "b")

    def __init__(
        self, dim: int, *, state_dim: int = 64, sampling: str = "bilinear", tied: bool = True,
        bidirectional: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        positive(dim=dim, state_dim=state_dim)
        if state_dim % 2:
            raise ValueError(f"state_dim counts conjugate pairs and must be even, got {state_dim}")
        half = state_dim // 2
        frequency, basis = hippo_normal(state_dim)
        roots = hippo_legs(state_dim)[1].to(basis.dtype)
        drive = torch.view_as_real(basis.mH @ roots).repeat(dim, 1, 1)  # [dim, half, 2]: real and imaginary parts
        self.log_rate = nn.Parameter(torch.full((dim, half), math.log(0.5)))
        self.frequency = nn.Parameter(frequency.repeat(dim, 1))
        self.p = nn.Parameter(drive * 0.5**0.5)
        self.q = None if tied else nn.Parameter(drive * 0.5**0.5)
        self.b = nn.Parameter(drive.clone())
        self.c = nn.Parameter(torch.randn(dim, half, 2) * 0.5**0.5)
        self.c_back = nn.Parameter(torch.randn(dim, half, 2) * 0.5**0.5) if bidirectional else None
        self.log_step = nn.Parameter(log_steps(dim))
        self.skip = nn.Parameter(torch.randn(dim))
        self.out = nn.Linear(dim, 2 * dim)
        self.sampling = one_of("sampling", sampling, SAMPLING)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix((x,), cut), x)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The systems, which mix tokens, and what each channel reads of its own: ``y [b, t, dim]``."""
        (x,), here = parts, Here.of(cut, self)
        exact = x.to(exact_dtype(x))
        a, b, *reads = self.system()
        ways = [here.linear_system(exact[..., None], a, b, c, backwards=n > 0)[..., 0, 0] for n, c in enumerate(reads)]
        y = sum(ways[1:], ways[0])
        return (y + self.skip.to(exact.dtype) * exact).to(x.dtype)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The channels mixed, token by token."""
        return functional.glu(self.out(functional.gelu(o)), -1)

    def system(self) -> tuple[Tensor, ...]:
        """A and B as sampled, and C (both ways two), of states ``[real parts, imaginary parts]``: ``[dim, n, n]``,
        ``[dim, n]`` and ``[dim, 1, n]``, in fp64."""
        p, b, *reads = (_parts(x) for x in (self.p, self.b, self.c, self.c_back) if x is not None)
        q = p if self.q is None else _parts(self.q)
        rate, turn = torch.diag_embed(-self.log_rate.double().exp()), torch.diag_embed(self.frequency.double())
        diagonal = torch.cat([torch.cat([rate, -turn], 2), torch.cat([turn, rate], 2)], 1)
        # Q* h of a pair and its conjugate is 2 Re(conj(q) h), and C h is 2 Re(c h).
        a, b = SAMPLING[self.sampling](diagonal - 2 * p[:, :, None] * q[:, None], b, self.log_step.double().exp())
        signs = b.new_tensor([2.0, -2.0]).repeat_interleave(b.shape[1] // 2)
        return a, b, *((c * signs)[:, None] for c in reads)


def _parts(x: Tensor) -> Tensor:
    """``[dim, half, 2]`` as ``[dim, n]``: first all real parts, then all imaginary ones."""
    return x.double().transpose(1, 2).flatten(1)
