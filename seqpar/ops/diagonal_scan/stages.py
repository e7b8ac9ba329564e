"""The diagonal scan and the selective scan as ops in stages: see ``seqpar/ops/stages.py`` for the contract.

Both see their tokens twice. :meth:`begin` asks each chunk what it does to a state that passes through it, and folds the
answers into what leaves each chunk if nothing enters the run: this is a diagonal scan over chunks. :meth:`finish` adds
the share of the incoming state to what enters each chunk, and only then computes outputs: no pass over the tokens
corrects them. Backward is the mirror. What a chunk does is computed in torch (``reference.py``, ``selective.py``) or in
Triton (``kernel.py``, ``kernel_selective.py``), which have the same functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqpar.collectives.transition import Transition
from seqpar.ops import problems
from seqpar.ops.choice import use_kernel
from seqpar.ops.diagonal_scan import reference, selective
from seqpar.ops.diagonal_scan.folding import entering, fold, fold_back, leaving
from seqpar.ops.diagonal_scan.tiles import Cut, chunk_sums, state_dtype, wrapped
from seqpar.ops.selfcheck import worst
from seqpar.ops.stages import Tensors


@dataclass(frozen=True)
class Run:
    """The tokens of one run. ``outgoing`` [b, 1, d, n]: the state that leaves if none enters.

    ``total`` [b or 1, 1, d, 1]: the sum of log_a, or of delta, over the tokens. ``log_totals`` [b or 1, chunks, d n]:
    the logarithm of what each chunk multiplies a state by. ``left`` [b, chunks, d n]: what leaves each chunk if nothing
    enters the run. ``rates``: log_a, or A. ``passes``: the functions that see the tokens, ``work``: what they read;
    ``folds``: those of the scan over chunks.
    """

    outgoing: Tensor
    reset: bool
    total: Tensor
    rates: Tensor
    num_shared: int
    cut: Cut
    log_totals: Tensor
    left: Tensor
    passes: Any
    folds: Any
    work: Any


@dataclass(frozen=True)
class Adjoint:
    """The mirror of :class:`Run`. ``outgoing`` [b, 1, d, n]: the gradient of the incoming state if that of the final
    one is zero. ``entered`` [b, chunks, d n]: the gradient of what enters each chunk, if that of the final one is zero.
    """

    outgoing: Tensor
    d_out: Tensor
    incoming: Tensor | None
    entered: Tensor


@dataclass(frozen=True)
class DiagonalScan:
    """``h_t = exp(log_a_t) h_(t-1) + x_t`` for each channel, real or complex.

    Law: outputs, final state and all gradients are those of the loop over tokens; a document starts from zero.
    ``tokens``: ``(log_a [b, t, d], x [b, t, d])``; or ``(None, x)`` with ``shared`` ``(log_a [d],)``, one decay for all
    tokens (S4D, arXiv 2206.11893; S5, arXiv 2208.04933): then every rank knows every transition. Output ``[b, t, d]``
    in the dtype of ``x``; states ``[b, 1, d, 1]`` in fp32, fp64 for fp64, complex if ``x`` is. The real part of
    ``log_a`` is at most 0, and may be -inf. ``reverse``: from the last token to the first; ``starts`` then count from
    the last. Raises ``ValueError`` for shapes and dtypes that do not fit.
    """

    impl: str = "auto"
    reverse: bool = False

    def begin(self, tokens: Tensors, shared: Tensors, starts: tuple[int, ...]) -> Run:
        log_a, x = _decay_and_x(tokens, shared)
        _check_starts(starts, x.shape[1])
        passes = folds = _diagonal_passes(self.impl, x)
        cut = Cut(x.shape[1], passes.chunk_of(x, x.shape[1]), starts, self.reverse)
        per_token = log_a if log_a.dim() == 3 else log_a.expand(1, x.shape[1], -1)
        dtype = state_dtype(x)
        log_totals = chunk_sums(per_token, cut, dtype.to_real())
        work = passes.prepare(per_token, x, cut)
        left = fold(folds, log_totals, passes.summaries(work), cut.zero_chunks)
        total = wrapped(log_totals.sum(1)).to(dtype if log_a.is_complex() else dtype.to_real())[:, None, :, None]
        outgoing = _last(left)[:, None, :, None]
        return Run(outgoing, len(starts) > 0, total, log_a, len(shared), cut, log_totals, left, passes, folds, work)

    def transition(self, run: Run) -> Transition:
        return Transition(run.total)

    def known(self, shared: Tensors, like: Tensor, tokens: Sequence[int]) -> Sequence[Transition] | None:
        if not shared or shared[0] is None:
            return None
        log_a = shared[0].to(torch.complex128 if shared[0].is_complex() else torch.float64)
        dtype = like.dtype if log_a.is_complex() else like.dtype.to_real()
        totals = [wrapped(log_a * n) if n else torch.zeros_like(log_a) for n in tokens]  # not 0 * -inf
        return [Transition(total.to(dtype).view(1, 1, -1, 1)) for total in totals]

    def intra(self, run: Run) -> None:
        """Nothing: a second look at the tokens is best taken when the incoming state is there."""

    def finish(self, run: Run, partial: None, incoming: Tensor | None) -> Tensor:
        out: Tensor = run.passes.replay(run.work, entering(run.left, run.log_totals, run.cut, incoming))
        return out

    def begin_backward(self, run: Run, d_out: Tensor, incoming: Tensor | None) -> Adjoint:
        d_states = run.passes.summaries_back(run.work, d_out)
        entered = fold_back(run.folds, run.log_totals, d_states, run.cut.zero_chunks)
        return Adjoint(_first(entered)[:, None, :, None], d_out, incoming, entered)

    def intra_backward(self, run: Run, adjoint: Adjoint) -> None:
        """Nothing, as in :meth:`intra`."""

    def finish_backward(
        self, run: Run, adjoint: Adjoint, partial: None, d_final: Tensor | None
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        states = entering(run.left, run.log_totals, run.cut, adjoint.incoming)
        d_states = leaving(adjoint.entered, run.log_totals, run.cut, d_final)
        d_log_a, d_x = run.passes.gradients(run.work, adjoint.d_out, states, d_states)
        log_a = run.rates
        d_log_a = d_log_a if log_a.is_complex() or not d_log_a.is_complex() else d_log_a.real
        if log_a.dim() == 1:
            return (None, d_x), (d_log_a.sum((0, 1)).to(log_a.dtype),)
        return (d_log_a.to(log_a.dtype), d_x), (None,) * run.num_shared


@dataclass(frozen=True)
class SelectiveScan:
    """``h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t``, ``y_t = sum over n of C_t h_t``: the scan of Mamba.

    Law: outputs, final state and all gradients are those of the loop over tokens; a document starts from zero.
    ``tokens``: ``(u, delta, B, C)``, ``u, delta [b, t, d]``, ``delta >= 0`` (after its softplus), ``B, C [b, t, n]``;
    ``shared``: ``(A,)``, ``[d, n]``, at most 0. Output ``[b, t, d]`` in the dtype of ``u``; states ``[b, 1, d, n]`` in
    fp32, fp64 for fp64. The transition travels as the sums of ``delta``, ``d`` numbers for each sequence. The skip
    ``D u`` and the gate are the layer's. ``reverse`` as in :class:`DiagonalScan`. Raises ``ValueError`` for shapes and
    dtypes that do not fit. Gu and Dao, 2023, arXiv:2312.00752.
    """

    impl: str = "auto"
    reverse: bool = False

    def begin(self, tokens: Tensors, shared: Tensors, starts: tuple[int, ...]) -> Run:
        u, delta, keys, queries, rates = _check_selective(tokens, shared)
        _check_starts(starts, u.shape[1])
        passes, folds = _selective_passes(self.impl, u)
        cut = Cut(u.shape[1], passes.chunk_of(rates, u.shape[1]), starts, self.reverse)
        sums = chunk_sums(delta, cut, state_dtype(u))
        log_totals = (sums[..., None] * rates.to(sums.dtype)).flatten(2)
        work = passes.prepare(u, delta, keys, queries, rates, cut)
        left = fold(folds, log_totals, passes.summaries(work).flatten(2), cut.zero_chunks)
        total = sums.sum(1)[:, None, :, None]
        outgoing = _last(left).view(u.shape[0], 1, *rates.shape)
        return Run(outgoing, len(starts) > 0, total, rates, len(shared), cut, log_totals, left, passes, folds, work)

    def transition(self, run: Run) -> Transition:
        return Transition(run.total, run.rates.to(run.total.dtype)[None, None])

    def known(self, shared: Tensors, like: Tensor, tokens: Sequence[int]) -> None:
        """Nothing: the steps depend on the tokens."""

    def intra(self, run: Run) -> None:
        """Nothing, as in :meth:`DiagonalScan.intra`."""

    def finish(self, run: Run, partial: None, incoming: Tensor | None) -> Tensor:
        states = entering(run.left, run.log_totals, run.cut, incoming)
        out: Tensor = run.passes.replay(run.work, _unflatten(states, run))
        return out

    def begin_backward(self, run: Run, d_out: Tensor, incoming: Tensor | None) -> Adjoint:
        d_states = run.passes.summaries_back(run.work, d_out).flatten(2)
        entered = fold_back(run.folds, run.log_totals, d_states, run.cut.zero_chunks)
        return Adjoint(_first(entered).view(run.outgoing.shape), d_out, incoming, entered)

    def intra_backward(self, run: Run, adjoint: Adjoint) -> None:
        """Nothing, as in :meth:`intra`."""

    def finish_backward(
        self, run: Run, adjoint: Adjoint, partial: None, d_final: Tensor | None
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        states = _unflatten(entering(run.left, run.log_totals, run.cut, adjoint.incoming), run)
        d_states = _unflatten(leaving(adjoint.entered, run.log_totals, run.cut, d_final), run)
        *d_tokens, d_rates = run.passes.gradients(run.work, adjoint.d_out, states, d_states)
        return d_tokens, (d_rates.to(run.rates.dtype),)


def _last(left: Tensor) -> Tensor:
    return left[:, -1] if left.shape[1] else left.new_zeros(left.shape[0], left.shape[2])


def _first(entered: Tensor) -> Tensor:
    return entered[:, 0] if entered.shape[1] else entered.new_zeros(entered.shape[0], entered.shape[2])


def _unflatten(states: Tensor, run: Run) -> Tensor:
    return states.unflatten(2, run.outgoing.shape[2:])


def _diagonal_passes(impl: str, x: Tensor) -> Any:
    if not use_kernel(impl, x.real, check=check):
        return reference
    from seqpar.ops.diagonal_scan import kernel

    return kernel


def _selective_passes(impl: str, u: Tensor) -> tuple[Any, Any]:
    if not use_kernel(impl, u, check=check):
        return selective, reference
    from seqpar.ops.diagonal_scan import kernel, kernel_selective

    return kernel_selective, kernel


def _decay_and_x(tokens: Tensors, shared: Tensors) -> tuple[Tensor, Tensor]:
    log_a, x = tokens
    if (log_a is None) == (not shared or shared[0] is None):
        raise ValueError("log_a must be given once: for each token, or shared by all")
    log_a = shared[0] if log_a is None else log_a
    assert log_a is not None
    if x is None or x.dim() != 3 or tuple(log_a.shape) not in (tuple(x.shape), tuple(x.shape[2:])):
        shapes = f"log_a {list(log_a.shape)}, x {None if x is None else list(x.shape)}"
        raise ValueError(f"x must be [b, t, d] and log_a [b, t, d] (or shared [d]), got {shapes}")
    if log_a.is_complex() and not x.is_complex():
        raise ValueError(f"a complex log_a needs a complex x, got {x.dtype}: cast x first")
    return log_a, x


def check(device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of the kernels of both scans."""
    return worst(problems.scans(DiagonalScan, SelectiveScan, 70), device, dtype)


def _check_selective(tokens: Tensors, shared: Tensors) -> list[Tensor]:
    given = [x for x in (*tokens, *shared) if x is not None]
    shapes = [tuple(x.shape) for x in given]
    if len(given) == 5 and given[0].dim() == 3 and given[4].dim() == 2:
        (b, t, d), (_, n) = shapes[0], shapes[4]
        if shapes == [(b, t, d), (b, t, d), (b, t, n), (b, t, n), (d, n)] and not any(x.is_complex() for x in given):
            return given
    raise ValueError(f"expected real u, delta [b, t, d], B, C [b, t, n] and a shared A [d, n], got {shapes}")


def _check_starts(starts: tuple[int, ...], tokens: int) -> None:
    if list(starts) != sorted(set(starts)) or any(not 0 <= start < tokens for start in starts):
        raise ValueError(f"starts must ascend within the {tokens} tokens, got {starts}")
