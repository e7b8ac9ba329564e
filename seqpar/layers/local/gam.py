"""Gated associative memory (Acharya 2025, arXiv 2509.00605)."""

import torch
from torch import Tensor, nn

from seqpar.crossing.here import Here
from seqpar.layers.local.convolution import ShortConvolution
from seqpar.layers.parts.checks import positive
from seqpar.sharding.cut import Cut


class GAM(nn.Module):
    """A short causal convolution beside a memory of learned slots, each with its own sigmoid gate.

    ``sigmoid(local_gate(x)) * conv(x) + sigmoid(global_gate(x)) * softmax(x M') M`` with slots ``M [slots, dim]``, the
    same for every token: no state, so ``width - 1`` rows that cross a cut are all that travels. ``x [b, t, dim]`` my
    tokens, and so is the result. The softmax is fp32 (fp64 for fp64). Defaults are the paper's: 512 slots, width 3. The
    state is that of the convolution: the last ``width - 1`` inputs, zeros for a document that begins.
    """

    def __init__(self, dim: int, *, slots: int = 512, width: int = 3) -> None:
        super().__init__()
        positive(dim=dim, slots=slots)
        self.conv = ShortConvolution(dim, width=width, bias=True)
        self.slots = nn.Parameter(nn.init.xavier_uniform_(torch.empty(slots, dim)))
        self.local_gate = nn.Linear(dim, dim)
        self.global_gate = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """The convolution takes the tokens as they are."""
        return (x,)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The one call that mixes tokens: the convolution ``[b, t, dim]``."""
        return Here.of(cut, self).causal_conv(parts[0], self.conv.weight, self.conv.bias)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """What the memory says of each token, and the two gates."""
        return torch.sigmoid(self.local_gate(x)) * o + torch.sigmoid(self.global_gate(x)) * self._recall(x)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The output for one token ``x [b, dim]``, and the next state."""
        local, state = self.conv.step(x, state)
        return self.finish(local, x), state

    def _recall(self, x: Tensor) -> Tensor:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.softmax(x @ self.slots.T, -1, dtype=exact).to(x.dtype) @ self.slots
