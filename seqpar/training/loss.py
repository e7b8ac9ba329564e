"""Next-token loss over a cut sequence: the one owner of the normaliser."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from seqpar.collectives import Group
from seqpar.collectives.agreed import agree
from seqpar.collectives.group import where
from seqpar.crossing.replicated import summed
from seqpar.sharding.agreement import fingerprint
from seqpar.sharding.called import called, readable
from seqpar.sharding.shard import Shard
from seqpar.training.rows import per_row
from seqpar.training.tiled import tiled

_NAME = "next_token_loss"


def next_token_targets(
    labels: Tensor, lengths: Sequence[int] | Sequence[Sequence[int]], ignore_index: float = -100, *, ahead: int = 1
) -> Tensor:
    """Shift global ``labels`` ``[b, s]`` left by one within each document; a document's last token has no target.

    ``lengths``: of the documents, or a list for each row. ``ahead``: shift by so many tokens; the last ``ahead`` of a
    document have no target. ``ignore_index``: what stands where there is none. Raises ``ValueError`` for ``ahead < 0``.
    """
    if ahead < 0:
        raise ValueError(f"ahead must not be negative, got {ahead}")
    if per_row(lengths):
        rows: Any = zip(labels.split(1), lengths, strict=True)
        return torch.cat([next_token_targets(row, own, ignore_index, ahead=ahead) for row, own in rows])
    sizes = torch.tensor(np.asarray(lengths, np.int64))
    left = torch.repeat_interleave(sizes.cumsum(0), sizes) - torch.arange(int(sizes.sum()))
    targets = torch.full_like(labels, ignore_index)
    targets[:, : max(0, labels.shape[1] - ahead)] = labels[:, ahead:]
    targets[:, (left <= ahead).nonzero().flatten().to(labels.device)] = ignore_index
    return targets


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
    _agree_on_loss("next_token_loss", logits, labels, shard, group, ignore_index, divisor)
    _check(logits, labels, shard, group, "logits must be", "vocabulary")
    targets, num_valid = _my_targets(logits, labels, shard, ignore_index, divisor)
    return summed(_cross_entropy(logits, targets, ignore_index), group, _NAME) / num_valid


def tiled_next_token_loss(
    x: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    *,
    tokens: int,
    shard: Shard,
    group: Group,
    ignore_index: int = -100,
    divisor: int | None = None,
) -> Tensor:
    """:func:`next_token_loss` of ``head(x)``, without ever holding the logits of more than ``tokens`` tokens.

    Law: the same number, and the same gradients of ``x`` and of the head up to the order of sums, for every ``tokens``.
    ``x [b, t, dim]`` of my tokens; ``head`` turns ``[b, n, dim]`` into logits ``[b, n, vocabulary]``, token by token,
    and runs again in backward. The rest is as there.
    """
    _agree_on_loss("tiled_next_token_loss", x, labels, shard, group, ignore_index, divisor)
    _check(x, labels, shard, group, "x must be", "dim")
    targets, num_valid = _my_targets(x, labels, shard, ignore_index, divisor)

    def part(x: Tensor, targets: Tensor) -> Tensor:
        return _cross_entropy(head(x), targets, ignore_index)

    return summed(torch.stack(tiled(part, x, targets, tokens=tokens)).sum(), group, _NAME) / num_valid


def _agree_on_loss(
    place: str, x: Tensor, labels: Tensor, shard: Shard, group: Group, ignore_index: int, divisor: int | None
) -> None:
    if group.size > 1 and readable(labels):
        agree(group, "the labels", fingerprint(labels))  # on a GPU only their shape: reading them would wait for it
    called(place, group, shard, (ignore_index, divisor), x, shared=(labels,))
    if divisor is not None and not 0 < divisor < math.inf:
        raise ValueError(f"{where(group)}: divisor must be a positive number of targets, got {divisor}")


def _check(x: Tensor, labels: Tensor, shard: Shard, group: Group, must_be: str, last: str) -> None:
    all_tokens, mine = shard.num_tokens, shard.num_local
    if labels.dim() != 2 or labels.shape[1] != all_tokens:
        raise ValueError(f"{where(group)}: labels must be [batch, {all_tokens}], unshifted, got {list(labels.shape)}")
    if x.dim() != 3 or x.shape[:2] != (labels.shape[0], mine):
        raise ValueError(f"{where(group)}: {must_be} [batch, {mine}, {last}], got {list(x.shape)}")


def _my_targets(
    x: Tensor, labels: Tensor, shard: Shard, ignore_index: int, divisor: int | None
) -> tuple[Tensor, Tensor | int]:
    """Those of my tokens, ``[b, t]``, and the number of valid ones of the whole batch."""
    targets = next_token_targets(labels, shard.lengths, ignore_index)
    num_valid = (targets != ignore_index).sum().clamp(min=1).to(x.device) if divisor is None else divisor
    return shard.take(targets).to(x.device), num_valid


def _cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Summed over tokens, in fp32 (fp64 for fp64 logits)."""
    exact = logits.flatten(0, 1) if logits.dtype == torch.float64 else logits.flatten(0, 1).float()
    return functional.cross_entropy(exact, targets.flatten(), ignore_index=ignore_index, reduction="sum")
