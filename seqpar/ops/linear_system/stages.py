"""A linear time-invariant system as an op in stages: see ``seqpar/ops/stages.py`` for the contract."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from seqpar.collectives.transition import Transition
from seqpar.ops.linear_system import reference
from seqpar.ops.linear_system.matrix import matrix_of
from seqpar.ops.linear_system.pieces import Pieces, pieces_of
from seqpar.ops.stages import Tensors


@dataclass(frozen=True)
class Run:
    """The tokens of one run; ``pieces`` is None if there are none. The rest is computed when it is first asked for, and
    backward asks for little of it."""

    u: Tensor
    system: tuple[Tensor, Tensor, Tensor]
    reset: bool
    pieces: Pieces | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of states."""
        return torch.float64 if self.u.dtype == torch.float64 else torch.float32

    @property
    def no_state(self) -> Tensor:
        return self.u.new_zeros(self.u.shape[0], *self.system[1].shape, self.u.shape[3], dtype=self.dtype)

    @property
    def empty_out(self) -> Tensor:
        return self.u.new_zeros(*self.u.shape[:3], self.system[2].shape[1], self.u.shape[3])

    @cached_property
    def worked(self) -> tuple[list[Tensor], reference.Tables]:
        """The tokens in pieces, each ``[b, pieces, places, h, v]``, and what pieces share."""
        assert self.pieces is not None
        return self.pieces.apart(self.u.to(self.dtype)), reference.tables(*self.system, self.pieces, self.dtype)

    @cached_property
    def entering(self) -> Tensor:
        """The state before each piece, if none enters the run."""
        return self.entered_by(None)

    def entered_by(self, incoming: Tensor | None) -> Tensor:
        """The state ``[b, pieces, h, n, v]`` before each piece."""
        assert self.pieces is not None
        inputs, table = self.worked
        return reference.entering(reference.leaving(inputs[0], table, self.pieces, incoming), self.pieces, incoming)

    @cached_property
    def outgoing(self) -> Tensor:
        """The state ``[b, h, n, v]`` that leaves if none enters."""
        if self.pieces is None:
            return self.no_state
        inputs, table = self.worked
        return reference.final(inputs[0], self.entering, table, self.pieces)


@dataclass(frozen=True)
class Adjoint:
    """The mirror of :class:`Run`. ``outgoing``: the gradient of the incoming state if that of the final one is zero.
    ``leaves``: u, and what is learned of A, B and C, of which ``out`` and ``final`` were computed."""

    outgoing: Tensor
    d_out: Tensor
    leaves: tuple[Tensor, ...] = ()
    out: Tensor | None = None
    final: Tensor | None = None


