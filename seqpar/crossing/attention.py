"""Softmax attention over a cut sequence: one function, three transports."""

import math
from dataclasses import replace
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqpar.collectives import Group, alone
from seqpar.collectives.first_order import first_order
from seqpar.collectives.group import where
from seqpar.collectives.planned import Planned
from seqpar.crossing.attending.always import Always, Both, Go, Resident, Return, Unhidden, Ways, merged, unhidden_plan
from seqpar.crossing.attending.cross import Cross, check_cross
from seqpar.crossing.meetings import View
from seqpar.crossing.tiles import Mosaic, Tile
from seqpar.crossing.transports import Gather, GatherPlan, Ring, gather_plan
from seqpar.ops.compiling import apart
from seqpar.ops.softmax_block import Band, Scores, Terms, attend, attend_backward, check_impl, merge
from seqpar.ops.softmax_block.scores import PLAIN
from seqpar.sharding.called import called
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.relayout import heads_to_tokens, split_heads, tokens_to_heads
from seqpar.sharding.shard import Shard, digest_of

TRANSPORTS = ("ring", "all_gather", "all_to_all")

Window = int | tuple[int | None, int | None] | None


@apart
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shard: Shard,
    group: Group,
    causal: bool = True,
    window: Window = None,
    scale: float | None = None,
    scores: Scores | None = None,
    always: Always | None = None,
    transport: str = "ring",
    slot: Slot | None = None,
    impl: str = "auto",
    return_lse: bool = False,
    key_shard: Shard | None = None,
) -> Any:
    """Softmax attention of my queries over the whole cut sequence, each within its own document.

    Law: the ranks' outputs and gradients, put together, are those of one device, for every layout and transport.

    Shapes: ``q [b, t, h, k]``, ``k [b, t, g, k]``, ``v [b, t, g, v]`` with ``t`` my tokens; returns ``[b, t, h, v]`` in
    the dtype of ``q``. ``h`` is a multiple of ``g`` (grouped queries): keys and values travel as ``g`` heads.
    ``causal``: a token sees itself and earlier tokens; otherwise all of its document. ``window``: it sees the last
    ``window`` tokens up to and including itself (and, if not causal, all later ones); a pair ``(left, right)``: as many
    before and after itself, None for all. ``scale``: default ``k**-0.5``.
    ``scores``: what else is done to scores (:class:`seqpar.Scores`: a cap, sinks, biases by distance). ``always``:
    what windows do not hide (:class:`seqpar.Always`: global tokens, learned rows).
    ``transport``: ``"ring"`` (Ring Self-Attention, arXiv 2105.13120, with online softmax), ``"all_gather"`` (LASP-2H,
    arXiv 2502.07563) or ``"all_to_all"`` (DeepSpeed-Ulysses, arXiv 2309.14509; heads are dealt as evenly as they go).
    ``key_shard``: keys and values are my tokens of another sequence (an encoder's), cut by this one; the i-th document
    here sees all of the i-th there, so ``causal`` must be off; keys that my queries see then come at once, by
    ``"ring"`` too. A query without a key gets 0.
    ``slot`` keeps what crossed the cuts for activation checkpointing; layers pass it. ``impl``: ``"auto"``,
    ``"reference"`` (torch) or ``"triton"``. With ``return_lse`` the result is ``(out, lse)``: ``lse [b, t, h]``, fp32
    (fp64 for fp64), the logarithm of the sum of what is normalised by; gradients go through both.
    Raises ``ValueError`` before the first message if shapes, dtypes or options do not fit.
    """
    scores, always = scores or Scores(), always or Always()
    keys = shard if key_shard is None else key_shard
    cut_of_keys = None if key_shard is None else digest_of(key_shard)
    options = causal, window, scale, transport, return_lse, scores.options, always.seen, always.seeing, cut_of_keys
    kinds = (*scores.parameters, always.keys, always.values)
    called("attention", group, shard, options, q, *((k, v) if key_shard is None else ()), shared=kinds)
    _check(q, k, v, shard, group, scale, transport, keys)
    _check_options(q, k, v, scores, always, shard, group, impl)
    if key_shard is not None:
        check_cross(shard, key_shard, causal, window, where(group))
        if scores.by_distance or always.any:
            raise ValueError(f"{where(group)}: two sequences have no distances: no biases by distance, no always=")
    q, scale = _scaled(q, scale, scores)
    view, slot = view_of(causal, window, group), slot or Slot()
    job = _Job(shard, group, view, scale, transport, impl, scores, always, key_shard)
    if transport == "all_to_all" and group.size > 1:
        return _by_heads(q, k, v, job, slot, return_lse)
    out, lse = _whole(q, k, v, job, slot)
    return (out, lse) if return_lse else out


