"""The other exact cut of a cell with heads: all tokens of some heads on every rank, so that no rank waits for another.

It takes as many steps as the whole sequence has, and is the faster way only where steps cost what heads cost.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.group import where
from seqpar.crossing.stream import stream
from seqpar.crossing.streaming.running import Cell, packed, unpacked
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.relayout import heads_to_tokens, split_heads, tokens_to_heads
from seqpar.sharding.shard import Shard


def stream_heads(
    cell: Cell,
    params: Sequence[Tensor],
    tokens: Sequence[Tensor],
    initial: Sequence[Tensor],
    *,
    shard: Shard,
    group: Group,
    backwards: bool = False,
    chunk: int = 0,
    every: int = 0,
    learns: bool = False,
    recompute: bool = True,
    entering: Tensor | None = None,
    position: int = 0,
    return_leaving: bool = False,
    slot: Slot | None = None,
) -> Any:
    """:func:`seqpar.crossing.stream.stream` of a cell whose heads do not see each other, by two all-to-alls.

    Law: the numbers are those of ``stream``. Every tensor has heads: ``tokens [b, t, h, d]``, ``params [h, ...]``,
    ``initial [h, ...]``, and the output ``[b, t, h, d]``. Heads are dealt as evenly as they go; a rank may get none.
    Raises ``ValueError`` before the first message if tensors do not have the same heads.
    """
    heads = initial[0].shape[0]
    if any(x.dim() != 4 or x.shape[2] != heads for x in tokens) or any(
        x.shape[0] != heads for x in (*params, *initial)
    ):
        raise ValueError(f"{where(group)}: all of a stream over heads must have {heads} heads, got {_shapes(tokens)}")
    slot, deal = slot or Slot(), split_heads(heads, heads, group.size).queries
    low, high = deal[group.rank]
    whole = [tokens_to_heads(x, shard, group, deal, slot) for x in tokens]
    mine, sizes = [x[low:high] for x in initial], tuple(x.shape for x in initial)
    given = None if entering is None else packed([x[:, low:high] for x in unpacked(entering, sizes)])
    one, leaving = shard.together, None
    if low == high:
        empty = Shard.of([0], one.group)
        like = stream(cell, params, [x[:, :0] for x in tokens], initial, shard=empty, group=one.group, chunk=chunk)
        # None, but part of the graph: every rank takes part in the messages of backward, in the same order.
        nothing = whole[0].sum() if given is None else whole[0].sum() + given.sum()
        out = (nothing + like.new_zeros((*whole[0].shape[:3], like.shape[3]))).to(like.dtype)
        leaving = nothing + packed([x.new_zeros(len(like), 0, *x.shape[1:]) for x in initial])
    else:
        found = stream(
            cell, [x[low:high] for x in params], whole, mine, shard=one, group=one.group, backwards=backwards,
            chunk=chunk, every=every, learns=learns, recompute=recompute, entering=given, position=position,
            return_leaving=return_leaving, slot=slot,
        )  # fmt: skip
        out, leaving = found if return_leaving else (found, None)
    out = heads_to_tokens(out, shard, group, deal, slot)
    if not return_leaving:
        return out
    assert leaving is not None
    return out, _whole(leaving, sizes, (low, high), group)


def _whole(leaving: Tensor, sizes: tuple[torch.Size, ...], mine: tuple[int, int], group: Group) -> Tensor:
    """The state of all heads, the same on every rank; what follows from it is taken to be the same, too."""
    low, high = mine
    parts = unpacked(leaving, tuple(torch.Size((high - low, *size[1:])) for size in sizes))
    rooms = [part.new_zeros(len(part), *size) for part, size in zip(parts, sizes)]
    state = packed([torch.cat([x[:, :low], part, x[:, high:]], 1) for x, part in zip(rooms, parts)])
    others = group.all_reduce(state.detach()).wait() - state.detach()
    return state + others


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(list(x.shape)) for x in tensors)
