"""Maxima over a cut sequence, of each document: what keeps exponentials small. No gradient flows through them.

A layer that divides ``sum exp(k) v`` by ``sum exp(k)`` may subtract any number from ``k`` in both: the value stays, and
so does its gradient. The largest ``k`` so far is the number with which nothing overflows.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.group import where
from seqpar.crossing.segments import Batches, batches_of
from seqpar.ops.kept import kept
from seqpar.sharding.called import called
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
    called("running_max", group, shard, return_final, x, shared=(initial,))
    _check(x, initial, shard, group)
    x, slot, target = x.detach(), slot or Slot(), shard
    if shard.layout == "striped" and shard.size > 1:
        target = Shard.of(shard.lengths, group)
        x = relayout(x, shard, target, group, slot)
    plan = _running_plan(target, return_final, x.device)
    (found,) = _exchanged(x, initial, plan, group, slot)
    result, final = _run(x, found[:, :-1], plan.batches), found[:, -1]
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
    called("document_max", group, shard, (), x)
    _check(x, None, shard, group)
    (found,) = _exchanged(x.detach(), None, _whole_plan(shard, x.device), group, slot or Slot())
    return found[:, :-1]


def _check(x: Tensor, initial: Tensor | None, shard: Shard, group: Group) -> None:
    if (shard.size, shard.rank) != (group.size, group.rank):
        raise ValueError(f"{where(group)}: the shard was cut for rank {shard.rank} of {shard.size}")
    if x.dim() < 2 or x.shape[1] != shard.num_local:
        raise ValueError(f"{where(group)}: x must hold my {shard.num_local} tokens, got {list(x.shape)}")
    expected = (x.shape[0], *x.shape[2:])
    if initial is not None and initial.shape != expected:
        raise ValueError(f"{where(group)}: initial must be {list(expected)}, got {list(initial.shape)}")


# --- which maxima travel: integers only ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Plan:
    """``sends``: of every rank, which of its pieces' maxima the others get. Known here are those of all my pieces, in
    ``batches``, then what every rank sent; ``mine``: which of my pieces I send.

    So many maxima are ``wanted``, the last of them that of the last document. ``over [some of them, known]``: those
    over known ones, filled up with one of nothing, and ``where`` they are wanted; ``continues``: over ``initial``, too.
    """

    batches: Batches
    sends: tuple[tuple[int, ...], ...]
    mine: Tensor
    wanted: int
    over: Batches
    known: Tensor
    where: Tensor
    continues: Tensor


Pieces = Sequence[Sequence[Piece]]
Sends = Callable[[int, Piece], bool]
Wanted = tuple[Sequence[int], bool]  # over which of the maxima known here, and whether over the initial one, too


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
    """The places of each document's pieces, in its order."""
    places: dict[int, list[int]] = {}
    for place in sorted(range(len(known)), key=lambda place: known[place].first):
        places.setdefault(known[place].document, []).append(place)
    return places


def _plan(shard: Shard, sends: tuple[tuple[int, ...], ...], wanted: Sequence[Wanted], device: torch.device) -> _Plan:
    mine = shard.pieces_of(shard.rank)
    batches = batches_of([piece.row for piece in mine], [piece.count for piece in mine], [0] * len(mine), device)
    some = [(number, over) for number, (over, _) in enumerate(wanted) if over]
    counts = [len(over) for _, over in some]
    starts = [0, *accumulate(counts)][: len(counts)]
    index = [
        torch.tensor(each, dtype=torch.int64, device=device)
        for each in (
            sends[shard.rank],
            [place for _, over in some for place in over],
            [number for number, _ in some],
            [number for number, (_, continues) in enumerate(wanted) if continues],
        )
    ]
    return _Plan(
        batches, sends, index[0], len(wanted), batches_of(starts, counts, [0] * len(counts), device), *index[1:]
    )


