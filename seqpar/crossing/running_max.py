"""Maxima over a cut sequence, of each document: what keeps exponentials small. No gradient flows through them.

A layer that divides ``sum exp(k) v`` by ``sum exp(k)`` may subtract any number from ``k`` in both: the value stays, and
so does its gradient. The largest ``k`` so far is the number with which nothing overflows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.group import where
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.relayout import relayout
from seqpar.sharding.shard import Piece, Shard


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
        target = Shard.of(shard.lengths, group)
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
    """``sends``: of every rank, which of its pieces' maxima the others get. Known here are those of all my pieces, then
    what every rank sent. ``wanted``: what comes of them; the last is the maximum of the last document."""

    sends: tuple[tuple[int, ...], ...]
    wanted: tuple[_Wanted, ...]


Pieces = Sequence[Sequence[Piece]]
Sends = Callable[[int, Piece], bool]


def _pieces(shard: Shard) -> list[tuple[Piece, ...]]:
    return [shard.pieces_of(rank) for rank in range(shard.size)]


def _sends(pieces: Pieces, sends: Sends) -> tuple[tuple[int, ...], ...]:
    """Of every rank the numbers of its pieces that it sends."""
    return tuple(
        tuple(place for place, piece in enumerate(of_rank) if sends(rank, piece)) for rank, of_rank in enumerate(pieces)
    )


def _known(pieces: Pieces, sends: Sequence[Sequence[int]], mine: int) -> list[Piece]:
    """The pieces whose maxima I have: mine, then those that were sent."""
    sent = [pieces[rank][place] for rank, places in enumerate(sends) for place in places]
    return [*pieces[mine], *sent]


def _by_document(known: Sequence[Piece]) -> dict[int, list[int]]:
    places: dict[int, list[int]] = {}
    for place, piece in enumerate(known):
        places.setdefault(piece.document, []).append(place)
    return places


@lru_cache(maxsize=64)
def _running_plan(shard: Shard, final: bool) -> _Plan:
    """What came before each of my pieces, in its document."""
    pieces, last = _pieces(shard), len(shard.lengths) - 1
    reach = _reach(pieces)

    def goes_on(rank: int, piece: Piece) -> bool:
        elsewhere = any(first > piece.first for other, first in reach[piece.document].items() if other != rank)
        return elsewhere or (final and piece.document == last and shard.size > 1)

    sends = _sends(pieces, goes_on)
    known = _known(pieces, sends, shard.rank)
    places = _by_document(known)

    def before(piece: Piece) -> _Wanted:
        earlier = [place for place in places[piece.document] if known[place].first < piece.first]
        return _Wanted(tuple(earlier), piece.document == 0)

    entering = [before(piece) for piece in pieces[shard.rank]]
    return _Plan(sends, (*entering, _Wanted(tuple(places.get(last, ())), last == 0)))


@lru_cache(maxsize=64)
def _whole_plan(shard: Shard) -> _Plan:
    """The maximum of each document that has tokens here."""
    pieces = _pieces(shard)
    reach = _reach(pieces)
    sends = _sends(pieces, lambda rank, piece: len(reach[piece.document]) > 1)
    places = _by_document(_known(pieces, sends, shard.rank))
    here = sorted({piece.document for piece in pieces[shard.rank]})
    return _Plan(sends, (*(_Wanted(tuple(places[document]), False) for document in here), _Wanted((), False)))


def _reach(pieces: Pieces) -> dict[int, dict[int, int]]:
    """Of each document, by rank, where the last of its pieces there begins."""
    reach: dict[int, dict[int, int]] = {}
    for rank, of_rank in enumerate(pieces):
        for piece in of_rank:
            by_rank = reach.setdefault(piece.document, {})
            by_rank[rank] = max(piece.first, by_rank.get(rank, 0))
    return reach


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
        mine = own[:, list(plan.sends[group.rank])].contiguous()
        shapes = [(own.shape[0], len(places), *own.shape[2:]) for places in plan.sends]
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
