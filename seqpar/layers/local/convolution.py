"""The short convolution that recurrent layers put before their recurrence (Mamba, arXiv 2312.00752; H3, 2212.14052)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.convolution import causal_conv
from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import positive
from seqpar.ops.precision import exactly
from seqpar.sharding.cut import Cut


class ShortConvolution(nn.Module):
    """Each channel convolved with the last ``width`` tokens of its document, then ``silu`` if wanted.

    ``x [b, t, dim]`` my tokens, and so is the result; ``width - 1`` rows cross a cut. ``initial`` and the final state
    ``[b, width - 1, dim]`` are inputs, as in :func:`seqpar.crossing.convolution.causal_conv`; where neither is given
    nor asked for, those of ``cut.states`` are taken and kept. The state for :meth:`step` is such a final state, or
    zeros for a document that begins.
    """

    def __init__(self, dim: int, *, width: int = 4, bias: bool = False, silu: bool = False) -> None:
        super().__init__()
        positive(dim=dim, width=width)
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(dim, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound)) if bias else None
        self.silu = silu

    def forward(self, x: Tensor, cut: Cut, *, initial: Tensor | None = None, return_final: bool = False) -> Any:
        """``y``, or ``(y, final)`` with ``return_final``."""
        if initial is None and not return_final:
            return self._activate(Here.of(cut, self).causal_conv(x, self.weight, self.bias))
        out = causal_conv(
            x,
            self.weight,
            self.bias,
            shard=cut.shard,
            group=cut.group,
            slot=cut.slot(self),
            initial=initial,
            return_final=return_final,
        )
        return (self._activate(out[0]), out[1]) if return_final else self._activate(out)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The output for one token ``x [b, dim]`` after the inputs in ``state``, and the next state."""
        window = torch.cat([state, x[:, None]], 1)
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = exactly(torch.einsum)("bwd,dw->bd", window.to(exact), self.weight.to(exact))
        if self.bias is not None:
            y = y + self.bias.to(exact)
        return self._activate(y.to(x.dtype)), window[:, 1:]

    def _activate(self, y: Tensor) -> Tensor:
        return functional.silu(y) if self.silu else y
