"""The streams that a router makes of a cut sequence: the tokens it sends to one memory, in their order.

Which tokens these are is known only while training runs, so the ranks tell each other their choices, a byte each; from
there on every rank knows all streams, and a stream is a document like any other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from seqpar.collectives import Group
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.shard import Shard


@dataclass(frozen=True)
class Streams:
    """For every sequence of the batch and every memory, the tokens it gets, document by document, in one packed row.

    ``shard``: how that row lies on the ranks; a document of it is a stream. Its tokens are entries ``(sequence, token,
    memory)`` of a tensor ``[b, before + t, m, ...]`` of mine, flattened: ``rows`` says which are mine. The first
    ``before`` tokens are those that came before the first document; rank 0 holds them, in all streams. ``last``
    ``[b, m, before]``: the place in the packed row of each of the last tokens of the last document's streams; -1: none.
    """

    shard: Shard
    rows: Tensor
    last: Tensor


def streams_of(chosen: Tensor, shard: Shard, before: int) -> Streams:
    """The streams of ``chosen [b, s, m]`` (bool, all tokens of the sequence, the same on every rank)."""
    memories = chosen.shape[2]
    chosen = functional.pad(chosen.cpu(), (0, 0, before, 0), value=True)
    owner, row = _owners(shard, before)
    lengths = [before + shard.lengths[0], *shard.lengths[1:]] if shard.lengths else [before]
    sequence, memory, token = chosen.transpose(1, 2).nonzero().unbind(1)  # in this order
    counts = torch.stack([part.sum(1) for part in chosen.split(lengths, 1)], -1)  # [b, m, documents]
    mine = owner[token] == shard.rank
    local = before + shard.num_local
    rows = (sequence[mine] * local + row[token[mine]]) * memories + memory[mine]
    packed = Shard.of(counts.flatten().tolist(), shard.group, fragments=_fragments(owner[token], shard.size))
    return Streams(packed, rows, _last(counts, before))


def last_of_streams(x: Tensor, streams: Streams, group: Group, slot: Slot) -> Tensor:
    """``[b, m, before, d]``: the last rows of the last document's streams, zeros before their start, on every rank.

    ``x [1, n, d]`` are my rows of all streams. What follows is taken to be the same on every rank.
    """
    place = torch.full((streams.shard.num_tokens + 1,), -1)  # the last one for what does not exist
    place[streams.shard.indices_of(group.rank)] = torch.arange(x.shape[1])
    mine = place[streams.last].to(x.device)
    held = torch.where((mine >= 0)[..., None], torch.cat([x[0], x.new_zeros(1, x.shape[2])])[mine], 0.0)
    # Each row is held by one rank, so the sum over ranks is exact, and so is this; the gradient goes to who holds it.
    (whole,) = slot.keep(lambda: (group.all_reduce(held.detach()).wait(),))
    return held + (whole - held.detach())


def _owners(shard: Shard, before: int) -> tuple[Tensor, Tensor]:
    """Of each token, after ``before`` of rank 0: its rank, and its row there among ``before`` more."""
    owner, row = (torch.zeros(before + shard.num_tokens, dtype=torch.int64) for _ in range(2))
    row[:before] = torch.arange(before)
    for rank in range(shard.size):
        index = before + shard.indices_of(rank)
        owner[index] = rank
        row[index] = before + torch.arange(len(index))
    return owner, row


def _fragments(owner: Tensor, size: int) -> list[list[tuple[int, int]]]:
    """Each rank's ranges of the packed row, whose tokens have these owners."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    ranks, counts = torch.unique_consecutive(owner, return_counts=True)
    ends = counts.cumsum(0)
    for rank, start, stop in zip(ranks.tolist(), (ends - counts).tolist(), ends.tolist()):
        found[rank].append((start, stop))
    return found


def _last(counts: Tensor, before: int) -> Tensor:
    """The places of the last ``before`` tokens of each stream of the last document ``[b, m, before]``, or -1."""
    ends = counts.flatten().cumsum(0).view_as(counts)[..., -1:]
    places = ends - before + torch.arange(before)
    return torch.where(places >= ends - counts[..., -1:], places, -1)
