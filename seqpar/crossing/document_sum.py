"""Sums over whole documents of a cut sequence: what a layer reads that is not causal, without a pass over tokens.

Each rank sums up its tokens of each document; those of documents that lie on several ranks are added by one all-reduce.
A document that lies on one rank sends nothing. A sum that several ranks read gets gradients from all of them, so its
gradient is the same sum over ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.first_order import first_order
from seqpar.collectives.group import where
from seqpar.ops.kept import kept
from seqpar.sharding.called import called
from seqpar.sharding.columns import numbers
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.shard import Shard, tokens_of


@lru_cache(maxsize=64)
def documents_here(shard: Shard) -> tuple[int, ...]:
    """The documents that have tokens here, ascending: of these are the sums that a rank gets."""
    return tuple(sorted({piece.document for piece in shard.pieces_of(shard.rank)}))


@kept()
def document_index(shard: Shard, device: torch.device) -> Tensor:
    """``[t]`` int64: the place of each of my tokens' documents in :func:`documents_here`."""
    documents = np.searchsorted(numbers(shard.offsets), tokens_of(shard.runs[shard.rank]), "right") - 1
    return torch.tensor(np.searchsorted(numbers(documents_here(shard)), documents), dtype=torch.int64, device=device)


def document_sum(x: Tensor, *, shard: Shard, group: Group, slot: Slot | None = None) -> Tensor:
    """The sum of ``x`` over all tokens of each document that has tokens here: ``[b, documents here, ...]``.

    Law: every rank with tokens of a document has its whole sum, and the gradients of ``x`` are those of one device.
    ``x [b, t, ...]`` my tokens; sums are fp32 (fp64 for fp64). ``slot`` keeps what crossed the cuts for activation
    checkpointing. Raises ``ValueError`` before the first message unless ``x`` holds my tokens.
    """
    called("document_sum", group, shard, (), x)
    check(shard, group, x)
    x, sums = x.to(exact(x)), _sums_here(shard, x.device)
    index = document_index(shard, x.device)
    parts = x.new_zeros((x.shape[0], sums.documents, *x.shape[2:])).index_add(1, index, x)
    return total(parts, sums, group, slot or Slot())


# --- parts of sums, made whole ---------------------------------------------------------------------------------------


def check(shard: Shard, group: Group, *tensors: Tensor) -> None:
    """Raise ``ValueError`` unless the shard is of this group and all tensors hold my tokens."""
    if (shard.size, shard.rank) != (group.size, group.rank):
        raise ValueError(f"{where(group)}: the shard was cut for rank {shard.rank} of {shard.size}")
    for x in tensors:
        if x.dim() < 2 or x.shape[1] != shard.num_local:
            raise ValueError(f"{where(group)}: tensors must hold my {shard.num_local} tokens, got {list(x.shape)}")


def exact(x: Tensor) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@lru_cache(maxsize=64)
def crossing(shard: Shard) -> tuple[int, ...]:
    """The documents that have tokens on more than one rank, ascending."""
    pieces = shard.pieces
    begins = np.flatnonzero(np.diff(pieces.document, prepend=-1))
    if not len(begins):
        return ()
    several = np.minimum.reduceat(pieces.rank, begins) < np.maximum.reduceat(pieces.rank, begins)
    return tuple(pieces.document[begins[several]].tolist())


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over so many ``documents``, of which ``mine`` cross a cut: these have ``places`` in a message of ``size``
    sums."""

    documents: int
    mine: Tensor
    places: Tensor
    size: int


def sums_of(shard: Shard, documents: Sequence[int], device: torch.device) -> Sums:
    """Of ``documents`` that have tokens here; those of them that cross are asked for by every rank that holds them."""
    place = {document: place for place, document in enumerate(crossing(shard))}
    mine = [number for number, document in enumerate(documents) if document in place]
    places = [place[documents[number]] for number in mine]
    mine_here, places_there = (torch.tensor(each, dtype=torch.int64, device=device) for each in (mine, places))
    return Sums(len(documents), mine_here, places_there, len(place))


@kept()
def _sums_here(shard: Shard, device: torch.device) -> Sums:
    return sums_of(shard, documents_here(shard), device)


@first_order("document_sum or document_memories")
class _Total(torch.autograd.Function):
    """Sums of parts over ranks; their gradients are parts again."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, sums: Sums, group: Group, slot: Slot) -> Tensor:
        ctx.call = (sums, group)
        return slot.keep(lambda: (_added(parts, sums, group),))[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _added(grads[0], *ctx.call), None, None, None


def total(parts: Tensor, sums: Sums, group: Group, slot: Slot) -> Tensor:
    """``[b, documents, ...]``: my parts of the documents' sums, made whole."""
    if not sums.size:
        return parts
    result: Tensor = _Total.apply(parts, sums, group, slot)
    return result


def _added(parts: Tensor, sums: Sums, group: Group) -> Tensor:
    message = parts.new_zeros((parts.shape[0], sums.size, *parts.shape[2:]))
    message.index_copy_(1, sums.places, parts.index_select(1, sums.mine))
    summed = group.all_reduce(message).wait().index_select(1, sums.places)
    return parts.index_copy(1, sums.mine, summed)
