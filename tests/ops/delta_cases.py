"""Runs of the delta rule, what the loop says about them, and how far stages are from it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.oracles.delta import delta_rule as oracle

KINDS = ("none", "scalar", "vector")
NAMES = ("o", "final state", "dq", "dk", "dv", "d_beta", "d_log_decay", "d_incoming")
SCALE = 0.7
Results = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Case:
    """Inputs and upstream gradients of one run; ``tokens`` are q, k, v, beta, log_decay."""

    tokens: tuple[Tensor | None, ...]
    starts: tuple[int, ...]
    incoming: Tensor | None
    d_o: Tensor
    d_final: Tensor | None

    def to(self, dtype: torch.dtype) -> "Case":
        """q, k, v, o in ``dtype``; states and gates in fp32 at least."""
        state = torch.float64 if dtype == torch.float64 else torch.float32
        q, k, v, beta, log_decay = self.tokens
        wide = [None if x is None else x.to(state) for x in (beta, log_decay, self.incoming, self.d_final)]
        tokens = (q.to(dtype), k.to(dtype), v.to(dtype), wide[0], wide[1])
        return Case(tokens, self.starts, wide[2], self.d_o.to(dtype), wide[3])

    def on(self, device: str) -> "Case":
        """All tensors there."""
        tokens = tuple(None if x is None else x.to(device) for x in self.tokens)
        incoming, d_o, d_final = (None if x is None else x.to(device) for x in (self.incoming, self.d_o, self.d_final))
        return Case(tokens, self.starts, incoming, d_o, d_final)


def make(kind, t, starts=(), *, with_incoming=True, with_d_final=True, dims=(2, 2, 5, 3), unit=True, strength=0.1):
    """A random case with unit keys and queries, beta in [0, 2] and gates as strong as ``-strength``."""
    b, h, k, v = dims
    generator = torch.Generator().manual_seed(t + 1000 * KINDS.index(kind) + len(starts))

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries, keys = random(b, t, h, k), random(b, t, h, k)
    if unit:
        queries, keys = (x / x.norm(dim=-1, keepdim=True) for x in (queries, keys))
    beta = 2 * torch.rand(b, t, h, generator=generator, dtype=torch.float64)
    shape = {"scalar": (b, t, h), "vector": (b, t, h, k)}.get(kind)
    log_decay = None if shape is None else -strength * torch.rand(*shape, generator=generator, dtype=torch.float64)
    incoming, d_final = random(b, h, k, v), random(b, h, k, v)
    tokens = (queries, keys, random(b, t, h, v), beta, log_decay)
    starts = tuple(start for start in starts if start < t)
    return Case(
        tokens, starts, incoming if with_incoming else None, random(b, t, h, v), d_final if with_d_final else None
    )


def passed(run, transition, inner, boundary):
    """The law of the stages: what comes out of a run, of what comes in."""
    return inner if run.reset or boundary is None else inner + transition.apply(boundary)


@torch.no_grad()
def staged(op, case: Case) -> Results:
    """All results of a run; forward and backward each begin anew, as the scan over ranks does."""
    run = op.begin(case.tokens, (), case.starts)
    o, final = (
        op.finish(run, op.intra(run), case.incoming),
        passed(run, op.transition(run), run.outgoing, case.incoming),
    )
    run = op.begin(case.tokens, (), case.starts)
    adjoint = op.begin_backward(run, case.d_o, case.incoming)
    d_incoming = passed(run, op.transition(run).adjoint(), adjoint.outgoing, case.d_final)
    grads, shared = op.finish_backward(run, adjoint, op.intra_backward(run, adjoint), case.d_final)
    assert len(shared) == 0
    return o, final, *grads, d_incoming


def expected(case: Case) -> Results:
    """The same from the loop in fp64, differentiated by autograd."""
    case = case.to(torch.float64).on("cpu")
    tokens = [None if x is None else x.clone().requires_grad_() for x in case.tokens]
    q, v = case.tokens[0], case.tokens[2]
    incoming = torch.zeros(*q.shape[::2], q.shape[3], v.shape[3], dtype=torch.float64)
    incoming = (incoming if case.incoming is None else case.incoming.clone()).requires_grad_()
    o, final = oracle(*tokens, starts=case.starts, scale=SCALE, initial_state=incoming)
    loss = (o * case.d_o).sum() + (0 if case.d_final is None else (final * case.d_final).sum())
    inputs = (*tokens, incoming)
    wanted = [x for x in inputs if x is not None]
    loss = loss + sum(0 * x.sum() for x in wanted)  # without tokens nothing else needs them
    grads = iter(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    return o.detach(), final.detach(), *(None if x is None else next(grads) for x in inputs)


def faded(case: Case, every: int) -> Case:
    """Each so many tokens forget all that was before."""
    gates = case.tokens[4].clone()
    gates[:, ::every] = -torch.inf
    return replace(case, tokens=(*case.tokens[:4], gates))


def errors(case: Case, got: Results, want: Results | None = None) -> dict[str, float]:
    """Norm of the error over norm of the reference, per result."""
    result = {}
    for name, x, y in zip(NAMES, got, expected(case) if want is None else want, strict=True):
        assert (x is None) == (y is None), name
        if x is not None and y is not None:
            assert x.shape == y.shape, name
            assert bool(x.isfinite().all()), name
            result[name] = float((x.cpu().double() - y).norm() / y.norm().clamp(min=1e-6))
    return result


def check(op, case: Case, tolerance: float, *, forward: float | None = None, want: Results | None = None) -> None:
    """All results of the stages are those of the loop; ``forward``: another tolerance for o and the final state."""
    allowed = dict.fromkeys(NAMES[:2], tolerance if forward is None else forward)
    found = errors(case, staged(op, case), want)
    wrong = {name: error for name, error in found.items() if not error <= allowed.get(name, tolerance)}
    assert not wrong
