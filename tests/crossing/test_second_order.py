"""Second derivatives of every public function: right on one device, or ValueError with its name; never lost."""

import pytest
import torch
from torch.autograd.functional import hvp

from seqpar import Shard
from seqpar.collectives import Span, Summary, alone, exclusive_scan, halo, run_ranks
from seqpar.crossing.attention import attention
from seqpar.crossing.convolution import causal_conv, grid_conv, symmetric_conv, token_shift
from seqpar.crossing.document_memory import document_memories
from seqpar.crossing.document_sum import document_sum
from seqpar.crossing.preceding import preceding
from seqpar.crossing.recurrences import delta_rule, diagonal_scan, linear_attention, linear_system, selective_scan
from seqpar.crossing.replicated import scale_gradient, whole_gradient
from seqpar.layers.parts.sequence_norm import moments
from seqpar.ops.decayed_linear_attention.bidirectional import bidirectional
from seqpar.ops.softmax_block import block_attention
from seqpar.ops.softmax_block.bands import Band
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.relayout import relayout, split_heads, tokens_to_heads
from tests.cutting import tensors

TOKENS = 12
W4, W9 = tensors(1, (4, 3), (4, 3, 3))
A, B, C = tensors(2, (1, 3, 3), (1, 3), (1, 1, 3))


def unit(x):
    return x.unflatten(-1, (1, 4)) / (1 + x.unflatten(-1, (1, 4)).norm(dim=-1, keepdim=True))


