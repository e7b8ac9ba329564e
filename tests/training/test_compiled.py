"""Compiled blocks: the numbers of eager ones, one break of the graph at the crossing, nothing anew for new lengths."""

import copy
import random

import pytest
import torch
from torch._dynamo.utils import counters

from seqpar import Cut, sequence_parallel
from seqpar.collectives import alone
from seqpar.models import Decoder, DecoderConfig

MIXERS = ("linear_attention", "gla", "gated_deltanet", "mamba2")


def blocks(name):
    torch.manual_seed(0)
    block = Decoder(DecoderConfig(name, dim=16, heads=2)).blocks[0]
    return block, copy.deepcopy(block)


def drawn(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(2, 12) for _ in range(rng.randint(2, 4))]
    return lengths, torch.randn(2, sum(lengths), 16, generator=torch.Generator().manual_seed(seed))


def check_blocks(name, batches, backend):
    torch.compiler.reset()
    counters.clear()
    eager, block = blocks(name)
    compiled = torch.compile(block, backend=backend)
    for seed in range(batches):
        lengths, x = drawn(seed)
        expected, found = (each(x, Cut.whole(lengths)) for each in (eager, compiled))
        assert (found - expected).norm() <= 1e-6 * expected.norm()
        up = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1000))
        for mine, other in zip(*(torch.autograd.grad(y, list(m.parameters()), up) for y, m in
                                 ((found, block), (expected, eager)))):  # fmt: skip
            assert (mine - other).norm() <= 1e-5 * (1e-3 + other.norm())
        if seed == 0:
            assert counters["stats"]["unique_graphs"] == 2, "what is before the crossing, and what is after it"
        if seed == 1:
            warm = counters["stats"]["unique_graphs"]
            assert warm <= 4, "once more for tokens of any number"
    assert counters["stats"]["unique_graphs"] == warm, "compiled again for other lengths"


def test_a_compiled_block():
    check_blocks("softmax", 5, "eager")


@pytest.mark.nightly
@pytest.mark.parametrize("name", ("softmax", *MIXERS))
def test_compiled_blocks_over_fifty_batches(name):
    check_blocks(name, 50, "aot_eager")


def test_a_compiled_wrapper_is_right_and_compiles_the_model_inside():
    torch.compiler.reset()
    torch.manual_seed(0)
    plain = sequence_parallel(Decoder(DecoderConfig("softmax", dim=16, heads=2)), group=alone())
    around, inside = torch.compile(copy.deepcopy(plain), backend="eager"), copy.deepcopy(plain)
    inside.compile(backend="eager")
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    losses = []
    for model in (plain, around, inside):
        loss = model(tokens, labels=tokens, lengths=[13, 7]).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)
    for other in (around, inside):
        for mine, right in zip(other.parameters(), plain.parameters()):
            assert (mine.grad - right.grad).norm() <= 1e-5 * (1e-6 + right.grad.norm())
