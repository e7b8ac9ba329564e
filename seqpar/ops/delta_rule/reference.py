"""The (gated) delta rule over the tokens of one run, in chunks, in torch: the meaning of the op.

For each batch and head ``S_t = (I - beta_t k_t k_t') Diag(a_t) S_(t-1) + beta_t k_t v_t'`` with ``a_t =
exp(log_decay_t)``, and ``o_t = scale q_t' S_t``: DeltaNet (Yang et al. 2024, arXiv:2406.06484) without a gate, Gated
DeltaNet (Yang et al. 2024, arXiv:2412.06464) with one per head, Kimi Delta Attention (arXiv:2510.26692) with one per
key channel. The state is zero before the first token of a document.

q, k [b, t, h, k], v [b, t, h, v], beta [b, t, h], log_decay None, [b, t, h] or [b, t, h, k]; state [b, h, k, v].
Everything is computed in fp32, or fp64 for fp64.

Inside a chunk, ``errors = v - k' S`` (each with the state that its token meets) are linear in the state S that enters
the chunk, ``errors = values - erase S``, both from one triangular solve. With ``write`` for beta times the keys as they
reach the end of the chunk, ``A`` for ``Diag(decay of the chunk)``, and ``read`` likewise for the output:

    S'  = A S  + write' (values - erase S)          o  = scale (local + read S)
    dS  = A dS' - erase' (write dS') + scale read' do
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from seqpar.collectives.transition import Transition, exact_matmul
from seqpar.ops.decayed_linear_attention.chunks import Cut, Tile, cut_tokens, load, new_tiles, tokens_of
from seqpar.ops.decayed_linear_attention.decay import per_gate, prefix_sums, suffix_sums, whole_chunk
from seqpar.ops.delta_rule.decays import build_steps, scores, scores_backward


@dataclass(frozen=True)
class Run:
    """The tokens of one run. ``steps``: their decay; ``across`` [b or 1, h or 1, n, 1 or k, 1]: that of each chunk.

    ``erase``, ``write`` [b, h, n, C, k], ``values`` [b, h, n, C, v]: what each chunk does to a state.
    """

    reset: bool
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    starts: tuple[int, ...]
    scale: float
    cut: Cut
    steps: Tensor
    across: Tensor
    erase: Tensor
    write: Tensor
    values: Tensor

    @cached_property
    def states(self) -> Tensor:
        """[b, h, n + 1, k, v]: what enters each chunk and leaves the last, if nothing enters the run."""
        return _chain(self, None)

    @property
    def outgoing(self) -> Tensor:
        """The state that leaves if none enters."""
        return self.states[:, :, -1]


@dataclass(frozen=True)
class Adjoint:
    """The mirror of a run. ``states``: those that enter its chunks; ``sources`` [b, h, n, k, v]: what each chunk's
    output adds to the gradient of the state that enters it; ``d_states``: what enters backward, if d_final is zero."""

    d_out: Tensor
    states: Tensor
    sources: Tensor
    d_states: Tensor

    @property
    def outgoing(self) -> Tensor:
        """The gradient of the incoming state, if that of the final one is zero."""
        return self.d_states[:, :, 0]


@dataclass(frozen=True)
class Gradients:
    """Gradients of some tokens' tensors, [b, h, n, C, dim]."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    gates: Tensor


