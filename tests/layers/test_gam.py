"""Gated associative memory is its paper's equation, however it is cut, all at once or step by step."""

from collections.abc import Sequence
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from seqpar import Cut, Shard
from seqpar.collectives import Group, Ledger, run_ranks
from seqpar.layers import Block
from seqpar.layers.local.gam import GAM
from tests.cutting import LAYOUTS, cut, leaves, relative_error, spread, tensors
from tests.oracles.convolution import convolution

LENGTHS = [6, 0, 1, 9, 2]
DIM, SLOTS = 5, 7
T = TypeVar("T", bound=nn.Module)


def drawn(module: T) -> T:
    """The module with the same weights on every rank."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.double().parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return module


def layer_of(width: int = 3) -> GAM:
    return drawn(GAM(DIM, slots=SLOTS, width=width))


def gam(layer: GAM, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Token by token: the convolution of the oracle, and the memory slot by slot."""
    conv = layer.conv
    local = convolution(x, conv.weight, conv.bias, lengths=lengths, left=conv.weight.shape[1] - 1)
    outputs = []
    for token, near in zip(x.unbind(1), local.unbind(1)):
        shares = torch.stack([(token * slot).sum(-1).exp() for slot in layer.slots], -1)
        recalled = sum(share[:, None] * slot for share, slot in zip(shares.unbind(-1), layer.slots))
        gates = (token @ gate.weight.T + gate.bias for gate in (layer.local_gate, layer.global_gate))
        near_gate, far_gate = (1 / (1 + (-gate).exp()) for gate in gates)
        outputs.append(near_gate * near + far_gate * recalled / shares.sum(-1, keepdim=True))
    return torch.stack(outputs, 1)


def pairs(group: Group, layout: str, width: int) -> list[tuple[Tensor, Tensor]]:
    """(got, expected) on this rank: output, gradients of input and parameters."""
    layer, (x, upstream) = layer_of(width), tensors(0, (2, sum(LENGTHS), DIM), (2, sum(LENGTHS), DIM))
    x.requires_grad_()
    out = gam(layer, x, LENGTHS)
    expected = torch.autograd.grad(out, [x, *layer.parameters()], upstream)
    shard = cut(LENGTHS, group, layout, 2)
    (mine,) = leaves(shard, x.detach())
    got = layer(mine, Cut(shard, group))
    grads = torch.autograd.grad(got, [mine, *layer.parameters()], shard.take(upstream))
    share = group.size**-0.5
    found = [(got.detach(), shard.take(out.detach())), (grads[0], shard.take(expected[0]))]
    return found + [(group.all_reduce(g).wait() * share, e * share) for g, e in zip(grads[1:], expected[1:])]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_equation_on_any_number_of_ranks(layout: str, size: int) -> None:
    for width in (3, 6):
        for parts in spread(run_ranks(size, pairs, layout, width)):
            whole = torch.cat([expected.flatten() for _, expected in parts])
            assert relative_error(parts, whole) < 1e-12


@pytest.mark.spmd(1, 2, 4)
def test_in_every_world(group: Group) -> None:
    for got, expected in pairs(group, "zigzag", 3):
        assert (got - expected).norm() <= 1e-12 * (1 + expected.norm())


def test_only_the_window_crosses_a_cut() -> None:
    """Two inputs forward, two gradients back, whatever the number of tokens and slots."""

    def sent(group: Group, tokens: int) -> tuple[int, int]:
        ledger, shard = Ledger(group), Shard.of([tokens], group)
        (x,) = leaves(shard, torch.zeros(1, tokens, DIM))
        y = layer_of()(x, Cut(shard, ledger))
        forward = ledger.bytes_
        y.sum().backward()
        return forward, ledger.bytes_ - forward

    row = DIM * 8
    for tokens in (12, 120):
        assert run_ranks(3, sent, tokens) == [(2 * row, 0), (2 * row, 2 * row), (0, 2 * row)]


def test_steps_give_the_same_as_all_at_once() -> None:
    layer, (x,) = layer_of(), tensors(1, (2, 7, DIM))
    state, outputs = torch.zeros(2, 2, DIM, dtype=torch.float64), []
    for token in x.unbind(1):
        y, state = layer.step(token, state)
        outputs.append(y)
    whole = layer(x, Cut.whole([7]))
    assert (torch.stack(outputs, 1) - whole).norm() < 1e-13 * whole.norm()
    assert torch.equal(state, x[:, -2:])


def test_checkpointing_a_block_changes_no_bit_and_sends_nothing_again() -> None:
    def outcome(group: Group, checkpoint: bool) -> tuple[tuple[Tensor, ...], int]:
        ledger, block = Ledger(group), drawn(Block(DIM, layer_of(), 8, checkpoint=checkpoint))
        shard = Shard.of(LENGTHS, group, "zigzag")
        (x,) = leaves(shard, *tensors(2, (1, sum(LENGTHS), DIM)))
        y = block(x, Cut(shard, ledger))
        return torch.autograd.grad(y, [x, *block.parameters()], x.detach()), ledger.bytes_

    for (plain, sent), (again, sent_again) in zip(run_ranks(3, outcome, False), run_ranks(3, outcome, True)):
        assert sent == sent_again
        assert all(torch.equal(one, other) for one, other in zip(plain, again))


def test_half_precision_softmax_is_not_half_precise() -> None:
    layer, (x,) = layer_of().float(), tensors(3, (1, 40, DIM), dtype=torch.float32)
    half = layer_of().bfloat16()
    layer.load_state_dict({name: each.float() for name, each in half.state_dict().items()})
    exact, rounded = (each(x.to(dtype), Cut.whole([40])) for each, dtype in ((layer, x.dtype), (half, torch.bfloat16)))
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("wrong", ["dim", "slots", "width"])
def test_sizes_are_at_least_one(wrong: str) -> None:
    sizes = {"dim": 4, "slots": 4, "width": 3, wrong: 0}
    with pytest.raises(ValueError, match=f"{wrong} must be at least 1, got 0"):
        GAM(sizes["dim"], slots=sizes["slots"], width=sizes["width"])


def test_all_but_the_convolution_treats_every_token_by_itself() -> None:
    layer, (x,) = layer_of(), tensors(4, (2, 9, DIM))
    o = layer.mix(layer.project(x, torch.arange(9)), Cut.whole([9]))
    whole = layer.finish(o, x)
    assert torch.equal(whole, layer(x, Cut.whole([9])))
    for rows in (slice(0, 1), slice(3, 8)):
        assert (layer.finish(o[:, rows], x[:, rows]) - whole[:, rows]).norm() < 1e-14 * whole.norm()
