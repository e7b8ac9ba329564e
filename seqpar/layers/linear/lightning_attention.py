"""Lightning Attention: a constant decay per head (Qin et al. 2024, arXiv 2401.04658; TransNormerLLM, 2307.14995)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import head_dim, one_of, positive
from seqpar.layers.parts.norm import RMSNorm
from seqpar.layers.ssm.state_space import exact_dtype
from seqpar.ops.kept import kept
from seqpar.sharding.cut import Cut

SLOPES = ("alibi", "arange")


def decay_slopes(slopes: str, heads: int, layer: int, layers: int) -> tuple[float, ...]:
    """By how much the log of the state falls per token, for each head.

    Both published conventions, with heads ``h = 0 .. H-1`` and layer ``l`` of ``L``: ``"alibi"``, of the published
    code, ``2^(-8 (h+1) / H) (1 - l / (L-1) + 1e-5)`` (other ``H`` than powers of two as ALiBi fills them up, arXiv
    2108.12409); ``"arange"``, of the TransNormerLLM paper, ``(8 / H) (1 - l / L) h``, whose head 0 never forgets.

    >>> decay_slopes("arange", heads=4, layer=1, layers=2)
    (0.0, 1.0, 2.0, 3.0)
    """
    one_of("slopes", slopes, SLOPES)
    positive(heads=heads, layers=layers)
    if not 0 <= layer < layers:
        raise ValueError(f"layer must be 0 to {layers - 1} (layers={layers}), got {layer}")
    if slopes == "arange":
        return tuple(8 / heads * (1 - layer / layers) * head for head in range(heads))
    share = 1 - layer / max(1, layers - 1) + 1e-5
    return tuple(slope * share for slope in _alibi(heads))


def _alibi(heads: int) -> list[float]:
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    return slopes if power == heads else slopes + _alibi(2 * power)[0::2][: heads - power]


@kept(most=256)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of constants, made once per device. Not a buffer: ``model.to(bfloat16)`` would round it."""
    return torch.tensor(values, dtype=dtype, device=device)


def constant_decay(values: tuple[float, ...], x: Tensor) -> Tensor:
    """The log decay ``[h]`` for inputs ``x``, in fp32 (fp64 for fp64)."""
    return constant(values, torch.float64 if x.dtype == torch.float64 else torch.float32, x.device)


class LightningAttention(nn.Module):
    """``S_t = exp(-slope) S_{t-1} + k_t v_t'`` and ``o_t = q_t S_t``: one state per head travels, the decay does not.

    ``x [b, t, dim]`` my tokens, and so is the result. Queries, keys and values pass through silu; the output of all
    heads together is divided by its root mean square and gated by the sigmoid of a projection of the rank of one head.
    ``slopes``: see :func:`decay_slopes`; they depend on which ``layer`` of ``layers`` this is. ``key_dim`` and
    ``value_dim`` are those of one head (default: ``dim / heads``).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        layer: int = 0,
        layers: int = 1,
        slopes: str = "alibi",
        key_dim: int | None = None,
        value_dim: int | None = None,
    ) -> None:
        super().__init__()
        key_dim = head_dim(dim, heads, key_dim)
        value_dim = head_dim(dim, heads, value_dim, "value_dim")
        self.log_decay = tuple(-slope for slope in decay_slopes(slopes, heads, layer, layers))
        self.q = nn.Linear(dim, heads * key_dim, bias=False)
        self.k = nn.Linear(dim, heads * key_dim, bias=False)
        self.v = nn.Linear(dim, heads * value_dim, bias=False)
        self.gate = nn.Sequential(
            nn.Linear(dim, value_dim, bias=False), nn.Linear(value_dim, heads * value_dim, bias=False)
        )
        self.out = nn.Linear(heads * value_dim, dim, bias=False)
        self.norm = RMSNorm(heads * value_dim)
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values through silu, token by token."""
        q, k = (functional.silu(project(x)).unflatten(-1, (-1, self.key_dim)) for project in (self.q, self.k))
        v = functional.silu(self.v(x)).unflatten(-1, (-1, self.value_dim))
        return q, k, v

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The one call that mixes tokens: ``o [b, t, h, v]``, in fp32 (fp64 for fp64): sums outgrow fp16."""
        q, k, v = parts
        decay = constant_decay(self.log_decay, q)
        return Here.of(cut, self).linear_attention(q, k, v, log_decay=decay, out_dtype=exact_dtype(q))

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads normed, gated and put together, token by token."""
        return self.out(self.norm(o.flatten(-2)).to(x.dtype) * torch.sigmoid(self.gate(x)))