@dataclass(frozen=True)
class _Chunks:
    """The inputs of a tile in the dtype of the state; ``into`` and ``out``: decay from its first, to its last token."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    steps: Tensor
    into: Tensor
    out: Tensor


def begin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    starts: tuple[int, ...],
    *,
    scale: float = 1.0,
) -> Run:
    """Sum up what each chunk of my tokens does to a state. Raises ``ValueError`` for shapes that do not fit."""
    check(q, k, v, beta, log_decay, starts)
    cut = cut_tokens(q, max(q.shape[-1], v.shape[-1]), starts)
    like = q.new_empty(0, dtype=state_dtype(q))
    steps = build_steps(log_decay, starts, cut, like)
    across = steps.prod(-2).unsqueeze(-1)
    erase, write = (new_tiles(cut, k, k.shape[-1], like.dtype) for _ in range(2))
    values = new_tiles(cut, v, v.shape[-1], like.dtype)
    run = Run(len(starts) > 0, q, k, v, beta, log_decay, starts, scale, cut, steps, across, erase, write, values)
    for tile in cut.tiles:
        x = _load(run, tile)
        right = torch.cat([x.k * x.into, x.v], -1)
        solved = torch.linalg.solve_triangular(_system(x), right, upper=False, unitriangular=True)
        tile.of(erase).copy_(solved[..., : k.shape[-1]])
        tile.of(values).copy_(solved[..., k.shape[-1] :])
        tile.of(write).copy_(x.beta * x.k * x.out)
    return run


def transition(run: Run) -> Transition:
    """The matrix [b, h, k, k] that a state is multiplied with; zero, and not computed, if a document starts here."""
    b, _, h, dim = run.k.shape
    if run.reset:
        return Transition(run.erase.new_zeros(b, h, dim, dim), matrix=True)
    matrix = torch.eye(dim, dtype=torch.float64, device=run.k.device).expand(b, h, dim, dim)
    for n in range(run.cut.num_chunks):
        erased = exact_matmul(run.erase[:, :, n], matrix)
        matrix = run.across[:, :, n] * matrix - exact_matmul(run.write[:, :, n].mT, erased)
    return Transition(matrix.to(run.erase.dtype), matrix=True)


def intra(run: Run) -> tuple[Tensor, Tensor]:
    """``local`` [b, h, n, C, v] and ``read`` [b, h, n, C, k]: the output is ``scale (local + read S)``."""
    local, read = torch.empty_like(run.values), torch.empty_like(run.erase)
    for tile in run.cut.tiles:
        x = _load(run, tile)
        weights = scores(x.q, x.k, x.steps) * x.beta.mT
        torch.matmul(weights, tile.of(run.values), out=tile.of(local))
        tile.of(read).copy_((x.q * x.into).sub_(weights @ tile.of(run.erase)))
    return local, read


def finish(run: Run, partial: tuple[Tensor, Tensor], incoming: Tensor | None) -> Tensor:
    """The output o [b, t, h, v], with the incoming state [b, h, k, v] (None is zero)."""
    local, read = partial
    states = _states(run, incoming)
    out = new_tiles(run.cut, run.v, run.v.shape[-1], run.v.dtype)
    for tile in run.cut.tiles:
        seen = tile.of(read) @ tile.of(states)
        tile.of(out).copy_(seen.add_(tile.of(local)).mul_(run.scale))
    return tokens_of(out, run.cut)


def begin_backward(run: Run, d_out: Tensor, incoming: Tensor | None) -> Adjoint:
    """Sum up what my tokens do to the gradient of a state that passes back through them."""
    _, read = intra(run)
    b, h = run.values.shape[:2]
    sources = run.values.new_empty(b, h, run.cut.num_chunks, run.k.shape[-1], run.v.shape[-1])
    for tile in run.cut.tiles:
        d_o = load(d_out, run.cut, tile).to(read.dtype)
        tile.of(sources).copy_((tile.of(read).mT @ d_o).mul_(run.scale))
    return Adjoint(d_out, _states(run, incoming), sources, _d_states(run, sources, None))


def intra_backward(run: Run, adjoint: Adjoint) -> Gradients:
    """What the output alone gives: all of dq, and the gradient of what is written (v for the while)."""
    dtype, channels = run.erase.dtype, run.steps.shape[-1]
    widths = (run.q.shape[-1], run.k.shape[-1], run.v.shape[-1], 1, channels)
    grads = Gradients(*(new_tiles(run.cut, run.q, width, dtype) for width in widths))
    for tile in run.cut.tiles:
        x, state = _load(run, tile), tile.of(adjoint.states)
        d_o = load(adjoint.d_out, run.cut, tile).to(dtype) * run.scale
        written = x.beta * _errors(run, tile, state)
        dq_in = (d_o @ state.mT).mul_(x.into)
        dq, dk, d_gates = scores_backward(x.q, x.k, x.steps, (d_o @ written.mT).tril_())
        tile.of(grads.v).copy_(scores(x.q, x.k, x.steps).mT @ d_o)
        tile.of(grads.q).copy_(dq.add_(dq_in))
        tile.of(grads.k).copy_(dk)
        tile.of(grads.gates).copy_(d_gates.add_(suffix_sums(per_gate(x.q * dq_in, channels))))
    return grads


def finish_backward(
    run: Run, adjoint: Adjoint, partial: Gradients, d_final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, beta and log_decay, in their shapes and dtypes. Uses ``partial`` up.

    ``d_final`` [b, h, k, v]: the total gradient of the state after my last token; None is zero.
    """
    d_states = adjoint.d_states if d_final is None else _d_states(run, adjoint.sources, d_final)
    for tile in run.cut.tiles:
        part = Gradients(*(tile.of(x) for x in (partial.q, partial.k, partial.v, partial.beta, partial.gates)))
        _add_gradients(run, tile, part, tile.of(adjoint.states), tile.of(d_states[:, :, 1:]))
    grads = (tokens_of(x, run.cut) for x in (partial.q, partial.k, partial.v, partial.beta, partial.gates))
    wanted = (run.q, run.k, run.v, run.beta, run.log_decay)
    dq, dk, dv, d_beta, d_gates = (
        None if like is None else grad.reshape(like.shape).to(like.dtype) for grad, like in zip(grads, wanted)
    )
    assert dq is not None and dk is not None and dv is not None and d_beta is not None
    return dq, dk, dv, d_beta, d_gates


