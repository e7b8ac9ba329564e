"""The stages of the delta rule on Triton kernels; laws, names and shapes are those of ``reference.py``.

bf16 inputs are multiplied in bf16, and what lies between kernels is bf16 then: the states that enter chunks, what
chunks do to them, and the errors of tokens. All else is fp32: sums, states on their way, what crosses runs, gates,
solves.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from seqpar.collectives.transition import Transition
from seqpar.ops import launch
from seqpar.ops.delta_rule.chunks import Gates, build_gates
from seqpar.ops.delta_rule.reference import check
from seqpar.ops.delta_rule.tiles import Tiles, fitted, tiles_for, whole


@dataclass(frozen=True)
class States:
    """``states`` [b, h, n, k, v] enter the chunks, ``errors`` [b, h, n, C, v] of tokens; fp32 ``final`` leaves."""

    states: Tensor
    errors: Tensor
    final: Tensor


@dataclass(frozen=True)
class Run:
    """The tokens of one run. ``erase`` [b, h, n, C, k], ``values`` [b, h, n, C, v]: as the reference's; ``weights``
    [b, h, n, C, C]: scores of queries and keys, times beta; ``inverse`` (same shape): solves for a chunk's errors."""

    reset: bool
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    starts: tuple[int, ...]
    scale: float
    gates: Gates
    tiles: Tiles
    weights: Tensor
    inverse: Tensor
    erase: Tensor
    values: Tensor

    @property
    def outgoing(self) -> Tensor:
        """The state that leaves if none enters."""
        return self.from_zero.final

    @cached_property
    def from_zero(self) -> States:
        """The states if none enters."""
        return _chain(self, None)

    @cached_property
    def transition(self) -> Tensor:
        """[b, h, k, k] in fp32; computed when it is asked for."""
        return _transition(self)


@dataclass(frozen=True)
class DStates:
    """``d_states`` [b, h, n, k, v]: gradients of the states that leave the chunks, ``d_errors`` [b, h, n, C, v] of
    their tokens' errors; fp32 ``initial`` of the state that enters the run."""

    d_states: Tensor
    d_errors: Tensor
    initial: Tensor


@dataclass(frozen=True)
class Adjoint:
    """The mirror of a run, with the ``states`` of forward."""

    run: Run
    d_out: Tensor
    states: States

    @property
    def outgoing(self) -> Tensor:
        """The gradient of the incoming state, if that of the final one is zero."""
        return self.from_zero.initial

    @cached_property
    def from_zero(self) -> DStates:
        """The gradients of states if that of the final one is zero."""
        return _chain_back(self.run, self.d_out, None)


