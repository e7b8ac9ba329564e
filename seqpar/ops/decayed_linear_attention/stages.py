"""The stages of decayed linear attention on Triton kernels; laws, names and shapes are those of ``reference.py``.

The scan may run from the last token to the first (``reverse``): the same chunks in the other order, and no copy.
Chunk states are stored in bf16 for bf16 inputs, whose products take them in bf16 anyway, else as the reference's; sums
over states, the outgoing state and what crosses chunks stay in fp32 (fp64 for fp64).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.ops.decayed_linear_attention.gates import Gates, build_gates
from seqpar.ops.decayed_linear_attention.launches import dense, run_chain, run_gradients, run_output
from seqpar.ops.decayed_linear_attention.pairs import pair_gradients, pair_scores
from seqpar.ops.decayed_linear_attention.reference import check_inputs
from seqpar.ops.decayed_linear_attention.tiles import Tiles, fitted, tiles_for


@dataclass(frozen=True)
class Run:
    """The tokens of one run, and what they do to a state that passes through them.

    ``outgoing``, ``log_decay_total``, ``reset``, ``log_decay``: as the reference's. ``states`` [b, h, n, k, v]: what
    enters each chunk if the incoming state is zero; None: not stored.
    """

    outgoing: Tensor
    log_decay_total: Tensor | None
    reset: bool
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    scale: float
    gates: Gates
    tiles: Tiles
    states: Tensor | None


@dataclass(frozen=True)
class Adjoint:
    """The mirror of :class:`Run`: ``states`` [b, h, n, k, v] are gradients of the states that leave each chunk."""

    outgoing: Tensor
    d_o: Tensor
    incoming: Tensor | None
    states: Tensor


@dataclass(frozen=True)
class Pairs:
    """What pairs of tokens inside chunks give, for gates per key channel: scores, and dq and dk without diagonal."""

    scores: Tensor
    dq: Tensor
    dk: Tensor


def begin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    starts: tuple[int, ...] = (),
    *,
    scale: float = 1.0,
    reverse: bool = False,
    summary_only: bool = False,
    tiles: Tiles | None = None,
) -> Run:
    """Sum up what my tokens do to a state that passes through them.

    ``starts``: tokens before which the state is zero, ascending; with ``reverse`` these are the last ones of documents.
    ``summary_only`` stores no states of chunks: :func:`finish` then makes a second pass over k and v.
    Raises ``ValueError`` if shapes, dtypes or starts do not fit, as the reference does.
    """
    check_inputs(q, k, v, log_decay, starts)
    q, k, v = dense(q), dense(k), dense(v)
    if tiles is None:
        tiles = tiles_for(q, v, log_decay is not None and log_decay.dim() == 4)
    tiles = fitted(tiles, q.shape[1], q.shape[-1], v.shape[-1])
    gates = build_gates(q, log_decay, starts, tiles.chunk, reverse)
    states, outgoing, totals = run_chain(k, v, gates, tiles, backward=False, store=not summary_only)
    gates = gates.with_totals(totals)
    return Run(outgoing, gates.total(), len(starts) > 0, q, k, v, log_decay, scale, gates, tiles, states)


def intra(run: Run) -> Tensor | None:
    """Scores [b, h, n, C, C] for gates per key channel, with decay; None for the others: :func:`finish` makes them."""
    return pair_scores(run.q, run.k, run.gates) if run.gates.vector else None


def finish(run: Run, partial: Tensor | None, incoming: Tensor | None) -> Tensor:
    """The output o [b, t, h, v], with the incoming state [b, h, k, v] (None is zero)."""
    states, boundary = _states(run, _boundary(run, incoming))
    qkv = (run.q, run.k, run.v)
    return run_output(qkv, partial, states, boundary, run.gates, run.tiles, backward=False, scale=run.scale)


def begin_backward(run: Run, d_o: Tensor, incoming: Tensor | None) -> Adjoint:
    """Sum up what my tokens do to the gradient of a state that passes back through them."""
    d_o = dense(d_o.to(run.q.dtype))
    states, outgoing, _ = run_chain(run.q, d_o, run.gates, run.tiles, backward=True, scale=run.scale)
    assert states is not None
    outgoing = torch.zeros_like(outgoing) if run.gates.fresh else outgoing
    return Adjoint(outgoing, d_o, _boundary(run, incoming), states)


def intra_backward(run: Run, adjoint: Adjoint) -> Pairs | None:
    """Gradients from pairs of tokens inside chunks, for gates per key channel; None for the others."""
    if not run.gates.vector:
        return None
    dq, dk = pair_gradients((run.q, run.k, run.v, adjoint.d_o), run.gates, run.tiles, run.scale)
    return Pairs(pair_scores(run.q, run.k, run.gates), dq, dk)


def finish_backward(
    run: Run, adjoint: Adjoint, partial: Pairs | None, d_final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and the gradient of log_decay, in the shapes and dtypes of the inputs.

    ``d_final`` [b, h, k, v]: the total gradient of the state after the last token that the scan reads; None is zero.
    """
    gates, tiles, scale = run.gates, run.tiles, run.scale
    d_final = None if d_final is None else d_final.to(gates.dtype).contiguous()
    kqd = (run.k, run.q, adjoint.d_o)
    scores = None if partial is None else partial.scores
    dv = run_output(kqd, scores, adjoint.states, d_final, gates, tiles, backward=True, scale=scale)
    states, incoming = _states(run, adjoint.incoming)
    inputs, pairs = (run.q, run.k, run.v, adjoint.d_o), None if partial is None else (partial.dq, partial.dk)
    both = ((states, adjoint.states), (incoming, d_final))
    dq, dk, d_gates = run_gradients(inputs, pairs, *both, gates, tiles, scale)
    return dq, dk, dv, like_log_decay(d_gates, run.log_decay)


def _boundary(run: Run, incoming: Tensor | None) -> Tensor | None:
    """The incoming state, if anything is seen of it."""
    return None if incoming is None or run.gates.fresh else incoming.to(run.gates.dtype).contiguous()


def _states(run: Run, incoming: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The states that enter the chunks, and the incoming one if it is still to be added to them."""
    if run.states is not None:
        return run.states, incoming
    states, _, _ = run_chain(run.k, run.v, run.gates, run.tiles, backward=False, initial=incoming)
    assert states is not None
    return states, None


def like_log_decay(d_gates: Tensor | None, log_decay: Tensor | None) -> Tensor | None:
    """The gradient of the gates [b, t, h, 1 or k] as that of log_decay of any of the four kinds."""
    if d_gates is None or log_decay is None:
        return None
    d_gates = d_gates.sum((0, 1, 3)) if log_decay.dim() == 1 else d_gates.reshape(log_decay.shape)
    return d_gates.to(log_decay.dtype)
