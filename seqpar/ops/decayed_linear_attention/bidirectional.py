"""Decayed linear attention in both directions at once, on one device.

``o = o_forward + o_backward``: the scan from the first token to the last, and that from the last to the first, of the
same q, k and v, with gates of their own. A token sees itself in both. The merged scan of ViG (Liao et al. 2024,
arXiv:2405.18425).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seqpar.collectives.first_order import first_order
from seqpar.ops import launch
from seqpar.ops.decayed_linear_attention.gates import Gates, build_gates
from seqpar.ops.decayed_linear_attention.launches import dense, new_states, run_gradients, strides_of
from seqpar.ops.decayed_linear_attention.pairs import pair_gradients, pair_scores
from seqpar.ops.decayed_linear_attention.stages import like_log_decay
from seqpar.ops.decayed_linear_attention.tiles import Tiles, tiles_for

Two = tuple[Gates, Gates]
Tensors = tuple[Tensor, ...]


def bidirectional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay_forward: Tensor | None,
    log_decay_backward: Tensor | None,
    starts: tuple[int, ...] = (),
    scale: float = 1.0,
) -> Tensor:
    """The sum of both directions, [b, t, h, v]; autograd gives the gradients.

    Law: equals the recurrence plus the recurrence over turned tokens, turned back. q, k ``[b, t, h, k]``, v
    ``[b, t, h, v]``; the two log_decay are of one kind, of None, ``[h]``, ``[b, t, h]`` and ``[b, t, h, k]``.
    ``starts``: the first tokens of documents, ascending; nothing passes from one document to another.
    Raises ``ValueError`` if shapes do not fit.
    """
    _check(q, k, v, log_decay_forward, log_decay_backward, starts)
    out: Tensor = _Bidirectional.apply(q, k, v, log_decay_forward, log_decay_backward, starts, scale)
    return out


@first_order("bidirectional")
class _Bidirectional(torch.autograd.Function):
    """Both scans forward; backward both scans of the gradients, each against its own order."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        forth: Tensor | None,
        back: Tensor | None,
        starts: tuple[int, ...],
        scale: float,
    ) -> Tensor:
        q, k, v = dense(q), dense(k), dense(v)
        ctx.starts, ctx.scale = starts, scale
        ctx.save_for_backward(q, k, v, forth, back)
        tiles = tiles_for(q, v, forth is not None and forth.dim() == 4)
        gates = _gates(q, forth, back, starts, tiles)
        states = _both_chains(k, v, gates, tiles, 1.0, backward=False)
        return _both_outputs((q, k, v), _scores(q, k, gates), states, gates, tiles, scale, backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, forth, back = ctx.saved_tensors
        d_o, scale = dense(grads[0].to(q.dtype)), ctx.scale
        tiles = tiles_for(q, v, forth is not None and forth.dim() == 4)
        gates = _gates(q, forth, back, ctx.starts, tiles)
        states = _both_chains(k, v, gates, tiles, 1.0, backward=False)
        d_states = _both_chains(q, d_o, gates, tiles, scale, backward=True)
        dv = _both_outputs((k, q, d_o), _scores(q, k, gates), d_states, gates, tiles, scale, backward=True)
        inputs, before, d_decays = (q, k, v, d_o), None, []
        for number, (one, log_decay) in enumerate(zip(gates, (forth, back))):
            pairs = pair_gradients(inputs, one, tiles, scale) if one.vector else None
            both, dtype = (states[number], d_states[number]), one.dtype if before is None else q.dtype
            dq, dk, d_gates = run_gradients(
                inputs, pairs, both, (None, None), one, tiles, scale, before=before, dtype=dtype
            )
            before = (dq, dk)
            d_decays.append(like_log_decay(d_gates, log_decay))
        return dq, dk, dv, *d_decays, None, None


def _gates(q: Tensor, forth: Tensor | None, back: Tensor | None, starts: tuple[int, ...], tiles: Tiles) -> Two:
    """The gates of both directions, laid out alike; from the last token, documents start where they end."""
    ends = tuple(start - 1 for start in starts if start > 0)
    one = build_gates(q, forth, starts, tiles.chunk, False)
    other = build_gates(q, back, ends, tiles.chunk, True)
    if one.strides() != other.strides():
        one, other = (replace(gates, log_decay=_contiguous(gates.log_decay)) for gates in (one, other))
    return one, other


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _scores(q: Tensor, k: Tensor, gates: Two) -> Tensors | None:
    return tuple(pair_scores(q, k, one) for one in gates) if gates[0].vector else None


def _both_chains(x: Tensor, y: Tensor, gates: Two, tiles: Tiles, scale: float, *, backward: bool) -> Tensors:
    """The states of both directions at the chunks, from k and v, or their gradients, from q and d_o."""
    from seqpar.ops.decayed_linear_attention import kernel_bidirectional

    (b, t, h, dim), dim_v, block, one = x.shape, y.shape[-1], tiles.chain, gates[0]
    states = tuple(new_states(x, y, one) for _ in gates)
    outgoing = [x.new_empty(b, h, dim, dim_v, dtype=one.dtype) for _ in gates]
    programs = b * h * -(-dim // block.k) * -(-dim_v // block.v)
    launch.launch(
        kernel_bidirectional.both_chains_kernel,
        (2 * programs,),
        *(x, y, *_paired(gates), *states, *outgoing, *strides_of(x, y), *one.strides()),
        *(t, one.num_chunks, h, scale, programs, dim, dim_v, one.chunk, block.k, block.v),
        *(*one.flags()[:3], backward, tiles.precision),
        num_warps=max(block.warps, 8),  # two directions in the registers of one
        num_stages=1 if one.vector else min(block.stages, 2),
    )
    return states


def _both_outputs(
    xyz: Tensors, scores: Tensors | None, states: Tensors, gates: Two, tiles: Tiles, scale: float, *, backward: bool
) -> Tensor:
    """o of q, k, v, or dv of k, q, d_o."""
    from seqpar.ops.decayed_linear_attention import kernel_bidirectional

    (b, t, h, dim), dim_v, block, one = xyz[0].shape, xyz[2].shape[-1], tiles.output, gates[0]
    out, unused = xyz[2].new_empty(b, t, h, dim_v), xyz[2].new_empty(0, dtype=one.dtype)
    launch.launch(
        kernel_bidirectional.both_outputs_kernel,
        (b * one.num_chunks * h * -(-dim_v // block.v),),
        *(*xyz, *_paired(gates), *((unused, unused) if scores is None else scores), *states, unused, out),
        *(*strides_of(*xyz), *one.strides(), t, one.num_chunks, h, scale, 1.0 if backward else scale),
        *(dim, dim_v, one.chunk, block.k, block.v, *one.flags()[:3], backward, tiles.precision),
        num_warps=max(block.warps, 8),  # two directions in the registers of one
        num_stages=min(block.stages, 2),
    )
    return out


def _paired(gates: Two) -> Tensors:
    """log_decay, sums and segments, each of one and the other direction."""
    return tuple(x for pair in zip(gates[0].tensors(), gates[1].tensors()) for x in pair)


def _check(q: Tensor, k: Tensor, v: Tensor, forth: Tensor | None, back: Tensor | None, starts: tuple[int, ...]) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"expected q, k [b, t, h, k], v [b, t, h, v], got {[tuple(x.shape) for x in (q, k, v)]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}: cast them first")
    shapes = [None if x is None else tuple(x.shape) for x in (forth, back)]
    if shapes[0] != shapes[1] or shapes[0] not in (None, tuple(q.shape[2:3]), tuple(q.shape[:3]), tuple(q.shape)):
        raise ValueError(f"both log_decay must be None, [h], [b, t, h] or [b, t, h, k] of q, got {shapes}")
    if list(starts) != sorted(set(starts)) or any(not 0 <= start < q.shape[1] for start in starts):
        raise ValueError(f"starts must ascend within the {q.shape[1]} tokens, got {starts}")
