"""Batch normalisation over all tokens of a cut sequence (Ioffe and Szegedy 2015, arXiv 1502.03167)."""

from typing import Any

import torch
from torch import Tensor, nn

from seqpar.collectives import Group
from seqpar.collectives.first_order import first_order
from seqpar.collectives.group import where
from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import positive
from seqpar.sharding.cut import Cut
from seqpar.sharding.exchanged import Slot, backward_pass
from seqpar.sharding.shard import Shard


class SequenceBatchNorm(nn.Module):
    """Each channel minus its mean, divided by its standard deviation, over the batch and all tokens on all ranks.

    Law: outputs, gradients and running statistics are those of one device; the latter are the same on all ranks.
    As in every batch norm, all documents of a batch share the statistics, which see later tokens, too: while it trains,
    it keeps no states. In ``eval()`` running statistics are used, and nothing crosses a cut.

    ``x [b, t, dim]`` my tokens, and so is the result, in its dtype; statistics are fp32 (fp64 for fp64). ``2 dim``
    numbers of every rank go to every other, forward, and as many are summed, backward. The running statistics move by
    ``momentum`` of the way in each call (not again when it is computed again); their variance is the unbiased one.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        positive(dim=dim)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be from 0 to 1, got {momentum}")
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.momentum, self.eps = momentum, eps

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        exact = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        mean, var = self._statistics(exact, cut)
        scale = self.weight.to(exact.dtype) * (var + self.eps).rsqrt()
        return ((exact - mean) * scale + self.bias.to(exact.dtype)).to(x.dtype)

    def _statistics(self, x: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        here = Here.of(cut, self)
        here.keep_no_states()
        mean, var = moments(x, **here.place)
        if backward_pass() is None:
            self._follow(mean.detach(), var.detach(), x.shape[0] * cut.shard.num_tokens)
        return mean, var

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics, of ``count`` numbers a channel."""
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        unbiased = var * (count / max(1, count - 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


def moments(x: Tensor, *, shard: Shard, group: Group, slot: Slot | None = None) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel over the batch and all tokens: each ``[d]``, the same on every rank.

    ``x [b, t, d]`` my tokens. Each rank's mean and sum of squares around it travel: no digits are lost to a large mean.
    What follows from the results is added up over ranks in backward. Raises ``ValueError`` before the first message
    unless ``x`` holds my tokens.
    """
    if x.dim() != 3 or x.shape[1] != shard.num_local:
        raise ValueError(f"{where(group)}: x must be [b, t, d] with my {shard.num_local} tokens, got {list(x.shape)}")
    result: tuple[Tensor, Tensor] = _Moments.apply(x, shard, group, slot or Slot())
    return result


@first_order("moments")
class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard, group: Group, slot: Slot) -> tuple[Tensor, Tensor]:
        mean, var = slot.keep(lambda: _moments(x, shard, group))
        ctx.group, ctx.count = group, max(1, x.shape[0] * shard.num_tokens)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, mean = ctx.saved_tensors
        d_mean, d_var = ctx.group.all_reduce(torch.stack(grads)).wait() / ctx.count
        return d_mean + 2 * (x - mean) * d_var, None, None, None


def _moments(x: Tensor, shard: Shard, group: Group) -> tuple[Tensor, Tensor]:
    mine = torch.zeros_like(x[:, :0].sum((0, 1))) if not x.shape[1] else x.mean((0, 1))
    around = (x - mine).square().sum((0, 1))
    means, squares = torch.stack(list(group.all_gather(torch.stack([mine, around])).wait())).unbind(1)
    counts = [sum(piece.count for piece in shard.pieces_of(rank)) for rank in range(group.size)]
    shares = x.new_tensor([count / max(1, sum(counts)) for count in counts])[:, None]
    mean = (shares * means).sum(0)
    var = squares.sum(0) / max(1, x.shape[0] * sum(counts)) + (shares * (means - mean).square()).sum(0)
    return mean, var