@dataclass(frozen=True)
class LinearSystem:
    """``h_t = A h_(t-1) + B u_t`` and ``y_t = C h_t``: a matrix that all tokens share, dense or complex diagonal.

    Law: outputs, final state and all gradients are those of the loop over tokens; a document starts from zero. Every
    rank knows what a run of any length does to a state (a power of A, in fp64), so only states travel.
    ``tokens``: ``(u [b, t, h, v],)``, ``v`` inputs that each have a state; ``shared``: ``(A [h, n, n], B [h, n],
    C [h, q, n])``, or A ``[h, n / 2]`` complex, for states of so many real parts and then imaginary ones. Output
    ``[b, t, h, q, v]`` in the dtype of ``u``; states ``[b, h, n, v]`` in fp32, fp64 for fp64.
    Each token costs about ``h v (chunk q + 2 q n + 2 n)`` multiplications in matmuls over chunks of at most 64 tokens.
    Backward computes forward again, and no gradient of a matrix that asks for none. Raises ``ValueError`` for shapes
    and dtypes that do not fit. There are torch matmuls only, whatever ``impl`` says.
    """

    impl: str = "auto"

    def begin(self, tokens: Tensors, shared: Tensors, starts: tuple[int, ...]) -> Run:
        u, a, b, c = (x for x in (*tokens, *shared) if x is not None)
        check(u, a, b, c)
        if list(starts) != sorted(set(starts)) or any(not 0 <= start < u.shape[1] for start in starts):
            raise ValueError(f"starts must ascend within the {u.shape[1]} tokens, got {starts}")
        if not u.shape[1]:
            return Run(u, (a, b, c), False)
        return Run(u, (a, b, c), len(starts) > 0, pieces_of(u.shape[1], starts, u.device))

    def transition(self, run: Run) -> Transition:
        return _power(run.system[0], run.u.shape[1])

    def known(self, shared: Tensors, like: Tensor, tokens: Sequence[int]) -> Sequence[Transition]:
        a = shared[0]
        assert a is not None
        powers = {count: _power(a, count) for count in set(tokens)}
        return [powers[count] for count in tokens]

    def intra(self, run: Run) -> list[Tensor] | None:
        return None if run.pieces is None else reference.within(*run.worked)

    def finish(self, run: Run, partial: list[Tensor] | None, incoming: Tensor | None) -> Tensor:
        if run.pieces is None or partial is None:
            return run.empty_out
        states = run.entering if incoming is None else run.entered_by(incoming)
        return reference.output(partial, states, run.worked[1], run.pieces).to(run.u.dtype)

    def begin_backward(self, run: Run, d_out: Tensor, incoming: Tensor | None) -> Adjoint:
        if run.pieces is None:
            return Adjoint(run.no_state, d_out)
        with torch.enable_grad():
            entering = run.no_state if incoming is None else incoming.detach().clone()
            u = run.u.detach().requires_grad_()
            a, b, c = (x.detach().requires_grad_(x.requires_grad) for x in run.system)
            table = reference.tables(a, b, c, run.pieces, run.dtype)
            out, final = reference.run(u, table, run.pieces, entering.requires_grad_())
        (outgoing,) = torch.autograd.grad(out, entering, d_out, retain_graph=True, materialize_grads=True)
        return Adjoint(outgoing, d_out, (u, *(x for x in (a, b, c) if x.requires_grad)), out, final)

    def intra_backward(self, run: Run, adjoint: Adjoint) -> None:
        """Nothing: the gradients of output and final state go back together."""

    def finish_backward(
        self, run: Run, adjoint: Adjoint, partial: None, d_final: Tensor | None
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        learned = [x.requires_grad for x in run.system]
        if adjoint.out is None or adjoint.final is None:
            zeros = (torch.zeros_like(x) if wanted else None for x, wanted in zip(run.system, learned))
            return (torch.zeros_like(run.u),), tuple(zeros)
        d_final = torch.zeros_like(adjoint.final) if d_final is None else d_final
        d_u, *found = torch.autograd.grad((adjoint.out, adjoint.final), adjoint.leaves, (adjoint.d_out, d_final))
        return (d_u,), tuple(found.pop(0) if wanted else None for wanted in learned)


def _power(a: Tensor, tokens: int) -> Transition:
    """What so many tokens do to a state; in fp64, as it never travels."""
    return Transition(matrix_of(a.detach()).raised(tokens).dense()[None], matrix=True)


def check(u: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
    """Raise ``ValueError`` for shapes and dtypes that do not fit each other."""
    given = (u, a, b, c)
    diagonal = a.is_complex()
    if [x.dim() for x in given] == [4, 2 if diagonal else 3, 2, 3]:
        h, n, q = *b.shape, c.shape[1]
        fits = a.shape == ((h, n / 2) if diagonal else (h, n, n)) and c.shape == (h, q, n) and u.shape[2] == h
        if fits and min(h, n, q) > 0 and not any(x.is_complex() for x in (u, b, c)):
            return
    raise ValueError(
        "expected real u [b, t, h, v], a [h, n, n] (or complex, [h, n / 2]), b [h, n] and c [h, q, n], got "
        f"{', '.join(f'{x.dtype} {list(x.shape)}' for x in given)}"
    )
