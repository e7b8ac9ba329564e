"""A pre-norm residual block around any token mixer."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again_in_backward

from seqpar.layers.parts.mlp import SwiGLU
from seqpar.layers.parts.norm import RMSNorm
from seqpar.ops.compiling import apart, compiling
from seqpar.sharding.cut import Cut


class Mixer(Protocol):
    """A layer that mixes tokens: it is told where it stands.

    ``project`` and ``finish`` treat every token by itself (so they do the same for some tokens as for all), ``mix`` is
    the one call that mixes them. ``mixer(x, cut)`` does the three in order.
    """

    def __call__(self, x: Tensor, cut: Cut) -> Tensor: ...

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]: ...

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor: ...

    def finish(self, o: Tensor, x: Tensor) -> Tensor: ...


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``. ``x [b, t, dim]``, ``mixer`` any layer called with the cut.

    ``checkpoint``: keep only the input of the block and compute the rest again in backward. What crossed the cuts is
    kept, so the second time sends nothing; so is the state of random numbers. ``mlp_tokens``: the feed-forward part
    works on so many tokens at a time (0: all).
    """

    def __init__(
        self, dim: int, mixer: nn.Module, hidden: int, *, checkpoint: bool = False, mlp_tokens: int = 0
    ) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = RMSNorm(dim), mixer
        self.mlp_norm, self.mlp = RMSNorm(dim), SwiGLU(dim, hidden, mlp_tokens)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        if self.checkpoint and torch.is_grad_enabled():
            return run_again_in_backward(self._run, x, cut, use_reentrant=False)
        return self._run(x, cut)

    def _run(self, x: Tensor, cut: Cut) -> Tensor:
        mixer: Any = self.mixer
        if not hasattr(mixer, "project"):
            return self._feed_forward(x + _called(mixer, self.mixer_norm(x), cut))
        positions = cut.positions
        apart = self.mlp.tile_tokens > 0  # tiles run again by themselves, and fewer tokens are fewer tiles

        def before(rows: slice, x: Tensor) -> tuple[Tensor, ...]:
            normed = self.mixer_norm(x)
            return normed, *mixer.project(normed, positions[rows])

        def after(rows: slice, x: Tensor, o: Tensor, normed: Tensor) -> tuple[Tensor]:
            x = x + mixer.finish(o, normed)
            return (x if apart else self._feed_forward(x),)

        normed, *parts = cut.token_wise("before", before, (x,))
        o = _mixed(mixer, tuple(parts), cut)
        del parts  # what backward needs of them, autograd has
        (x,) = cut.token_wise("after", after, (x, o, normed))
        return self._feed_forward(x) if apart else x

    def _feed_forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


@apart
def _mixed(mixer: Mixer, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
    o = mixer.mix(parts, cut)
    return o.contiguous() if compiling() else o  # strides that change with lengths would be compiled anew


@apart
def _called(mixer: Mixer, x: Tensor, cut: Cut) -> Tensor:
    return mixer(x, cut)