# Each takes my tokens ``x [1, t, 4]``, which stand for all of a function's inputs.
FUNCTIONS = {
    "attention": lambda x, s, g: attention(unit(x), unit(x), unit(x), shard=s, group=g),
    "attention by heads": lambda x, s, g: attention(
        *[x.unflatten(-1, (4, 1))] * 3, shard=s, group=g, transport="all_to_all"
    ),
    "linear_attention": lambda x, s, g: linear_attention(unit(x), unit(x), unit(x), shard=s, group=g),
    "delta_rule": lambda x, s, g: delta_rule(unit(x), unit(x), unit(x), x[..., :1].sigmoid(), shard=s, group=g),
    "diagonal_scan": lambda x, s, g: diagonal_scan(x, -x.square(), shard=s, group=g),
    "selective_scan": lambda x, s, g: selective_scan(
        x, x.square(), -torch.ones(4, 2, dtype=x.dtype), x[..., :2], x[..., 2:], shard=s, group=g
    ),
    "linear_system": lambda x, s, g: linear_system(x.unflatten(-1, (1, 4)), 0.3 * A, B, C, shard=s, group=g),
    "causal_conv": lambda x, s, g: causal_conv(x, W4, shard=s, group=g),
    "symmetric_conv": lambda x, s, g: symmetric_conv(x, W4, shard=s, group=g),
    "grid_conv": lambda x, s, g: grid_conv(x, W9, width=3, shard=s, group=g),
    "token_shift": lambda x, s, g: token_shift(x, shard=s, group=g),
    "preceding": lambda x, s, g: preceding(x, 2, shard=s, group=g).rows,
    "document_sum": lambda x, s, g: document_sum(x, shard=s, group=g),
    "document_memories": lambda x, s, g: document_memories([(unit(x), unit(x))], shard=s, group=g)[0].read(unit(x)),
    "moments": lambda x, s, g: torch.stack(moments(x, shard=s, group=g)),
    "relayout": lambda x, s, g: relayout(x, s, Shard.of(s.lengths, g, "striped"), g, Slot()),
    "tokens_to_heads": lambda x, s, g: tokens_to_heads(
        x.unflatten(-1, (4, 1)), s, g, split_heads(4, 4, g.size).queries, Slot()
    ),
    "Shard.gather": lambda x, s, g: s.gather(x),
    "halo": lambda x, s, g: halo(
        x, g, [[Span(0, TOKENS // g.size * r, TOKENS // g.size)] for r in range(g.size)], left=1
    ),
    "exclusive_scan": lambda x, s, g: exclusive_scan(Summary(x[:, :2]), g),
    "bidirectional": lambda x, s, g: bidirectional(unit(x), unit(x), unit(x), None, None),
    "block_attention": lambda x, s, g: torch.cat(
        [y.flatten() for y in block_attention(*[unit(x)] * 3, Band(high=0), 1.0)]
    ),
    "whole_gradient": lambda x, s, g: whole_gradient(x, g),
    "scale_gradient": lambda x, s, g: scale_gradient(x, 2),
}


def energy(function, x, shard, group):
    return (function(x, shard, group) ** 2).sum() + 0.1 * (x**3).sum()


def asked(group, function, ask):
    """The second derivative that ``ask`` takes on this rank, of a function and a term beside it."""
    shard = Shard.of([TOKENS], group)
    x = shard.take(tensors(0, (1, TOKENS, 4))[0]).clone().requires_grad_()
    if ask == "hvp":
        return hvp(lambda x: energy(function, x, shard, group), x, torch.ones_like(x))[1]
    value = energy(function, x, shard, group)
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    total = value + gradient.square().sum()
    if ask == "grad":
        return torch.autograd.grad(total, x)[0]
    total.backward()
    return x.grad


def by_differences(function, ask):
    """The same on one device, from first derivatives a little to either side."""
    shard, small = Shard.of([TOKENS], alone()), 1e-5
    x = tensors(0, (1, TOKENS, 4))[0]

    def slope(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(energy(function, x, shard, alone()), x)[0]

    along = torch.ones_like(x) if ask == "hvp" else slope(x)
    second = (slope(x + small * along) - slope(x - small * along)) / (2 * small)
    return second if ask == "hvp" else slope(x) + 2 * second


@pytest.mark.parametrize("ask", ["backward", "grad", "hvp"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_are_right_or_refused_by_name(name, ask):
    function, word = FUNCTIONS[name], name.partition(" ")[0]

    def on_one():
        try:
            return asked(alone(), function, ask)
        except ValueError as error:
            assert word in str(error)
            assert "cannot be differentiated again" in str(error)
            return None

    def on_two(group):
        with pytest.raises(ValueError, match="cannot be differentiated again"):
            asked(group, function, ask)

    found = on_one()
    if found is not None:
        expected = by_differences(function, ask)
        assert (found - expected).norm() <= 1e-6 * expected.norm()
    if name not in ("bidirectional", "block_attention", "scale_gradient") or found is None:
        run_ranks(2, on_two)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_graph_of_first_derivatives_changes_none(name):
    """``create_graph=True`` alone is no second derivative."""

    def body(group):
        shard = Shard.of([TOKENS], group)
        x = shard.take(tensors(0, (1, TOKENS, 4))[0]).clone().requires_grad_()
        return [
            torch.autograd.grad(energy(FUNCTIONS[name], x, shard, group), x, create_graph=create)[0].detach()
            for create in (False, True)
        ]

    for plain, with_graph in run_ranks(2, body):
        assert torch.equal(plain, with_graph)


def test_transforms_of_torch_func_are_refused_by_name():
    x, shard = tensors(0, (1, TOKENS, 4))[0], Shard.of([TOKENS], alone())
    with pytest.raises(ValueError, match=r"attention: transforms of torch\.func"):
        torch.func.grad(lambda x: energy(FUNCTIONS["attention"], x, shard, alone()))(x)


def test_a_penalty_that_does_not_cross_is_right():
    """Of the loss with respect to logits: nothing of it went through a function that crosses cuts."""
    logits = tensors(3, (1, TOKENS, 5))[0].requires_grad_()
    loss = logits.logsumexp(-1).sum()
    scaled = whole_gradient(logits, alone()).square().sum()
    (gradient,) = torch.autograd.grad(loss + scaled, logits, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), logits)
    assert torch.isfinite(second).all()
