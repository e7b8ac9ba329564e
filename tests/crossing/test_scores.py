"""What is done to scores, over a cut sequence, is what is done on one device: random programs against an fp64 loop."""

import math
import random
from functools import partial

import pytest
import torch

from seqpar import Always, Buckets, Scores, Shard, attention
from seqpar.collectives import Ledger, run_ranks
from seqpar.crossing.attention import TRANSPORTS, last_attention
from seqpar.crossing.meetings import View
from seqpar.ops.choice import has_triton
from tests.cutting import LAYOUTS, cut, relative_error, spread, tensors
from tests.oracles.scores import scored_attention

BATCH, K_DIM, V_DIM = 2, 6, 4
CUT = ("q", "k", "v", "factor")  # what ranks hold their rows of; all else is the same on every rank
BUCKETS = {
    "clipped": Buckets.clipped(5, 3),
    "t5": Buckets.t5(8, 12, bidirectional=True),
    "t5 causal": Buckets.t5(6, 9, bidirectional=False),
}


def column(kind, distance):
    """Which column of a table a distance reads, by the formulas of the papers."""
    if kind == "clipped":
        return min(max(distance, -5), 3) + 5
    count, most, side = (4, 12, 4 * (distance > 0)) if kind == "t5" else (6, 9, 0)
    away, exact = abs(distance) if kind == "t5" else max(-distance, 0), count // 2
    if away >= exact:
        away = min(exact + int(math.log(away / exact) / math.log(most / exact) * (count - exact)), count - 1)
    return side + away


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
    parameters = dict(zip(names, tensors(seed, *[(BATCH, tokens, *shape) for shape in names.values()])))
    shapes = {"sinks": heads[:1], "slopes": heads[:1], "factor": (tokens,)}
    if rng.random() < 0.5:
        options["buckets"] = kind = rng.choice(tuple(BUCKETS))
        both = {"table": (heads[0], BUCKETS[kind].count), "embeddings": (heads[0], BUCKETS[kind].count, K_DIM)}
        parameters |= {n: tensors(seed + 3, both[n])[0] for n in rng.choice((("table",), ("embeddings",), tuple(both)))}
    parameters |= {n: tensors(seed + 2, shape)[0] for n, shape in shapes.items() if rng.random() < 0.3}
    for name in ("seen", "seeing"):
        if rng.random() < 0.4:
            options[name] = tuple(sorted(rng.sample(range(tokens), rng.randint(0, min(4, tokens)))))
    if rng.random() < 0.3:
        parameters |= dict(zip(("keys", "values"), tensors(seed + 4, (3, heads[1], K_DIM), (3, heads[1], V_DIM))))
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
    rest = {n: each for n, each in options.items() if n not in ("window", "buckets")}
    rest["column"] = partial(column, options.get("buckets"))
    return rest | {"left": left, "right": right}


def call(mine, options, **how):
    """:func:`seqpar.attention` with the parameters and options of a program."""
    given = mine | options
    of_always = {n: given.pop(n) for n in ("seen", "seeing", "keys", "values") if n in given}
    of_scores = {n: given.pop(n) for n in tuple(given) if n not in ("q", "k", "v", "causal", "window")}
    of_scores["buckets"] = BUCKETS.get(of_scores.get("buckets"))
    return attention(**given, scores=Scores(**of_scores), always=Always(**of_always), return_lse=True, **how)


def on_a_rank(group, lengths, place, options, parameters, expected, seed):
    """Pairs (got, expected) of outputs and gradients of what is cut, and the gradients of what is not."""
    shard = cut(lengths, group, place["layout"], seed)
    dtype, how = place.get("dtype", torch.float64), {"transport": place["transport"], "impl": place.get("impl", "auto")}
    mine = {n: take(shard, n, each).to(dtype, copy=True).requires_grad_() for n, each in parameters.items()}
    outputs = call(mine, options, shard=shard, group=group, **how)
    results, upstream, whole = expected
    loss = sum((out * shard.take(up)).sum() for out, up in zip(outputs, upstream))
    grads = torch.autograd.grad(loss, list(mine.values()))
    pairs = [(got.detach(), shard.take(each)) for got, each in zip(outputs, results)]
    of_cut = [(got, take(shard, n, each)) for n, got, each in zip(mine, grads, whole) if n in CUT]
    return pairs + of_cut, [got for n, got in zip(mine, grads) if n not in CUT]


def take(shard, name, whole):
    return shard.take(whole, 0 if name == "factor" else 1) if name in CUT else whole


def worst(seed):
    """The largest relative error of outputs and gradients of one random program."""
    return worst_of(*program(seed), seed)


def worst_of(lengths, place, options, parameters, seed=0):
    expected = expected_of(lengths, options, parameters, seed)
    ranks = run_ranks(place["size"], on_a_rank, lengths, place, options, parameters, expected, seed)
    results, _, whole = expected
    of_cut = [each for name, each in zip(parameters, whole) if name in CUT]
    found = [relative_error(parts, each) for parts, each in zip(spread([p for p, _ in ranks]), (*results, *of_cut))]
    for index, each in enumerate(each for name, each in zip(parameters, whole) if name not in CUT):
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