def begin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    starts: tuple[int, ...],
    *,
    scale: float = 1.0,
    tiles: Tiles | None = None,
) -> Run:
    """Sum up what each chunk of my tokens does to a state."""
    check(q, k, v, beta, log_decay, starts)
    vector = log_decay is not None and log_decay.dim() == 4
    tiles = tiles_for(q, v, vector) if tiles is None else fitted(tiles, q.shape[1], q.shape[-1], v.shape[-1], vector)
    q, k, v, beta = (x.contiguous() for x in (q, k, v, beta))
    gates = build_gates(q, log_decay, starts, tiles.chunk)
    b, h, n, c = (q.shape[0], q.shape[2], -(-q.shape[1] // tiles.chunk), tiles.chunk)
    work = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    weights, inverse, erase = (q.new_empty(b, h, n, c, width, dtype=work) for width in (c, c, k.shape[-1]))
    values = q.new_empty(b, h, n, c, v.shape[-1], dtype=torch.float32)
    run = Run(len(starts) > 0, q, k, v, beta, log_decay, starts, scale, gates, tiles, weights, inverse, erase, values)
    _solve(run)
    return run


def transition(run: Run) -> Transition:
    """What a state is multiplied with; zero, and not computed, if a document starts here."""
    if run.reset:
        b, _, h, dim = run.k.shape
        return Transition(run.k.new_zeros(b, h, dim, dim, dtype=torch.float32), matrix=True)
    return Transition(run.transition, matrix=True)


def intra(run: Run) -> None:
    """The scores are there already, and each output is made at once."""


def finish(run: Run, partial: None, incoming: Tensor | None) -> Tensor:
    """The output o [b, t, h, v], with the incoming state [b, h, k, v] (None is zero)."""
    from seqpar.ops.delta_rule import kernel

    states, o = _states(run, incoming), torch.empty_like(run.v)
    (t, h, dim_k, dim_v), block = _sizes(run), run.tiles.output
    launch.launch(
        kernel.output_kernel, (*_chunk_grid(run), -(-dim_v // block.v)),
        run.q, run.gates.into, run.weights, states.errors, states.states, o, run.scale, t, h, dim_k, dim_v,
        C=run.tiles.chunk, BK=block.k, BV=block.v, VECTOR=_is_vector(run), PRECISION=run.tiles.precision,
        **run.tiles.options(block),
    )  # fmt: skip
    return o


def begin_backward(run: Run, d_out: Tensor, incoming: Tensor | None) -> Adjoint:
    """Sum up what my tokens do to the gradient of a state that passes back through them."""
    return Adjoint(run, d_out.contiguous(), _states(run, incoming))


def intra_backward(run: Run, adjoint: Adjoint) -> None:
    """All gradients are made at once, when that of the final state is there."""


def finish_backward(
    run: Run, adjoint: Adjoint, partial: None, d_final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, beta and log_decay, in their shapes and dtypes; ``d_final`` None is zero."""
    from seqpar.ops.delta_rule import kernel_backward, kernel_vector

    back = adjoint.from_zero if d_final is None else _chain_back(run, adjoint.d_out, d_final)
    dq, dk, dv = (torch.empty_like(x) for x in (run.q, run.k, run.v))
    (t, h, dim_k, dim_v), block, gates = _sizes(run), run.tiles.gradient, run.gates
    blocks, vector = -(-dim_k // block.k), _is_vector(run)
    d_beta = gates.into.new_empty(blocks, *gates.into.shape[:4])
    d_gates = torch.empty_like(run.k, dtype=torch.float32) if vector else torch.empty_like(d_beta)
    launch.launch(
        kernel_vector.vector_gradients_kernel if vector else kernel_backward.gradients_kernel,
        (*_chunk_grid(run), blocks),
        run.q, run.k, run.beta, _steps(run), gates.into, gates.out, gates.across,
        run.inverse, adjoint.states.errors, adjoint.states.states, adjoint.d_out, back.d_states, back.d_errors,
        dq, dk, dv, d_beta, d_gates, run.scale, t, h, dim_k, dim_v,
        C=run.tiles.chunk, BK=block.k, BV=block.v, PRECISION=run.tiles.precision,
        **({"LEVELS": _levels(run)} if vector else {"GATED": gates.steps is not None}), **run.tiles.options(block),
    )  # fmt: skip
    return dq, dk, dv, _tokens_of(d_beta, run.beta), _like_log_decay(run, d_gates)


def _solve(run: Run) -> None:
    from seqpar.ops.delta_rule import kernel

    block = run.tiles.solve
    launch.launch(
        kernel.chunk_kernel, _chunk_grid(run),
        run.q, run.k, run.v, run.beta, _steps(run), run.gates.into, run.weights, run.inverse, run.erase, run.values,
        *_sizes(run),
        C=run.tiles.chunk, BK=block.k, BV=block.v, GATED=run.gates.steps is not None, VECTOR=_is_vector(run),
        LEVELS=_levels(run), PRECISION=run.tiles.precision, **run.tiles.options(block),
    )  # fmt: skip


def _states(run: Run, incoming: Tensor | None) -> States:
    return run.from_zero if incoming is None or run.starts[:1] == (0,) else _chain(run, incoming)


def _chain(run: Run, incoming: Tensor | None) -> States:
    from seqpar.ops.delta_rule import kernel

    (t, h, dim_k, dim_v), gates = _sizes(run), run.gates
    b, _, n = run.values.shape[:3]
    states, errors = run.erase.new_empty(b, h, n, dim_k, dim_v), torch.empty_like(run.values, dtype=run.erase.dtype)
    final = gates.into.new_empty(b, h, dim_k, dim_v)
    launch.launch(
        kernel.states_kernel, (b * h, -(-dim_v // run.tiles.chain.v)),
        run.k, run.beta, gates.out, gates.across, run.erase, run.values, _boundary(incoming, final), states, errors,
        final, n, t, h, dim_k, dim_v,
        **_chain_constants(run), ENTERS=incoming is not None, BV=run.tiles.chain.v,
        **run.tiles.options(run.tiles.chain),
    )  # fmt: skip
    return States(states, errors, final)


def _chain_back(run: Run, d_out: Tensor, d_final: Tensor | None) -> DStates:
    from seqpar.ops.delta_rule import kernel_backward

    (t, h, dim_k, dim_v), gates = _sizes(run), run.gates
    b, _, n = run.values.shape[:3]
    d_states, d_errors = run.erase.new_empty(b, h, n, dim_k, dim_v), torch.empty_like(run.values, dtype=run.erase.dtype)
    initial = gates.into.new_empty(b, h, dim_k, dim_v)
    launch.launch(
        kernel_backward.d_states_kernel, (b * h, -(-dim_v // run.tiles.chain.v)),
        run.q, run.k, run.beta, gates.into, gates.out, gates.across, run.erase, run.weights, d_out,
        _boundary(d_final, initial), d_states, d_errors, initial, run.scale, n, t, h, dim_k, dim_v,
        **_chain_constants(run), ENTERS=d_final is not None, BV=run.tiles.chain.v,
        **run.tiles.options(run.tiles.chain),
    )  # fmt: skip
    return DStates(d_states, d_errors, initial)


def _transition(run: Run) -> Tensor:
    from seqpar.ops.delta_rule import kernel

    t, h, dim_k, _ = _sizes(run)
    b, _, n = run.values.shape[:3]
    matrix = run.gates.into.new_empty(b, h, dim_k, dim_k)
    block = run.tiles.transition
    launch.launch(
        kernel.transition_kernel, (b * h, -(-dim_k // block.v)),
        run.k, run.beta, run.gates.out, run.gates.across, run.erase, matrix, n, t, h, dim_k,
        **_chain_constants(run), BV=block.v, **run.tiles.options(block),
    )  # fmt: skip
    return matrix


def _chain_constants(run: Run) -> dict[str, Any]:
    dim_k = whole(run.k.shape[-1])
    return {"C": run.tiles.chunk, "BK": dim_k, "VECTOR": _is_vector(run), "PRECISION": run.tiles.precision}


def _chunk_grid(run: Run) -> tuple[int, int]:
    b, h, n = run.values.shape[:3]
    return n, b * h


def _sizes(run: Run) -> tuple[int, int, int, int]:
    """Tokens, heads, key and value dim."""
    return run.q.shape[1], run.q.shape[2], run.q.shape[3], run.v.shape[3]


def _boundary(state: Tensor | None, like: Tensor) -> Tensor:
    return like if state is None else state.to(like.dtype).contiguous()


def _levels(run: Run) -> int:
    """How often blocks of tokens double in size until they fill a chunk."""
    return run.tiles.chunk.bit_length() - 1


def _steps(run: Run) -> Tensor:
    """What is loaded as the gates; anything where there are none."""
    return run.gates.into if run.gates.steps is None else run.gates.steps


def _is_vector(run: Run) -> bool:
    return run.log_decay is not None and run.log_decay.dim() == 4


def _like_log_decay(run: Run, d_gates: Tensor) -> Tensor | None:
    if run.log_decay is None:
        return None
    return d_gates.to(run.log_decay.dtype) if _is_vector(run) else _tokens_of(d_gates, run.log_decay)


def _tokens_of(parts: Tensor, like: Tensor) -> Tensor:
    """Sum [blocks, b, h, n, C] over blocks, in the order, shape and dtype of a tensor [b, t, h]."""
    return parts.sum(0).flatten(2)[:, :, : like.shape[1]].transpose(1, 2).to(like.dtype)
