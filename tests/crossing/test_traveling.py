"""Plans of how blocks travel: what they mean, compared pair by pair; and what they cost to make, in counted work."""

import gc
import random
import sys
import tracemalloc
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from seqpar import Shard, attention
from seqpar.collectives import alone, run_ranks
from seqpar.collectives.halo import _plan as halo_plan
from seqpar.collectives.rows import subtract, union, within
from seqpar.crossing.attending.always import unhidden_plan
from seqpar.crossing.attention import TRANSPORTS
from seqpar.crossing.document_sum import crossing, document_index, documents_here
from seqpar.crossing.legs import legs_of
from seqpar.crossing.running_max import _running_plan, _whole_plan
from seqpar.crossing.tiles import SMALL, Mosaic, _mask
from seqpar.crossing.transports import View, gather_plan, ring_plan
from seqpar.sharding.relayout import _moves
from seqpar.sharding.shard import dealt, in_sequence
from tests.cutting import LAYOUTS, cut
from tests.oracles import traveling as oracle

CPU = torch.device("cpu")


class Place(NamedTuple):
    """Where a plan is made; it sends nothing."""

    rank: int
    size: int


def seen_in(tiles):
    """The pairs of rows that tiles see; none is seen twice, and none of the tiles is empty."""
    found = []
    for tile in tiles:
        if isinstance(tile, Mosaic):
            seen = tile.mask(torch.device("cpu"))
            assert max(seen.shape) <= SMALL
        else:
            seen = tile.band.mask(*tile.shape)
        assert seen.any()
        found += [(tile.rows[0] + i, tile.keys[0] + j) for i, j in seen.nonzero().tolist()]
    assert len(found) == len(set(found))
    return set(found)


def some_case(seed):
    rng = random.Random(seed)
    lengths = [rng.choice((0, 1, 2, 3, rng.randint(0, 40))) for _ in range(rng.randint(0, 7))]
    size = rng.randint(1, 9)
    shard = cut(lengths, Place(rng.randrange(size), size), LAYOUTS[seed % 4], seed)
    window = rng.choice((None, None, 1, 2, 3, 5, 11, 30))
    causal = rng.random() < 0.5
    return shard, View(causal, window, None if causal else rng.choice((None, None, 1, 2, 5, 11, 30)))


@pytest.mark.parametrize("part", range(8))
def test_plans_are_those_of_every_pair_of_tokens(part):
    for seed in range(250 * part, 250 * (part + 1)):
        shard, view = some_case(seed)
        how, held_by = (view.causal, view.window, view.right), oracle.places(shard)
        queries, plan = held_by[shard.rank], ring_plan(shard, view)
        expected = oracle.ring_hops(shard, *how)
        assert plan.hops == tuple(hop for hop, _ in expected), seed
        for hop, tiles, (_, held) in zip(plan.hops, plan.tiles, expected):
            keys = [held_by[hop.source][row] for r in held for row in range(*r)]
            assert seen_in(tiles) == oracle.visible(queries, keys, *how), seed
        gather = gather_plan(shard, view)
        sends, receives, keys = oracle.gathered(shard, *how, gather.everything)
        assert (gather.sends, gather.receives) == (sends, receives), seed
        if gather.order is not None:
            keys = [keys[row] for row in gather.order.array.tolist()]
            assert shard.pieces.step > 1 or keys == sorted(keys), seed
        assert seen_in(gather.tiles) == oracle.visible(queries, keys, *how), seed