def last_attention(
    q: Tensor, k: Tensor, v: Tensor, *, view: View, scale: float | None, scores: Scores, impl: str
) -> Tensor:
    """Causal attention of the last tokens of a document over all, on one device: :func:`attention` where the keys and
    values ``[b, s, g, ...]`` of earlier calls are there."""
    t, s = q.shape[1], k.shape[1]
    scores.check(q)
    q, scale = _scaled(q, scale, scores)
    shard, low = Shard.of([s], alone()), None if view.window is None else s - t - view.window + 1
    tile = Tile((0, t), (0, s), Band(low, s - t))
    late = replace(shard.pieces, first=shard.pieces.first + s - t, count=shard.pieces.count - s + t)
    plan = GatherPlan(False, (), (), None, (tile,), late)
    return _attend(q, k, v, _Job(shard, alone(), view, scale, "ring", impl, scores, Always(), visitors=plan), Slot())[0]


def _scaled(q: Tensor, scale: float | None, scores: Scores) -> tuple[Tensor, float]:
    """Queries with their factors, and the scale."""
    if scores.factor is not None:
        q = (q * scores.factor.view(-1, 1, 1)).to(q.dtype)
    return q, 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: Shard,
    group: Group,
    scale: float | None,
    transport: str,
    keys: Shard,
) -> None:
    who = where(group)
    if transport not in TRANSPORTS:
        raise ValueError(f"{who}: transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{who}: scale must be finite, got {scale}")
    if (shard.size, shard.rank) != (group.size, group.rank):
        raise ValueError(f"{who}: the shard was cut for rank {shard.rank} of {shard.size}")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"{who}: q, k and v must be [batch, tokens, heads, dim], got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{who}: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[1] != shard.num_local or not k.shape[1] == v.shape[1] == keys.num_local:
        mine = f"{shard.num_local}" if keys is shard else f"{shard.num_local}, {keys.num_local} and {keys.num_local}"
        raise ValueError(f"{who}: q, k and v must hold my {mine} tokens, got {shapes}")
    if not q.shape[0] == k.shape[0] == v.shape[0] or q.shape[3] != k.shape[3] or k.shape[2] != v.shape[2]:
        raise ValueError(f"{who}: q and k must share their dim, k and v their heads, all their batch, got {shapes}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{who}: query heads must be a multiple of key/value heads, got {shapes}")


def view_of(causal: bool, window: Window, group: Group) -> View:
    """What a query sees; raises ``ValueError`` for a window that makes no sense."""
    who = where(group)
    if not isinstance(window, tuple):
        if window is not None and not (isinstance(window, Integral) and window >= 1):
            raise ValueError(f"{who}: window must be at least 1 token, got {window}")
        return View(causal, window)
    if len(window) != 2 or not all(each is None or (isinstance(each, Integral) and each >= 0) for each in window):
        raise ValueError(f"{who}: a window (left, right) is two numbers of tokens or None, got {window}")
    left, right = window
    if causal and right:
        raise ValueError(f"{who}: the window {window} sees later tokens: pass causal=False, or {(left, 0)}")
    return View(causal, None if left is None else left + 1, None if causal else right)


def _check_options(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, always: Always, shard: Shard, group: Group, impl: str
) -> None:
    try:
        scores.check(q)
        always.check(k, v, shard)
    except ValueError as problem:
        raise ValueError(f"{where(group)}: {problem}") from None
    check_impl(q, v, impl, scores.terms(q[:, :0].detach(), 1.0))


class _Job(NamedTuple):
    """What a call needs to know besides tensors."""

    shard: Shard
    group: Group
    view: View
    scale: float
    transport: str
    impl: str
    scores: Scores
    always: Always
    keys: Shard | None = None
    terms: Terms = PLAIN
    rounded: bool = True  # whether the output is; otherwise it is merged once more
    visitors: GatherPlan | None = None  # the queries are not my own: they came to see my keys

    @property
    def whole(self) -> bool:
        """Whether every query meets all of its keys at once, and nothing is merged."""
        alone = self.group.size == 1 and len(self.shard.runs[0]) <= 1 and self.scores.sinks is None
        return alone and self.rounded and not self.always.seen

    @property
    def how(self) -> dict[str, Any]:
        """How a tile is computed."""
        return {"impl": self.impl, "whole": self.whole}

    @property
    def places(self) -> Planned:
        """The positions of the queries in their documents."""
        return self.shard.planned_positions if self.visitors is None else self.visitors.positions

    def blocks(self) -> Ring | Gather | Both | Resident:
        """How keys and values come by."""
        if self.keys is not None:
            return Cross(self.shard, self.keys, self.group)
        shard, group, view, seen = self.shard, self.group, self.view, self.always.seen
        if self.visitors is not None:
            return Resident(self.visitors.tiles, shard.planned_positions)
        gather = self.transport == "all_gather"
        blocks = Gather(gather_plan(shard, view), group) if gather else Ring(shard, group, view)
        return Both(blocks, Gather(unhidden_plan(shard, view, seen, True), group)) if seen else blocks


