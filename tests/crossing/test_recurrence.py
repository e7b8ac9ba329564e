"""Every recurrence over a cut sequence is its token-by-token loop: kinds, directions, layouts, states, kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product

import pytest
import torch
from torch import Tensor

from seqpar import attention
from seqpar.collectives import Ledger, run_ranks
from seqpar.collectives.scan import ALGORITHMS
from seqpar.crossing import recurrences
from seqpar.ops import choice
from tests.cutting import LAYOUTS, SIZES, cut, relative_error, spread, tensors
from tests.oracles import delta, diagonal, recurrence

B, H, K, V, D, N = 2, 2, 4, 3, 5, 3
PACKED = [7, 0, 1, 23, 12]


@dataclass(frozen=True)
class Kind:
    """``inputs(tokens)``: tensors with tokens, tensors without, and an initial state in the layout of the function.

    ``function`` is under test; ``oracle(tokens, shared, starts, state)`` gives output and final state."""

    inputs: Callable[[int], tuple[list[Tensor], list[Tensor], Tensor]]
    function: Callable[..., Tensor]
    oracle: Callable[..., tuple[Tensor, Tensor]]


def mild(shape: tuple[int, ...], seed: int) -> Tensor:
    """Log decays near 0: far tokens matter."""
    return -0.03 * tensors(seed, shape)[0].abs()


def linear_inputs(decay: str, t: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    q, k, v, state = tensors(1, (B, t, H, K), (B, t, H, K), (B, t, H, V), (B, H, K, V))
    shapes = {"none": None, "constant": (H,), "scalar": (B, t, H), "vector": (B, t, H, K)}
    gates = [] if decay == "none" else [mild(shapes[decay], 2)]
    return ([q, k, v, *gates], [], state) if decay != "constant" else ([q, k, v], gates, state)


def linear(decay: str) -> Kind:
    def function(tokens, shared, **how):
        q, k, v, *gates = [*tokens, *shared]
        return recurrences.linear_attention(q, k, v, log_decay=gates[0] if gates else None, scale=0.7, **how)

    def oracle(tokens, shared, starts, state):
        q, k, v, *gates = [*tokens, *shared]
        bounds = [*starts, q.shape[1]]
        lengths = [bounds[0], *(b - a for a, b in pairwise(bounds))]
        return recurrence.decayed_linear_attention(
            q, k, v, gates[0] if gates else None, lengths=lengths, scale=0.7, initial_state=state
        )

    return Kind(lambda t: linear_inputs(decay, t), function, oracle)


def delta_kind(decay: str) -> Kind:
    def inputs(t):
        (q, k, v, *gates), _, state = linear_inputs(decay, t)
        beta = 1.8 * torch.sigmoid(tensors(3, (B, t, H))[0])
        return [q, k / k.norm(dim=-1, keepdim=True), v, beta, *gates], [], state

    def function(tokens, shared, **how):
        q, k, v, beta, *gates = tokens
        return recurrences.delta_rule(q, k, v, beta, log_decay=gates[0] if gates else None, scale=0.7, **how)

    def oracle(tokens, shared, starts, state):
        q, k, v, beta, *gates = tokens
        decay = gates[0] if gates else None
        return delta.delta_rule(q, k, v, beta, decay, starts=starts, scale=0.7, initial_state=state)

    return Kind(inputs, function, oracle)


def diagonal_kind(shared_decay: bool, is_complex: bool) -> Kind:
    def inputs(t):
        x, angle, state, angle_of_state = tensors(4, (B, t, D), (B, t, D), (B, 1, D, 1), (B, 1, D, 1))
        log_a = mild((D,) if shared_decay else (B, t, D), 5)
        if is_complex:
            x, state = torch.complex(x, angle), torch.complex(state, angle_of_state)
            log_a = torch.complex(log_a, tensors(6, tuple(log_a.shape))[0])
        return ([x], [log_a], state) if shared_decay else ([x, log_a], [], state)

    def function(tokens, shared, **how):
        return recurrences.diagonal_scan(*tokens, *shared, **how)

    def oracle(tokens, shared, starts, state):
        x, log_a = [*tokens, *shared]
        initial = None if state is None else state[:, 0, :, 0]
        out, final = diagonal.diagonal_scan(log_a, x, starts=starts, initial_state=initial)
        return out, final[:, None, :, None]

    return Kind(inputs, function, oracle)


def selective_kind() -> Kind:
    def inputs(t):
        u, step, b, c, a, state = tensors(7, (B, t, D), (B, t, D), (B, t, N), (B, t, N), (D, N), (B, 1, D, N))
        return [u, 0.1 * step.abs(), b, c], [-0.3 * a.abs()], state

    def function(tokens, shared, **how):
        u, step, b, c = tokens
        return recurrences.selective_scan(u, step, shared[0], b, c, **how)

    def oracle(tokens, shared, starts, state):
        u, step, b, c = tokens
        initial = None if state is None else state[:, 0]
        out, final = diagonal.selective_scan(u, step, b, c, shared[0], starts=starts, initial_state=initial)
        return out, final[:, None]

    return Kind(inputs, function, oracle)


KINDS: dict[str, Kind] = {
    **{f"linear, {decay}": linear(decay) for decay in ("none", "constant", "scalar", "vector")},
    **{f"delta, {decay}": delta_kind(decay) for decay in ("none", "scalar", "vector")},
    "diagonal": diagonal_kind(shared_decay=False, is_complex=False),
    "diagonal, complex": diagonal_kind(shared_decay=False, is_complex=True),
    "diagonal, complex, shared": diagonal_kind(shared_decay=True, is_complex=True),
    "selective": selective_kind(),
}


def starts_of(lengths: Sequence[int], continues: bool) -> tuple[int, ...]:
    begins = sorted({end - length for end, length in zip(accumulate(lengths), lengths) if length})
    return tuple(begins[1:] if continues and lengths[0] else begins)  # a state enters the first document alone


def one_device(name, lengths, backwards, stateful):
    """The oracle's output, final state and gradients, and the upstream gradients they belong to."""
    kind, t = KINDS[name], sum(lengths)
    tokens, shared, state = kind.inputs(t)
    wanted = [x.requires_grad_() for x in [*tokens, *shared, *([state] if stateful else [])]]
    turned = [x.flip(1) for x in tokens] if backwards else tokens
    starts = starts_of(lengths[::-1] if backwards else lengths, stateful)
    out, final = kind.oracle(turned, shared, starts, state if stateful else None)
    out = out.flip(1) if backwards else out
    if not lengths[0 if backwards else -1]:
        final = torch.zeros_like(final)  # that of the last document, which is empty
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(8))
    upstream_state = torch.randn(final.shape, dtype=final.dtype, generator=torch.Generator().manual_seed(9))
    ends = ([out, final], [upstream, upstream_state]) if stateful else ([out], [upstream])
    ends = list(zip(*(pair for pair in zip(*ends) if pair[0].requires_grad)))
    grads = torch.autograd.grad(ends[0], wanted, ends[1], allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, wanted)]
    return upstream, upstream_state, out.detach(), final.detach(), grads


