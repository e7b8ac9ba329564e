"""Next-token loss over a cut sequence: the one owner of the normaliser."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from collectives import Group
from collectives.group import where
from seqpar.shard import Shard


def next_token_targets(labels: Tensor, lengths: Sequence[int], ignore_index: int = -100) -> Tensor:
    """Shift global ``labels`` ``[b, s]`` left by one within each document; a document's last token has no target."""
    targets = torch.full_like(labels, ignore_index)
    targets[:, :-1] = labels[:, 1:]
    last_tokens = [end - 1 for end, length in zip(accumulate(lengths), lengths) if length]
    targets[:, last_tokens] = ignore_index
    return targets


class _GlobalSum(torch.autograd.Function):
    """The sum over ranks. Every rank computes the same loss from it, so a part's gradient is one, not ``n``."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        return group.all_reduce(part).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


def num_targets(labels: Tensor, lengths: Sequence[int], ignore_index: int = -100) -> int:
    """How many tokens of a batch have something to predict, at least 1: what its loss is divided by."""
    return max(1, int((next_token_targets(labels, lengths, ignore_index) != ignore_index).sum()))


def next_token_loss(
    logits: Tensor, labels: Tensor, *, shard: Shard, group: Group, ignore_index: int = -100, divisor: int | None = None
) -> Tensor:
    """The mean cross-entropy of every token's successor in its document, over all ranks: the same number on each.

    Law: the ranks' gradients sum to those of one device. Labels are shifted before they are cut, so no rank loses its
    last target; the sum is divided once, by the number of valid targets of the whole batch, so a rank without one adds
    nothing; if no rank has one the loss is 0 with zero gradients.

    Shapes: ``logits [b, t, vocabulary]`` of my tokens; ``labels [b, s]`` int64 of all tokens, not shifted, the same on
    every rank, ``ignore_index`` where there is nothing to predict. Computed in fp32 (fp64 for fp64 logits). One
    number is summed. ``divisor``, where this sequence is a part of a batch, is the number of valid targets of the whole
    batch (:func:`num_targets`): the parts' losses then sum to the batch's. Raises ``ValueError`` if shapes do not fit.
    """
    all_tokens, mine = shard.num_tokens, shard.num_local
    if labels.dim() != 2 or labels.shape[1] != all_tokens:
        raise ValueError(f"{where(group)}: labels must be [batch, {all_tokens}], unshifted, got {list(labels.shape)}")
    if logits.dim() != 3 or logits.shape[:2] != (labels.shape[0], mine):
        raise ValueError(f"{where(group)}: logits must be [batch, {mine}, vocabulary], got {list(logits.shape)}")
    targets = next_token_targets(labels, shard.lengths, ignore_index)
    num_valid = (targets != ignore_index).sum().clamp(min=1).to(logits.device) if divisor is None else divisor
    my_targets = shard.take(targets).to(logits.device).flatten()
    exact = logits.flatten(0, 1) if logits.dtype == torch.float64 else logits.flatten(0, 1).float()
    part = functional.cross_entropy(exact, my_targets, ignore_index=ignore_index, reduction="sum")
    total: Tensor = _GlobalSum.apply(part, group)
    return total / num_valid
