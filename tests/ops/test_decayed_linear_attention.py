"""Decayed linear attention in stages equals the token-by-token loop: outputs, states and every gradient."""

from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqpar.ops.decayed_linear_attention.decay import suffix_sums
from seqpar.ops.decayed_linear_attention.reference import (
    Adjoint,
    Run,
    begin,
    begin_backward,
    finish,
    finish_backward,
    intra,
    intra_backward,
)
from tests.oracles.recurrence import decayed_linear_attention as oracle

KINDS = ("none", "constant", "scalar", "vector")
TOKENS = (0, 1, 15, 16, 17, 63, 64, 65, 100, 200)
STARTS = {
    "continue": (),
    "fresh": (0,),
    "middle": (37,),
    "tiny": tuple(range(2, 200, 3)),
    "in one chunk": (0, 70, 71, 90),
    "at the edges": (16, 64, 128),
    "last token": (199,),
}
NAMES = ("o", "final state", "dq", "dk", "dv", "d_log_decay", "d_incoming")
SCALE = 0.7
Results = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Case:
    """Inputs and upstream gradients of one run."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    starts: tuple[int, ...]
    incoming: Tensor | None
    d_o: Tensor
    d_final: Tensor | None

    def to(self, dtype: torch.dtype) -> "Case":
        """Tokens in ``dtype``; states and gates in fp32 at least."""
        state = torch.float64 if dtype == torch.float64 else torch.float32
        wide = [None if x is None else x.to(state) for x in (self.log_decay, self.incoming, self.d_final)]
        q, k, v, d_o = (x.to(dtype) for x in (self.q, self.k, self.v, self.d_o))
        return Case(q, k, v, wide[0], self.starts, wide[1], d_o, wide[2])


def make(
    kind: str,
    t: int,
    starts: tuple[int, ...] = (),
    *,
    with_incoming: bool = True,
    with_d_final: bool = True,
    dims: tuple[int, int, int, int] = (2, 2, 5, 3),
) -> Case:
    """A random case whose gates are mild: at least half of an incoming state survives all tokens."""
    b, h, k, v = dims
    generator = torch.Generator().manual_seed(t + 1000 * KINDS.index(kind) + len(starts))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = {"constant": (h,), "scalar": (b, t, h), "vector": (b, t, h, k)}.get(kind)
    log_decay = None if shape is None else -torch.rand(*shape, generator=generator, dtype=torch.float64) * 0.69 / 200
    return Case(
        random(b, t, h, k), random(b, t, h, k), random(b, t, h, v), log_decay,
        tuple(start for start in starts if start < t),
        3 * random(b, h, k, v) if with_incoming else None,
        random(b, t, h, v),
        random(b, h, k, v) if with_d_final else None,
    )  # fmt: skip


def passed(run: Run, inner: Tensor, boundary: Tensor | None) -> Tensor:
    """The law of the module: what comes out of a run, of what comes in."""
    if run.reset or boundary is None:
        return inner
    return inner + boundary * (1.0 if run.log_decay_total is None else run.log_decay_total.exp())


def forward(case: Case) -> tuple[Tensor, Tensor]:
    run = begin(case.q, case.k, case.v, case.log_decay, case.starts, scale=SCALE)
    return finish(run, intra(run), case.incoming), passed(run, run.outgoing, case.incoming)


def backward(case: Case) -> Results:
    run = begin(case.q, case.k, case.v, case.log_decay, case.starts, scale=SCALE)
    adjoint = begin_backward(run, case.d_o, case.incoming)
    grads = finish_backward(run, adjoint, intra_backward(run, adjoint), case.d_final)
    return (*grads, passed(run, adjoint.outgoing, case.d_final))


@torch.no_grad()
def staged(case: Case) -> Results:
    return (*forward(case), *backward(case))


def expected(case: Case) -> Results:
    """The same from the loop in fp64, differentiated by autograd."""
    case = case.to(torch.float64)
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    log_decay = None if case.log_decay is None else case.log_decay.clone().requires_grad_()
    incoming = torch.zeros(*case.q.shape[::2], case.q.shape[3], case.v.shape[3], dtype=torch.float64)
    incoming = (incoming if case.incoming is None else case.incoming.clone()).requires_grad_()
    edges = sorted({0, *case.starts, case.q.shape[1]})
    lengths = [end - begin for begin, end in pairwise(edges)]
    fresh = case.starts[:1] == (0,)
    o, final = oracle(q, k, v, log_decay, lengths=lengths, continues=not fresh, scale=SCALE, initial_state=incoming)
    loss = (o * case.d_o).sum() + (0 if case.d_final is None else (final * case.d_final).sum())
    inputs = (q, k, v, log_decay, incoming)
    wanted = [x for x in inputs if x is not None]
    loss = loss + sum(0 * x.sum() for x in wanted)  # without tokens nothing else needs them
    grads = iter(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    return (o, final, *(None if x is None else next(grads) for x in inputs))


def errors(case: Case, got: Results, want: Results | None = None, *, cancels: bool = False) -> dict[str, float]:
    """Norm of the error over norm of the reference, per result.

    The gates' gradient is a sum of differences of terms as large as q * dq. Where it ``cancels`` (one token, or nothing
    left of the state) it is compared with those.
    """
    want = expected(case) if want is None else want
    result = {}
    for name, x, y in zip(NAMES, got, want):
        assert (x is None) == (y is None), name
        if x is None or y is None:
            continue
        assert x.shape == y.shape, name
        size = y.norm()
        if name == "d_log_decay" and (cancels or case.q.shape[1] == 1):
            assert want[2] is not None
            size = torch.maximum(size, (case.q * want[2]).norm())
        error = (x.double() - y).norm()
        result[name] = 0.0 if error == 0 else (error / size).item()
    return result


def assert_close(
    case: Case, got: Results, outputs: float, gradients: float, want: Results | None = None, *, cancels: bool = False
) -> None:
    for name, error in errors(case, got, want, cancels=cancels).items():
        assert error <= (outputs if name in NAMES[:2] else gradients), (name, error)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS.keys())
@pytest.mark.parametrize("t", TOKENS)
def test_equals_the_loop(kind: str, t: int, starts: tuple[int, ...]) -> None:
    boundaries = list(product((True, False), repeat=2))
    for i in range(4) if t in (17, 100) else [(t + len(starts)) % 4]:
        case = make(kind, t, starts, with_incoming=boundaries[i][0], with_d_final=boundaries[i][1])
        assert_close(case, staged(case), 1e-12, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [(1, 1, 1, 1), (1, 3, 3, 7), (3, 1, 16, 8), (2, 4, 64, 64), (2, 1, 100, 60)], ids=str)
def test_equals_the_loop_for_all_dims(kind: str, dims: tuple[int, int, int, int]) -> None:
    case = make(kind, 130, (60, 64), dims=dims)
    assert_close(case, staged(case), 1e-12, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_many_tiles(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the work is cut into tiles, it is the same work."""
    case = make(kind, 200, (130,))
    want = expected(case)
    for bytes_ in (1, 1 << 16, 1 << 17, 1 << 18, 1 << 30):
        monkeypatch.setattr("seqpar.ops.decayed_linear_attention.chunks.TILE_BYTES_CPU", bytes_)
        assert_close(case, staged(case), 1e-12, 1e-10, want)