def cut_pairs(group, name, lengths, layout, backwards, stateful, scan, expected, dtype, impl):
    """(got, expected) of this rank: output, every gradient, and the final state; parts of sums are summed."""
    upstream, upstream_state, out, final, grads = expected
    kind, shard = KINDS[name], cut(lengths, group, layout)
    tokens, shared, state = kind.inputs(sum(lengths))

    def as_dtype(x):
        return x.to(dtype) if not x.is_complex() and dtype != torch.float64 else x

    mine = [shard.take(as_dtype(x)).detach().clone().requires_grad_() for x in tokens]
    whole = [as_dtype(x).detach().clone().requires_grad_() for x in [*shared, *([state] if stateful else [])]]
    result = kind.function(
        mine,
        whole[: len(shared)],
        shard=shard,
        group=group,
        scan=scan,
        backwards=backwards,
        initial_state=whole[-1] if stateful else None,
        return_final_state=stateful,
        impl=impl,
    )
    got, got_final = result if stateful else (result, None)
    ends = [got, got_final] if stateful else [got]
    up = [as_dtype(shard.take(upstream)), as_dtype(upstream_state)][: len(ends)]
    got_grads = torch.autograd.grad(ends, [*mine, *whole], up, allow_unused=True)
    got_grads = [torch.zeros_like(x) if g is None else g for g, x in zip(got_grads, [*mine, *whole])]
    pairs = [(got.detach(), shard.take(out))]
    pairs += [(g, shard.take(e)) for g, e in zip(got_grads[: len(mine)], grads)]
    for g, e in zip(got_grads[len(mine) :], grads[len(mine) :]):
        summed = group.all_reduce(torch.view_as_real(g).contiguous() if g.is_complex() else g).wait()
        whole_e = torch.view_as_real(e) if e.is_complex() else e
        pairs.append((summed / group.size**0.5, whole_e / group.size**0.5))
    if stateful:
        pairs.append((got_final.detach() / group.size**0.5, final / group.size**0.5))
    return pairs


def error_of(parts, whole):
    if whole.is_complex():
        parts = [tuple(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in pair) for pair in parts]
        whole = torch.view_as_real(whole.resolve_conj())
    return relative_error(parts, whole)


def errors(size, name, lengths, layout, *, backwards=False, stateful=False, scan="all_gather",
           dtype=torch.float64, impl="reference"):  # fmt: skip
    expected = one_device(name, lengths, backwards, stateful)
    ranks = run_ranks(size, cut_pairs, name, lengths, layout, backwards, stateful, scan, expected, dtype, impl)
    wholes = [expected[2], *expected[4], *([expected[3]] if stateful else [])]
    return [error_of(parts, whole) for parts, whole in zip(spread(ranks), wholes)]


def assert_exact(found):
    assert found[0] < 1e-12, found
    assert max(found[1:]) < 1e-10, found


