"""What is done to scores, over a cut sequence, is what is done on one device: random programs against an fp64 loop."""

import random

import pytest
import torch

from seqpar import Scores, Shard, attention
from seqpar.collectives import Ledger, run_ranks
from seqpar.crossing.attention import TRANSPORTS
from tests.cutting import LAYOUTS, cut, leaves, relative_error, spread, tensors
from tests.oracles.scores import scored_attention

BATCH, K_DIM, V_DIM = 2, 6, 4
CUT = ("q", "k", "v")  # what ranks hold their rows of; all else is the same on every rank


def program(seed):
    """Lengths, layout, ranks, options and parameters of one call, drawn from a seed."""
    rng = random.Random(seed)
    lengths = [rng.choice((0, 1, 2, rng.randint(0, 23))) for _ in range(rng.randint(1, 5))] + [rng.randint(1, 9)]
    heads = rng.choice(((4, 4), (4, 2), (6, 1), (3, 3)))
    causal = rng.random() < 0.5
    options = {"causal": causal}
    if rng.random() < 0.6:
        left, right = (rng.choice((None, 0, 1, 3, 7, 20)) for _ in range(2))
        options["window"] = (left, rng.choice((0, None)) if causal else right)
    names = {"q": (heads[0], K_DIM), "k": (heads[1], K_DIM), "v": (heads[1], V_DIM)}
    if rng.random() < 0.4:
        options["softcap"] = rng.choice((0.7, 3.0))
    tokens = sum(lengths)
    shapes = [(BATCH, tokens, *names[name]) for name in CUT]
    parameters = dict(zip(CUT, tensors(seed, *shapes)))
    for name, shape in (("sinks", heads[:1]),):
        if rng.random() < 0.4:
            (parameters[name],) = tensors(seed + 2, shape)
    place = {"layout": rng.choice(LAYOUTS), "size": rng.randint(1, 5), "transport": rng.choice(TRANSPORTS)}
    return lengths, place, options, parameters


def expected_of(lengths, options, parameters, seed):
    """Output, log-sum-exp, their upstream gradients and the gradients of all parameters, by the oracle."""
    inputs = {name: each.clone().requires_grad_() for name, each in parameters.items()}
    outputs = scored_attention(**inputs, lengths=lengths, **oracle_options(options))
    upstream = tensors(seed + 1, *[each.shape for each in outputs])
    loss = sum((out * up).sum() for out, up in zip(outputs, upstream))
    grads = torch.autograd.grad(loss, list(inputs.values()))
    return [each.detach() for each in outputs], upstream, grads


def oracle_options(options):
    left, right = options.get("window", (None, None))
    return {n: each for n, each in options.items() if n != "window"} | {"left": left, "right": right}


def call(mine, options, **how):
    """:func:`seqpar.attention` with the parameters and options of a program."""
    of_scores = {n: each for n, each in (mine | options).items() if n not in ("causal", "window", *CUT)}
    rest = {n: each for n, each in (mine | options).items() if n not in of_scores}
    return attention(**rest, scores=Scores(**of_scores), return_lse=True, **how)


def on_a_rank(group, lengths, place, options, parameters, expected, seed):
    """Pairs (got, expected) of outputs and gradients of what is cut, and the gradients of what is not."""
    shard = cut(lengths, group, place["layout"], seed)
    mine = dict(zip(CUT, leaves(shard, *[parameters[name] for name in CUT])))
    shared = {n: each.clone().requires_grad_() for n, each in parameters.items() if n not in CUT}
    outputs = call({**mine, **shared}, options, shard=shard, group=group, transport=place["transport"])
    results, upstream, whole = expected
    loss = sum((out * shard.take(up)).sum() for out, up in zip(outputs, upstream))
    grads = torch.autograd.grad(loss, [*mine.values(), *shared.values()])
    pairs = [(got.detach(), shard.take(each)) for got, each in zip((*outputs, *grads), (*results, *whole[:3]))]
    return pairs, grads[3:]


def worst(seed):
    """The largest relative error of outputs and gradients of one random program."""
    lengths, place, options, parameters = program(seed)
    expected = expected_of(lengths, options, parameters, seed)
    ranks = run_ranks(place["size"], on_a_rank, lengths, place, options, parameters, expected, seed)
    results, _, whole = expected
    found = [relative_error(parts, each) for parts, each in zip(spread([p for p, _ in ranks]), (*results, *whole))]
    for index, each in enumerate(whole[3:]):
        found.append(relative_error([(sum(shared[index] for _, shared in ranks), each)], each))
    return max(found)


@pytest.mark.parametrize("part", range(4))
def test_random_programs(part):
    for seed in range(10 * part, 10 * (part + 1)):
        assert worst(seed) < 1e-11, program(seed)[:3]


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(20))
def test_many_random_programs(part):
    for seed in range(1000 + 50 * part, 1000 + 50 * (part + 1)):
        assert worst(seed) < 1e-11, program(seed)[:3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": (-1, 2)}, "must not be negative"),
        ({"window": (3, 2)}, "sees later tokens: pass causal=False"),
        ({"scores": Scores(softcap=0.0)}, "softcap must be a positive number, got 0.0"),
        ({"scores": Scores(sinks=torch.zeros(3))}, "one number for each of 4 query heads"),
    ],
)
def test_bad_input_raises_on_every_rank_before_the_first_message(options, words):
    def body(group):
        ledger, x = Ledger(group), torch.zeros(1, 4, 4, 8)
        with pytest.raises(ValueError, match=rf"rank {group.rank} of 2: .*{words}"):
            attention(x, x, x, shard=Shard.of([8], group), group=ledger, **options)
        return ledger.messages

    assert run_ranks(2, body) == [0, 0]
