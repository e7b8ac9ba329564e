"""The attention function that models of transformers call, by the name ``"seqpar"`` in its registry."""

from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from seqpar.collectives.group import where
from seqpar.crossing.attention import attention
from seqpar.hf.calls import called
from seqpar.hf.sight import Sight, sight
from seqpar.ops.softmax_block.scores import Buckets, Scores
from seqpar.sharding.cut import Cut
from seqpar.sharding.shard import Shard

NAME = "seqpar"
KEYWORD = "seqpar_cut"
REGISTRY = "ALL_ATTENTION_FUNCTIONS"


def register() -> None:
    """Enter attention and masks into transformers' registries; once is enough, twice does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, called(attend))
    AttentionMaskInterface.register(NAME, sight)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Sight | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    relative: tuple[Tensor, Buckets] | None = None,
    seqpar_cut: Cut | None = None,
) -> tuple[Tensor, None]:
    """Softmax attention of one layer over the cut sequence, as transformers calls it.

    ``query [b, h, t, k]``, ``key`` and ``value [b, g, t, ...]`` of my tokens; returns ``[b, t, h, v]``.
    ``attention_mask``: how far a token sees. ``s_aux``: sinks, a number for each head. ``relative``: what keys get by
    distance, see :class:`seqpar.ops.softmax_block.scores.Scores`; only adapters pass it. ``seqpar_cut``: where the
    layer stands; it comes as a keyword of the call of the model, or is found in the layer while the model is cut, where
    models do not hand keywords on. Raises ``ValueError`` for what cannot be honoured.
    """
    kind = type(module).__name__
    seqpar_cut = seqpar_cut or vars(module).get(KEYWORD)
    if seqpar_cut is None:
        raise ValueError(f"{kind} was not told where it stands: attention {NAME!r} is for models that are cut")
    who = where(seqpar_cut.group)
    if dropout:
        raise ValueError(f"{who}: {kind} drops attention weights at random: set attention_dropout to 0")
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{who}: {kind} has {query.shape[2]} queries and {key.shape[2]} keys: a cut model has no cache"
        )
    seen = _seen(kind, who, attention_mask, sliding_window, is_causal)
    sinks = None if s_aux is None else s_aux.flatten().to(query.dtype)
    embeddings, buckets = (None, None) if relative is None else relative
    place = seqpar_cut.shard if seen.chunk is None else _chunked(seqpar_cut.shard, seen.chunk)
    out = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        shard=place,
        group=seqpar_cut.group,
        causal=seen.causal,
        window=seen.window if seen.both is None else (seen.both, seen.both),
        scale=scaling,
        scores=Scores(softcap or None, sinks, embeddings=embeddings, buckets=buckets),
        transport=seqpar_cut.transport,
        slot=seqpar_cut.slot(module),
        impl=seqpar_cut.impl,
    )
    return out, None


def _seen(kind: str, who: str, mask: Any, window: int | None, causal: bool | None) -> Sight:
    """What a token sees: what its mask says, which must not contradict what the call says."""
    if not isinstance(mask, Sight):
        what = "no mask" if mask is None else f"a mask of its own ({type(mask).__name__})"
        raise ValueError(f"{who}: {kind} attends with {what}, so how far a token sees is not known")
    if causal is not None and causal != mask.causal:
        raise ValueError(f"{who}: {kind} is called with is_causal={causal}, and its mask says otherwise")
    if window is not None and window != mask.window:
        raise ValueError(f"{who}: {kind} is called with a window of {window}, its mask with {mask.window}")
    return mask


@lru_cache(maxsize=32)
def _chunked(shard: Shard, chunk: int) -> Shard:
    """The same tokens on the same ranks, as documents of at most ``chunk`` tokens."""
    lengths = [min(chunk, length - start) for length in shard.lengths for start in range(0, length, chunk)]
    return Shard(tuple(lengths), shard.layout, shard.runs, shard.group, shard.rank)