@kept()
def _running_plan(shard: Shard, final: bool, device: torch.device) -> _Plan:
    """What came before each of my pieces, in its document."""
    pieces, last = _pieces(shard), len(shard.lengths) - 1
    reach = _reach(pieces)

    def goes_on(rank: int, piece: Piece) -> bool:
        elsewhere = any(first > piece.first for other, first in reach[piece.document] if other != rank)
        return elsewhere or (final and piece.document == last and shard.size > 1)

    sends = _sends(pieces, goes_on)
    known = _known(pieces, sends, shard.rank)
    places = _by_document(known)
    firsts = {document: [known[place].first for place in of] for document, of in places.items()}

    def before(piece: Piece) -> Wanted:
        earlier = bisect_left(firsts[piece.document], piece.first)
        return places[piece.document][:earlier], piece.document == 0

    entering = [before(piece) for piece in pieces[shard.rank]]
    return _plan(shard, sends, [*entering, (places.get(last, ()), last == 0)], device)


@kept()
def _whole_plan(shard: Shard, device: torch.device) -> _Plan:
    """The maximum of each document that has tokens here."""
    pieces = _pieces(shard)
    reach = _reach(pieces)
    sends = _sends(pieces, lambda rank, piece: len(reach[piece.document]) > 1)
    places = _by_document(_known(pieces, sends, shard.rank))
    here = sorted({piece.document for piece in pieces[shard.rank]})
    return _plan(shard, sends, [*((places[document], False) for document in here), ((), False)], device)


def _reach(pieces: Pieces) -> dict[int, list[tuple[int, int]]]:
    """Of each document, on which ranks it goes furthest and where its last piece there begins: two are enough to know
    if it goes on elsewhere, or lies on several."""
    reach: dict[int, list[tuple[int, int]]] = {}
    for rank, of_rank in enumerate(pieces):
        for piece in of_rank:
            other = [each for each in reach.get(piece.document, []) if each[0] != rank]
            same = [each for each in reach.get(piece.document, []) if each[0] == rank]
            mine = max([(rank, piece.first), *same], key=lambda each: each[1])
            reach[piece.document] = sorted([mine, *other], key=lambda each: -each[1])[:2]
    return reach


# --- maxima ----------------------------------------------------------------------------------------------------------


def _exchanged(x: Tensor, initial: Tensor | None, plan: _Plan, group: Group, slot: Slot) -> tuple[Tensor, ...]:
    """The maxima that the plan wants, ``[b, wanted, ...]``."""
    own = _maxima(x, plan.batches)
    return slot.keep(lambda: (_wanted(own, initial, plan, group),))


def _maxima(x: Tensor, segments: Batches) -> Tensor:
    """Of each segment, in the order in which they were given."""
    parts = [part.amax(2) for part in segments.apart(x, -torch.inf)]
    if not parts:
        return x[:, :0]
    return torch.empty_like(found := torch.cat(parts, 1)).index_copy_(1, segments.order, found)


def _wanted(own: Tensor, initial: Tensor | None, plan: _Plan, group: Group) -> Tensor:
    known = own
    if any(plan.sends):
        mine = own.index_select(1, plan.mine)
        shapes = [(own.shape[0], len(places), *own.shape[2:]) for places in plan.sends]
        known = torch.cat([own, *group.all_gather(mine, shapes).wait()], 1)
    found = own.new_full((own.shape[0], plan.wanted, *own.shape[2:]), -torch.inf)
    found.index_copy_(1, plan.where, _maxima(known.index_select(1, plan.known), plan.over))
    if initial is not None:
        continued = torch.maximum(found.index_select(1, plan.continues), initial[:, None].to(own.dtype))
        found.index_copy_(1, plan.continues, continued)
    return found


def _run(x: Tensor, entering: Tensor, segments: Batches) -> RunningMax:
    """The running maxima of my tokens, whose pieces these maxima enter."""
    before, upto = [], []
    of_batches = entering.index_select(1, segments.order).split([number for number, _ in segments.shapes], 1)
    for part, entered in zip(segments.apart(x, -torch.inf), of_batches):
        reached = torch.maximum(part.cummax(2).values, entered[:, :, None])
        upto.append(reached)
        before.append(torch.cat([entered[:, :, None], reached[:, :, :-1]], 2))
    return RunningMax(segments.joined(before), segments.joined(upto)) if before else RunningMax(x, x)
