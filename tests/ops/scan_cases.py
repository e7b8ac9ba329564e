"""Runs of the diagonal and the selective scan, what the loops say about them, and how far stages are from that."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.oracles.diagonal import diagonal_scan, selective_scan

KINDS = ("gated", "constant", "complex", "complex constant", "half complex", "selective")
NAMES = {"selective": ("u", "delta", "keys", "queries", "rates")}
GATES = ("d_log_a", "d_delta", "d_rates")


@dataclass(frozen=True)
class Case:
    """Inputs and upstream gradients of one run. ``tokens`` and ``shared`` are those of the op."""

    kind: str
    tokens: tuple[Tensor | None, ...]
    shared: tuple[Tensor, ...]
    starts: tuple[int, ...]
    d_out: Tensor
    incoming: Tensor | None
    d_final: Tensor | None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors that are there, tokens first."""
        given = NAMES.get(self.kind, ("log_a", "x") if self.shared == () else ("x", "log_a"))
        return ("out", "final", "d_incoming", *(f"d_{name}" for name in given))

    @property
    def inputs(self) -> list[Tensor]:
        return [x for x in (*self.tokens, *self.shared) if x is not None]

    def to(self, dtype: torch.dtype) -> "Case":
        """x, u, B, C in ``dtype``, rates, steps and states in fp32 at least (the complex of that width, if complex)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def cast(x: Tensor | None, real: torch.dtype) -> Tensor | None:
            return None if x is None else x.to(real.to_complex() if x.is_complex() else real)

        step = 1 if self.kind == "selective" else 0
        tokens = tuple(cast(x, wide if i == step else dtype) for i, x in enumerate(self.tokens))
        shared = tuple(cast(x, wide) for x in self.shared)
        ends = (cast(self.incoming, wide), cast(self.d_final, wide))
        return Case(self.kind, tokens, shared, self.starts, cast(self.d_out, dtype), *ends)

    def on(self, device: str) -> "Case":
        """The same on another device."""
        moved = [tuple(None if x is None else x.to(device) for x in part) for part in (self.tokens, self.shared)]
        d_out, incoming, d_final = (
            None if x is None else x.to(device) for x in (self.d_out, self.incoming, self.d_final)
        )
        return Case(self.kind, *moved, self.starts, d_out, incoming, d_final)

    def double(self) -> "Case":
        return self.to(torch.float64)


def make(kind, t, starts=(), *, b=2, d=5, n=3, seed=0, strength=0.5):
    """A random case; ``strength`` is about what a token's decay takes away."""
    generator = torch.Generator().manual_seed(seed + t + 1000 * KINDS.index(kind))

    def random(*shape, complex_=False):
        dtype = torch.complex128 if complex_ else torch.float64
        return torch.randn(*shape, generator=generator, dtype=dtype)

    starts = tuple(start for start in starts if start < t)
    if kind == "selective":
        delta = strength * torch.rand(b, t, d, generator=generator, dtype=torch.float64)
        tokens, shared = (random(b, t, d), delta, random(b, t, n), random(b, t, n)), (-random(d, n).exp(),)
        return Case(kind, tokens, shared, starts, random(b, t, d), random(b, 1, d, n), random(b, 1, d, n))
    complex_ = "complex" in kind
    log_a = -strength * random(*((d,) if "constant" in kind else (b, t, d))).square()
    if kind.startswith("complex"):
        log_a = torch.complex(log_a, 3 * random(*log_a.shape))
    x, d_out = (random(b, t, d, complex_=complex_) for _ in range(2))
    tokens, shared = ((None, x), (log_a,)) if log_a.dim() == 1 else ((log_a, x), ())
    ends = (random(b, 1, d, 1, complex_=complex_) for _ in range(2))
    return Case(kind, tokens, shared, starts, d_out, *ends)


def passed(run, transition, inner, boundary):
    """The law of the stages: what comes out of a run, of what comes in."""
    return inner if run.reset or boundary is None else inner + transition.apply(boundary)


@torch.no_grad()
def staged(op, case: Case) -> list[Tensor]:
    """All results of a run; forward and backward each begin anew, as a recurrence over ranks does."""
    run = op.begin(case.tokens, case.shared, case.starts)
    out, final = (
        op.finish(run, op.intra(run), case.incoming),
        passed(run, op.transition(run), run.outgoing, case.incoming),
    )
    run = op.begin(case.tokens, case.shared, case.starts)
    adjoint = op.begin_backward(run, case.d_out, case.incoming)
    d_incoming = passed(run, op.transition(run).adjoint(), adjoint.outgoing, case.d_final)
    d_tokens, d_shared = op.finish_backward(run, adjoint, op.intra_backward(run, adjoint), case.d_final)
    assert (len(d_tokens), len(d_shared)) == (len(case.tokens), len(case.shared))
    grads = [x for x in (*d_tokens, *d_shared) if x is not None]
    assert [x.dtype for x in (out, *grads)] == [x.dtype for x in (case.d_out, *case.inputs)]
    return [out, final, d_incoming, *grads]


def expected(case: Case, reverse=False) -> list[Tensor]:
    """The same from the loops in fp64, differentiated by autograd."""
    case = case.double()
    inputs = [x.clone().requires_grad_() for x in case.inputs]
    like = torch.zeros_like(case.double().d_out[:, :0].sum(1))  # [b, d]
    shape = (len(like), 1, *case.shared[0].shape) if case.kind == "selective" else (*like[:, None].shape, 1)
    incoming = like.new_zeros(shape) if case.incoming is None else case.incoming.clone()
    incoming.requires_grad_()
    order = [x.flip(1) if reverse and x.dim() == 3 else x for x in inputs]
    if case.kind == "selective":
        out, final = selective_scan(*order, starts=case.starts, initial_state=incoming[:, 0])
    else:
        x, log_a = order if case.shared else order[::-1]
        out, final = diagonal_scan(log_a, x, starts=case.starts, initial_state=incoming[:, 0, :, 0])
    final, out = final.reshape(shape), out.flip(1) if reverse else out
    outs, upstream = [out, final], [case.d_out, torch.zeros_like(final) if case.d_final is None else case.d_final]
    kept = [(x, d) for x, d in zip(outs, upstream) if x.requires_grad]
    wanted = [incoming, *inputs]
    grads = torch.autograd.grad(
        [x for x, _ in kept], wanted, [d for _, d in kept], allow_unused=True, materialize_grads=True
    )
    return [out.detach(), final.detach(), *grads]


def errors(case: Case, got: list[Tensor], want: list[Tensor] | None = None) -> dict[str, float]:
    """Norm of the error over norm of what is expected, for each result."""
    found = {}
    for name, x, y in zip(case.names, got, expected(case) if want is None else want, strict=True):
        assert x.shape == y.shape, name
        assert bool(torch.view_as_real(x).isfinite().all() if x.is_complex() else x.isfinite().all()), name
        wide = torch.complex128 if y.is_complex() else torch.float64
        found[name] = float((x.to(wide) - y).norm() / y.norm().clamp(min=1e-6))
    return found


def without_boundary(case: Case) -> Case:
    """Nothing enters, and nothing is asked of what leaves."""
    return replace(case, incoming=None, d_final=None)
