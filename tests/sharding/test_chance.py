"""Random numbers of tokens are those of one device, however the sequence is cut, and are drawn again in backward."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqpar import Cut, Shard, sequence_parallel
from seqpar.collectives import Group, alone, run_ranks
from seqpar.layers import Dropout
from seqpar.layers.parts.block import Block
from seqpar.sharding.chance import Chance, philox
from tests.layers.drawn import drawn, relative

LENGTHS = (5, 0, 1, 21)
DIM = 6


class Dropping(nn.Module):
    """Two places that drop, one of which a coin may skip, between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, DIM), nn.Linear(DIM, 11)
        self.first, self.second = Dropout(0.3), Dropout(0.5)

    def body(self, x: Tensor, cut: Cut) -> Tensor:
        x = self.first(x.sin(), cut)
        return self.second(x.exp(), cut) if cut.random(self).of_layer() < 0.5 else x

    def forward(self, tokens: Tensor, cut: Cut) -> Tensor:
        logits: Tensor = self.head(self.body(self.embed(tokens), cut))
        return logits


def words(*numbers: int) -> Any:
    return tuple(torch.tensor(number) for number in numbers)


def test_philox_is_that_of_its_authors() -> None:
    """The known answers of Random123 for ten rounds."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        assert tuple(int(word) for word in philox(words(*counter), key)) == expected


def step(group: Group, layout: str, seed: int, again: str = "") -> dict[str, Tensor]:
    model, shard = copy.deepcopy(MODEL), Shard.of(LENGTHS, group, layout)
    cut = Cut(shard, group, chance=Chance(seed + group.rank))  # rank 0 decides
    x = shard.take(drawn(2, sum(LENGTHS), DIM)).clone().requires_grad_()
    y = checkpoint(model.body, x, cut, use_reentrant=again == "reentrant") if again else model.body(x, cut)
    y.backward(shard.take(drawn(2, sum(LENGTHS), DIM, seed=1)))
    assert x.grad is not None
    return {"output": shard.gather(y.detach()), "input": shard.gather(x.grad)}


MODEL = Dropping().double()


@pytest.mark.parametrize("layout", ("contiguous", "zigzag", "striped"))
@pytest.mark.parametrize("again", ("", "reentrant", "not reentrant"))
def test_ranks_draw_what_one_draws(layout: str, again: str) -> None:
    skipped = set()
    for seed in (0, 1, 5, 6):
        expected = step(alone(), "contiguous", seed)
        zeros = (expected["output"] == 0).double().mean()
        skipped.add(bool(zeros < 0.4))  # 0.3 where the coin skips, otherwise 0.5
        for size in (2, 3):
            for outcome in run_ranks(size, lambda group: step(group, layout, seed, again)):  # noqa: B023
                assert all(torch.equal(outcome[part], expected[part]) for part in expected)
    assert skipped == {False, True}  # both sides of the coin were seen


def test_masks_differ_between_passes_layers_calls_sequences_and_tokens() -> None:
    layers, x = (Dropout(), Dropout()), torch.ones(2, 64, 64)
    cut, other = Cut.whole([64]), Cut.whole([64])
    found = [each.random(layer).of_tokens(x) for each in (cut, other) for layer in layers for _ in range(2)]
    streams = torch.stack([sequence for each in found for sequence in (*each, *each.transpose(1, 2))]).flatten(1)
    assert torch.corrcoef(streams).fill_diagonal_(0).abs().max() < 0.1
    assert abs(streams.mean() - 0.5) < 0.01 and abs(streams.var() - 1 / 12) < 0.01
    assert streams.min() >= 0 and streams.max() < 1


def test_dropout_keeps_the_mean_and_does_nothing_outside_of_training() -> None:
    x, cut = torch.ones(1, 500, 40), Cut.whole([500])
    y = Dropout(0.2)(x, cut)
    assert set(y.unique().tolist()) == {0.0, 1.25} and abs(y.mean() - 1) < 0.02
    assert torch.equal(Dropout(0.2).eval()(x, cut), x) and not Dropout(1.0)(x, cut).any()
    with pytest.raises(ValueError, match="from 0 to 1"):
        Dropout(1.5)
    with pytest.raises(ValueError, match="my 500 tokens"):
        Dropout(0.2)(x[:, :7], cut)


def test_a_module_called_twice_is_not_computed_again() -> None:
    layer, cut = Dropout(), Cut.whole([4])
    x = torch.ones(1, 4, 3, requires_grad=True)
    y = checkpoint(lambda x: layer(layer(x, cut), cut), x, use_reentrant=False)
    with pytest.raises(ValueError, match="one module for each call"):
        y.sum().backward()


def test_other_random_numbers_are_refused_in_a_cut_model() -> None:
    model = Dropping()
    model.head = nn.Sequential(nn.Linear(DIM, 11), nn.Dropout(0.1))
    tokens = torch.zeros(1, 12, dtype=torch.int64)

    def body(group: Group) -> None:
        cut = sequence_parallel(copy.deepcopy(model), group=group)
        cut(tokens)

    run_ranks(1, body)
    with pytest.raises(ValueError, match=r"head\.1 \(Dropout\).*seqpar\.layers\.Dropout"):
        run_ranks(2, body)
    model.eval()
    run_ranks(2, body)


def test_a_checkpointed_block_draws_again_what_torch_drew() -> None:
    """On one rank torch's own dropout is right, too: the gradient is that of the output that was seen."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor, cut: Cut) -> Tensor:
            y: Tensor = self.drop(x)
            return y

    block, cut, x, grads = Block(DIM, Mixer(), 8).double(), Cut.whole([9]), drawn(1, 9, DIM), []
    for again in (False, True):
        block.checkpoint = again
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        y = block(leaf, cut)
        torch.manual_seed(4)
        grads.append(torch.autograd.grad(y.square().sum(), leaf)[0])
    assert relative(grads[1], grads[0]) < 1e-12
