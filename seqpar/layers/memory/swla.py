"""Sliding-window linear attention (Behrouz et al. 2025, arXiv 2505.23735): a memory of one matrix, whose ways through
tokens compose."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.memory.neural_memory import FORGET, STEP
from seqpar.layers.parts.checks import head_dim, positive
from seqpar.layers.parts.norm import RMSNorm
from seqpar.sharding.cut import Cut


class SWLA(nn.Module):
    """``W_t = keep_t W_{t-1} + step_t sum_{w < window} gamma_t[w] v_{t-w} k_{t-w}'``, and token t reads ``W_t q_t``.

    Projections, convolution, gates, norm and output are those of
    :class:`~seqpar.layers.memory.neural_memory.NeuralMemory`; documents begin with zeros. Of each token the last
    ``window - 1`` are met one by one; once a token is ``window - 1`` tokens old, all that it will ever add is known,
    and it goes into the state of a linear attention. That state travels, and keys, values and gates of ``window - 1``
    tokens. ``x [b, t, dim]`` my tokens, and so is the result.
    """

    own_initialisation = ("gates",)

    def __init__(self, dim: int, heads: int, *, window: int = 16, width: int = 4) -> None:
        super().__init__()
        one = head_dim(dim, heads, None)
        positive(window=window, width=width)
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(3 * dim, width).uniform_(-(width**-0.5), width**-0.5))
        self.gates = nn.Linear(dim, heads * (2 + window))
        self.gates.bias.data.copy_(torch.tensor([FORGET, STEP, *[0.0] * window]).repeat(heads))
        self.gate = nn.Linear(dim, dim, bias=False)
        self.norm = RMSNorm(one)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """What the convolution reads, ``[b, t, 3 dim]``, and the gates ``[b, t, h, 2 + window]``."""
        return self.qkv(x), self.gates(x).unflatten(-1, (self.heads, -1))

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """What mixes tokens, the convolution, the window and the recurrence: ``[b, t, h, d]``, fp32 (fp64 for fp64)."""
        (inputs, gates), here = parts, Here.of(cut, self)
        exact = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        convolved = functional.silu(here.causal_conv(inputs, self.conv_weight)).to(exact)
        q, k, v = convolved.unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k = (functional.normalize(x, dim=-1, eps=1e-6) for x in (q, k))
        forget, step, gamma = gates.to(exact).split([1, 1, self.window], -1)
        log_keep, added = functional.logsigmoid(-forget), step.sigmoid() * gamma.sigmoid()
        rows, places = here.preceding(torch.cat([k, v, log_keep, added], -1).flatten(2), self.window - 1)
        k, v, kept, added = rows.unflatten(-1, (self.heads, -1)).split([*[q.shape[-1]] * 2, 1, self.window], -1)
        shares = _shares(kept.exp(), added)[:, places]
        there = torch.arange(self.window, device=q.device) <= here.positions.to(q.device)[..., None]
        shares = torch.where(there[..., None, :], shares, 0.0)
        o = torch.zeros_like(q)
        for w in range(self.window - 1):
            at = (places - w).clamp(min=0)
            o = o + (shares[..., w] * (k[:, at] * q).sum(-1))[..., None] * v[:, at]
        at = (places - self.window + 1).clamp(min=0)
        old = shares[..., -1:] * v[:, at]
        return o + here.linear_attention(q, k[:, at], old, log_decay=log_keep[..., 0])

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """Normed, gated and put together, token by token."""
        return self.out(self.norm(o.to(x.dtype)).flatten(-2) * functional.silu(self.gate(x)))


def _shares(keep: Tensor, added: Tensor) -> Tensor:
    """How much of the token ``w`` before each is in the state after it: ``[b, rows, h, window]``, from what each row
    keeps ``[b, rows, h, 1]`` and adds of the tokens before it."""
    shares = [added[..., :1]]
    for w in range(1, added.shape[-1]):
        before = functional.pad(shares[-1][:, :-1], (0, 0, 0, 0, 1, 0)) if len(keep[0]) else shares[-1]
        shares.append(added[..., w : w + 1] + keep * before)
    return torch.cat(shares, -1)
