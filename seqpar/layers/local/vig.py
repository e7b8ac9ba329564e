"""ViG, bidirectional gated linear attention over image patches (Liao et al. 2024, arXiv 2405.18425)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import head_dim, positive
from seqpar.layers.parts.norm import RMSNorm
from seqpar.sharding.cut import Cut


class ViG(nn.Module):
    """Gated linear attention both ways, each with its own gates, beside a 3 x 3 convolution over the grid of tokens.

    Each document is a grid of ``width`` columns, row after row, and must fill its last row. The convolution (depthwise,
    zeros around the grid) comes first: of ``y = conv(x)`` are queries, keys, values and all gates. Then
    ``o = (o_forward + o_backward) / 2``, where a token counts in both directions (in training and in use: half of that
    is not what was trained), and ``out(norm(o) g + local_norm(y) (1 - g))`` with ``g = sigmoid(gate(y))``, both norms
    root mean square, head by head. Log decays are ``logsigmoid(low_rank(y)) / temperature`` in fp32 (fp64 for fp64).

    ``x [b, t, dim]`` my tokens, and so is the result. A state each way travels, the decays of my tokens unless a chain
    carries it, and at most ``width + 1`` rows either way. Tokens see later ones, so there are no states between calls.
    Defaults are the paper's: ``key_dim = dim / heads / 2`` (of one head), gates of rank 16, temperature 16.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        width: int,
        key_dim: int | None = None,
        gate_rank: int = 16,
        temperature: float = 16.0,
    ) -> None:
        super().__init__()
        value_dim = head_dim(dim, heads, None)
        key_dim = max(1, value_dim // 2) if key_dim is None else head_dim(dim, heads, key_dim)
        positive(width=width, gate_rank=gate_rank)
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.conv_weight = nn.Parameter(torch.empty(dim, 3, 3).uniform_(-1 / 3, 1 / 3))
        self.conv_bias = nn.Parameter(torch.empty(dim).uniform_(-1 / 3, 1 / 3))
        self.qkv = nn.Linear(dim, heads * (2 * key_dim + value_dim), bias=False)
        self.decay = nn.Sequential(nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, 2 * heads * key_dim))
        self.gate = nn.Linear(dim, dim)
        self.norm, self.local_norm = RMSNorm(value_dim), RMSNorm(value_dim)
        self.out = nn.Linear(dim, dim, bias=False)
        self.heads, self.key_dim, self.width, self.temperature = heads, key_dim, width, temperature

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """The convolution takes the tokens as they are."""
        return (x,)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """What mixes tokens, the convolution and the recurrences, and what the gates make of them ``[b, t, dim]``."""
        here = Here.of(cut, self)
        y = here.grid_conv(parts[0], self.conv_weight, self.conv_bias, width=self.width)
        keys = self.heads * self.key_dim
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(y).split([keys, keys, y.shape[-1]], -1))
        before, after = self._log_decays(y)
        scale = self.key_dim**-0.5
        o = here.linear_attention(q, k, v, log_decay=before, scale=scale)
        o = (o + here.linear_attention(q, k, v, log_decay=after, scale=scale, backwards=True)) / 2
        gate = torch.sigmoid(self.gate(y)).unflatten(-1, (self.heads, -1))
        local = self.local_norm(y.unflatten(-1, (self.heads, -1)))
        return (self.norm(o) * gate + local * (1 - gate)).flatten(-2)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads put together, token by token."""
        return self.out(o)

    def _log_decays(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``[b, t, h, k]`` of the state that comes from the left, and of the one that comes from the right."""
        exact = torch.float64 if y.dtype == torch.float64 else torch.float32
        logits = self.decay(y).to(exact).unflatten(-1, (2, self.heads, -1))
        before, after = (functional.logsigmoid(logits) / self.temperature).unbind(2)
        return before, after
