"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635)."""

from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import head_dim, positive
from seqpar.layers.parts.norm import RMSNorm
from seqpar.layers.ssm.state_space import exact_dtype
from seqpar.sharding.cut import Cut


class GLA(nn.Module):
    """Linear attention whose decay each token sets for each key channel: ``sigmoid(low_rank(x)) ** (1 / 16)``.

    ``x [b, t, dim]`` my tokens, and so is the result. The state and the product of my decays travel. Each head's output
    is divided by its root mean square, then gated by swish. Defaults are the paper's: ``key_dim = dim / heads / 2``,
    ``value_dim = dim / heads`` (of one head), a gate of rank 16, and temperature 16, which keeps the decay near 1.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        gate_rank: int = 16,
        temperature: float = 16.0,
    ) -> None:
        super().__init__()
        value_dim = head_dim(dim, heads, value_dim, "value_dim")
        key_dim = max(1, head_dim(dim, heads, None) // 2) if key_dim is None else head_dim(dim, heads, key_dim)
        positive(gate_rank=gate_rank)
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.q = nn.Linear(dim, heads * key_dim, bias=False)
        self.k = nn.Linear(dim, heads * key_dim, bias=False)
        self.v = nn.Linear(dim, heads * value_dim, bias=False)
        self.decay = nn.Sequential(nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, heads * key_dim))
        self.gate = nn.Linear(dim, heads * value_dim, bias=False)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)
        self.norm = RMSNorm(value_dim)
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim
        self.temperature = temperature

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys, values and log decays, token by token."""
        q, k = (project(x).unflatten(-1, (-1, self.key_dim)) for project in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, self.value_dim))
        return q, k, v, self._log_decay(x)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The one call that mixes tokens: ``o [b, t, h, v]``, in fp32 (fp64 for fp64): sums outgrow fp16."""
        (q, k, v, log_decay), here = parts, Here.of(cut, self)
        scale = k.shape[-1] ** -0.5
        return here.linear_attention(q, k, v, log_decay=log_decay, scale=scale, out_dtype=exact_dtype(q))

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads normed, gated and put together, token by token."""
        return self.out(self.norm(o).to(x.dtype).flatten(-2) * functional.silu(self.gate(x)))

    def _log_decay(self, x: Tensor) -> Tensor:
        """``[b, t, h, k]``, in fp32 (fp64 for fp64): decays near 1 multiply up over the whole document."""
        logits = self.decay(x).to(exact_dtype(x)).unflatten(-1, (-1, self.key_dim))
        return functional.logsigmoid(logits) / self.temperature