@pytest.mark.sampled(12)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", KINDS)
def test_equals_the_loop(name, size):
    for number, (layout, backwards) in enumerate(product(LAYOUTS, (False, True))):
        scan = ALGORITHMS[(number + size) % len(ALGORITHMS)]
        assert_exact(errors(size, name, PACKED, layout, backwards=backwards, scan=scan))
        assert_exact(errors(size, name, [17], layout, backwards=backwards, stateful=True, scan=scan))


@pytest.mark.parametrize("name", KINDS)
def test_states_enter_and_leave_packed_documents(name):
    for backwards, lengths in product((False, True), ([5, 3, 9], [0, 4, 2], [4, 2, 0], [6])):
        assert_exact(errors(3, name, lengths, "contiguous", backwards=backwards, stateful=True, scan="ring"))


KERNELS = [(name, size) for name in KINDS if name != "diagonal, complex, shared" for size in (1, 3)]


@pytest.mark.sampled(24)
@pytest.mark.parametrize(("name", "size"), [*KERNELS, ("linear, scalar", 8)])
def test_kernels_cut_over_ranks_equal_the_loop(name, size):
    layout = LAYOUTS[size % len(LAYOUTS)]
    found = errors(size, name, [21, 2], layout, dtype=torch.float32, impl="triton", scan="all_scan", stateful=True)
    assert max(found) < 2e-5, found


@pytest.mark.parametrize("name", ["delta, none", "diagonal", "selective"])
def test_a_chain_sends_the_state_and_nothing_else(name):
    """And the others what the transition is made of: a matrix, a decay for each channel, the sum of the steps."""
    state, transition = {"delta, none": (H * K * V, H * K * K), "diagonal": (D, D), "selective": (D * N, D)}[name]

    def body(group, scan):
        ledger = Ledger(group)
        tokens, shared, _ = KINDS[name].inputs(8)
        shard = cut([8], ledger, "contiguous")
        KINDS[name].function([shard.take(x) for x in tokens], shared, shard=shard, group=ledger, scan=scan)
        return ledger.bytes_

    assert sum(run_ranks(2, body, "ring")) == 8 * B * state
    assert sum(run_ranks(2, body, "all_gather")) == 2 * 8 * B * (state + transition)


WRONG = {
    "beta": (lambda how: recurrences.delta_rule(*how["qkv"], torch.zeros(1, 4), **how["where"]), "beta must be"),
    "delta decay": (
        lambda how: recurrences.delta_rule(*how["qkv"], torch.zeros(1, 4, 1), log_decay=torch.zeros(1), **how["where"]),
        "log_decay must be",
    ),
    "scan shapes": (
        lambda how: recurrences.diagonal_scan(torch.zeros(1, 4, 2), torch.zeros(3), **how["where"]),
        "log_a the same, or",
    ),
    "selective": (
        lambda how: recurrences.selective_scan(
            *(torch.zeros(1, 4, 2),) * 2, torch.zeros(2, 3), *(torch.zeros(1, 4, 2),) * 2, **how["where"]
        ),
        "u and delta must be",
    ),
    "state": (
        lambda how: recurrences.diagonal_scan(
            torch.zeros(1, 4, 2), torch.zeros(2), initial_state=torch.zeros(1, 2), **how["where"]
        ),
        "initial_state must be",
    ),
    "tokens": (
        lambda how: recurrences.diagonal_scan(torch.zeros(1, 5, 2), torch.zeros(2), **how["where"]),
        "must hold my 4 tokens",
    ),
    "impl": (
        lambda how: recurrences.diagonal_scan(torch.zeros(1, 4, 2), torch.zeros(2), impl="cuda", **how["where"]),
        "impl must be one of auto, reference, triton, got 'cuda'",
    ),
}


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_an_implementation_that_cannot_run_is_refused_before_tokens_change_places(impl, monkeypatch):
    """Striped tokens are re-laid, and keys and values set out, before any op begins."""
    monkeypatch.setattr(choice, "kernels_are_interpreted", lambda: False)

    def body(group):
        ledger = Ledger(group)
        shard = cut([8], ledger, "striped")
        q = torch.zeros(1, 4, 1, 2)
        for function in (recurrences.linear_attention, attention):
            with pytest.raises(ValueError, match="impl"):
                function(q, q, q, shard=shard, group=ledger, impl=impl)
        return ledger.messages

    assert run_ranks(2, body) == [0, 0]


@pytest.mark.parametrize("fault", WRONG)
def test_bad_input_is_the_same_error_on_every_rank_before_any_message(fault):
    call, words = WRONG[fault]

    def body(group):
        ledger = Ledger(group)
        where = {"shard": cut([8], ledger, "contiguous"), "group": ledger}
        with pytest.raises(ValueError, match=words):
            call({"where": where, "qkv": [torch.zeros(1, 4, 1, 2)] * 3})
        return ledger.messages

    assert run_ranks(2, body) == [0, 0]
