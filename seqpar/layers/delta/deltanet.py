"""DeltaNet (Yang et al. 2024, arXiv 2406.06484)."""

from torch import Tensor, nn

from seqpar.crossing.here import Here
from seqpar.layers.delta.delta_parts import Heads, conv_weight, delta_mix, write_strength
from seqpar.layers.parts.checks import head_dim, positive
from seqpar.layers.parts.norm import RMSNorm
from seqpar.sharding.cut import Cut


class DeltaNet(nn.Module):
    """Linear attention that replaces what is stored under a key: ``S_t = S_{t-1} + beta_t k_t (v_t - k_t' S_{t-1})'``.

    Queries, keys and values come out of one causal convolution of ``width`` tokens with silu; queries and keys are
    then scaled to length one; ``beta = sigmoid(W x)`` per head, and twice that with ``negative_eigenvalues``
    (arXiv 2411.12537). ``o = S_t' q_t / sqrt(key_dim)``, divided by its root mean square head by head, then ``out``.
    ``x [b, t, dim]`` my tokens, and so is the result.

    The state travels, what my tokens do to one (a matrix ``[key_dim, key_dim]`` per head) unless a chain carries it,
    and ``width - 1`` rows before the convolution. Every document starts with a state and a convolution of zeros.
    ``key_dim`` and ``value_dim`` (default: ``dim / heads``) are those of one head.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        width: int = 4,
        negative_eigenvalues: bool = False,
    ) -> None:
        super().__init__()
        key_dim, value_dim = head_dim(dim, heads, key_dim), head_dim(dim, heads, value_dim, "value_dim")
        positive(width=width)
        self.sizes = Heads(heads, heads, key_dim, value_dim)
        self.qkv = nn.Linear(dim, self.sizes.channels, bias=False)
        self.conv_weight = conv_weight(self.sizes.channels, width)
        self.beta = nn.Linear(dim, heads, bias=False)
        self.norm = RMSNorm(value_dim)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)
        self.negative_eigenvalues = negative_eigenvalues

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """What the convolution reads, ``[b, t, channels]``, and ``beta [b, t, h]``, token by token."""
        return self.qkv(x), write_strength(self.beta(x), self.negative_eigenvalues)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """What mixes tokens, the convolution and the recurrence: ``o [b, t, h, v]``."""
        qkv, beta = parts
        return delta_mix(Here.of(cut, self), self.sizes, qkv, self.conv_weight, beta, None)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads normed and put together, token by token."""
        return self.out(self.norm(o).flatten(-2))
