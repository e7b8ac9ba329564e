"""Plans of how blocks travel: what they mean, compared pair by pair; and what it costs to make them, in counted work."""

import random
import sys
import tracemalloc
from typing import NamedTuple

import pytest
import torch
from torch._subclasses import FakeTensorMode

from seqpar import Shard
from seqpar.collectives import run_ranks
from seqpar.collectives.rows import subtract, union, within
from seqpar.crossing import attention
from seqpar.crossing.document_sum import _crossing, document_index, documents_here
from seqpar.crossing.legs import legs_of
from seqpar.crossing.running_max import _running_plan, _whole_plan
from seqpar.crossing.tiles import SMALL, Mosaic, Tile
from seqpar.crossing.transports import gather_plan, ring_plan
from seqpar.meetings import View
from seqpar.sharding.relayout import _moves
from tests.cutting import LAYOUTS, cut
from tests.oracles import traveling as oracle


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
    return shard, View(rng.random() < 0.6, window)


@pytest.mark.parametrize("part", range(8))
def test_plans_are_those_of_every_pair_of_tokens(part):
    for seed in range(250 * part, 250 * (part + 1)):
        shard, view = some_case(seed)
        how, held_by = (view.causal, view.window), oracle.places(shard)
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
