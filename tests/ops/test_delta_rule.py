"""The delta rule in stages equals the token-by-token loop: outputs, states and every gradient."""

from dataclasses import replace

import pytest
import torch

from seqpar.collectives.transition import exact_matmul
from seqpar.ops.decayed_linear_attention.decay import prefix_sums, suffix_sums
from seqpar.ops.delta_rule import DeltaRule, reference
from seqpar.ops.delta_rule.decays import scores, scores_backward
from tests.ops.delta_cases import KINDS, SCALE, check, expected, faded, make, staged
from tests.oracles.recurrence import per_channel

OP = DeltaRule(scale=SCALE, impl="reference")
TOKENS = (0, 1, 15, 16, 17, 63, 64, 65, 100)
STARTS = {
    "fresh": (0,),
    "middle": (37,),
    "tiny": tuple(range(2, 200, 3)),
    "one by one": tuple(range(130)),
    "in one chunk": (0, 70, 71, 90),
    "at the edges": (16, 64, 128),
    "last token": (129,),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", TOKENS)
def test_any_number_of_tokens(kind, t):
    check(OP, make(kind, t), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_documents_do_not_mix(kind, starts):
    check(OP, make(kind, 130, starts), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_without_states_and_their_gradients(kind):
    check(OP, make(kind, 70, with_incoming=False, with_d_final=False), 1e-12)
    check(OP, make(kind, 70, (20,), with_incoming=False), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [(1, 1, 1, 1), (2, 3, 4, 9), (1, 5, 33, 2), (1, 2, 60, 100)], ids=str)
def test_any_dims(kind, dims):
    check(OP, make(kind, 33, (7,), dims=dims), 1e-12)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_strong_decay_neither_overflows_nor_cancels(kind, dtype, tolerance):
    """At e^-20 per token a gradient of a gate is 1e-9 of the terms that it is made of."""
    check(OP, make(kind, 100, (40,), strength=20.0).to(dtype), tolerance)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_a_decay_of_zero_forgets_exactly(kind):
    case = make(kind, 100, (40,))
    check(OP, faded(case, every=7), 1e-12)
    # a state that fades to zero before the first token is one that starts there
    everything = torch.full_like(case.tokens[4][:, :1], -torch.inf)
    forgets = torch.cat([everything, case.tokens[4][:, 1:]], 1)
    forgotten = staged(OP, replace(case, tokens=(*case.tokens[:4], forgets)))
    fresh = staged(OP, replace(case, starts=(0, 40)))
    assert all(torch.equal(x, y) for x, y in zip(forgotten, fresh))


@pytest.mark.parametrize("kind", KINDS)
def test_long_keys_make_states_grow(kind):
    """The transition multiplies by ``1 - beta |k|^2`` along k: here up to -8, 20 times in a row."""
    case = make(kind, 20)
    long = replace(case, tokens=(case.tokens[0], 2.1 * case.tokens[1], *case.tokens[2:]))
    assert expected(long)[1].norm() > 1e3 * expected(case)[1].norm()
    check(OP, long, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype, forward, backward", [(torch.float32, 1e-6, 2e-6), (torch.bfloat16, 2e-3, 2e-3)], ids=str
)
def test_low_precision_rounds_once(kind, dtype, forward, backward):
    """One rounding to bf16 is 0.0017 in norm."""
    check(OP, make(kind, 200, (70,), dims=(1, 2, 16, 24)).to(dtype), backward, forward=forward)


@pytest.mark.parametrize("kind", KINDS)
def test_the_transition_is_the_product_of_what_tokens_do(kind):
    case = make(kind, 70)
    _, k, _, beta, log_decay = case.tokens
    matrix, gates = torch.eye(5, dtype=torch.float64).expand(2, 2, 5, 5), per_channel(log_decay, k).exp()
    for i in range(70):
        erase = beta[:, i, :, None, None] * k[:, i, :, :, None] * k[:, i, :, None, :]
        matrix = (torch.eye(5, dtype=torch.float64) - erase) @ (gates[:, i, :, :, None] * matrix)
    found = OP.transition(OP.begin(case.tokens, (), ()))
    assert found.kind == "matrix" and (found.value - matrix).norm() < 1e-12 * matrix.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_after_one_another_are_one(kind):
    case = make(kind, 90, (30,))
    whole = staged(OP, case)
    run = [OP.begin(tuple(None if x is None else x[:, a:b] for x in case.tokens), (), starts) for a, b, starts in
           ((0, 50, (30,)), (50, 90, ()))]  # fmt: skip
    between = run[0].outgoing
    o = torch.cat([OP.finish(run[0], OP.intra(run[0]), case.incoming), OP.finish(run[1], OP.intra(run[1]), between)], 1)
    final = run[1].outgoing + exact_matmul(OP.transition(run[1]).value, between)
    assert (o - whole[0]).norm() < 1e-13 * whole[0].norm() and (final - whole[1]).norm() < 1e-13 * whole[1].norm()


def test_states_that_are_not_asked_for_are_not_computed(monkeypatch):
    """Backward does not need the state that forward gave to the next rank, nor one rank a transition."""
    case = make("scalar", 70)
    chained = []
    monkeypatch.setattr(
        reference, "_chain", lambda run, state, chain=reference._chain: chained.append(1) or chain(run, state)
    )
    run = OP.begin(case.tokens, (), ())
    assert not chained
    OP.begin_backward(run, case.d_o, case.incoming)
    assert len(chained) == 1
    assert run.outgoing is not None and run.outgoing is not None
    assert len(chained) == 2
    OP.begin_backward(run, case.d_o, None)
    assert len(chained) == 2


def test_tiles_of_the_work_do_not_change_the_result(monkeypatch):
    from seqpar.ops.decayed_linear_attention import chunks

    case = make("vector", 200, (70, 150))
    want = expected(case)
    for bytes_ in (1, 1 << 14):
        monkeypatch.setattr(chunks, "TILE_BYTES_CPU", bytes_)
        check(OP, case, 1e-12, want=want)


@pytest.mark.parametrize("channels", [1, 6])
def test_gradients_of_scores_are_those_of_autograd(channels):
    generator = torch.Generator().manual_seed(0)
    rows, keys, d_scores = (torch.randn(2, 16, n, generator=generator, dtype=torch.float64) for n in (6, 6, 16))
    logs = -torch.rand(2, 16, channels, generator=generator, dtype=torch.float64)
    d_scores = d_scores.tril()
    inputs = [x.requires_grad_() for x in (rows, keys, logs)]
    passed = logs.cumsum(1)
    decay = (passed[:, :, None] - passed[:, None]).exp()
    plain = (rows[:, :, None] * keys[:, None] * decay).sum(-1).tril()
    want = torch.autograd.grad(plain, inputs, d_scores)
    with torch.no_grad():
        assert (scores(rows, keys, logs.exp()) - plain).norm() < 1e-13 * plain.norm()
        for got, expected_ in zip(scores_backward(rows, keys, logs.exp(), d_scores), want):
            assert (got - expected_).norm() < 1e-13 * expected_.norm()


def test_sums_from_both_sides():
    x = torch.arange(1.0, 5.0)[:, None]
    assert suffix_sums(x)[:, 0].tolist() == [10, 9, 7, 4] and prefix_sums(x)[:, 0].tolist() == [0, 1, 3, 6]


def test_what_does_not_fit_is_refused():
    case = make("scalar", 9)
    q, k, v, beta, log_decay = case.tokens
    for tokens, starts, says in [
        ((q, k[..., :2], v, beta, None), (), "expected q, k"),
        ((q, k, v[:, 1:], beta, None), (), "expected q, k"),
        ((q, k, v, beta[..., :1], None), (), "beta"),
        ((q.float(), k, v, beta, None), (), "one dtype"),
        ((q, k, v, beta, log_decay[..., 0]), (), "log_decay must be None"),
        ((q, k, v, beta, None), (9,), "starts must ascend within the 9 tokens"),
        ((q, k, v, beta, None), (3, 3), "starts must ascend"),
    ]:
        with pytest.raises(ValueError, match=says):
            OP.begin(tokens, (), starts)
    with pytest.raises(ValueError, match="impl must be one of"):
        DeltaRule(impl="fast").begin(case.tokens, (), ())
