"""Softmax attention over a cut sequence: one function, three transports."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqpar.collectives import Group, alone
from seqpar.collectives.first_order import first_order
from seqpar.collectives.group import where
from seqpar.crossing.meetings import View
from seqpar.crossing.tiles import Mosaic, Tile, Tiles
from seqpar.crossing.transports import Gather, Ring
from seqpar.ops.softmax_block import Scores, Terms, attend, attend_backward, check_impl, merge
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.relayout import heads_to_tokens, split_heads, tokens_to_heads
from seqpar.sharding.shard import Shard

TRANSPORTS = ("ring", "all_gather", "all_to_all")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shard: Shard,
    group: Group,
    causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    scores: Scores | None = None,
    transport: str = "ring",
    slot: Slot | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Softmax attention of my queries over the whole cut sequence, each within its own document.

    Law: the ranks' outputs and gradients, put together, are those of one device, for every layout and transport.

    Shapes: ``q [b, t, h, k]``, ``k [b, t, g, k]``, ``v [b, t, g, v]`` with ``t`` my tokens; returns ``[b, t, h, v]`` in
    the dtype of ``q``. ``h`` is a multiple of ``g`` (grouped queries): keys and values travel as ``g`` heads.
    ``causal``: a token sees itself and earlier tokens; otherwise all of its document. ``window``: it sees the last
    ``window`` tokens up to and including itself (and, if not causal, all later ones); a pair ``(left, right)``: as many
    before and after itself, None for all. ``scale``: default ``k**-0.5``.
    ``scores``: what else is done to scores (:class:`seqpar.Scores`: a cap, sinks, ...).
    ``transport``: ``"ring"`` (Ring Self-Attention, arXiv 2105.13120, with online softmax), ``"all_gather"`` (LASP-2H,
    arXiv 2502.07563) or ``"all_to_all"`` (DeepSpeed-Ulysses, arXiv 2309.14509; heads are dealt as evenly as they go).
    ``slot`` keeps what crossed the cuts for activation checkpointing; layers pass it. ``impl``: ``"auto"``,
    ``"reference"`` (torch) or ``"triton"``. With ``return_lse`` the result is ``(out, lse)``: ``lse [b, t, h]``, fp32
    (fp64 for fp64), the logarithm of the sum of what is normalised by; gradients go through both.
    Raises ``ValueError`` before the first message if shapes, dtypes or options do not fit.
    """
    scores = scores or Scores()
    _check(q, k, v, shard, group, transport)
    _check_scores(q, v, scores, group, impl)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    job, slot = _Job(shard, group, view_of(causal, window, group), scale, transport, impl, scores), slot or Slot()
    if transport == "all_to_all" and group.size > 1:
        return _by_heads(q, k, v, job, slot, return_lse)
    out, lse = _attend(q, k, v, job, slot)
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, shard: Shard, group: Group, transport: str) -> None:
    who = where(group)
    if transport not in TRANSPORTS:
        raise ValueError(f"{who}: transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}")
    if (shard.size, shard.rank) != (group.size, group.rank):
        raise ValueError(f"{who}: the shard was cut for rank {shard.rank} of {shard.size}")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"{who}: q, k and v must be [batch, tokens, heads, dim], got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{who}: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.shape[1] == k.shape[1] == v.shape[1] == shard.num_local:
        raise ValueError(f"{who}: q, k and v must hold my {shard.num_local} tokens, got {shapes}")
    if not q.shape[0] == k.shape[0] == v.shape[0] or q.shape[3] != k.shape[3] or k.shape[2] != v.shape[2]:
        raise ValueError(f"{who}: q and k must share their dim, k and v their heads, all their batch, got {shapes}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{who}: query heads must be a multiple of key/value heads, got {shapes}")


def view_of(causal: bool, window: int | tuple[int | None, int | None] | None, group: Group) -> View:
    """What a query sees; raises ``ValueError`` for a window that makes no sense."""
    who = where(group)
    if not isinstance(window, tuple):
        if window is not None and window < 1:
            raise ValueError(f"{who}: window must be at least 1 token, got {window}")
        return View(causal, window)
    left, right = window
    if min(left or 0, right or 0) < 0:
        raise ValueError(f"{who}: a window (left, right) must not be negative, got {window}")
    if causal and right:
        raise ValueError(f"{who}: the window {window} sees later tokens: pass causal=False, or {(left, 0)}")
    return View(causal or right == 0, None if left is None else left + 1, None if causal or right == 0 else right)


def _check_scores(q: Tensor, v: Tensor, scores: Scores, group: Group, impl: str) -> None:
    try:
        scores.check(q.shape[2])
    except ValueError as problem:
        raise ValueError(f"{where(group)}: {problem}") from None
    check_impl(q, v, impl, _terms(scores))


def _terms(scores: Scores) -> Terms:
    return Terms(scores.softcap)


