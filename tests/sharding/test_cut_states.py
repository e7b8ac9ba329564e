"""A hybrid prefilled over ranks and trained in chunks with states over ranks is one pass on one device."""

import pytest
import torch

from seqpar import Cut, Shard, States, next_token_targets, sum_over_ranks
from seqpar.models import Decoder, DecoderConfig

CHUNKS, WORDS = (9, 1, 14, 6), 13
SIZE = sum(CHUNKS)


def hybrid(pattern="gla softmax deltanet softmax"):
    model = Decoder(DecoderConfig(pattern, vocabulary=WORDS, dim=16, heads=2)).double()
    for seed, parameter in enumerate(model.parameters()):
        noise = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        parameter.data = 0.3 * noise
    return model


def windowed(model, window):
    for block in model.blocks:
        if hasattr(block.mixer, "window"):
            block.mixer.window = window
    return model


def tokens():
    return torch.randint(WORDS, (2, SIZE), generator=torch.Generator().manual_seed(5))


def loss_of(logits, targets):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def gradients(model, group=None):
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    return flat if group is None else group.all_reduce(flat).wait()


@pytest.mark.spmd(1, 2, 4)
@pytest.mark.parametrize(("layout", "window"), [("contiguous", None), ("zigzag", 5), ("striped", None)])
def test_chunks_over_ranks_are_one_pass_on_one_device(group, layout, window):
    targets = next_token_targets(tokens(), [SIZE])
    whole = windowed(hybrid(), window)
    expected = loss_of(whole(tokens(), Cut.whole([SIZE])), targets)
    expected.backward()
    model, states, total, start = windowed(hybrid(), window), States(), 0.0, 0
    for count in CHUNKS:  # gradients go back through all chunks
        cut = Cut(Shard.of([count], group, layout), group, states=states)
        rows = slice(start, start + count)
        logits = model(cut.shard.take(tokens()[:, rows]), cut)
        total = total + sum_over_ranks(loss_of(logits, cut.shard.take(targets[:, rows])), cut)
        states, start = states.next(), start + count
    total.backward()
    assert abs(total.item() - expected.item()) <= 1e-10 * expected.item()
    right = gradients(whole)
    assert (gradients(model, group) - right).norm() <= 1e-10 * right.norm()


@pytest.mark.spmd(4)
def test_a_prefill_over_ranks_is_gone_on_with_on_one(group):
    """The states are the same on every rank; decoding goes on from them token by token."""
    model, states = hybrid(), States()
    whole = model(tokens(), Cut.whole([SIZE]))
    with torch.no_grad():
        cut = Cut(Shard.of([SIZE - 4], group), group, states=states)
        model(cut.shard.take(tokens()[:, : SIZE - 4]), cut)
        states = states.next()
        for place in range(SIZE - 4, SIZE):
            logits, states = model.step(tokens()[:, place], states)
            assert (logits - whole[:, place]).norm() <= 1e-10 * whole[:, place].norm()


@pytest.mark.spmd(1, 3)
def test_documents_in_a_chunk_keep_to_themselves(group):
    """The first goes on with what came before; the last is gone on with."""
    model, states = hybrid("softmax"), States()
    lengths, chunks = [8, 5, 9], ([6], [2, 5, 3], [6])
    given = tokens()[:, : sum(lengths)]
    expected = model(given, Cut.whole(lengths))
    start = 0
    for chunk in chunks:
        cut = Cut(Shard.of(chunk, group, "zigzag"), group, states=states)
        rows = slice(start, start + sum(chunk))
        logits = cut.shard.gather(model(cut.shard.take(given[:, rows]), cut))
        assert (logits - expected[:, rows]).norm() <= 1e-10 * expected[:, rows].norm()
        states, start = states.next(chunk), rows.stop