def _by_heads(q: Tensor, k: Tensor, v: Tensor, job: _Job, slot: Slot, return_lse: bool) -> Any:
    """Ulysses: every rank gets the whole sequence of some heads, attends on its own, and sends its outputs back."""
    shard, group = job.shard, job.group
    keys = shard if job.keys is None else job.keys
    deal = split_heads(q.shape[2], k.shape[2], group.size)
    q_heads = tokens_to_heads(q, shard, group, deal.queries, slot)
    kv_heads = tokens_to_heads(torch.cat([k, v], -1), keys, group, deal.keys, slot)
    matched = kv_heads[:, :, deal.match(group.rank, kv_heads.device)]
    k_heads, v_heads = matched.split([k.shape[-1], v.shape[-1]], -1)
    mine = job.scores.of_heads(slice(*deal.queries[group.rank]))
    dealt = slice(*deal.keys[group.rank])
    always = job.always.of_heads(lambda x: x[:, dealt][:, deal.match(group.rank, x.device)])
    together = None if job.keys is None else keys.together
    alike = job._replace(
        shard=shard.together, group=alone(), transport="ring", scores=mine, always=always, keys=together
    )
    out, lse = _whole(q_heads, k_heads, v_heads, alike, Slot())
    out = heads_to_tokens(out, shard, group, deal.queries, slot)
    if not return_lse:
        return out
    return out, heads_to_tokens(lse.unsqueeze(-1), shard, group, deal.queries, slot).squeeze(-1)


def _whole(q: Tensor, k: Tensor, v: Tensor, job: _Job, slot: Slot) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp with the rows that no window hides; parts are merged before they are rounded."""
    always = job.always
    if always.keys is None and not always.seeing:
        return _attend(q, k, v, job, slot)
    out, lse = _attend(q, k, v, job._replace(rounded=False), slot)
    rows = torch.arange(q.shape[1], device=q.device)
    learned = None if always.keys is None else _learned(q, job)
    if learned is not None:
        outs, sums = torch.cat([out, learned[0]], 1), torch.cat([lse, learned[1]], 1)
        out, lse = merged(outs, sums, torch.cat([rows, rows]), len(rows))
    if always.seeing:
        mine, *seen = _seeing(q, k, v, learned, job, slot)
        out, lse = (whole.index_copy(1, mine, some) for whole, some in zip((out, lse), seen))
    return out.to(q.dtype), lse


def _learned(q: Tensor, job: _Job) -> tuple[Tensor, Tensor]:
    """My queries over learned rows, which have no place."""
    assert job.always.keys is not None and job.always.values is not None
    keys, values = (x.to(q.dtype).expand(len(q), *x.shape) for x in (job.always.keys, job.always.values))
    tile = Tile((0, q.shape[1]), (0, keys.shape[1]), Band())
    plan = GatherPlan(False, (), (), None, (tile,), job.shard.pieces)
    few = job._replace(scores=Scores(job.scores.softcap), always=Always(), rounded=False, visitors=plan)
    return _attend(q, keys, values, few, Slot())


def _seeing(
    q: Tensor, k: Tensor, v: Tensor, learned: tuple[Tensor, Tensor] | None, job: _Job, slot: Slot
) -> tuple[Tensor, Tensor, Tensor]:
    """My rows that see all of their document, their outputs and log-sum-exps: queries travel, and what they saw."""
    plan = unhidden_plan(job.shard, job.view, job.always.seeing, False)
    assert plan.order is not None
    ways = Ways(plan.sends, plan.receives, job.shard.num_local, plan.order, job.group)
    few = job._replace(scores=replace(job.scores, sinks=None), always=Always(), rounded=False, visitors=plan)
    out, lse = _attend(Go.apply(q, ways, slot), k, v, few, slot)
    back = Return.apply(torch.cat([out, lse.unsqueeze(-1)], -1), ways, slot)
    parts, sums = [back[..., :-1]], [back[..., -1]]
    into = [torch.arange(start, stop, device=q.device) for ranges in plan.sends for start, stop in ranges]
    mine = torch.cat([into[0].new_empty(0) if into else torch.arange(0, device=q.device), *into]).unique()
    row = torch.searchsorted(mine, torch.cat([mine[:0], *into]))
    every = torch.arange(len(mine), device=q.device)
    if learned is not None:
        parts, sums = [*parts, learned[0][:, mine]], [*sums, learned[1][:, mine]]
        row = torch.cat([row, every])
    if job.scores.sinks is not None:
        logits = job.scores.sinks.to(lse.dtype).expand(len(q), len(mine), -1)
        parts, sums = [*parts, torch.zeros_like(parts[0][:, :1]).expand(-1, len(mine), -1, -1)], [*sums, logits]
        row = torch.cat([row, every])
    return mine, *merged(torch.cat(parts, 1), torch.cat(sums, 1), row, len(mine))


def _attend(q: Tensor, k: Tensor, v: Tensor, job: _Job, slot: Slot) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by ring or gathering, differentiable."""
    terms = job.scores.terms(q, job.scale)
    job = job._replace(terms=terms.with_tensors(None, None, None))
    out, lse = _Attention.apply(q, k, v, job.scores.sinks, *terms.tensors, job, slot)
    return out, lse


