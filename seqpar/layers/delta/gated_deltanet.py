"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464)."""

from torch import Tensor, nn
from torch.nn import functional

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
from seqpar.layers.parts.checks import positive
from seqpar.layers.parts.fp32 import Fp32Parameters
from seqpar.layers.parts.norm import RMSNorm
from seqpar.sharding.cut import Cut


class GatedDeltaNet(Fp32Parameters):
    """The delta rule with a decay per head and token: ``S_t = (I - beta k k') exp(g) S_{t-1} + beta k v'``.

    ``g = -exp(log_a) softplus(a(x) + dt_bias)``, ``beta = sigmoid(W x)``, twice that with ``negative_eigenvalues``.
    Queries, keys and values come out of one causal convolution of ``width`` tokens with silu; queries and keys are
    then scaled to length one. ``o = S_t' q_t / sqrt(key_dim)``; then ``out(norm(o) silu(gate(x)))``, the norm being
    that of each head, before the gate. ``x [b, t, dim]`` my tokens, and so is the result.

    The state travels, what my tokens do to one (a matrix ``[key_dim, key_dim]`` per head) unless a chain carries it,
    and ``width - 1`` rows before the convolution. Every document starts with a state and a convolution of zeros.
    ``value_heads`` (default: ``heads``, of which it is a multiple) share ``heads`` queries and keys, each a run of
    neighbours; decay, beta and state are those of value heads. Defaults are the paper's: ``key_dim`` is three
    quarters of ``dim / heads``, values are ``expand_v = 2`` times as wide.
    """

    fp32 = ("dt_bias", "log_a")

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        value_heads: int | None = None,
        key_dim: int | None = None,
        expand_v: int = 2,
        width: int = 4,
        negative_eigenvalues: bool = False,
    ) -> None:
        super().__init__()
        value_heads = heads if value_heads is None else value_heads
        positive(dim=dim, heads=heads, value_heads=value_heads, expand_v=expand_v, width=width)
        key_dim = max(1, 3 * dim // (4 * heads)) if key_dim is None else key_dim
        positive(key_dim=key_dim)
        if value_heads % heads:
            raise ValueError(f"value_heads must be a multiple of heads, got {value_heads} and {heads}")
        self.sizes = Heads(heads, value_heads, key_dim, expand_v * key_dim)
        values = value_heads * self.sizes.value_dim
        self.qkv = nn.Linear(dim, self.sizes.channels, bias=False)
        self.conv_weight = conv_weight(self.sizes.channels, width)
        self.beta = nn.Linear(dim, value_heads, bias=False)
        self.decay = nn.Linear(dim, value_heads, bias=False)
        self.log_a, self.dt_bias = log_rates(value_heads), step_bias(value_heads)
        self.gate = nn.Linear(dim, values, bias=False)
        self.norm = RMSNorm(self.sizes.value_dim)
        self.out = nn.Linear(values, dim, bias=False)
        self.negative_eigenvalues = negative_eigenvalues

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """What the convolution reads, ``[b, t, channels]``, beta and log decay ``[b, t, h]``, token by token."""
        beta = write_strength(self.beta(x), self.negative_eigenvalues)
        return self.qkv(x), beta, softplus_log_decay(self.decay(x), self.log_a, self.dt_bias)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """What mixes tokens, the convolution and the recurrence: ``o [b, t, h, v]``."""
        qkv, beta, log_decay = parts
        return delta_mix(Here.of(cut, self), self.sizes, qkv, self.conv_weight, beta, log_decay)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads normed, gated and put together, token by token."""
        return self.out(self.norm(o).flatten(-2) * functional.silu(self.gate(x)))
