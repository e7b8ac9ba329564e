"""Kernels for scores under vector gates equal a loop over pairs of tokens, in value and gradient, for any gates."""

import math
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from seqpar.ops.decayed_linear_attention import decay
from seqpar.ops.decayed_linear_attention.chunks import Cut

pytest.importorskip("triton")
vector = pytest.importorskip("seqpar.ops.decayed_linear_attention.vector")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DOUBLE = pytest.mark.skipif(DEVICE == "cuda", reason="fp64 runs in the interpreter only")


@dataclass(frozen=True)
class Case:
    """q, k and gates [b, t, h, k], documents [t], and how they are cut."""

    q: Tensor
    k: Tensor
    gates: Tensor
    documents: Tensor | None
    cut: Cut

    def to(self, dtype: torch.dtype) -> "Case":
        gates = self.gates.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), gates=gates)


def make(tokens: int, chunk: int, dim: int, starts: tuple[int, ...] = (), heads: int = 1, batch: int = 1) -> Case:
    generator = torch.Generator().manual_seed(tokens + dim)
    q, k, gates = (torch.randn(batch, tokens, heads, dim, generator=generator, dtype=torch.float64) for _ in range(3))
    documents = torch.zeros(tokens, dtype=torch.int32)
    documents[list(starts)] = 1
    documents = documents.cumsum(0, dtype=torch.int32)
    q, k, gates = (x.to(DEVICE) for x in (q, k, -gates.abs()))
    return Case(q, k, gates, documents.to(DEVICE) if starts else None, Cut(tokens, chunk, -(-tokens // chunk), ()))


def pairs_of(case: Case) -> list[tuple[int, int]]:
    """All (i, j), j ascending down from i, in one chunk and document."""
    chunk, tokens = case.cut.chunk, case.cut.tokens
    of = [0] * tokens if case.documents is None else case.documents.tolist()
    return [(i, j) for i in range(tokens) for j in range(i, i // chunk * chunk - 1, -1) if of[i] == of[j]]


def oracle(case: Case) -> Tensor:
    """The scores in fp64, pair by pair, with the decay as a product of factors."""
    b, _, h, _ = case.q.shape
    chunk, factors = case.cut.chunk, case.gates.exp()
    zero = case.q.new_zeros(b, h)
    rows = [[zero] * chunk for _ in range(case.cut.num_chunks * chunk)]
    for i, j in pairs_of(case):
        passed = case.q[:, i] if i == j else passed * factors[:, j + 1]  # noqa: F821 (j starts at i)
        rows[i][j % chunk] = (passed * case.k[:, j]).sum(-1)
    scores = torch.stack([torch.stack(row, -1) for row in rows], -2)
    return scores.unflatten(-2, (case.cut.num_chunks, chunk))


def expected(case: Case, d_scores: Tensor) -> tuple[Tensor, ...]:
    """Scores, dq, dk and the gradient of the gates, all in fp64."""
    case = case.to(torch.float64)
    leaves = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.gates)]
    scores = oracle(replace(case, q=leaves[0], k=leaves[1], gates=leaves[2]))
    return scores.detach(), *torch.autograd.grad((scores * d_scores.double()).sum(), leaves, materialize_grads=True)


def tokens_of(x: Tensor, case: Case) -> Tensor:
    """[b, h, n, C, k] -> [b, t, h, k]."""
    return x.flatten(2, 3)[:, :, : case.cut.tokens].transpose(1, 2)


def computed(case: Case, d_scores: Tensor) -> tuple[Tensor, ...]:
    """The same from the kernels; the gates' gradient by the law of their module."""
    inputs = (case.q, case.k, case.gates, case.documents, case.cut)
    dq, dk = vector.scores_backward(*inputs, d_scores)
    assert dq.dtype == dk.dtype == (torch.float64 if case.q.dtype == torch.float64 else torch.float32)
    dq_tokens, dk_tokens = tokens_of(dq, case), tokens_of(dk, case)
    beyond = dq.flatten(2, 3)[:, :, case.cut.tokens :], dk.flatten(2, 3)[:, :, case.cut.tokens :]
    assert all((x == 0).all() for x in beyond)
    terms = dq_tokens * case.q.to(dq.dtype) - dk_tokens * case.k.to(dk.dtype)
    sums = [part.flip(1).cumsum(1).flip(1) for part in terms.split(case.cut.chunk, 1)]
    return vector.scores(*inputs), dq_tokens, dk_tokens, torch.cat(sums, 1)


def upstream(case: Case) -> Tensor:
    """Random gradients of the scores; NaN wherever no score is meant to be."""
    shape = (case.q.shape[0], case.q.shape[2], case.cut.num_chunks * case.cut.chunk, case.cut.chunk)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(case.q.dtype).to(DEVICE)
    meant = torch.zeros(shape[2:], dtype=torch.bool, device=DEVICE)
    for i, j in pairs_of(case):
        meant[i, j % case.cut.chunk] = True
    return gradient.masked_fill(~meant, math.nan).unflatten(2, (case.cut.num_chunks, case.cut.chunk))


def errors(case: Case) -> tuple[float, ...]:
    """Of scores, dq, dk and the gates' gradient: norm of the error over norm of the reference."""
    d_scores = upstream(case)
    want = expected(case, d_scores.nan_to_num(0.0))
    return tuple(float((x.double() - y).norm() / y.norm()) for x, y in zip(computed(case, d_scores), want))


SHAPES = ((1, 16, 16), (15, 16, 5), (33, 32, 60), (49, 64, 20), (50, 64, 100), (20, 32, 256))


@DOUBLE
@pytest.mark.parametrize("tokens, chunk, dim", SHAPES)
def test_equals_the_loop(tokens: int, chunk: int, dim: int) -> None:
    """Any tokens, any channels; with documents that start inside, at and across sub-blocks."""
    starts = tuple(start for start in (3, 16, 31, 49, 66) if start < tokens)
    assert max(errors(make(tokens, chunk, dim, starts))[: 4 if tokens > 1 else 3]) <= 1e-14


@pytest.mark.parametrize("dim", (16, 60))
def test_one_document_of_several_heads_and_sequences(dim: int) -> None:
    case = make(20, 32, dim, heads=2, batch=2).to(torch.float32)
    assert max(errors(case)) <= 1e-6


def test_views_with_any_strides() -> None:
    """q, k and gates may be parts of one tensor, and heads may come before tokens."""
    case = make(20, 16, 16, (5,), heads=2).to(torch.float32)
    packed = torch.cat([case.q, case.k, case.gates], -1).transpose(1, 2).contiguous().transpose(1, 2)
    q, k, gates = packed.split(16, -1)
    d_scores = upstream(case)
    views = computed(replace(case, q=q, k=k, gates=gates), d_scores)
    assert all(torch.equal(x, y) for x, y in zip(views, computed(case, d_scores)))
    last = replace(case, q=case.q.transpose(1, 3).contiguous().transpose(1, 3))
    assert all(torch.equal(x, y) for x, y in zip(computed(last, d_scores), views))


def nasty(case: Case) -> dict[str, Tensor]:
    """Gates that overflow or cancel where sums of logarithms are subtracted."""
    mild = torch.full_like(case.gates, -1e-4)
    some = torch.arange(mild.shape[-1], device=DEVICE) % 2 == 0
    dead, cliff, channels = mild.clone(), mild.clone(), mild.clone()
    dead[:, 9] = dead[:, 24] = -math.inf
    cliff[:, :20] = -20.0
    channels[:, 5:30, :, some] = -20.0
    channels[:, 18, :, ~some] = -math.inf
    return {"mild": mild, "all": torch.full_like(mild, -20.0), "dead": dead, "cliff": cliff, "channels": channels}


@pytest.mark.parametrize("which", ("mild", "all", "dead", "cliff", "channels"))
def test_every_entry_is_right_under_nasty_gates(which: str) -> None:
    """With positive q, k and gradients nothing may cancel, so each single entry has full relative precision."""
    case = make(45, 64, 16, (40,))
    case = replace(case, q=case.q.abs() + 0.1, k=case.k.abs() + 0.1, gates=nasty(case)[which]).to(torch.float32)
    d_scores = upstream(case).abs()
    got, want = computed(case, d_scores), expected(case, d_scores.nan_to_num(0.0))
    for x, y in zip(got[:3], want[:3]):
        normal = y > 1e-30  # smaller ones are denormal on their way
        assert ((x.double() - y).abs() <= 1e-5 * y)[normal].all()
        assert (x[~normal].abs() <= 2e-30).all()
    assert got[3].isfinite().all()


def rounded_blocks(q: Tensor, k: Tensor, factors: Tensor, d_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, dq and dk of tiles [..., C, d] by doubled blocks, in 16 bits where a block has eight tokens or more."""
    dtype, scores = q.dtype, q.new_zeros(*q.shape[:-1], q.shape[-2])
    q, k, diagonal = q.float(), k.float(), d_scores.diagonal(0, -2, -1).unsqueeze(-1).float()
    scores.diagonal(0, -2, -1).copy_((q * k).sum(-1))
    dq, dk = diagonal * k, diagonal * q
    for block, all_into, all_out in decay.double_blocks(factors):
        if block == q.shape[-2]:
            break
        into, out = decay.halves(all_into, block)[1], decay.halves(all_out, block)[0]
        narrow = dtype if block >= 8 else torch.float32
        later, earlier = (decay.halves(q, block)[1] * into).to(narrow), (decay.halves(k, block)[0] * out).to(narrow)
        d_quadrant = decay.quadrant(d_scores, block).to(narrow)
        decay.quadrant(scores, block).copy_(later @ earlier.mT)
        decay.halves(dq, block)[1].addcmul_(into, (d_quadrant @ earlier).float())
        decay.halves(dk, block)[0].addcmul_(out, (d_quadrant.mT @ later).float())
    return scores, dq, dk


@pytest.mark.parametrize("dtype, unit", ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)), ids=str)
def test_half_precision_is_that_of_rounded_factors(dtype: torch.dtype, unit: float) -> None:
    """At most 1.1 times the error of doubled blocks whose decayed queries and keys are rounded once to 16 bits, as
    matrix units need them; gradients, which they give in the same precision, too."""
    case = make(64, 64, 40)
    case = replace(case, gates=case.gates * 0.1).to(dtype)
    d_scores = upstream(case)
    zeroed = d_scores.nan_to_num(0.0)
    want = expected(case, zeroed)
    tiles = [x.transpose(1, 2).unsqueeze(2).contiguous() for x in (case.q, case.k, case.gates.exp())]
    scores, *grads = rounded_blocks(*tiles, zeroed)
    got = computed(case, d_scores)
    pairs = zip(got[:3], (scores, *(tokens_of(x, case) for x in grads)), want[:3])
    for x, other, y in pairs:
        error, allowed = (float((z.double() - y).norm() / y.norm()) for z in (x, other))
        assert error <= 1.1 * allowed <= unit


@DOUBLE
def test_channels_and_documents_keep_to_themselves() -> None:
    """A number elsewhere changes no bit: channels of no gradient, other documents, other heads, later tokens."""
    case = make(40, 32, 20, (18,), heads=2).to(torch.float32)
    base = vector.scores(case.q, case.k, case.gates, case.documents, case.cut)
    changed = [x.clone() for x in (case.q, case.k, case.gates)]
    for x, (head, tokens) in product(changed, ((0, slice(25, None)), (1, slice(None)))):
        x[:, tokens, head] *= 2
    other = vector.scores(*changed, case.documents, case.cut)
    assert torch.equal(base[:, 0, 0, :25], other[:, 0, 0, :25])
    assert not torch.equal(base[:, 0, 0, 25:], other[:, 0, 0, 25:]) and not torch.equal(base[:, 1], other[:, 1])
    assert (base[0, 0, 0, 18:, :18] == 0).all() and (base.triu(1) == 0).all()
