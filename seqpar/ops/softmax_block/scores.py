"""What is done to the scores of softmax attention besides scaling them."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """How scores become weights: ``softmax(softcap * tanh(scale * q.k / softcap))`` beside sinks.

    ``softcap``: scores stay between minus and plus this number (Gemma 2, arXiv 2408.00118). ``sinks [h]``: a learned
    logit for each query head that takes its part of the softmax and gives nothing (gpt-oss, arXiv 2508.10925). Tensors
    are parameters: the same on every rank; a rank's gradient is that of its queries, a part of a sum over ranks.
    """

    softcap: float | None = None
    sinks: Tensor | None = None

    def check(self, heads: int) -> None:
        """Raise ``ValueError`` unless it fits ``heads`` query heads."""
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be a positive number, got {self.softcap}")
        if self.sinks is not None and self.sinks.shape != (heads,):
            raise ValueError(f"sinks must be one number for each of {heads} query heads, got {list(self.sinks.shape)}")

    def of_heads(self, heads: slice) -> "Scores":
        """Those of some query heads."""
        return Scores(self.softcap, None if self.sinks is None else self.sinks[heads])


@dataclass(frozen=True, eq=False)
class Terms:
    """What the scores of one block become."""

    softcap: float | None = None

    @property
    def plain(self) -> bool:
        """Whether scores stay as they are."""
        return self.softcap is None

    def bend(self, scores: Tensor) -> Tensor:
        """Scaled scores ``[b, g, h // g, n, m]`` as they enter the softmax; may be done in place."""
        return scores if self.softcap is None else scores.div_(self.softcap).tanh_().mul_(self.softcap)

    def unbend(self, d_scores: Tensor, bent: Tensor) -> Tensor:
        """The gradient of scaled scores, from that of ``bent`` ones; may be done in place."""
        return d_scores if self.softcap is None else d_scores.mul_(1 - (bent / self.softcap).square_())


PLAIN = Terms()
