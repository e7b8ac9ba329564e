"""Mamba-2, structured state-space duality (Dao and Gu 2024, arXiv 2405.21060)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import positive
from seqpar.layers.parts.fp32 import Fp32Parameters
from seqpar.layers.parts.norm import GatedRMSNorm
from seqpar.layers.ssm.stuffed import clipped, windowed
from seqpar.sharding.cut import Cut


class Mamba2(Fp32Parameters):
    """A state-space model with one decay per head and token, which is linear attention with queries C and keys B.

    With ``dt = softplus(dt(x) + dt_bias)`` and ``A = -exp(log_a)`` per head: ``S_t = exp(dt A) S_{t-1} + B (dt x)'``
    and ``y = C S_t + D x``, where x, B and C (the inner channels, and ``groups`` keys and queries of ``state_dim``,
    each shared by ``heads / groups`` neighbouring heads) come out of one causal convolution of ``width`` tokens with
    silu. Then ``out(norm(y silu(z)))``, normed after the gate, each group of channels by itself. The paper's one
    in-projection [z, x, B, C, dt] is ``gate``, ``xbc`` and ``dt``. ``x [b, t, dim]`` my tokens, and so is the result.

    The state travels, the decays of my tokens unless a chain carries it, and ``width - 1`` rows of ``xbc``. Every
    document starts with a state and a convolution of zeros. The inner width is ``expand * dim``; ``heads`` is that over
    ``head_dim``. The decay starts as in the paper: A from -1 to -16, step sizes from 0.001 to 0.1, D at 1.

    Against being stuffed by more tokens than were trained on (arXiv 2410.07145): steps are ``step_scale`` times
    themselves plus ``step_offset``; ``window``: only so many tokens are seen, by the difference of two states;
    ``state_bound``: no head's state is longer than that, which only goes token by token.
    """

    fp32 = ("dt_bias", "log_a")

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 2,
        head_dim: int = 64,
        state_dim: int = 128,
        groups: int = 1,
        width: int = 4,
        step_scale: float = 1.0,
        step_offset: float = 0.0,
        window: int | None = None,
        state_bound: float | None = None,
    ) -> None:
        super().__init__()
        _check_remedies(step_scale, step_offset, window, state_bound)
        positive(dim=dim, expand=expand, head_dim=head_dim, state_dim=state_dim, groups=groups, width=width)
        inner = expand * dim
        if inner % head_dim:
            raise ValueError(f"head_dim must divide expand * dim, got head_dim={head_dim} and {expand} * {dim}")
        heads = inner // head_dim
        if heads % groups:
            raise ValueError(f"groups must divide the heads, got groups={groups} and {heads} heads")
        channels = inner + 2 * groups * state_dim
        self.gate = nn.Linear(dim, inner, bias=False)
        self.xbc = nn.Linear(dim, channels, bias=False)
        self.dt = nn.Linear(dim, heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, width).uniform_(-(width**-0.5), width**-0.5))
        self.conv_bias = nn.Parameter(torch.empty(channels).uniform_(-(width**-0.5), width**-0.5))
        self.dt_bias = nn.Parameter(_step_sizes(heads))
        self.log_a = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(inner, groups)
        self.out = nn.Linear(inner, dim, bias=False)
        self.heads, self.groups, self.inner = heads, groups, inner
        self.step_scale, self.step_offset = step_scale, step_offset
        self.window, self.state_bound = window, state_bound

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """What the convolution reads ``[b, t, inner + 2 groups state_dim]``, and step sizes ``[b, t, h]``, which are
        fp32 (fp64 for fp64)."""
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        dt = functional.softplus(self.dt(x).to(exact) + self.dt_bias.to(exact))
        return self.xbc(x), dt if (self.step_scale, self.step_offset) == (1, 0) else self._changed(dt)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """What mixes tokens, the convolution and the recurrence: ``y [b, t, h, head_dim]``."""
        (xbc, dt), here = parts, Here.of(cut, self)
        x, k, q = self._split(functional.silu(here.causal_conv(xbc, self.conv_weight, self.conv_bias)))
        v, log_decay = (dt[..., None] * x).to(x.dtype), -self.log_a.to(dt.dtype).exp() * dt
        if self.window is not None:
            y = windowed(here, q, k, v, log_decay, self.window)
        elif self.state_bound is not None:
            y = clipped(here, q, k, v, log_decay, self.state_bound)
        else:
            y = here.linear_attention(q, k, v, log_decay=log_decay, out_dtype=dt.dtype)
        return y + self.skip.to(dt.dtype)[:, None] * x

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads gated, normed and put together, token by token."""
        return self.out(self.norm(o.flatten(-2), self.gate(x)).to(x.dtype))

    def _changed(self, dt: Tensor) -> Tensor:
        return dt * self.step_scale + self.step_offset

    def _split(self, xbc: Tensor) -> tuple[Tensor, ...]:
        """x ``[b, t, h, head_dim]``, and B and C ``[b, t, h, state_dim]``: each head gets those of its group."""
        x, bc = xbc.split([self.inner, xbc.shape[-1] - self.inner], -1)
        share = self.heads // self.groups
        k, q = (y.unflatten(-1, (self.groups, -1)).repeat_interleave(share, 2) for y in bc.chunk(2, -1))
        return x.unflatten(-1, (self.heads, -1)), k, q


def _check_remedies(step_scale: float, step_offset: float, window: int | None, state_bound: float | None) -> None:
    if not (0 < step_scale < math.inf and 0 <= step_offset < math.inf):
        raise ValueError(f"steps stay steps: step_scale > 0 and step_offset >= 0, got {step_scale} and {step_offset}")
    if window is not None:
        positive(window=window)
    if state_bound is not None and not 0 < state_bound < math.inf:
        raise ValueError(f"state_bound must be above 0 and finite, got {state_bound}")
    if window is not None and state_bound is not None:
        raise ValueError("a window is the difference of two states, which a bound would bend: give one of the two")


def _step_sizes(heads: int, low: float = 1e-3, high: float = 0.1) -> Tensor:
    """Biases ``[heads]`` whose softplus is spread from ``low`` to ``high``, evenly in their logarithm."""
    dt = torch.empty(heads).uniform_(math.log(low), math.log(high)).exp()
    return dt + (-torch.expm1(-dt)).log()
