"""Models whose sequence is cut and whose activations leave: the same bits on every rank, for every layout and tier."""

import pytest
import torch
from torch import nn

from seqpar import Cut, sequence_parallel
from seqpar.collectives import alone, run_ranks
from seqpar.crossing.attention import TRANSPORTS
from seqpar.layers import GLA, LightningAttention, LinearAttention, Retention, SoftmaxAttention
from seqpar.models import HybridLM
from seqpar.models.hybrid import MIXERS, HybridConfig
from seqpar.offload.planning.strategies import Fractions
from seqpar.offload.runtime.activations import activations
from seqpar.offload.runtime.file_tier import FileTier
from seqpar.offload.runtime.tiers import HostTier
from seqpar.sharding.shard import LAYOUTS, Shard
from seqpar.training.swapped import is_checkpointed, swapped_cut

LENGTHS = [70, 0, 1, 150, 67]
SWAP, HALF = Fractions(0.0, 1.0, 0.0), Fractions(0.5, 0.5, 0.0)
AGAIN, MIXED = Fractions(0.0, 0.0, 1.0), Fractions(0.25, 0.25, 0.5)


class Swapped(nn.Module):
    """A model that runs under swapping (or not: ``fate=None``)."""

    def __init__(self, model, fate, tier=None):
        super().__init__()
        self.model, self.swap = model, None
        if fate is not None:
            self.swap = activations(model, fate, tier=tier, keep_last=1, smallest_bytes=512)

    def forward(self, tokens, cut):
        if self.swap is None:
            return self.model(tokens, cut)
        with self.swap:
            return self.model(tokens, swapped_cut(cut, self.swap, checkpointed=is_checkpointed(self.model)))


def build(mixer="linear_attention", checkpoint=False, **sizes):
    model = HybridLM(
        HybridConfig(dim=16, heads=2, softmax_every=2, mixer=mixer, checkpoint=checkpoint, **sizes)
    ).double()
    generator = torch.Generator().manual_seed(0)  # thread ranks must not share the global generator
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def batch(lengths, seed=0, rows=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (rows, sum(lengths)), generator=generator)


def steps(group, fate, tier=None, cut=None, num_steps=1, lengths=LENGTHS, micro_batches=1, **model):
    """Losses and gradients of some steps, and what the last one left to be swapped and computed again."""
    inner = Swapped(build(**model), fate, tier() if tier else None)
    wrapped = sequence_parallel(inner, group=group, **(cut or {}))
    found = []
    for number in range(num_steps):
        wrapped.zero_grad()
        losses = []
        for part in range(micro_batches):
            tokens = batch(lengths, 10 * number + part)
            losses.append(wrapped(tokens, labels=tokens, lengths=lengths).loss)
        sum(losses).backward()
        found.append([torch.stack(losses).detach(), *(p.grad.clone() for p in inner.parameters())])
    saved = () if inner.swap is None else inner.swap.saved
    return found, sum(s.swapped_bytes for s in saved), sum(s.recomputed_bytes for s in saved)


def assert_same(ranks, plain, exact=True):
    for (found, *_), (expected, *_) in zip(ranks, plain):
        for step, reference in zip(found, expected):
            for mine, other in zip(step, reference):
                if exact:
                    assert torch.equal(mine, other)
                else:
                    assert (mine - other).norm() <= 1e-12 * other.norm()


def compared(size, fate, exact=True, **options):
    """Runs both ways on ``size`` thread ranks; returns what was swapped and recomputed on rank 0."""
    tier = options.pop("tier", None)
    swapped = run_ranks(size, lambda group: steps(group, fate, tier, **options))
    assert_same(swapped, run_ranks(size, lambda group: steps(group, None, **options)), exact)
    return swapped[0][1:]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["host", "file"])
def test_the_same_bits_on_the_first_and_the_tenth_step(size, kind, tmp_path):
    tier = HostTier if kind == "host" else lambda: FileTier(tmp_path, checksum=True)
    swapped, _ = compared(size, HALF, tier=tier, num_steps=10)
    assert swapped > 0


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_layout_and_transport(layout, transport):
    for size in (2, 3):
        for fate in (SWAP, AGAIN):
            compared(size, fate, exact=fate is SWAP, cut={"layout": layout, "transport": transport})


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("fate", [SWAP, AGAIN, MIXED])
def test_every_mixer(mixer, fate):
    """Computed again, too, the bits are the same where nothing changes for the matrix products: all rows, as before."""
    exact = fate is not MIXED
    swapped, again = compared(1, fate, exact=exact, mixer=mixer)
    assert swapped > 0 and (again > 0) == (fate is not SWAP)
    compared(2, fate, exact=False, mixer=mixer)