@first_order("attention")
class _Attention(torch.autograd.Function):
    """Forward merges the visited blocks by online softmax; backward visits them again, and their gradients go home."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, job, slot = inputs
        q, k, v, sinks, *extra = tensors
        out, lse = slot.keep(lambda: _forward(q, k, v, sinks, job.terms.with_tensors(*extra), job))
        ctx.job = job
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, *extra, out, lse = ctx.saved_tensors
        job: _Job = ctx.job
        split = [k.shape[-1], v.shape[-1]]
        d_out = torch.zeros_like(out) if d_out is None else d_out
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        terms, blocks = job.terms.with_tensors(*extra), job.blocks()
        d_terms = terms.zeros(lse.dtype)

        def visit(number: int, block: Tensor) -> Tensor:
            d_block = torch.zeros(block.shape, dtype=lse.dtype, device=block.device)
            of_block = _placed(terms, job, number, q.device)
            for tile in blocks.tiles(number):
                rows, keys = slice(*tile.rows), slice(*tile.keys)
                block_k, block_v = block[:, keys].split(split, -1)
                mine = (d_out[:, rows], q[:, rows], block_k, block_v, out[:, rows], lse[:, rows])
                how = job.how | {"terms": of_block.tile(rows, keys), "into": d_terms.tile(rows, keys)}
                sums = None if d_lse is None else d_lse[:, rows]
                tile_grads = attend_backward(*mine, _mask(tile, q), job.scale, d_lse=sums, **how)
                dq[:, rows] += tile_grads[0]
                d_block[:, keys] += torch.cat(tile_grads[1:], -1)
            return d_block

        dk, dv = blocks.gradients(torch.cat([k, v], -1), visit).split(split, -1)
        d_sinks = None if sinks is None else _sinks_gradient(sinks, d_out, d_lse, out, lse)
        grads = (dq, dk, dv, d_sinks, *d_terms.tensors)
        tensors = (q, k, v, sinks, *extra)
        return *(None if x is None or g is None else g.to(x.dtype) for g, x in zip(grads, tensors)), None, None


def _placed(terms: Terms, job: _Job, number: int, device: torch.device) -> Terms:
    """The terms of my queries and of the keys of a block."""
    if not terms.by_distance:
        return terms
    positions = job.places.on(device), job.blocks().positions(number).on(device)
    return replace(terms, positions=positions)


def _sinks_gradient(sinks: Tensor, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
    """A sink is a key with value 0 that every query sees."""
    delta = (d_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if d_lse is not None:
        delta -= d_lse
    return -((sinks.to(lse.dtype) - lse).exp() * delta).sum((0, 1)).to(sinks.dtype)


def _mask(tile: Tile | Mosaic | Unhidden, like: Tensor) -> Any:
    return tile.band if isinstance(tile, Tile) else tile.mask(like.device)


def _forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, terms: Terms, job: _Job) -> tuple[Tensor, Tensor]:
    """My rows of the output, rounded once, to the dtype of ``q``, if nothing more is merged, and their log-sum-exp."""
    split = [k.shape[-1], v.shape[-1]]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros((*q.shape[:3], v.shape[-1]), dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=dtype, device=q.device)
    blocks = job.blocks()
    for number, block in enumerate(blocks.visits(torch.cat([k, v], -1))):
        of_block = _placed(terms, job, number, q.device)
        for tile in blocks.tiles(number):
            rows, keys = slice(*tile.rows), slice(*tile.keys)
            block_k, block_v = block[:, keys].split(split, -1)
            how = job.how | {"terms": of_block.tile(rows, keys)}
            part = attend(q[:, rows], block_k, block_v, _mask(tile, q), job.scale, **how)
            merge(out, lse, *part, rows)
    if sinks is not None:
        merge(out, lse, out.new_zeros(1).expand_as(out), sinks.to(dtype).expand_as(lse), slice(None))
    return (out.to(q.dtype) if job.rounded else out), lse
