"""A residual block around any token mixer."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again_in_backward

from seqpar.layers.parts.checks import one_of
from seqpar.layers.parts.mlp import SwiGLU
from seqpar.layers.parts.norm import norm_of
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


ORDERS = ("pre", "post", "after", "sandwich", "parallel", "parallel_shared")


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``. ``x [b, t, dim]``, ``mixer`` any layer called with the cut.

    ``checkpoint``: keep only the input of the block and compute the rest again in backward. What crossed the cuts is
    kept, so the second time sends nothing; so is the state of random numbers. ``mlp_tokens``: the feed-forward part
    works on so many tokens at a time (0: all). ``mlp``: another feed-forward part, any module that treats every token
    by itself (default: SwiGLU of ``hidden``). ``norm``: a kind of :func:`norm_of`, with ``eps``. ``residual``: times
    what is added to x (Granite). ``order``: where norms stand.

    - ``"pre"``: as above. ``"post"``: ``norm(x + f(x))`` (BERT). ``"after"``: ``x + norm(f(x))`` (OLMo 2).
    - ``"sandwich"``: ``x + norm(f(norm(x)))`` (Gemma 2).
    - ``"parallel"``: ``x + mixer(norm(x)) + mlp(norm(x))``, with two norms (GPT-NeoX); ``"parallel_shared"``: one.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        hidden: int,
        *,
        checkpoint: bool = False,
        mlp_tokens: int = 0,
        mlp: nn.Module | None = None,
        norm: str = "rms",
        eps: float = 1e-6,
        order: str = "pre",
        residual: float = 1.0,
    ) -> None:
        super().__init__()
        self.order, self.residual = one_of("order", order, ORDERS), residual
        self.mixer_norm, self.mixer = norm_of(norm, dim, eps), mixer
        self.mlp_norm = self.mixer_norm if order == "parallel_shared" else norm_of(norm, dim, eps)
        self.mlp = SwiGLU(dim, hidden, mlp_tokens) if mlp is None else mlp
        if order == "sandwich":
            self.mixer_out_norm, self.mlp_out_norm = norm_of(norm, dim, eps), norm_of(norm, dim, eps)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        if self.checkpoint and torch.is_grad_enabled():
            return run_again_in_backward(self._run, x, cut, use_reentrant=False)
        return self._run(x, cut)

    def _run(self, x: Tensor, cut: Cut) -> Tensor:
        mixer: Any = self.mixer
        if not hasattr(mixer, "project"):
            return self._after(x, _called(mixer, self._before(x, self.mixer_norm), cut))
        positions = cut.positions
        apart = getattr(self.mlp, "tile_tokens", 0) > 0  # tiles run again by themselves; fewer tokens are fewer tiles

        def before(rows: slice, x: Tensor) -> tuple[Tensor, ...]:
            normed = self._before(x, self.mixer_norm)
            return normed, *mixer.project(normed, positions[rows])

        def after(rows: slice, x: Tensor, o: Tensor, normed: Tensor) -> tuple[Tensor]:
            y = mixer.finish(o, normed)
            return (y if apart else self._after(x, y),)

        normed, *parts = cut.token_wise("before", before, (x,))
        o = _mixed(mixer, tuple(parts), cut)
        del parts  # what backward needs of them, autograd has
        (y,) = cut.token_wise("after", after, (x, o, normed))
        return self._after(x, y) if apart else y

    def _after(self, x: Tensor, y: Tensor) -> Tensor:
        """The block's output from its input and what the mixer made of it."""
        mixed = self._added(x, y, "mixer")
        enters = x if self.order.startswith("parallel") else mixed
        return self._added(mixed, self.mlp(self._before(enters, self.mlp_norm)), "mlp")

    def _before(self, x: Tensor, norm: nn.Module) -> Tensor:
        y: Tensor = x if self.order in ("post", "after") else norm(x)
        return y

    def _added(self, x: Tensor, y: Tensor, part: str) -> Tensor:
        """``y``, what a part made, added to ``x``."""
        norm: Any = getattr(self, f"{part}_norm")
        if self.order in ("after", "sandwich"):
            y = norm(y) if self.order == "after" else getattr(self, f"{part}_out_norm")(y)
        x = x + (y if self.residual == 1 else y * self.residual)
        return norm(x) if self.order == "post" else x


@apart
def _mixed(mixer: Mixer, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
    o = mixer.mix(parts, cut)
    return o.contiguous() if compiling() else o  # strides that change with lengths would be compiled anew


@apart
def _called(mixer: Mixer, x: Tensor, cut: Cut) -> Tensor:
    return mixer(x, cut)