@pytest.mark.parametrize("fate", [SWAP, MIXED])
def test_checkpointed_blocks_and_accumulation(fate):
    for options in ({"checkpoint": True}, {"micro_batches": 3}, {"checkpoint": True, "micro_batches": 2}):
        swapped, again = compared(2, fate, exact=fate is SWAP, **options)
        assert swapped > 0
        assert again == 0 or "checkpoint" not in options


def test_of_checkpointed_blocks_only_the_inputs_leave():
    inner = Swapped(build(checkpoint=True), AGAIN)
    tokens = batch(LENGTHS)
    sequence_parallel(inner, group=alone())(tokens, labels=tokens, lengths=LENGTHS).loss.backward()
    assert [saved.name for saved in inner.swap.saved] == ["layer_input"] * 3


def test_checkpointed_blocks_send_nothing_again():
    """What crossed the cuts is kept for them."""
    from collections import Counter

    from seqpar.collectives import Ledger

    def sent(group, fate):
        ledger = Ledger(group)
        steps(ledger, fate, checkpoint=True, cut={"transport": "all_gather"})
        return Counter(ledger.bytes_by_verb)

    assert run_ranks(2, lambda group: sent(group, MIXED)) == run_ranks(2, lambda group: sent(group, None))


@pytest.mark.spmd(1, 2, 4)
def test_in_every_world(group, tmp_path):
    for fate in (HALF, MIXED):
        swapped = steps(group, fate, lambda: FileTier(tmp_path, checksum=True))
        assert_same([swapped], [steps(group, None)], exact=fate is HALF)


def test_more_ranks_than_tokens():
    compared(4, MIXED, lengths=[2], exact=False)
    compared(3, SWAP, lengths=[1, 1])


@pytest.mark.parametrize("size", [1, 3])
def test_token_wise_parts_of_every_block_are_computed_again(size):
    """All but layer input, attention output and what mixes tokens: that is where the memory is."""
    swapped, again = compared(size, AGAIN, exact=False, lengths=[64 * 7 + 1])
    assert again > swapped


# --- layers in three parts -------------------------------------------------------------------------------------------

LAYERS = {
    "softmax": lambda: SoftmaxAttention(16, 4, kv_heads=2),
    "window": lambda: SoftmaxAttention(16, 4, window=5, rope_base=None),
    "linear": lambda: LinearAttention(16, 2),
    "normaliser": lambda: LinearAttention(16, 2, normaliser=True),
    "lightning": lambda: LightningAttention(16, 2, layers=2),
    "retention": lambda: Retention(16, 2),
    "gla": lambda: GLA(16, 2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_project_and_finish_treat_every_token_by_itself(name):
    """For some of the tokens they give what they give for all; otherwise nothing could be computed again."""
    torch.manual_seed(1)
    layer = LAYERS[name]().double()
    shard = Shard.of([9, 14], alone())
    x = torch.randn(2, 23, 16, dtype=torch.float64)
    parts = layer.project(x, shard.positions)
    o = layer.mix(parts, Cut.whole([9, 14]))
    whole = layer.finish(o, x)
    assert torch.equal(whole, layer(x, Cut.whole([9, 14])))
    for rows in (slice(0, 1), slice(5, 17), slice(11, 23)):
        for part, alike in zip(layer.project(x[:, rows], shard.positions[rows]), parts, strict=True):
            assert (part - alike[:, rows]).norm() <= 1e-14 * alike.norm()
        assert (layer.finish(o[:, rows], x[:, rows]) - whole[:, rows]).norm() <= 1e-14 * whole.norm()
    other = x.clone()
    other[:, 7] += 1
    changed = [p for p, q in zip(layer.project(other, shard.positions), parts) if not torch.equal(p, q)]
    assert changed and all(
        torch.equal(p[:, 8:], q[:, 8:]) for p, q in zip(layer.project(other, shard.positions), parts)
    )
