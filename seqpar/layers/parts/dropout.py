"""Dropout of a cut sequence (Srivastava et al. 2014)."""

from torch import Tensor, nn

from seqpar.sharding.cut import Cut


class Dropout(nn.Module):
    """Entries are set to 0 with probability ``p`` in training, and the others divided by ``1 - p``.

    Law: the ranks drop what one device drops, for every layout, and what runs again in backward drops it again: a mask
    follows from the seed (torch's default generator), the forward pass, the module and the token's place. ``x [b, t,
    ...]`` all of my tokens. One module for each place: one that is called twice in a pass cannot be computed again.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p must be from 0 to 1, got {p}")
        self.p = p

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return cut.random(self, x.device).dropout(x, self.p) if self.training and self.p > 0 else x

    def extra_repr(self) -> str:
        return f"p={self.p}"
