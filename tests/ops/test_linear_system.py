"""The linear system in stages equals the token-by-token loop: outputs, states and every gradient."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from seqpar import Shard
from seqpar.collectives import Group, alone, run_ranks
from seqpar.collectives.transition import together
from seqpar.crossing.recurrences import linear_system as on_ranks
from seqpar.ops.linear_system import LinearSystem
from seqpar.ops.linear_system.pieces import LARGEST, pieces_of
from tests.oracles.linear_system import linear_system

NAMES = ("out", "final", "d_incoming", "d_u", "d_a", "d_b", "d_c")
STARTS = {
    "continues": (),
    "fresh": (0,),
    "middle": (37,),
    "tiny": tuple(range(2, 130, 3)),
    "one by one": tuple(range(130)),
    "one after another": (0, 70, 71, 77),
    "at the edges": (16, 64, 128),
    "last token": (129,),
}


@dataclass(frozen=True)
class Case:
    """Inputs and upstream gradients of one run."""

    u: Tensor
    system: tuple[Tensor, Tensor, Tensor]
    starts: tuple[int, ...]
    d_out: Tensor
    incoming: Tensor | None
    d_final: Tensor | None


def make(t: int, starts=(), *, h=2, n=5, q=3, v=2, boundary=True) -> Case:
    """A system that neither dies out nor blows up: of norm 1 at most, up to a change of its basis."""
    generator = torch.Generator().manual_seed(t + 7 * n)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis = torch.eye(n) + 0.3 * random(h, n, n)
    a = 0.99 * basis @ torch.linalg.qr(random(h, n, n))[0] @ basis.inverse()
    ends = (random(2, h, n, v), random(2, h, n, v)) if boundary else (None, None)
    return Case(random(2, t, h, v), (a, random(h, n), random(h, q, n)), starts, random(2, t, h, q, v), *ends)


def passed(run, transition, inner: Tensor, boundary: Tensor | None) -> Tensor:
    """The law of the stages: what comes out of a run, of what comes in."""
    return inner if run.reset or boundary is None else inner + transition.apply(boundary)


def diagonal(case: Case) -> Case:
    """The same inputs of a system with two complex numbers instead of the matrix (and a state of four)."""
    generator = torch.Generator().manual_seed(case.u.shape[1])
    length, angle = (torch.rand(2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return replace(case, system=(torch.polar(0.9 + 0.1 * length, 6 * angle), *case.system[1:]))


def dense(a: Tensor) -> Tensor:
    """Each number as what it does to a real and an imaginary part, which stand half a state apart."""
    if not a.is_complex():
        return a
    whole = torch.zeros(len(a), 4, 4, dtype=torch.float64)
    for i in range(2):
        whole[:, i, i] = whole[:, i + 2, i + 2] = a[:, i].real
        whole[:, i + 2, i], whole[:, i, i + 2] = a[:, i].imag, -a[:, i].imag
    return whole


@torch.no_grad()
def staged(case: Case) -> list[Tensor]:
    op, system = LinearSystem(), tuple(x.clone().requires_grad_() for x in case.system)
    run = op.begin((case.u,), system, case.starts)
    out = op.finish(run, op.intra(run), case.incoming)
    final = passed(run, op.transition(run), run.outgoing, case.incoming)
    adjoint = op.begin_backward(run, case.d_out, case.incoming)
    d_incoming = passed(run, op.transition(run).adjoint(), adjoint.outgoing, case.d_final)
    (d_u,), d_system = op.finish_backward(run, adjoint, op.intra_backward(run, adjoint), case.d_final)
    return [out, final, d_incoming, d_u, *d_system]


def expected(case: Case) -> list[Tensor]:
    shape = (len(case.u), *case.system[1].shape, case.u.shape[3])
    ends = [torch.zeros(shape, dtype=torch.float64) if x is None else x for x in (case.incoming, case.d_final)]
    doubles = (x if x.is_complex() else x.double() for x in (ends[0], case.u, *case.system))
    incoming, *inputs = (x.clone().requires_grad_() for x in doubles)
    u, a, b, c = inputs
    out, final = linear_system(u, dense(a), b, c, starts=case.starts, initial_state=incoming)
    both = [(x, d.double()) for x, d in ((out, case.d_out), (final, ends[1])) if x.requires_grad]
    outs, upstream = zip(*both)
    wanted = [incoming, *inputs]
    grads = torch.autograd.grad(outs, wanted, upstream, allow_unused=True, materialize_grads=True)
    return [out.detach(), final.detach(), *grads]


def errors(case: Case) -> dict[str, float]:
    found = {}
    for name, ours, theirs in zip(NAMES, staged(case), expected(case), strict=True):
        assert ours.shape == theirs.shape, name
        found[name] = float((ours.to(theirs.dtype) - theirs).norm() / theirs.norm().clamp(min=1e-6))
    return found


def assert_right(case: Case) -> None:
    found = errors(case)
    assert max(found["out"], found["final"]) < 1e-12 and max(found.values()) < 1e-10, found


@pytest.mark.parametrize("t", (0, 1, 15, 16, 17, 63, 64, 65, 200))
def test_forward_and_backward_for_any_number_of_tokens(t: int) -> None:
    assert_right(make(t))
    assert_right(make(t, boundary=False))


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_documents_do_not_mix(starts: tuple[int, ...]) -> None:
    assert_right(make(130, starts))


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("t", (130, 131, 200))
def test_a_complex_diagonal_is_the_matrix_it_stands_for(t: int, starts: tuple[int, ...]) -> None:
    assert_right(diagonal(make(t, starts, n=4)))
    assert_right(diagonal(make(t, starts, n=4, boundary=False)))


def test_one_system_of_many_outputs_and_many_of_one() -> None:
    assert_right(make(90, (50,), h=1, n=7, q=9, v=1))
    assert_right(make(90, (50,), h=6, n=3, q=1, v=1))


def test_many_pieces() -> None:
    assert_right(make(1100, (1, 377, 700), h=1, n=2, q=1, v=1))


@pytest.mark.parametrize("cut", (0, 1, 40, 63))
def test_two_runs_in_sequence_are_one(cut: int) -> None:
    case, op = make(64), LinearSystem()
    first, second = (op.begin((u,), case.system, ()) for u in (case.u[:, :cut], case.u[:, cut:]))
    between = passed(first, op.transition(first), first.outgoing, case.incoming)
    ends = zip((first, second), (case.incoming, between))
    out = torch.cat([op.finish(run, op.intra(run), state) for run, state in ends], 1)
    whole = expected(case)[0]
    assert float((out - whole).norm() / whole.norm()) < 1e-12
    both = together([op.transition(first), op.transition(second)])
    whole_run = op.transition(op.begin((case.u,), case.system, ()))
    assert float((both.value - whole_run.value).norm() / whole_run.value.norm()) < 1e-12


def test_every_rank_knows_what_a_run_of_any_length_does() -> None:
    case, op = make(57), LinearSystem()
    mine = op.transition(op.begin((case.u,), case.system, ()))
    known = op.known(case.system, mine.value, (3, 57, 0))
    assert torch.equal(known[1].value, mine.value)
    state = case.incoming
    assert torch.equal(known[2].apply(state), state)
    for _ in range(3):
        state = case.system[0] @ state
    assert float((known[0].apply(case.incoming) - state).norm() / state.norm()) < 1e-13


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    case = make(300, (33,), n=8, boundary=False)
    case = Case(case.u.to(dtype), case.system, case.starts, case.d_out.to(dtype), None, None)
    found = errors(case)
    limit = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert max(found.values()) < limit, found


CPU = torch.device("cpu")


def test_a_document_is_cut_from_its_first_token_on() -> None:
    pieces = pieces_of(200, (130,), CPU)
    assert pieces.chunk == LARGEST and pieces.depth.tolist() == [0, 1, 2, 0, 1] and pieces.deepest == 2
    assert pieces.last == 6 and pieces.continues and not pieces_of(5, (0, 2), CPU).continues
    numbers = torch.arange(1.0, 201)[None, :, None]
    (apart,) = pieces.apart(numbers)
    assert apart[0, 2, :3, 0].tolist() == [129, 130, 0] and apart[0, 3, 0, 0] == 131
    assert torch.equal(pieces.joined([apart]), numbers)


@pytest.mark.parametrize("documents", (1, 3, 40, 400))
def test_tiny_documents_get_tiny_pieces(documents: int) -> None:
    """At most half of all places are empty, or so."""
    pieces = pieces_of(400, tuple(range(0, 400, 400 // documents)), CPU)
    assert len(pieces.rows) <= 2 * 400


def test_tiny_documents_leave_a_long_one_its_pieces() -> None:
    """A long document among tiny ones has the states that it has alone, and they have none."""
    alone, among = pieces_of(4096, (0,), CPU), pieces_of(8192, (*range(2049), *range(6144, 8192)), CPU)
    assert among.chunk == alone.chunk == LARGEST and alone.count == 4096 // LARGEST
    assert among.count == alone.count + 1  # and the last document, after which the run's state is asked for
    assert among.short == ((2048 + 2047, 1),) and len(among.rows) < 1.02 * 8192


def test_backwards_is_the_mirror_image() -> None:
    case = make(40, (), boundary=False)
    lengths = [13, 27]

    def body(group: Group) -> Tensor:
        shard = Shard.of(lengths, group)
        return shard.gather(on_ranks(shard.take(case.u), *case.system, shard=shard, group=group, backwards=True))

    mirrored = linear_system(case.u.flip(1), *case.system, starts=(0, 27))[0].flip(1)
    for out in run_ranks(3, body):
        assert float((out - mirrored).norm() / mirrored.norm()) < 1e-12


def test_what_does_not_fit_raises() -> None:
    case, op = make(8), LinearSystem()
    a, b, c = case.system
    odd = (torch.polar(a[:, 0, :2], a[:, 0, :2]), b, c)
    few = [(a[:, :4], b, c), (a, b, c[:1]), (a, b[0, 0], c), (a, b + 0j, c), odd]
    for u, system in [(case.u[..., 0], case.system), (case.u + 0j, case.system), *((case.u, each) for each in few)]:
        with pytest.raises(ValueError, match=r"a \[h, n, n\]"):
            op.begin((u,), system, ())
        with pytest.raises(ValueError, match=r"rank 0 of 1: .* a \[h, n, n\]"):
            on_ranks(u, *system, shard=Shard.of([8], alone()), group=alone())
    with pytest.raises(ValueError, match="ascend within the 8 tokens"):
        op.begin((case.u,), case.system, (8,))
    with pytest.raises(ValueError, match="impl must be one of"):
        on_ranks(case.u, a, b, c, shard=Shard.of([8], alone()), group=alone(), impl="fast")
    with pytest.raises(ValueError, match="initial_state must be"):
        on_ranks(case.u, a, b, c, shard=Shard.of([8], alone()), group=alone(), initial_state=case.incoming[:1])
