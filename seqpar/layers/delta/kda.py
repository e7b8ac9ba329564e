"""Kimi Delta Attention (Kimi Linear, Kimi Team 2025, arXiv 2510.26692)."""

from torch import Tensor, nn

from seqpar.crossing.here import Here
from seqpar.layers.delta.delta_parts import (
    Heads,
    conv_weight,
    delta_mix,
    log_rates,
    softplus_log_decay,
    step_bias,
    write_strength,
)
from seqpar.layers.parts.checks import head_dim, positive
from seqpar.layers.parts.fp32 import Fp32Parameters
from seqpar.layers.parts.norm import RMSNorm
from seqpar.layers.ssm.state_space import exact_dtype
from seqpar.sharding.cut import Cut


class KDA(Fp32Parameters):
    """The delta rule with a decay per key channel: ``S_t = (I - beta k k') Diag(exp(g)) S_{t-1} + beta k v'``.

    The decay's logits come of a projection of rank ``value_dim``, and ``g = -exp(log_a) softplus(logits + dt_bias)``
    with ``log_a`` per head and ``dt_bias`` per key channel. With a ``lower_bound``, from -5 up to but without 0, it is
    ``g = lower_bound sigmoid(exp(log_a) (logits + dt_bias))``: no token forgets more than that. ``beta`` is
    ``sigmoid(W x)``, and twice that with ``negative_eigenvalues``. Queries, keys and values come out of one causal
    convolution of ``width`` tokens with silu; queries and keys are then scaled to length one.
    ``o = S_t' q_t / sqrt(key_dim)``; then ``out(norm(o) sigmoid(gate(x)))``, the norm being that of each head, the gate
    of rank ``value_dim`` with a bias. ``x [b, t, dim]`` my tokens, and so is the result.

    The state travels, what my tokens do to one (a matrix ``[key_dim, key_dim]`` per head) unless a chain carries it,
    and ``width - 1`` rows before the convolution. Every document starts with a state and a convolution of zeros.
    ``key_dim`` and ``value_dim`` (default: ``dim / heads``) are those of one head.
    """

    fp32 = ("dt_bias", "log_a")

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        width: int = 4,
        lower_bound: float | None = None,
        negative_eigenvalues: bool = False,
    ) -> None:
        super().__init__()
        key_dim, value_dim = head_dim(dim, heads, key_dim), head_dim(dim, heads, value_dim, "value_dim")
        positive(width=width)
        if lower_bound is not None and not -5 <= lower_bound < 0:
            raise ValueError(f"lower_bound is a log decay, at least -5 and below 0, got {lower_bound}")
        self.sizes = Heads(heads, heads, key_dim, value_dim)
        self.qkv = nn.Linear(dim, self.sizes.channels, bias=False)
        self.conv_weight = conv_weight(self.sizes.channels, width)
        self.beta = nn.Linear(dim, heads, bias=False)
        self.decay = nn.Sequential(nn.Linear(dim, value_dim, bias=False), nn.Linear(value_dim, heads * key_dim, False))
        self.log_a, self.dt_bias = log_rates(heads), step_bias(heads * key_dim)
        self.gate = nn.Sequential(nn.Linear(dim, value_dim, bias=False), nn.Linear(value_dim, heads * value_dim))
        self.norm = RMSNorm(value_dim)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)
        self.lower_bound, self.negative_eigenvalues = lower_bound, negative_eigenvalues

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """What the convolution reads, ``[b, t, channels]``, beta ``[b, t, h]`` and log decay ``[b, t, h, k]``."""
        return self.qkv(x), write_strength(self.beta(x), self.negative_eigenvalues), self._log_decay(x)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """What mixes tokens, the convolution and the recurrence: ``o [b, t, h, v]``."""
        qkv, beta, log_decay = parts
        return delta_mix(Here.of(cut, self), self.sizes, qkv, self.conv_weight, beta, log_decay)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads normed, gated and put together, token by token."""
        return self.out(self.norm(o).flatten(-2) * self.gate(x).sigmoid())

    def _log_decay(self, x: Tensor) -> Tensor:
        """``[b, t, h, k]``, in fp32 (fp64 for fp64)."""
        logits, bias = (y.unflatten(-1, (self.sizes.keys, -1)) for y in (self.decay(x), self.dt_bias))
        if self.lower_bound is None:
            return softplus_log_decay(logits, self.log_a[:, None], bias)
        exact = exact_dtype(x)
        return self.lower_bound * (self.log_a[:, None].to(exact).exp() * (logits.to(exact) + bias.to(exact))).sigmoid()
