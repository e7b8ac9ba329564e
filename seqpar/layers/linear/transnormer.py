"""The token mixer of TransNormerLLM (Qin et al. 2023, arXiv 2307.14995)."""

from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.linear.lightning_attention import constant_decay, decay_slopes
from seqpar.layers.linear.lrpe import lrpe, lrpe_angles
from seqpar.layers.parts.checks import head_dim, one_of
from seqpar.layers.parts.fp32 import Fp32Parameters
from seqpar.layers.parts.norm import SimpleRMSNorm
from seqpar.layers.ssm.state_space import exact_dtype
from seqpar.sharding.cut import Cut

POSITIONS = ("learned", "fixed", "none")


class TransNormer(Fp32Parameters):
    """Lightning attention with linearised relative positions: one state per head travels, the decay does not.

    ``S_t = exp(-slope) S_{t-1} + k_t v_t'`` and ``o_t = q_t S_t``, with queries and keys through swish, then through
    :func:`seqpar.layers.linear.lrpe.lrpe`, which makes them twice as wide; then ``out(norm(o) * gate(x))``, with a norm
    of all heads together and neither weights nor an activation on the gate. ``x [b, t, dim]`` my tokens, and so is the
    result.

    ``positions``: ``"learned"`` angles, ``"fixed"`` ones, or ``"none"``; by default, as in the paper, learned in the
    first layer and none in the others, which know positions by their decay. ``slopes``: ``"arange"``, the paper's, or
    ``"alibi"``, that of the published code (:func:`seqpar.layers.decay_slopes`). The paper's feed-forward part is
    :class:`seqpar.layers.parts.mlp.SGLU`. ``key_dim`` and ``value_dim`` are those of one head (default: ``dim /
    heads``).
    """

    fp32 = ("theta",)

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        layer: int = 0,
        layers: int = 1,
        slopes: str = "arange",
        positions: str | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        base: float = 10000.0,
    ) -> None:
        super().__init__()
        key_dim = head_dim(dim, heads, key_dim)
        value_dim = head_dim(dim, heads, value_dim, "value_dim")
        if not base > 0:
            raise ValueError(f"base must be above 0, got {base}")
        self.log_decay = tuple(-slope for slope in decay_slopes(slopes, heads, layer, layers))
        default = "none" if layer else "learned"
        self.positions = one_of("positions", default if positions is None else positions, POSITIONS)
        self.q = nn.Linear(dim, heads * key_dim, bias=False)
        self.k = nn.Linear(dim, heads * key_dim, bias=False)
        self.v = nn.Linear(dim, heads * value_dim, bias=False)
        self.gate = nn.Linear(dim, heads * value_dim, bias=False)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)
        self.theta = nn.Parameter(lrpe_angles(heads, key_dim, base).float()) if self.positions == "learned" else None
        self.norm = SimpleRMSNorm()
        self.heads, self.key_dim, self.value_dim, self.base = heads, key_dim, value_dim, base

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Queries and keys through swish and with their positions, and values, token by token."""
        q, k = (project(x).unflatten(-1, (-1, self.key_dim)) for project in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, self.value_dim))
        q, k = (self._placed(functional.silu(y), positions) for y in (q, k))
        return q, k, v

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The one call that mixes tokens: ``o [b, t, h, v]``, in fp32 (fp64 for fp64): sums outgrow fp16."""
        (q, k, v), decay = parts, constant_decay(self.log_decay, parts[0])
        return Here.of(cut, self).linear_attention(q, k, v, log_decay=decay, out_dtype=exact_dtype(q))

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads normed together and gated, token by token."""
        return self.out(self.norm(o.flatten(-2)).to(x.dtype) * self.gate(x))

    def _placed(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.positions == "none":
            return x
        if self.theta is not None:
            return lrpe(x, positions, self.theta)
        return lrpe(x, positions, lrpe_angles(self.heads, x.shape[-1], self.base, x.device))