class _Job(NamedTuple):
    """What a call needs to know besides tensors."""

    shard: Shard
    group: Group
    view: View
    scale: float
    transport: str
    impl: str
    scores: Scores

    @property
    def whole(self) -> bool:
        """Whether every query meets all of its keys at once, and nothing is merged."""
        return self.group.size == 1 and len(self.shard.runs[0]) <= 1 and self.scores.sinks is None

    @property
    def how(self) -> dict[str, Any]:
        """How a tile is computed."""
        return {"impl": self.impl, "whole": self.whole, "terms": _terms(self.scores)}

    def blocks(self) -> Ring | Gather:
        """How keys and values come by."""
        return (Gather if self.transport == "all_gather" else Ring)(self.shard, self.group, self.view)


def _by_heads(q: Tensor, k: Tensor, v: Tensor, job: _Job, slot: Slot, return_lse: bool) -> Any:
    """Ulysses: every rank gets the whole sequence of some heads, attends on its own, and sends its outputs back."""
    shard, group = job.shard, job.group
    deal = split_heads(q.shape[2], k.shape[2], group.size)
    q_heads = tokens_to_heads(q, shard, group, deal.queries, slot)
    kv_heads = tokens_to_heads(torch.cat([k, v], -1), shard, group, deal.keys, slot)
    matched = kv_heads[:, :, deal.match(group.rank, kv_heads.device)]
    k_heads, v_heads = matched.split([k.shape[-1], v.shape[-1]], -1)
    mine = job.scores.of_heads(slice(*deal.queries[group.rank]))
    alike = job._replace(shard=shard.together, group=alone(), transport="ring", scores=mine)
    out, lse = _attend(q_heads, k_heads, v_heads, alike, Slot())
    out = heads_to_tokens(out, shard, group, deal.queries, slot)
    if not return_lse:
        return out
    return out, heads_to_tokens(lse.unsqueeze(-1), shard, group, deal.queries, slot).squeeze(-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, job: _Job, slot: Slot) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by ring or gathering, differentiable."""
    out, lse = _Attention.apply(q, k, v, job.scores.sinks, job, slot)
    return out, lse


@first_order("attention")
class _Attention(torch.autograd.Function):
    """Forward merges the visited blocks by online softmax; backward visits them again, and their gradients go home."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, job: _Job, slot: Slot
    ) -> tuple[Tensor, Tensor]:
        out, lse = slot.keep(lambda: _forward(q, k, v, sinks, job))
        ctx.job = job
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        job: _Job = ctx.job
        split = [k.shape[-1], v.shape[-1]]
        d_out = torch.zeros_like(out) if d_out is None else d_out
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)

        def visit(seen: Tiles, block: Tensor) -> Tensor:
            d_block = torch.zeros(block.shape, dtype=lse.dtype, device=block.device)
            for tile in seen:
                rows, keys = slice(*tile.rows), slice(*tile.keys)
                block_k, block_v = block[:, keys].split(split, -1)
                mine = (d_out[:, rows], q[:, rows], block_k, block_v, out[:, rows], lse[:, rows])
                sums = None if d_lse is None else d_lse[:, rows]
                tile_grads = attend_backward(*mine, _mask(tile, q), job.scale, d_lse=sums, **job.how)
                dq[:, rows] += tile_grads[0]
                d_block[:, keys] += torch.cat(tile_grads[1:], -1)
            return d_block

        dk, dv = job.blocks().gradients(torch.cat([k, v], -1), visit).split(split, -1)
        d_sinks = None if sinks is None else _sinks_gradient(sinks, d_out, d_lse, out, lse)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_sinks, None, None


def _sinks_gradient(sinks: Tensor, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
    """A sink is a key with value 0 that every query sees."""
    delta = (d_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if d_lse is not None:
        delta -= d_lse
    return -((sinks.to(lse.dtype) - lse).exp() * delta).sum((0, 1)).to(sinks.dtype)


def _mask(tile: Tile | Mosaic, like: Tensor) -> Any:
    return tile.band if isinstance(tile, Tile) else tile.mask(like.device)


def _forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, job: _Job) -> tuple[Tensor, Tensor]:
    """My rows of the output (rounded once, to the dtype of ``q``) and their log-sum-exp."""
    split = [k.shape[-1], v.shape[-1]]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros((*q.shape[:3], v.shape[-1]), dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=dtype, device=q.device)
    for seen, block in job.blocks().visits(torch.cat([k, v], -1)):
        for tile in seen:
            rows = slice(*tile.rows)
            block_k, block_v = block[:, slice(*tile.keys)].split(split, -1)
            part = attend(q[:, rows], block_k, block_v, _mask(tile, q), job.scale, **job.how)
            merge(out, lse, *part, rows)
    if sinks is not None:
        merge(out, lse, out.new_zeros(1).expand_as(out), sinks.to(dtype).expand_as(lse), slice(None))
    return out.to(q.dtype), lse