def test_mild_gates_let_the_incoming_state_through() -> None:
    """The cases above would notice if it were lost."""
    for kind in KINDS[1:]:
        case = make(kind, 200)
        run = begin(case.q, case.k, case.v, case.log_decay, ())
        assert run.log_decay_total is not None and run.log_decay_total.exp().min() > 0.5


def cut(case: Case, begin: int, end: int) -> Case:
    """The tokens ``begin`` to ``end - 1`` as a run of their own."""
    gates = case.log_decay if case.log_decay is None or case.log_decay.dim() == 1 else case.log_decay[:, begin:end]
    q, k, v, d_o = (x[:, begin:end] for x in (case.q, case.k, case.v, case.d_o))
    starts = tuple(start - begin for start in case.starts if begin <= start < end)
    return Case(q, k, v, gates, starts, case.incoming, d_o, case.d_final)


@torch.no_grad()
def chained(case: Case, at: int) -> Results:
    """What two runs give, cut before token ``at``, with states and gradients carried by hand."""
    left, right = cut(case, 0, at), cut(case, at, case.q.shape[1])
    o_left, between = forward(left)
    right = replace(right, incoming=between)
    o_right, final = forward(right)
    *grads_right, d_between = backward(right)
    *grads_left, d_incoming = backward(replace(left, d_final=d_between))
    grads = [join(a, b) for a, b in zip(grads_left[:4], grads_right[:4])]
    return torch.cat([o_left, o_right], 1), final, *grads, d_incoming


