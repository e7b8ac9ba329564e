"""The loss is that of one device: labels shifted before the cut, one normaliser, ranks without labels included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar import Shard, next_token_loss
from seqpar.collectives import Ledger, run_ranks
from tests.cutting import LAYOUTS, cut, relative_error, tensors

VOCABULARY = 7


def oracle(logits, labels, lengths):
    """Token by token: each predicts its successor in its own document."""
    losses, start = [], 0
    for length in lengths:
        for t in range(start, start + length - 1):
            for b in range(len(labels)):
                if labels[b, t + 1] != -100:
                    losses.append(-logits[b, t].log_softmax(-1)[labels[b, t + 1]])
        start += length
    return torch.stack(losses).mean() if losses else logits.sum() * 0


def check(size, lengths, layout, keep, seed=0):
    """Compare loss and gradient; labels outside the token range ``keep`` are ignored."""
    s = sum(lengths)
    (logits,) = tensors(seed, (2, s, VOCABULARY))
    labels = torch.randint(VOCABULARY, (2, s), generator=torch.Generator().manual_seed(seed))
    labels[:, : keep[0]] = -100
    labels[:, keep[1] :] = -100
    logits.requires_grad_()
    expected = oracle(logits, labels, lengths)
    (gradient,) = torch.autograd.grad(expected, logits)

    def body(group):
        shard = cut(lengths, group, layout, seed)
        mine = shard.take(logits.detach()).clone().requires_grad_()
        loss = next_token_loss(mine, labels, shard=shard, group=group)
        loss.backward()
        return loss.detach(), mine.grad, shard.take(gradient)

    ranks = run_ranks(size, body)
    assert len({loss.item() for loss, *_ in ranks}) == 1, "every rank returns the same bits"
    assert abs(ranks[0][0] - expected.detach()) <= 1e-12 * max(1.0, expected.detach().abs())
    assert relative_error([(got, want) for _, got, want in ranks], gradient) < 1e-10


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(lambda x: sum(x) > 0),
    size=st.integers(1, 6),
    layout=st.sampled_from(LAYOUTS),
    keep=st.tuples(st.integers(0, 30), st.integers(0, 60)),
    seed=st.integers(0, 5),
)
def test_equals_one_device(lengths, size, layout, keep, seed):
    check(size, lengths, layout, keep, seed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_last_rank_has_labels_or_none_has(layout):
    check(4, [20, 4], layout, (19, 24))
    check(4, [20, 4], layout, (24, 24))


def test_documents_of_one_token_have_no_target():
    check(3, [1, 1, 1, 1], "contiguous", (0, 4))


@pytest.mark.spmd(1, 2, 4)
def test_in_every_world(group):
    (logits,) = tensors(0, (1, 9, VOCABULARY))
    labels = torch.arange(9)[None] % VOCABULARY
    shard = Shard.of([4, 5], group)
    loss = next_token_loss(shard.take(logits), labels, shard=shard, group=group)
    assert abs(loss - oracle(logits, labels, [4, 5])) < 1e-12


def test_one_number_is_summed():
    def body(group):
        ledger, shard = Ledger(group), Shard.of([8], group)
        logits = torch.zeros(1, shard.num_local, VOCABULARY, requires_grad=True)
        next_token_loss(logits, torch.zeros(1, 8, dtype=torch.int64), shard=shard, group=ledger).backward()
        return dict(ledger.bytes_by_verb)

    assert run_ranks(1, body) == [{}]
    assert run_ranks(2, body) == [{"all_reduce": 4}] * 2


def test_bad_input():
    def body(group):
        shard = Shard.of([8], group)
        with pytest.raises(ValueError, match=rf"rank {group.rank} of 2: labels must be \[batch, 8\], unshifted, got"):
            next_token_loss(torch.zeros(1, 4, 3), torch.zeros(1, 4), shard=shard, group=group)
        with pytest.raises(ValueError, match=rf"rank {group.rank} of 2: logits must be \[batch, 4, vocabulary\], got"):
            next_token_loss(torch.zeros(1, 8, 3), torch.zeros(1, 8), shard=shard, group=group)

    run_ranks(2, body)
