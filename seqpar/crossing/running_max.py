"""Maxima over a cut sequence, of each document: what keeps exponentials small. No gradient flows through them.

A layer that divides ``sum exp(k) v`` by ``sum exp(k)`` may subtract any number from ``k`` in both: the value stays, and
so does its gradient. The largest ``k`` so far is the number with which nothing overflows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.group import where
from seqpar.collectives.planned import Planned, rows
from seqpar.columns import Column, Columns
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.relayout import relayout
from seqpar.sharding.shard import Shard


class RunningMax(NamedTuple):
    """Of each token ``[b, t, ...]``: the maximum of the tokens of its document ``before`` it (``-inf`` for the first),
    and ``upto`` it."""

    before: Tensor
    upto: Tensor


@torch.no_grad()
def running_max(
    x: Tensor,
    *,
    shard: Shard,
    group: Group,
    slot: Slot | None = None,
    initial: Tensor | None = None,
    return_final: bool = False,
) -> Any:
    """The maximum of each document so far, elementwise: :class:`RunningMax`.

    Law: the ranks' results, put together, are those of one device, bit for bit, for every layout. Each part of a
    document that goes on at another rank sends its maximum once; a striped layout is re-laid instead.
    Nothing has a gradient.

    Shapes: ``x [b, t, ...]`` with ``t`` my tokens. ``initial [b, ...]``, the same on every rank, continues an earlier
    document in the first one. With ``return_final`` the result is ``(running max, final)``: the maximum of the last
    document, ``-inf`` if it has no tokens, the same on every rank. ``slot`` keeps what crossed the cuts for activation
    checkpointing.
    Raises ``ValueError`` before the first message if shapes do not fit.
    """
    _check(x, initial, shard, group)
    x, slot, target = x.detach(), slot or Slot(), shard
    if shard.layout == "striped" and shard.size > 1:
        target = shard.contiguous
        x = relayout(x, shard, target, group, slot)
    plan = _running_plan(target, return_final)
    *entering, final = _exchanged(x, initial, plan, target, group, slot)
    result = _run(x, entering, target)
    if target is not shard:
        together = relayout(torch.stack(result, 2), target, shard, group, slot)
        result = RunningMax(*together.unbind(2))
    return (result, final) if return_final else result


@torch.no_grad()
def document_max(x: Tensor, *, shard: Shard, group: Group, slot: Slot | None = None) -> Tensor:
    """The maximum of all tokens of each document that has tokens here, elementwise: ``[b, documents here, ...]``.

    Law: every rank with tokens of a document has the maximum that one device has. ``x [b, t, ...]`` my tokens; the
    documents are those of :func:`seqpar.crossing.document_sum.documents_here`. Each part of a document that has parts
    on other ranks sends its maximum once. Nothing has a gradient. Raises ``ValueError`` as :func:`running_max`.
    """
    _check(x, None, shard, group)
    *maxima, _ = _exchanged(x.detach(), None, _whole_plan(shard), shard, group, slot or Slot())
    return torch.stack(maxima, 1) if maxima else x.new_empty((x.shape[0], 0, *x.shape[2:]))


def _check(x: Tensor, initial: Tensor | None, shard: Shard, group: Group) -> None:
    if (shard.size, shard.rank) != (group.size, group.rank):
        raise ValueError(f"{where(group)}: the shard was cut for rank {shard.rank} of {shard.size}")
    if x.dim() < 2 or x.shape[1] != shard.num_local:
        raise ValueError(f"{where(group)}: x must hold my {shard.num_local} tokens, got {list(x.shape)}")
    expected = (x.shape[0], *x.shape[2:])
    if initial is not None and initial.shape != expected:
        raise ValueError(f"{where(group)}: initial must be {list(expected)}, got {list(initial.shape)}")


# --- which maxima travel: integers only ------------------------------------------------------------------------------


class _Wanted(NamedTuple):
    """A maximum: over these of the maxima known here, and over ``initial`` if it ``continues`` the first document."""

    known: tuple[int, ...]
    continues: bool


@dataclass(frozen=True)
class _Plan:
    """``mine``: which of my pieces' maxima the others get; ``sends``: how many come of every rank. Known here are those
    of all my pieces, then what every rank sent. ``wanted``: what comes of them; the last is the maximum of the last
    document."""

    mine: Planned
    sends: tuple[int, ...]
    wanted: tuple[_Wanted, ...]


@dataclass(frozen=True, eq=False)
class _Known:
    """The maxima that are known here, by document and position: ``place`` is where they are."""

    token: Column
    place: Column

    def between(self, low: int, high: int) -> tuple[int, ...]:
        """Those of pieces that begin at tokens from ``low`` to before ``high`` of the sequence."""
        begin, end = np.searchsorted(self.token, (low, high)).tolist()
        return tuple(self.place[begin:end].tolist())


def _sent(shard: Shard, chosen: Column) -> tuple[Planned, tuple[int, ...], _Known]:
    """Of the pieces of all ranks those that are ``chosen`` (by numbers) are sent: what a plan needs to know."""
    mine, sent = shard.pieces.of(shard.rank), shard.pieces.at(chosen)
    sent = sent.at(np.lexsort((sent.row, sent.rank)))
    leaving = np.searchsorted(mine.row, sent.row[sent.rank == shard.rank])
    token = np.concatenate([mine.token, sent.token])
    order = np.argsort(token, kind="stable")
    return rows(leaving), tuple(np.bincount(sent.rank, minlength=shard.size).tolist()), _Known(token[order], order)


@lru_cache(maxsize=64)
def _running_plan(shard: Shard, final: bool) -> _Plan:
    """What came before each of my pieces, in its document."""
    pieces, last = shard.pieces, len(shard.lengths) - 1
    goes_on = np.arange(len(pieces)) < _last_elsewhere(pieces)
    if final and shard.size > 1:
        goes_on |= pieces.document == last
    mine, sends, known = _sent(shard, np.flatnonzero(goes_on))
    entering = [
        _Wanted(known.between(token - piece.first, token), piece.document == 0)
        for piece, token in zip(shard.pieces_of(shard.rank), pieces.of(shard.rank).token.tolist())
    ]
    ends = shard.offsets[-2:] if shard.lengths else (0, 0)
    return _Plan(mine, sends, (*entering, _Wanted(known.between(*ends), last == 0)))


@lru_cache(maxsize=64)
def _whole_plan(shard: Shard) -> _Plan:
    """The maximum of each document that has tokens here."""
    pieces = shard.pieces
    begins = np.flatnonzero(np.diff(pieces.document, prepend=-1))
    crossing = _last_elsewhere(pieces)[begins] >= 0
    sizes = np.diff(begins, append=len(pieces))
    mine, sends, known = _sent(shard, np.flatnonzero(np.repeat(crossing, sizes)))
    here = sorted({piece.document for piece in shard.pieces_of(shard.rank)})
    wanted = [_Wanted(known.between(*shard.offsets[document : document + 2]), False) for document in here]
    return _Plan(mine, sends, (*wanted, _Wanted((), False)))


def _last_elsewhere(pieces: Columns) -> Column:
    """For each piece, the number of the last piece of its document that another rank holds; -1 if there is none."""
    begins = np.flatnonzero(np.diff(pieces.document, prepend=-1))
    if not len(begins):
        return begins
    sizes, number = np.diff(begins, append=len(pieces)), np.arange(len(pieces))
    last = np.repeat(begins + sizes - 1, sizes)
    elsewhere = np.where(pieces.rank == pieces.rank[last], -1, number)
    other = np.repeat(np.maximum.reduceat(elsewhere, begins), sizes)
    return np.where(pieces.rank == pieces.rank[last], other, last)


# --- maxima ----------------------------------------------------------------------------------------------------------


def _exchanged(
    x: Tensor, initial: Tensor | None, plan: _Plan, shard: Shard, group: Group, slot: Slot
) -> tuple[Tensor, ...]:
    """The maxima that the plan wants, ``[b, ...]`` each."""
    pieces = shard.pieces_of(shard.rank)
    parts = [x[:, piece.row : piece.row + piece.count].amax(1) for piece in pieces]
    own = torch.stack(parts, 1) if parts else x.new_empty((x.shape[0], 0, *x.shape[2:]))
    return slot.keep(lambda: _maxima(own, initial, plan, group))


def _maxima(own: Tensor, initial: Tensor | None, plan: _Plan, group: Group) -> tuple[Tensor, ...]:
    known, nothing = own, own.new_full((own.shape[0], *own.shape[2:]), -torch.inf)
    if any(plan.sends):
        mine = own[:, plan.mine.on(own.device)].contiguous()
        shapes = [(own.shape[0], count, *own.shape[2:]) for count in plan.sends]
        known = torch.cat([own, *group.all_gather(mine, shapes).wait()], 1)
    first = nothing if initial is None else initial.to(own.dtype)
    return tuple(
        torch.maximum(
            known[:, list(want.known)].amax(1) if want.known else nothing, first if want.continues else nothing
        )
        for want in plan.wanted
    )


def _run(x: Tensor, entering: Sequence[Tensor], shard: Shard) -> RunningMax:
    """The running maxima of my tokens, whose pieces these maxima enter."""
    before, upto = [x[:, :0]], [x[:, :0]]
    for piece, entered in zip(shard.pieces_of(shard.rank), entering):
        reached = torch.maximum(x[:, piece.row : piece.row + piece.count].cummax(1).values, entered[:, None])
        upto.append(reached)
        before += [entered[:, None], reached[:, :-1]]
    return RunningMax(torch.cat(before, 1), torch.cat(upto, 1))