def join(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """The gradient of an input of which both runs had a part, or, without a token axis, the whole."""
    if left is None or right is None:
        return None
    return left + right if left.dim() == 1 else torch.cat([left, right], 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("starts", [(), (0,), (90,), (10, 64, 65, 120)], ids=str)
def test_two_runs_are_one(kind: str, starts: tuple[int, ...]) -> None:
    case = make(kind, 150, starts)
    want = expected(case)
    for at in (0, 1, 16, 64, 65, 90, 149, 150):
        assert_close(case, chained(case, at), 1e-12, 1e-10, want)


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision(kind: str) -> None:
    case = make(kind, 200, (50,), dims=(1, 2, 32, 32)).to(torch.float32)
    assert_close(case, staged(case), 1e-6, 1e-5)


def extreme_gates(kind: str, like: Tensor) -> dict[str, Tensor]:
    """Gates of -20 per token, of exactly 0, and a mixture with mild ones."""
    pick = torch.randint(0, 4, like.shape, generator=torch.Generator().manual_seed(0))
    mixture = torch.tensor([-20.0, 0.0, -0.01, -1.0])[pick]
    return {"strong": torch.full_like(like, -20.0), "zero": torch.zeros_like(like), "mixture": mixture.to(like.dtype)}


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("which", ["strong", "zero", "mixture"])
def test_extreme_gates(kind: str, which: str) -> None:
    case = make(kind, 150, (100,), dims=(1, 2, 16, 16))
    assert case.log_decay is not None
    for dtype, outputs, gradients in ((torch.float64, 1e-12, 1e-10), (torch.float32, 1e-6, 3e-5)):
        extreme = replace(case, log_decay=extreme_gates(kind, case.log_decay)[which]).to(dtype)
        got = staged(extreme)
        assert all(x is None or x.isfinite().all() for x in got)
        assert_close(extreme, got, outputs, gradients, cancels=which == "strong")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """One rounding of a result is 0.0017 (bf16) or 0.0002 (fp16) in norm: the errors are a few of them."""
    case = make(kind, 200, (50,), dims=(1, 2, 32, 32)).to(dtype)
    got = staged(case)
    assert all(x is None or x.dtype == dtype for x in (got[0], *got[2:5]))
    assert all(x is None or x.dtype == torch.float32 for x in (got[1], *got[5:]))
    unit = 0.0017 if dtype == torch.bfloat16 else 0.0017 / 8
    for name, error in errors(case, got).items():
        assert error <= {"final state": 1.6, "d_incoming": 1.6, "d_log_decay": 6.0}.get(name, 2.5) * unit, (
            name,
            error / unit,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_see_each_other(kind: str) -> None:
    """Other tokens and another state before a start change no bit behind it, and the other way round for gradients."""
    case = make(kind, 150, (70,))
    other = make(kind, 150, (70, 140))
    pairs = zip((other.q, other.k, other.v, other.d_o), (case.q, case.k, case.v, case.d_o))
    q, k, v, d_o = (torch.cat([a[:, :70], b[:, 70:]], 1) for a, b in pairs)
    got, changed = staged(case), staged(replace(case, q=q, k=k, v=v, d_o=d_o, incoming=other.incoming))
    for i in (0, 2, 3, 4):
        a, b = got[i], changed[i]
        assert a is not None and b is not None
        assert torch.equal(a[:, 70:], b[:, 70:]) and not torch.equal(a[:, :70], b[:, :70])
    assert torch.equal(got[1], changed[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_stay_and_results_are_mine(kind: str, dtype: torch.dtype) -> None:
    """Tiles share memory, but neither inputs nor results are part of it: another call changes nothing of the first."""
    case = make(kind, 150, (70,), dims=(2, 3, 16, 8)).to(dtype)
    inputs = [case.q, case.k, case.v, case.d_o, case.log_decay, case.incoming, case.d_final]
    before = [None if x is None else x.clone() for x in inputs]
    first = staged(case)
    kept = [None if x is None else x.clone() for x in first]
    staged(replace(case, q=-case.q, v=2 * case.v))
    for x, y in [*zip(inputs, before), *zip(first, kept)]:
        assert (x is None) == (y is None)
        assert x is None or y is None or torch.equal(x, y)


@pytest.mark.parametrize("tokens", [64, 150])
def test_a_constant_gate_is_the_same_gate_at_every_token(tokens: int) -> None:
    constant = make("constant", tokens, (30,), dims=(2, 3, 16, 8))
    assert constant.log_decay is not None
    scalar = replace(constant, log_decay=constant.log_decay.expand(2, tokens, 3))
    want = list(staged(scalar))
    assert want[5] is not None
    want[5] = want[5].sum((0, 1))
    for name, x, y in zip(NAMES, staged(constant), want):
        assert x is not None and y is not None
        assert (x - y).norm() <= 1e-13 * y.norm(), name


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_linear_in_tokens(kind: str) -> None:
    case = make(kind, 2048, dims=(1, 1, 32, 32)).to(torch.float32)
    with Largest() as largest:
        staged(case)
    assert largest.elements <= 2 * case.q.numel()


def test_reset_and_totals() -> None:
    """What the scan needs to know has the promised shapes."""
    shapes = {"constant": (1, 2, 1, 1), "scalar": (2, 2, 1, 1), "vector": (2, 2, 5, 1)}
    for kind in KINDS:
        case = make(kind, 70)
        run = begin(case.q, case.k, case.v, case.log_decay, ())
        assert not run.reset and begin(case.q, case.k, case.v, case.log_decay, (0,)).reset
        total = run.log_decay_total
        assert (None if total is None else tuple(total.shape)) == shapes.get(kind)
        assert isinstance(begin_backward(run, case.d_o, None), Adjoint)


def test_wrong_arguments() -> None:
    case = make("none", 10)
    with pytest.raises(ValueError, match="log_decay must be"):
        begin(case.q, case.k, case.v, case.q[:, :, :, 0, None], ())
    with pytest.raises(ValueError, match="ascend"):
        begin(case.q, case.k, case.v, None, (5, 3))
    with pytest.raises(ValueError, match="ascend"):
        begin(case.q, case.k, case.v, None, (10,))
    with pytest.raises(ValueError, match="one dtype"):
        begin(case.q, case.k, case.v.float(), None, ())
    with pytest.raises(ValueError, match="expected q"):
        begin(case.q, case.k[:, :5], case.v, None, ())


def test_sums_to_the_end_of_a_chunk_are_not_differences_of_larger_ones() -> None:
    """After a huge term the small ones that follow keep all their digits."""
    x = torch.full((64, 1), 1e-3)
    x[0] = 1e9
    exact = x.double().flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(suffix_sums(x)[1:].double(), exact[1:], rtol=1e-6, atol=0)