@pytest.mark.parametrize("seed", range(200))
def test_who_holds_what(seed):
    shard, _ = some_case(seed)
    held_by = oracle.places(shard)
    listed = {(p.rank, p.document, p.first, p.count, p.row) for p in columns(shard)}
    one_by_one = [(rank, piece) for rank in range(shard.size) for piece in shard.pieces_of(rank)]
    assert listed == {(rank, p.document, p.first, p.count, p.row) for rank, p in one_by_one}
    ranks = {}
    for rank, rows in enumerate(held_by):
        for document, _ in rows:
            ranks.setdefault(document, set()).add(rank)
    assert crossing(shard) == tuple(sorted(document for document, held in ranks.items() if len(held) > 1))
    here = documents_here(shard)
    assert [here[place] for place in document_index(shard, CPU).tolist()] == [d for d, _ in held_by[shard.rank]]
    assert shard.positions.tolist() == [position for _, position in held_by[shard.rank]]


def columns(shard):
    class One(NamedTuple):
        rank: int
        document: int
        first: int
        count: int
        row: int

    found = shard.pieces
    return [One(*row) for row in zip(*(getattr(found, name).tolist() for name in One._fields))]


@pytest.mark.parametrize("seed", range(100))
def test_moves_between_any_layouts(seed):
    rng = random.Random(seed)
    lengths, size = [rng.randint(0, 12) for _ in range(rng.randint(0, 5))], rng.randint(1, 6)
    layouts = [rng.choice(LAYOUTS) for _ in range(2)]
    plans = []
    for rank in range(size):
        old, new = (cut(lengths, Place(rank, size), layout, seed + i) for i, layout in enumerate(layouts))
        plans.append((old, new, _moves(old, new)))
    sent = [old.indices_of(old.rank)[moves.leaving.array].split(list(moves.sends)) for old, _, moves in plans]
    for rank, (_, new, moves) in enumerate(plans):
        come = [parts[rank] for parts in sent]
        assert moves.receives == tuple(len(part) for part in come)
        assert torch.equal(torch.cat(come)[moves.order.array], new.indices_of(rank))


def test_ranges_as_sets():
    rng = random.Random(0)
    for _ in range(3000):
        some, taken = (union((s, s + rng.randint(0, 4)) for s in rng.choices(range(30), k=rng.randint(0, 6)))
                       for _ in range(2))  # fmt: skip
        rows = {row for span in some for row in range(*span)}
        left = rows - {row for span in taken for row in range(*span)}
        assert subtract(some, taken) == union((row, row + 1) for row in left)
        place = {row: number for number, row in enumerate(sorted(rows))}
        assert within(subtract(some, taken), some) == union((place[row], place[row] + 1) for row in left)


# --- what planning costs ---------------------------------------------------------------------------------------------


class TooMuchWorkError(AssertionError):
    """A plan took more lines of Python, or more bytes, than allowed."""


@contextmanager
def at_most(lines, bytes_):
    """Counts the lines of Python that are run, and the bytes of memory in use; raises where there are too many."""
    counted = {"lines": 0, "bytes": 0}

    def line(frame, event, argument):
        if event == "line":
            counted["lines"] += 1
            if counted["lines"] > lines:
                raise TooMuchWorkError(f"more than {lines:.0f} lines of Python")
        return line

    gc.collect()
    gc.disable()  # what other tests left would be counted
    tracemalloc.start()
    before = sys.gettrace()
    sys.settrace(line)
    try:
        yield counted
    finally:
        sys.settrace(before)
        counted["bytes"] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        gc.enable()
    if counted["bytes"] > bytes_:
        raise TooMuchWorkError(f"more than {bytes_:.0f} bytes at once")


