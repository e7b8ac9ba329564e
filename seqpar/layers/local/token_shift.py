"""Token shift: a learned mix of each token with the one before it (RWKV, Peng et al. 2023, arXiv 2305.13048)."""

import torch
from torch import Tensor, nn

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import positive
from seqpar.sharding.cut import Cut


class TokenShift(nn.Module):
    """``x + mu * (shifted - x)``, channel by channel, where ``shifted`` is the token before, zeros for the first.

    ``x [b, t, dim]`` my tokens, and so is the result; one row crosses a cut. ``mu`` starts at 0.5. The state for
    :meth:`step` is the token before, ``[b, dim]``, zeros for a document that begins.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        positive(dim=dim)
        self.mu = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self._mix(x, Here.of(cut, self).token_shift(x))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The output for one token ``x [b, dim]``, and the next state."""
        return self._mix(x, state), x

    def _mix(self, x: Tensor, shifted: Tensor) -> Tensor:
        return x + self.mu * (shifted - x)
