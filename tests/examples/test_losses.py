"""The losses of examples/losses.py on any number of ranks are those of one device, written in plain torch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from examples import losses
from seqpar import Cut, next_token_targets, sequence_parallel
from seqpar.collectives import alone
from seqpar.collectives.c10d import ProcessRanks
from seqpar.models import Decoder, DecoderConfig

LENGTHS = [5, 1, 13, 4]
WORDS = 11


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def drawn(module, seed=1):
    """The same weights on every rank."""
    for number, parameter in enumerate(module.double().parameters()):
        parameter.data = 0.3 * numbers(*parameter.shape, seed=100 * seed + number)
    return module


def decoder(seed=1):
    return drawn(Decoder(DecoderConfig("softmax linear_attention", vocabulary=WORDS, dim=8, heads=2)), seed)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.experts = decoder(), losses.Experts(8, 12, 3)

    def forward(self, tokens, cut):
        return self.model.head(self.experts(self.model.hidden(tokens, cut), cut))


def tokens():
    return torch.randint(WORDS, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))


def labels():
    return torch.where(torch.arange(sum(LENGTHS)) % 5 == 2, -100, tokens())


def targets():
    return next_token_targets(labels(), LENGTHS)


RETURNS, WEIGHTS = numbers(1, sum(LENGTHS), seed=7), numbers(1, sum(LENGTHS), seed=8).abs()
LAST = torch.tensor(LENGTHS).cumsum(0) - 1
DOCUMENTS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))


def mean_cross_entropy(logits, wanted, **how):
    return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), **how)


def z_of_one(model, call):
    logits, valid = call(model), targets() != -100
    return mean_cross_entropy(logits, targets()) + 1e-2 * (logits.logsumexp(-1)[valid] ** 2).mean()


def smoothed_of_one(model, call):
    return mean_cross_entropy(call(model), targets(), label_smoothing=0.1)


def weighted_of_one(model, call):
    shifted = next_token_targets(WEIGHTS, LENGTHS, 0) * (targets() != -100)
    return (losses.each(call(model), targets()) * shifted).sum() / shifted.sum()


def values_of_one(model, call):
    return (WEIGHTS * (call(model)["values"] - RETURNS) ** 2).sum() / WEIGHTS.sum()


def ahead_of_one(model, call):
    wanted = [next_token_targets(labels(), LENGTHS, ahead=n) for n in (1, 2)]
    found = sum(mean_cross_entropy(x, y, reduction="sum") for x, y in zip(call(model), wanted))
    return found / 7


def distilled_of_one(model, call):
    student, teacher = call(model).log_softmax(-1), call(decoder(2)).log_softmax(-1).detach()
    return (teacher.exp() * (teacher - student)).sum(-1).mean()


def dpo_of_one(model, call):
    def likelihood(logits):
        log = logits.log_softmax(-1)[0]
        wanted = targets()[0]
        return torch.stack(
            [sum(log[i, wanted[i]] for i in range(len(wanted)) if wanted[i] >= 0 and DOCUMENTS[i] == d) + 0 * log.sum()
             for d in range(len(LENGTHS))]
        )  # fmt: skip

    gain = likelihood(call(model)) - likelihood(call(decoder(2))).detach()
    return -functional.logsigmoid(0.1 * (gain[0::2] - gain[1::2])).mean()


def preferred_of_one(model, call):
    values = call(model)["values"][0, LAST]
    return -functional.logsigmoid(values[0::2] - values[1::2]).mean()


def mixture_of_one(model, call):
    hidden = model.model.hidden(tokens(), Cut.whole(LENGTHS))
    shares = model.experts.router(hidden).softmax(-1).flatten(0, 1)
    load = functional.one_hot(shares.argmax(-1), 3).double().mean(0)
    return mean_cross_entropy(call(model), targets()) + 0.3 * (load * shares.mean(0)).sum()


def called(**how):
    return lambda model, wrap: model(tokens(), lengths=LENGTHS, **{name: value() for name, value in how.items()}).loss


VALUES = {"targets": lambda: RETURNS, "weights": lambda: WEIGHTS}
CASES = {
    "z": (decoder, {"loss": losses.z_loss}, called(labels=labels), z_of_one),
    "z, tiled": (decoder, {"loss": losses.z_loss, "loss_tokens": 3}, called(labels=labels), z_of_one),
    "smoothed": (decoder, {"loss": losses.smoothed}, called(labels=labels), smoothed_of_one),
    "weighted": (decoder, {}, called(labels=labels, weights=lambda: WEIGHTS), weighted_of_one),
    "weighted, tiled": (
        decoder,
        {"loss_tokens": 4},
        called(labels=labels, weights=lambda: WEIGHTS),
        weighted_of_one,
    ),
    "values": (
        lambda: drawn(losses.WithValues(decoder())),
        {"loss": losses.value_loss},
        called(**VALUES),
        values_of_one,
    ),
    "ahead": (
        lambda: drawn(losses.SeveralAhead(decoder())),
        {"loss": losses.loss_ahead},
        called(targets=lambda: losses.ahead(labels(), LENGTHS), divisor=lambda: 7),
        ahead_of_one,
    ),
    "distilled": (
        decoder,
        {},
        lambda model, wrap: losses.distilled(model, wrap(decoder(2)), tokens(), LENGTHS),
        distilled_of_one,
    ),
    "dpo": (
        decoder,
        {},
        lambda model, wrap: losses.dpo(model, wrap(decoder(2)), tokens(), labels(), LENGTHS),
        dpo_of_one,
    ),
    "preferred": (
        lambda: drawn(losses.WithValues(decoder())),
        {},
        lambda model, wrap: losses.preferred(model, tokens(), LENGTHS),
        preferred_of_one,
    ),
    "balance": (lambda: drawn(Mixture()), {}, called(labels=labels), mixture_of_one),
}


def one_device(name):
    make, _, _, oracle = CASES[name]
    model = make()
    loss = oracle(model, lambda module: module(tokens(), Cut.whole(LENGTHS)))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, gradients, name):
    loss, expected = one_device(name)
    assert abs(found - loss) <= 1e-10 * abs(loss)
    assert {key for key, g in gradients.items() if g is not None} >= expected.keys()
    norm = sum(each.norm() ** 2 for each in expected.values()) ** 0.5
    for key, each in expected.items():
        assert (gradients[key] - each).norm() <= 1e-10 * norm, key


@pytest.mark.spmd(1, 2, 4)
@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_one_device(group, name):
    make, options, step, _ = CASES[name]
    model = sequence_parallel(make(), group=group, layout="zigzag", **options)
    loss = step(model, lambda other: sequence_parallel(other, group=group, layout="zigzag"))
    loss.backward()
    assert_same(loss.item(), {key: p.grad for key, p in model.module.named_parameters()}, name)


@pytest.mark.spmd(2, 4)
@pytest.mark.parametrize("around", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", CASES)
def test_under_ddp_and_fsdp2_too(group, name, around):
    if not isinstance(group, ProcessRanks) or dist.get_world_size() != group.size:
        pytest.skip("needs a world of as many processes: pytest --world processes")
    make, options, step, _ = CASES[name]
    inner = make()
    if around == "fsdp2":
        mesh = init_device_mesh("cpu", (group.size,))
        for block in getattr(inner, "model", inner).blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(inner, mesh=mesh)
    model = sequence_parallel(inner, group=group, sync_gradients=False, **options)
    outer = DistributedDataParallel(model, find_unused_parameters=True) if around == "ddp" else model
    loss = step(outer, lambda other: sequence_parallel(other, group=group))
    loss.backward()
    found = {key: p.grad for key, p in inner.named_parameters()}
    whole = {key: getattr(g, "full_tensor", lambda g=g: g)() for key, g in found.items() if g is not None}
    assert_same(loss.item(), whole, name)


@pytest.mark.spmd(2)
def test_a_term_that_is_not_the_same_on_every_rank_is_refused(group):
    class MeanOverMine(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = decoder()

        def forward(self, tokens, cut):
            logits = self.model(tokens, cut)
            cut.add_loss((logits**2).mean(), "size")
            return logits

    model = sequence_parallel(MeanOverMine(), group=group)
    with pytest.raises(ValueError, match=r"add_loss\('size'\) got other numbers on other ranks"):
        model(tokens(), labels=labels(), lengths=LENGTHS)


@pytest.mark.spmd(2)
def test_a_sum_over_parts_of_a_batch_with_one_divisor_is_that_of_the_batch(group):
    """Two calls of different numbers of targets, as micro-batches or replicas are, weigh as their targets do."""
    model, tail = sequence_parallel(decoder(), group=group), [*LENGTHS[:-1]]
    parts = [(slice(0, sum(tail)), tail), (slice(sum(tail), None), LENGTHS[-1:])]
    counts = []
    for rows, lengths in parts:
        counts.append(model(tokens()[:, rows], labels=labels()[:, rows], lengths=lengths).num_targets)
    for rows, lengths in parts:
        out = model(tokens()[:, rows], labels=labels()[:, rows], lengths=lengths, divisor=sum(counts))
        assert out.loss_sum / sum(counts) == out.loss
        out.loss.backward()
    whole = sequence_parallel(decoder(), group=group)
    whole(tokens(), labels=labels(), lengths=LENGTHS).loss.backward()
    for mine, other in zip(model.parameters(), whole.parameters()):
        assert (mine.grad - other.grad).norm() <= 1e-12 * (1 + other.grad.norm())


def test_a_loss_that_is_no_sum_is_refused_and_outputs_without_logits_say_what_to_do():
    model = sequence_parallel(
        decoder(), group=alone(), loss=lambda logits, targets, weights: losses.each(logits, targets)
    )
    with pytest.raises(ValueError, match=r"must return a sum, one number, got torch.float64 \[1, 23\]"):
        model(tokens(), labels=labels(), lengths=LENGTHS)
    with pytest.raises(ValueError, match=r"needs sequence_parallel\(loss=...\)"):
        sequence_parallel(drawn(losses.SeveralAhead(decoder())), group=alone())(tokens(), labels=labels())