@pytest.mark.parametrize("seed", range(4))
def test_the_last_queries_over_what_earlier_calls_left(seed):
    """What generation does: keys and values of before are there, the queries are new."""
    options, scores = {"left": (None, 3)[seed % 2]}, {"softcap": 2.0, "buckets": BUCKETS["t5"]}
    q, k, v, slopes, sinks, table = tensors(seed, (2, 9, 4, 6), (2, 9, 2, 6), (2, 9, 2, 4), (4,), (4,), (4, 8))
    scores |= {"slopes": slopes, "sinks": sinks, "table": table}
    of_oracle = {n: each for n, each in scores.items() if n != "buckets"} | {"column": partial(column, "t5")}
    right, _ = scored_attention(q, k, v, [9], **options, **of_oracle)
    view = View(True, None if options["left"] is None else options["left"] + 1)
    out = last_attention(q[:, 6 - seed :], k, v, view=view, scale=None, scores=Scores(**scores), impl="auto")
    assert (out - right[:, 6 - seed :]).norm() < 1e-12 * right.norm()


@pytest.mark.skipif(not has_triton(), reason="needs triton")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_kernels_serve_all_that_does_not_change_scores(transport):
    """Windows, sinks and rows that no window hides are tiles and merges; kernels compute in fp32."""
    lengths, shapes = [5, 0, 21, 14], ((1, 40, 4, 16), (1, 40, 2, 16), (1, 40, 2, 16), (4,), (3, 2, 16), (3, 2, 16))
    parameters = dict(zip(("q", "k", "v", "sinks", "keys", "values"), tensors(0, *shapes)))
    options = {"causal": False, "window": (3, 2), "seen": (0, 7), "seeing": (6, 7)}
    place = {"size": 2, "layout": "zigzag", "transport": transport, "impl": "triton", "dtype": torch.float32}
    assert worst_of(lengths, place, options, parameters) < 2e-6


def sent(group, options, backward):
    """Bytes of one call, forward or backward, in fp32, of one document of 8 tokens a rank."""
    ledger, shard = Ledger(group), Shard.of([8 * group.size], group)
    q, k, v = (torch.ones(1, 8, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    out = attention(q, k, v, shard=shard, group=ledger, causal=False, **options)
    if backward:
        ledger.clear()
        out.sum().backward()
    return ledger.bytes_


ROW, QUERY, SAW = 2 * (8 + 8) * 4, 4 * 8 * 4, 4 * (8 + 1) * 4  # keys and values, a query, what it saw of a rank


@pytest.mark.parametrize("transport", ["ring", "all_gather"])
def test_only_what_is_seen_travels(transport):
    """Two rows each way of a cut; of tokens that windows do not hide only themselves, to whom they would be hidden."""
    near = {"window": (2, 2), "transport": transport}
    hop = 3 if transport == "ring" else 1  # round a ring, rows for the rank before pass by all others
    assert sum(run_ranks(4, sent, near, False)) == 3 * (2 + 2 * hop) * ROW
    seen = sum(run_ranks(4, sent, near | {"always": Always(seen=(0, 31))}, False))
    assert seen - 3 * (2 + 2 * hop) * ROW == 2 * 3 * ROW
    for seeing, count in (((5,), 1), ((5, 6, 30), 3)):
        with_queries = sum(run_ranks(4, sent, near | {"always": Always(seeing=seeing)}, False))
        assert with_queries - 3 * (2 + 2 * hop) * ROW == count * 3 * (QUERY + SAW)
    learned = Always(keys=torch.ones(3, 2, 8), values=torch.ones(3, 2, 8))
    for more in ({"always": learned}, {"scores": Scores(softcap=2.0, sinks=torch.ones(4), slopes=torch.ones(4))}):
        for backward in (False, True):
            assert run_ranks(4, sent, near | more, backward) == run_ranks(4, sent, near, backward)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": (-1, 2)}, "is two numbers of tokens or None"),
        ({"window": (3, 2)}, "sees later tokens: pass causal=False"),
        ({"always": Always(seen=(3, 8))}, "seen must be places among 8 tokens"),
        ({"always": Always(keys=torch.zeros(3, 2, 8), values=torch.zeros(3, 4, 8))}, "learned keys and values must be"),
        ({"scores": Scores(table=torch.zeros(4, 3))}, "need buckets"),
        ({"scores": Scores(softcap=2.0), "impl": "triton"}, "the kernels do not cap or bias"),
        ({"scores": Scores(softcap=0.0)}, "softcap must be a positive number, got 0.0"),
        ({"scores": Scores(sinks=torch.zeros(3))}, r"sinks must be \[4\] for 4 query heads"),
    ],
)
def test_bad_input_raises_on_every_rank_before_the_first_message(options, words):
    def body(group):
        ledger, x = Ledger(group), torch.zeros(1, 4, 4, 8)
        with pytest.raises(ValueError, match=words) as found:
            attention(x, x, x, shard=Shard.of([8], group), group=ledger, **options)
        assert f"rank {group.rank} of 2" in str(found.value) or "impl" in options
        return ledger.messages

    assert run_ranks(2, body) == [0, 0]
