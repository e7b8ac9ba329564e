"""What holds of any delta rule, of its kernels: on a GPU, or else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from seqpar.ops.delta_rule import DeltaRule, stages, tiles
from tests.ops.delta_cases import KINDS, NAMES, SCALE, Case, check, make, staged
from tests.oracles.recurrence import per_channel

OP = DeltaRule(scale=SCALE, impl="triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = (1, 2, 16, 16)
STARTS = (5, 16, 30)
TOKENS = 34
FP32 = 2e-6


def case_of(kind: str, t: int = TOKENS, starts: tuple[int, ...] = (), **options) -> Case:
    return make(kind, t, starts, **{"dims": SMALL, **options}).to(torch.float32).on(DEVICE)


def changed(case: Case, **tensors: torch.Tensor) -> Case:
    """The case with some of q, k, v, beta and log_decay replaced."""
    tokens = dict(zip(("q", "k", "v", "beta", "log_decay"), case.tokens), **tensors)
    return replace(case, tokens=tuple(tokens.values()))


def begun(case: Case):
    return OP.begin(case.tokens, (), case.starts)


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.cpu().double() - want.cpu().double()).norm() / want.double().norm())


# Documents, states and gates in every combination.


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("starts", [(), (0, 20), STARTS], ids=str)
@pytest.mark.parametrize("enters, leaves", [(True, False), (False, True)])
def test_documents_with_and_without_states(kind, starts, enters, leaves):
    """An incoming state, or a gradient of the final one, alone; with a start at the first token nothing comes in."""
    case = case_of(kind, starts=starts, with_incoming=enters, with_d_final=leaves, dims=(1, 1, 16, 16))
    check(OP, case, FP32)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_of_one_document_depends_on_another(kind):
    """Not even where both lie in one chunk."""
    case = case_of(kind, starts=STARTS)
    first, second = (slice(None), slice(5)), (slice(None), slice(5, 16))
    other = [None if x is None else x.clone() for x in case.tokens]
    for x in other[:3]:
        x[first] *= 3
    before, after = staged(OP, case), staged(OP, replace(case, tokens=tuple(other)))
    for name, x, y in zip(NAMES, before, after):
        if x is not None and name not in ("final state", "d_incoming"):
            assert torch.equal(x[second], y[second]), name
    assert torch.equal(before[1], after[1]) and not torch.equal(before[0][first], after[0][first])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_sequences_do_not_meet(kind):
    case = case_of(kind, 9, dims=(2, 2, 16, 16))
    turned = [None if x is None else x.flip(0, 2).contiguous() for x in case.tokens]
    states = [x.flip(0, 1).contiguous() for x in (case.incoming, case.d_final)]
    flipped = Case(tuple(turned), (), states[0], case.d_o.flip(0, 2).contiguous(), states[1])
    for name, x, y in zip(NAMES, staged(OP, case), staged(OP, flipped)):
        if x is not None:
            assert torch.equal(y, x.flip(0, 1 if name in ("final state", "d_incoming") else 2)), name


# What a run does to a state.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [16, 20])
def test_the_transition_is_the_product_of_what_tokens_do(kind, dim):
    case = case_of(kind, 40, dims=(1, 1, dim, 16))
    _, k, _, beta, log_decay = (None if x is None else x.cpu().double() for x in case.tokens)
    one = torch.eye(dim, dtype=torch.float64)
    matrix, gates = one.expand(1, 1, dim, dim), per_channel(log_decay, k).exp()
    for i in range(40):
        erase = beta[:, i, :, None, None] * k[:, i, :, :, None] * k[:, i, :, None, :]
        matrix = (one - erase) @ (gates[:, i, :, :, None] * matrix)
    assert error_of(OP.transition(begun(case)).value, matrix) < FP32
    assert not OP.transition(begun(replace(case, starts=(20,)))).value.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_enters_adds_what_the_transition_makes_of_it(kind):
    case = case_of(kind)
    run = begun(case)
    through = stages._states(run, case.incoming).final  # the chain with the state in it
    assert error_of(run.outgoing + OP.transition(run).apply(case.incoming), through) < FP32


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_of_unit_length_finds_what_was_written_last(kind):
    """With beta 1 a token replaces what its key finds: ``k_t S_t = v_t``, whatever was there and however it faded."""
    case = case_of(kind)
    case = changed(case, beta=torch.ones_like(case.tokens[3]))
    state, key, value = begun(case).outgoing, case.tokens[1][:, -1], case.tokens[2][:, -1]
    assert error_of((key.unsqueeze(-2) @ state).squeeze(-2), value) < FP32


@pytest.mark.parametrize("kind", KINDS)
def test_with_beta_zero_nothing_is_written_and_states_only_fade(kind):
    case = case_of(kind)
    case = changed(case, beta=torch.zeros_like(case.tokens[3]))
    run = begun(case)
    faded = per_channel(case.tokens[4], case.tokens[1]).double().sum(1).exp()
    assert not run.outgoing.any()
    assert error_of(OP.transition(run).value, torch.diag_embed(faded)) < FP32


# What must not matter.


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_chunks_does_not_matter(kind, monkeypatch):
    case, found = case_of(kind, 20, (12,), strength=2.0, dims=(1, 1, 16, 16)), []
    for size in (16, 32):
        for name in ("_INTERPRETER", "_EXACT"):
            monkeypatch.setattr(tiles, name, replace(getattr(tiles, name), chunk=size))
        assert begun(case).tiles.chunk == size
        found.append(staged(OP, case))
    for name, x, y in zip(NAMES, *found):
        assert x is None or error_of(x, y) < 2 * FP32, name


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_linear_in_values_and_states(kind):
    """Twice the values and twice the state give twice the output, to the last bit."""
    case = case_of(kind, 17, dims=(1, 1, 16, 16))
    twice = replace(changed(case, v=2 * case.tokens[2]), incoming=2 * case.incoming)
    (o, final, *_), (o_twice, final_twice, *_) = staged(OP, case), staged(OP, twice)
    assert torch.equal(2 * o, o_twice) and torch.equal(2 * final, final_twice)
