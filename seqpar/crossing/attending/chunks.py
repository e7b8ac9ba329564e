"""Attention to keys and values of earlier calls: every rank holds those that later calls may see."""

import torch
from torch import Tensor, nn

from seqpar.collectives.group import where
from seqpar.crossing.attending.always import Always
from seqpar.crossing.replicated import whole_gradient
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
    window: int | None,
    scale: float | None,
    always: Always | None,
    state: str,
) -> Tensor:
    """Causal attention of my queries to all tokens of this call and of those before, ``[b, t, h, v]``.

    Law: calls one after the other give what one call of all tokens gives. Sends everyone's keys and values to all;
    memory is that of my queries times the keys they may see. Raises ``ValueError`` unless causal, and for ``always``
    with anything but learned rows.
    """
    if always is not None and (always.seen or always.seeing):
        raise ValueError(f"{where(cut.group)}: tokens that no window hides keep no states: pass no states")
    seen = _seen(torch.cat([k, v], -1), cut, layer, causal, window, state)
    k, v = seen.split([k.shape[-1], v.shape[-1]], -1)
    visible = _visible(cut.shard, seen.shape[1], window)
    if always is not None and always.keys is not None and always.values is not None:
        k, v = (torch.cat([x.expand(len(k), *x.shape), y], 1) for x, y in ((always.keys, k), (always.values, v)))
        visible = torch.cat([visible.new_ones(len(visible), len(always.keys)), visible], 1)
    return _of_my_queries(q, k, v, visible, scale)


def _seen(mine: Tensor, cut: Cut, layer: nn.Module, causal: bool, window: int | None, state: str) -> Tensor:
    """Keys and values ``[b, tokens, g, k + v]`` of earlier calls and of everyone in this one; those that later tokens
    may see are kept."""
    shard, group, states = cut.shard, cut.group, cut.states
    assert states is not None
    if not causal:
        raise ValueError(
            f"{where(group)}: softmax attention that sees later tokens keeps no states from one call to the next: pass "
            "no states"
        )
    before, new = states.enter(layer, state), shard.gather(mine)
    whole = new if before is None else torch.cat([before, new], 1)
    last = next((n for n in reversed(shard.lengths) if n), 0)
    alone = sum(n > 0 for n in shard.lengths) <= 1
    kept = whole if alone else whole[:, whole.shape[1] - last :]
    kept = kept if window is None else kept[:, max(0, kept.shape[1] - window + 1) :]
    states.leave(layer, state, kept, cut.exchanged)
    return whole_gradient(whole, group)


def _visible(shard: Shard, num_keys: int, window: int | None) -> Tensor:
    """``[my tokens, keys]`` bool: keys of the call's tokens stand after those of earlier calls, which belong to the
    first document."""
    before = num_keys - shard.num_tokens
    lengths = torch.tensor(shard.lengths, dtype=torch.int64)
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    place = torch.arange(shard.num_tokens)
    key_document = torch.cat([document.new_zeros(before), document])
    key_place = torch.cat([torch.arange(-before, 0), place])
    mine, my_document = shard.take(place[None])[0][:, None], shard.take(document[None])[0][:, None]
    seen = (key_place <= mine) & (key_document == my_document)
    return seen if window is None else seen & (key_place > mine - window)


def _of_my_queries(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    """Attention of my queries to all keys that they see."""
    share = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(share, 2).transpose(1, 2) for x in (k, v))
    mask = seen.to(q.device)
    return nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, scale=scale).transpose(1, 2)
