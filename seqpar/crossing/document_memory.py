"""What whole documents remember, and their tokens read: ``q_t sum_s k_s v_s'``, with no order among tokens.

The sum of a long document is a state ``[k, v]``, which its tokens read; one that lies on several ranks is added up by
an all-reduce. A document that is whole here and shorter than a state is worth needs none: its tokens read each other.
Both work on documents of about the same length at once, so that many cost about what one of as many tokens costs.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.crossing.document_sum import Sums, check, crossing, exact, sums_of, total
from seqpar.crossing.segments import Batches, batches_of
from seqpar.ops.kept import kept
from seqpar.ops.precision import no_autocast
from seqpar.sharding.called import called
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.shard import Shard


@dataclass(frozen=True, eq=False)
class _Plan:
    """``batches`` of my pieces, of which the first ``short`` are of documents that need no state. Each piece of the
    others adds to the state ``places`` of ``sums`` (None: each has its own, in this order)."""

    batches: Batches
    short: int
    places: Tensor | None
    sums: Sums


@dataclass(frozen=True, eq=False)
class DocumentMemory:
    """Keys and values in batches, and the states ``[b, documents, h, k, v]`` of documents that have one."""

    keys: list[Tensor]
    values: list[Tensor]
    states: Tensor
    plan: _Plan

    def read(self, q: Tensor) -> Tensor:
        """Each of my tokens ``q [b, t, h, k]`` reads its document: ``[b, t, h, v]``, in fp32 (fp64). Sends nothing."""
        with no_autocast(q):
            return self._read(q.to(self.states.dtype))

    def _read(self, q: Tensor) -> Tensor:
        plan, shapes = self.plan, self.plan.batches.shapes
        queries = plan.batches.apart(q)
        read = [_read_tokens(*each) for each in zip(queries[: plan.short], self.keys, self.values)]
        if plan.short == len(shapes):  # no one reads a state, but every rank takes part in their gradients
            return plan.batches.joined([*read, _read_states(q[:, None, :0], self.states.sum(1, True))])
        states = self.states if plan.places is None else self.states.index_select(1, plan.places)
        of_batches = states.split([segments for segments, _ in shapes[plan.short :]], 1)
        return plan.batches.joined([*read, *(_read_states(*each) for each in zip(queries[plan.short :], of_batches))])


def document_memories(
    pairs: Sequence[tuple[Tensor, Tensor]], *, shard: Shard, group: Group, slot: Slot | None = None
) -> list[DocumentMemory]:
    """For each pair of keys and values a memory of every document that has tokens here, all of them of one message.

    Law: what tokens read, and all gradients, are those of one device, for every layout. ``k [b, t, h, k]`` and
    ``v [b, t, h, v]`` my tokens (of either, one head may serve all); sums are fp32 (fp64 for fp64). ``slot`` keeps what
    crossed the cuts for activation checkpointing. Raises ``ValueError`` before the first message unless all hold my
    tokens.
    """
    called("document_memories", group, shard, (), *(x for pair in pairs for x in pair))
    check(shard, group, *(x for pair in pairs for x in pair))
    plan = _plan_of(shard, min(_worth(k.shape[-1], v.shape[-1]) for k, v in pairs), pairs[0][0].device)
    pairs = [(k.to(exact(k)), v.to(exact(v))) for k, v in pairs]
    with no_autocast(pairs[0][0]):
        return _memories(pairs, plan, group, slot or Slot())


def _memories(pairs: Sequence[tuple[Tensor, Tensor]], plan: _Plan, group: Group, slot: Slot) -> list[DocumentMemory]:
    apart = [(plan.batches.apart(k), plan.batches.apart(v)) for k, v in pairs]
    parts = [_parts(*pair, *batches, plan) for pair, batches in zip(pairs, apart)]
    sizes = [part.shape[2:].numel() for part in parts]
    whole = total(torch.cat([part.flatten(2) for part in parts], 2), plan.sums, group, slot)
    states = (each.unflatten(2, part.shape[2:]) for each, part in zip(whole.split(sizes, 2), parts))
    return [DocumentMemory(*batches, each, plan) for batches, each in zip(apart, states)]


def _parts(k: Tensor, v: Tensor, keys: list[Tensor], values: list[Tensor], plan: _Plan) -> Tensor:
    """My parts of the states."""
    states = [torch.einsum("bnlhk,bnlhv->bnhkv", *each) for each in zip(keys[plan.short :], values[plan.short :])]
    if not states:
        return k[:, :0, :, :, None] * v[:, :0, :, None]  # none, but part of the graph
    found = states[0] if len(states) == 1 else torch.cat(states, 1)
    if plan.places is None:
        return found
    return found.new_zeros((len(found), plan.sums.documents, *found.shape[2:])).index_add(1, plan.places, found)


def _read_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bnhlm,bnmhv->bnlhv", torch.einsum("bnlhk,bnmhk->bnhlm", q, k), v)


def _read_states(q: Tensor, states: Tensor) -> Tensor:
    return torch.einsum("bnlhk,bnhkv->bnlhv", q, states)


def _worth(k: int, v: int) -> int:
    """Up to how many tokens of a document read each other for what writing and reading a state costs."""
    return 2 * k * v // (k + v)


@kept()
def _plan_of(shard: Shard, worth: int, device: torch.device) -> _Plan:
    pieces, crosses = shard.pieces_of(shard.rank), frozenset(crossing(shard))
    held = Counter(piece.document for piece in pieces)
    long = [p.count > worth or p.document in crosses or held[p.document] > 1 for p in pieces]
    batches = batches_of([p.row for p in pieces], [p.count for p in pieces], long, device)
    of = [pieces[place].document for place in batches.order.tolist() if long[place]]
    documents = tuple(dict.fromkeys(of))
    number = {document: place for place, document in enumerate(documents)}
    places = None if len(documents) == len(of) else torch.tensor([number[each] for each in of], device=device)
    return _Plan(batches, batches.kinds.count(False), places, sums_of(shard, documents, device))
