"""Sums over whole documents of a cut sequence: what a layer reads that is not causal, without a pass over tokens.

Each rank sums up its tokens of each document; those of documents that lie on several ranks are added by one all-reduce.
A document that lies on one rank sends nothing. A sum that several ranks read gets gradients from all of them, so its
gradient is the same sum over ranks.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.group import where
from seqpar.collectives.planned import Planned, rows
from seqpar.columns import numbers
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.shard import Shard, tokens_of


@lru_cache(maxsize=64)
def documents_here(shard: Shard) -> tuple[int, ...]:
    """The documents that have tokens here, ascending: of these are the sums that a rank gets."""
    return tuple(sorted({piece.document for piece in shard.pieces_of(shard.rank)}))


def document_index(shard: Shard) -> Tensor:
    """``[t]`` int64: the place of each of my tokens' documents in :func:`documents_here`."""
    return _index(shard).on(torch.device("cpu"))


@lru_cache(maxsize=64)
def _index(shard: Shard) -> Planned:
    documents = np.searchsorted(numbers(shard.offsets), tokens_of(shard.runs[shard.rank]), "right") - 1
    return rows(np.searchsorted(numbers(documents_here(shard)), documents))


def document_sum(x: Tensor, *, shard: Shard, group: Group, slot: Slot | None = None) -> Tensor:
    """The sum of ``x`` over all tokens of each document that has tokens here: ``[b, documents here, ...]``.

    Law: every rank with tokens of a document has its whole sum, and the gradients of ``x`` are those of one device.
    ``x [b, t, ...]`` my tokens; sums are fp32 (fp64 for fp64). ``slot`` keeps what crossed the cuts for activation
    checkpointing. Raises ``ValueError`` before the first message unless ``x`` holds my tokens.
    """
    _check(shard, group, x)
    x = x.to(_exact(x))
    index = _index(shard).on(x.device)
    parts = x.new_zeros((x.shape[0], len(documents_here(shard)), *x.shape[2:])).index_add(1, index, x)
    return _total(parts, shard, group, slot or Slot())


def document_states(k: Tensor, v: Tensor, *, shard: Shard, group: Group, slot: Slot | None = None) -> Tensor:
    """The sum of ``k_t v_t'`` over all tokens of each document that has tokens here: ``[b, documents here, h, k, v]``.

    The :func:`document_sum` of the outer products, which are never formed. ``k [b, t, h, k]``, ``v [b, t, h, v]``.
    """
    _check(shard, group, k, v)
    states: list[Any] = [None] * len(documents_here(shard))
    for place, held in _rows(shard):
        state = torch.einsum("bthk,bthv->bhkv", k[:, held].to(_exact(k)), v[:, held].to(_exact(v)))
        states[place] = state if states[place] is None else states[place] + state
    # Without tokens there are no documents, but what is summed must still be part of the graph: every rank takes part.
    none = (k[..., None] * v[..., None, :]).to(_exact(k)) if not states else None
    return _total(torch.stack(states, 1) if none is None else none, shard, group, slot or Slot())


def read_states(q: Tensor, states: Tensor, shard: Shard) -> Tensor:
    """Each of my tokens reads the state of its document: ``o_t = q_t S``, ``[b, t, h, v]``. Sends nothing.

    ``q [b, t, h, k]``, ``states [b, documents here, h, k, v]``, whose dtype the result has.
    """
    parts = [
        torch.einsum("bthk,bhkv->bthv", q[:, held].to(states.dtype), states[:, place]) for place, held in _rows(shard)
    ]
    return torch.cat(parts, 1) if parts else torch.einsum("bthk,bhkv->bthv", q.to(states.dtype), states.sum(1))


def _check(shard: Shard, group: Group, *tensors: Tensor) -> None:
    if (shard.size, shard.rank) != (group.size, group.rank):
        raise ValueError(f"{where(group)}: the shard was cut for rank {shard.rank} of {shard.size}")
    for x in tensors:
        if x.dim() < 2 or x.shape[1] != shard.num_local:
            raise ValueError(f"{where(group)}: tensors must hold my {shard.num_local} tokens, got {list(x.shape)}")


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(shard: Shard) -> list[tuple[int, slice]]:
    """Each of my pieces: the place of its document in :func:`documents_here`, and its rows."""
    here = {document: place for place, document in enumerate(documents_here(shard))}
    return [(here[p.document], slice(p.row, p.row + p.count)) for p in shard.pieces_of(shard.rank)]


@lru_cache(maxsize=64)
def _crossing(shard: Shard) -> tuple[int, ...]:
    """The documents that have tokens on more than one rank, ascending."""
    pieces = shard.pieces
    begins = np.flatnonzero(np.diff(pieces.document, prepend=-1))
    if not len(begins):
        return ()
    several = np.minimum.reduceat(pieces.rank, begins) < np.maximum.reduceat(pieces.rank, begins)
    return tuple(pieces.document[begins[several]].tolist())


@lru_cache(maxsize=64)
def _shared(shard: Shard) -> tuple[Planned, Planned]:
    """The places in :func:`documents_here` of the documents that cross, and their places among all that do."""
    crossing = {document: place for place, document in enumerate(_crossing(shard))}
    here = documents_here(shard)
    mine = [place for place, document in enumerate(here) if document in crossing]
    return rows(mine), rows([crossing[here[place]] for place in mine])


class _Total(torch.autograd.Function):
    """Sums of parts over ranks; their gradients are parts again."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, shard: Shard, group: Group, slot: Slot) -> Tensor:
        ctx.call = (shard, group)
        return slot.keep(lambda: (_added(parts, shard, group),))[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _added(grads[0], *ctx.call), None, None, None


def _total(parts: Tensor, shard: Shard, group: Group, slot: Slot) -> Tensor:
    """``[b, documents here, ...]``: my parts of the documents' sums, made whole."""
    if not _crossing(shard):
        return parts
    result: Tensor = _Total.apply(parts, shard, group, slot)
    return result


def _added(parts: Tensor, shard: Shard, group: Group) -> Tensor:
    mine, places = (each.on(parts.device) for each in _shared(shard))
    message = parts.new_zeros((parts.shape[0], len(_crossing(shard)), *parts.shape[2:]))
    message[:, places] = parts[:, mine]
    whole = parts.clone()
    whole[:, mine] = group.all_reduce(message).wait()[:, places]
    return whole
