"""Attention to keys and values of earlier calls: every rank holds those that later calls may see."""

import torch
from torch import Tensor, nn

from seqpar.collectives.group import where
from seqpar.crossing.attention import Window, last_attention, view_of
from seqpar.crossing.replicated import whole_gradient
from seqpar.ops.softmax_block.scores import Scores
from seqpar.sharding.cut import Cut
from seqpar.sharding.shard import Shard


def attention_of_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cut: Cut,
    layer: nn.Module,
    *,
    causal: bool,
    window: Window,
    scale: float | None,
    scores: Scores | None,
    impl: str,
    state: str,
) -> Tensor:
    """Causal attention of my queries to all tokens of this call and of those before, ``[b, t, h, v]``.

    Law: calls one after the other give what one call of all tokens gives. Sends everyone's keys and values to all;
    memory is that of my queries times the keys they may see. Raises ``ValueError`` unless causal, and for ``scores`` on
    several ranks or of several documents.
    """
    view, who = view_of(causal, window, cut.group), where(cut.group)
    if view.ahead or not causal:
        raise ValueError(
            f"{who}: softmax attention that sees later tokens keeps no states from one call to the next: pass no states"
        )
    rows = None if cut.states is None else cut.states.rows
    if scores is not None and (cut.group.size > 1 or len(cut.shard.lengths) != 1 or rows):
        raise ValueError(
            f"{who}: attention with scores keeps states for one document on one rank and rows at one position; it got "
            f"documents of {list(cut.shard.lengths)[:6]} tokens on {cut.group.size} ranks: pass no states"
        )
    seen = _seen(torch.cat([k, v], -1), cut, layer, view.window, state)
    k, v = seen.split([k.shape[-1], v.shape[-1]], -1)
    if scores is not None:
        return last_attention(q, k, v, view=view, scale=scale, scores=scores, impl=impl)
    return _of_my_queries(q, k, v, _visible(cut.shard, seen.shape[1], view.window, rows), scale)


def _seen(mine: Tensor, cut: Cut, layer: nn.Module, window: int | None, state: str) -> Tensor:
    """Keys and values ``[b, tokens, g, k + v]`` of earlier calls and of everyone in this one; those that later tokens
    may see are kept."""
    shard, group, states = cut.shard, cut.group, cut.states
    assert states is not None
    before, new = states.enter(layer, state), shard.gather(mine)
    whole = new if before is None else torch.cat([before, new], 1)
    last = next((n for n in reversed(shard.lengths) if n), 0)
    alone = sum(n > 0 for n in shard.lengths) <= 1
    kept = whole if alone else whole[:, whole.shape[1] - last :]
    kept = kept if window is None else kept[:, max(0, kept.shape[1] - window + 1) :]
    states.leave(layer, state, kept, cut.exchanged)
    return whole_gradient(whole, group)


def _visible(shard: Shard, num_keys: int, window: int | None, rows: tuple[int, ...] | None) -> Tensor:
    """``[my tokens, keys]`` bool: keys of the call's tokens stand after those of earlier calls, which belong to the
    first document; ``[b, 1, my tokens, keys]`` if these were as many in each of ``rows``."""
    before = num_keys - shard.num_tokens
    lengths = torch.tensor(shard.lengths, dtype=torch.int64)
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    place = torch.arange(shard.num_tokens)
    key_document = torch.cat([document.new_zeros(before), document])
    key_place = torch.cat([torch.arange(-before, 0), place])
    mine, my_document = shard.take(place[None])[0][:, None], shard.take(document[None])[0][:, None]
    seen = (key_place <= mine) & (key_document == my_document)
    seen = seen if window is None else seen & (key_place > mine - window)
    return seen if rows is None else seen & (key_place >= -torch.tensor(rows)[:, None, None, None])


def _of_my_queries(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    """Attention of my queries to all keys that they see."""
    share = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(share, 2).transpose(1, 2) for x in (k, v))
    mask = seen.to(q.device)
    return nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, scale=scale).transpose(1, 2)
