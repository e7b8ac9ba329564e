"""Options and values that make no sense are one ``ValueError``, the same on every rank, before the first message."""

import math

import pytest
import torch

from seqpar import Shard, attention, delta_rule, linear_attention, next_token_loss
from seqpar.collectives import Ledger, run_ranks


def qkv(rows):
    return [torch.randn(1, rows, 2, 4) for _ in range(3)]


CALLS = {
    "window must be at least 1 token, got nan": lambda rows, cut: attention(*qkv(rows), window=math.nan, **cut),
    "window must be at least 1 token, got 1.5": lambda rows, cut: attention(*qkv(rows), window=1.5, **cut),
    "scale must be finite, got inf": lambda rows, cut: attention(*qkv(rows), scale=math.inf, **cut),
    "log_decay must be from -inf to 0, got 5 to 5": lambda rows, cut: linear_attention(
        *qkv(rows), log_decay=torch.full((2,), 5.0), **cut
    ),
    "beta must be from 0 to 2, got 50 to 50": lambda rows, cut: delta_rule(
        *qkv(rows), torch.full((1, rows, 2), 50.0), **cut
    ),
    "beta must be from 0 to 2, got -1 to -1": lambda rows, cut: delta_rule(
        *qkv(rows), torch.full((1, rows, 2), -1.0), **cut
    ),
    **{
        f"divisor must be a positive number of targets, got {divisor}": lambda rows, cut, divisor=divisor: (
            next_token_loss(torch.randn(1, rows, 5), torch.ones(1, 8, dtype=torch.int64), divisor=divisor, **cut)
        )
        for divisor in (0, -1, math.nan, math.inf)
    },
}


@pytest.mark.parametrize("words", CALLS)
def test_values_that_make_no_sense(words):
    def body(group):
        ledger = Ledger(group)
        shard = Shard.of([8], ledger)
        with pytest.raises(ValueError, match=f"rank {group.rank} of {group.size}: {words}"):
            CALLS[words](shard.num_local, {"shard": shard, "group": ledger})
        return ledger.messages

    assert run_ranks(1, body) == [0]
    assert run_ranks(2, body) == [0, 0]