def forget():
    """Every plan that was made."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("seqpar.", "collectives.")):
            for value in list(vars(module).values()):
                getattr(value, "cache_clear", lambda: None)()


def legs(shard):
    return legs_of(shard, True, True)


def attended(**view):
    return lambda plan: lambda shard: plan(shard, View(**view))


def always(beyond):
    """The first token of each document is seen by all of it, or sees it."""
    firsts = lambda shard: tuple(start for start, length in zip(shard.offsets, shard.lengths) if length)  # noqa: E731
    return lambda shard: unhidden_plan(shard, View(False, 3, 2), firsts(shard), beyond)


PLANS = {
    "always seen": always(True),
    "always seeing": always(False),
    "positions": lambda shard: shard.positions,
    "pieces": lambda shard: [shard.pieces_of(rank) for rank in range(shard.size)],
    "legs": legs,
    "relayout": lambda shard: _moves(shard, Shard.of(shard.lengths, shard.group)),
    "document sum": lambda shard: (crossing(shard), document_index(shard, CPU)),
    "running max": lambda shard: _running_plan(shard, True, CPU),
    "document max": lambda shard: _whole_plan(shard, CPU),
    "halo": lambda shard: halo_plan(shard.spans, shard.rank, 3, 0),
    **{
        f"{plan.__wrapped__.__name__} {view}": attended(causal=causal, window=window, right=right)(plan)
        for plan in (ring_plan, gather_plan)
        for view, causal, window, right in (
            ("causal", True, None, None),
            ("full", False, None, None),
            ("window", True, 4, None),
            ("two-sided", False, 4, 3),
        )
    },
}


def work(plan, lengths, size, layout, most=(float("inf"), float("inf"))):
    """Lines and bytes of planning from nothing."""
    plan(cut([3], Place(1, 2), layout))  # what is imported or set up once is there
    shard = cut(lengths, Place(size // 2, size), layout)
    forget()
    with at_most(*most) as counted:
        plan(shard)
    return counted


@pytest.mark.sampled(12)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PLANS)
def test_work_grows_with_documents(name, layout):
    """Five times the documents (and pieces, and tokens) on as many ranks: at most 1.3 times 5 times the work."""
    few = work(PLANS[name], [5] * 1_000, 32, layout)
    most = [1.3 * 5 * few[what] + 10_000 for what in ("lines", "bytes")]
    work(PLANS[name], [5] * 5_000, 32, layout, most)


@pytest.mark.sampled(24)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("lengths", [[3_583], [7] * 500], ids=["one document", "500 documents"])
def test_work_grows_with_ranks(lengths, name, layout):
    """Four times the ranks, and as many tokens."""
    few = work(PLANS[name], lengths, 128, layout)
    most = [1.3 * 4 * few[what] + 10_000 for what in ("lines", "bytes")]
    work(PLANS[name], lengths, 512, layout, most)


# --- nothing is made twice -------------------------------------------------------------------------------------------


def attend(shard, group, transport, grad=True):
    q, k, v = (torch.randn(1, shard.num_local, 2, 4, requires_grad=grad) for _ in range(3))
    out = attention(q, k, v, shard=shard, group=group, transport=transport)
    if grad:
        out.sum().backward()
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_second_call_makes_no_plan_and_no_mask(transport, layout):
    """Nor does one of another shard of the same tokens, as every step makes one."""

    def made():
        return [each.cache_info().misses for each in (ring_plan, gather_plan, _mask, _moves, in_sequence, dealt)]

    def body(group):
        attend(cut([5] * 60, group, layout), group, transport)
        return attend(cut([5] * 60, group, layout), group, transport).shape

    forget()
    run_ranks(3, body)
    first = made()
    assert sum(first)
    run_ranks(3, body)
    assert made() == first


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_kept_serves_in_any_mode(layout, transport):
    """Made in inference mode or of fake tensors, it is real outside, and can be saved for backward."""

    def body(group):
        shard = cut([5] * 30, group, layout)
        with torch.inference_mode():
            attend(shard, group, transport, grad=False)
            assert not shard.positions.is_inference()
        attend(shard, group, transport)
        with torch.inference_mode():
            attend(shard, group, transport, grad=False)

    forget()
    run_ranks(2, body)
    shard = cut([5] * 30, alone(), layout)
    for _ in range(2):
        with FakeTensorMode():
            assert attend(shard, alone(), transport).shape == (1, 150, 2, 4)
            assert isinstance(shard.positions + 1, FakeTensor)
        assert shard.positions.tolist() == 30 * [0, 1, 2, 3, 4]
        attend(shard, alone(), transport)