def _add_gradients(run: Run, tile: Tile, grads: Gradients, state: Tensor, d_state: Tensor) -> None:
    """What the states give: ``state`` enters the chunks of a tile, ``d_state`` is the gradient of what leaves them."""
    x, channels = _load(run, tile), run.steps.shape[-1]
    errors = _errors(run, tile, state)
    written = x.beta * errors
    d_written = grads.v + (x.k * x.out) @ d_state
    system = _system(x)
    dv = torch.linalg.solve_triangular(system.mT, x.beta * d_written, upper=True, unitriangular=True)
    dk_in = (dv @ state.mT).mul_(x.into).neg_()
    dk_out = (written @ d_state.mT).mul_(x.out)
    d_pairs = (dv @ errors.mT).tril_(-1).neg_()
    pairs = scores(x.k, x.k, x.steps)
    dk_later, dk_earlier, d_gates = scores_backward(x.k, x.k, x.steps, d_pairs * x.beta.mT)
    d_gates += suffix_sums(per_gate(x.k * dk_in, channels)) + prefix_sums(per_gate(x.k * dk_out, channels))
    d_gates += per_gate((tile.of(run.across) * state * d_state).sum(-1).unsqueeze(-2), channels)
    grads.v.copy_(dv)
    grads.k.add_(dk_in).add_(dk_out).add_(dk_later).add_(dk_earlier)
    grads.beta.copy_((d_written * errors).sum(-1, keepdim=True) + (d_pairs * pairs).sum(-2).unsqueeze(-1))
    grads.gates.add_(d_gates)


def _load(run: Run, tile: Tile) -> _Chunks:
    dtype = run.erase.dtype
    q, k, v, beta = (load(x, run.cut, tile).to(dtype) for x in (run.q, run.k, run.v, run.beta.unsqueeze(-1)))
    steps = tile.of(run.steps)
    return _Chunks(q, k, v, beta, steps, *whole_chunk(steps))


def _system(x: _Chunks) -> Tensor:
    """What the errors of a chunk are solved from; the diagonal counts as ones and all above it as zeros."""
    return scores(x.k, x.k, x.steps) * x.beta.mT


def _errors(run: Run, tile: Tile, state: Tensor) -> Tensor:
    return tile.of(run.values) - tile.of(run.erase) @ state


def _states(run: Run, incoming: Tensor | None) -> Tensor:
    return run.states if incoming is None or run.starts[:1] == (0,) else _chain(run, incoming)


def _chain(run: Run, incoming: Tensor | None) -> Tensor:
    """The states that enter each chunk, and leave the last."""
    states = run.values.new_zeros(*run.values.shape[:2], run.cut.num_chunks + 1, run.k.shape[-1], run.v.shape[-1])
    if incoming is not None:
        states[:, :, 0] = incoming
    for n in range(run.cut.num_chunks):
        state = states[:, :, n]
        errors = run.values[:, :, n] - run.erase[:, :, n] @ state
        states[:, :, n + 1] = run.across[:, :, n] * state + run.write[:, :, n].mT @ errors
    return states


def _d_states(run: Run, sources: Tensor, d_final: Tensor | None) -> Tensor:
    """The gradients of the states that enter each chunk, and leave the last."""
    states = torch.cat([sources, sources.new_zeros(*sources.shape[:2], 1, *sources.shape[3:])], 2)
    if d_final is not None:
        states[:, :, -1] = d_final
    for n in reversed(range(run.cut.num_chunks)):
        d_state = states[:, :, n + 1]
        erased = run.erase[:, :, n].mT @ (run.write[:, :, n] @ d_state)
        states[:, :, n] += run.across[:, :, n] * d_state - erased
    return states


def state_dtype(x: Tensor) -> torch.dtype:
    """Of states, gates and everything inside a chunk."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, starts: tuple[int, ...]) -> None:
    """Raise ``ValueError`` if the tensors of a run do not fit each other."""
    b, t, h, dim = q.shape
    shapes = {name: list(x.shape) for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta))}
    if k.shape != q.shape or v.shape[:3] != q.shape[:3] or beta.shape != q.shape[:3]:
        raise ValueError(f"expected q, k [b, t, h, k], v [b, t, h, v] and beta [b, t, h], got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}: cast them first")
    if log_decay is not None and tuple(log_decay.shape) not in ((b, t, h), (b, t, h, dim)):
        shape = tuple(log_decay.shape)
        raise ValueError(f"log_decay must be None, {(b, t, h)} or {(b, t, h, dim)}, got {shape}")
    if list(starts) != sorted(set(starts)) or any(not 0 <= start < t for start in starts):
        raise ValueError(f"starts must ascend within the {t} tokens, got {starts}")
