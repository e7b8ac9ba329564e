"""Based, JRT-RNN, LightNet and Aaren: what is known of them beyond their equations."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar import Cut, Shard
from seqpar.collectives import alone, run_ranks
from seqpar.layers.entry import Sizes
from seqpar.layers.linear.aaren import Aaren
from seqpar.layers.linear.based import Based, taylor_dim, taylor_features
from seqpar.layers.linear.catalog_feature import ENTRIES
from seqpar.layers.linear.jrt import JRT
from seqpar.layers.linear.lightnet import LightNet
from seqpar.layers.linear.md_position import MDTPE, column_shard, md_lrpe, row_shard
from seqpar.sharding.states import States
from tests.layers.drawn import drawn, loud, relative
from tests.layers.mixers import rms
from tests.layers.oracles.oracles_decay import swish

LENGTHS = [5, 0, 9, 1, 3]
TOKENS = sum(LENGTHS)


# --- the Taylor map --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 5, 16])
def test_products_of_features_are_the_taylor_series_of_exp(dim: int) -> None:
    q, k = drawn(2, 7, dim)
    s = (q * k).sum(-1) / math.sqrt(dim)
    assert relative((taylor_features(q) * taylor_features(k)).sum(-1), 1 + s + s**2 / 2) < 1e-13
    assert taylor_features(q).shape[-1] == taylor_dim(dim)


def test_153_features_by_hand() -> None:
    assert taylor_dim(16) == 153
    x = torch.tensor([3.0, -2.0], dtype=torch.float64)
    expected = [1, 3 / 2**0.25, -2 / 2**0.25, 9 / 2, -6 / 2**0.5, 4 / 2]
    assert taylor_features(x).tolist() == pytest.approx(expected, rel=1e-14)


def test_features_round_once() -> None:
    x = drawn(3, 16).bfloat16()
    assert torch.equal(taylor_features(x), taylor_features(x.float()).bfloat16())


def test_no_normaliser_of_based_is_small() -> None:
    """``1 + s + s^2 / 2`` is at least 1/2: products as negative as they may be divide by nothing near 0."""
    layer, x = loud(Based(8, 2, feature_dim=3)).float(), 30 * drawn(1, TOKENS, 8).float()
    q, k, v = layer.project(x, Cut.whole(LENGTHS).positions)
    sums = layer.mix((q, k, v), Cut.whole(LENGTHS))[..., -1]
    assert sums.min() >= 0.49
    assert layer(x, Cut.whole(LENGTHS)).isfinite().all()


# --- JRT-RNN ---------------------------------------------------------------------------------------------------------


def test_tokens_beyond_the_prefix_weigh_nothing_in_the_encoder() -> None:
    """``phi(0)`` is 1, 0, ...: masked before the map, such a token would still count 1 in the normaliser."""
    assert taylor_features(torch.zeros(4)).tolist() == [1.0] + [0.0] * 14
    layer = loud(JRT(8, 2, prefix=2, feature_dim=3))
    positions = Cut.whole(LENGTHS).positions
    *_, k_encoder, v_encoder = layer.project(drawn(1, TOKENS, 8), positions)
    outside = positions >= 2
    assert k_encoder[:, outside].abs().max() == v_encoder[:, outside].abs().max() == 0
    assert k_encoder[:, ~outside, :, 0].min() == 1


def test_the_prefix_sees_all_of_itself_and_nothing_beyond() -> None:
    layer, cut = loud(JRT(8, 2, prefix=4, feature_dim=3)), Cut.whole([9])
    x = drawn(1, 9, 8).requires_grad_()
    y = layer(x, cut)
    seen = [torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)[0].norm(dim=-1)[0] > 0 for t in range(9)]
    assert [row.tolist() for row in seen] == [[s <= max(t, 3) for s in range(9)] for t in range(9)]


def test_an_endless_prefix_and_a_longer_one_than_the_document_are_alike() -> None:
    x, outputs = drawn(1, TOKENS, 8), []
    for prefix in (None, 9, 1000, 4):
        outputs.append(loud(JRT(8, 2, prefix=prefix, feature_dim=3))(x, Cut.whole(LENGTHS)))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[1], outputs[2])
    assert relative(outputs[3], outputs[0]) > 1e-3


# --- running maxima --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Aaren, LightNet, lambda d, h: LightNet(d, h, causal=False, start="one")])
def test_scores_far_beyond_what_exp_can_take(make: Any) -> None:
    """In fp32 ``exp`` ends at 88: with scores in the thousands all is finite, and near what fp64 says."""
    layer, x, cut = loud(make(8, 2)), drawn(1, TOKENS, 8), Cut.whole(LENGTHS)
    layer.k.weight.data *= 3000
    results = []
    for dtype in (torch.float64, torch.float32):
        given = x.to(dtype, copy=True).requires_grad_()
        y = layer.to(dtype)(given, cut)
        y.backward(drawn(*y.shape, seed=3).to(dtype))
        results.append((y.detach().double(), layer.v.weight.grad.double().clone()))
        assert given.grad is not None and given.grad.isfinite().all()
        layer.zero_grad()
    for exact, rounded in zip(*results):
        assert relative(rounded, exact) < 1e-4


def test_aaren_of_equal_scores_is_a_running_mean() -> None:
    layer, x = loud(Aaren(8, 2)), drawn(1, TOKENS, 8)
    layer.query.data.zero_()
    o, start = [], 0
    for length in LENGTHS:
        part = layer.v(x[:, start : start + length])
        o.append(part.cumsum(1) / torch.arange(1, length + 1)[:, None])
        start += length
    assert relative(layer(x, Cut.whole(LENGTHS)), layer.out(torch.cat(o, 1))) < 1e-13


def test_the_last_token_of_a_document_reads_what_all_tokens_read_without_order() -> None:
    x, cut = drawn(1, TOKENS, 8), Cut.whole(LENGTHS)
    causal, whole = loud(LightNet(8, 2)), loud(LightNet(8, 2, causal=False))
    last = torch.tensor([4, 13, 14, 17])
    assert relative(causal(x, cut)[:, last], whole(x, cut)[:, last]) < 1e-12
    assert relative(causal(x, cut), whole(x, cut)) > 1e-2


def test_the_two_starts_of_lightnet() -> None:
    """A first token's key is 1, or ``sigmoid(k)``: then the start weighs ``exp(0)``."""
    x = drawn(1, 1, 8)
    for start, key in (("empty", lambda k: torch.ones_like(k)), ("one", lambda k: 1 / (1 + (-k).exp()))):
        layer = loud(LightNet(8, 2, start=start))
        q, k, v = (y.unflatten(-1, (2, -1)) for y in (layer.q(x), layer.k(x), layer.v(x)))
        o = ((swish(q) * key(k)).sum(-1, keepdim=True) * v).flatten(-2)
        expected = layer.out(rms(o, layer.norm.weight) * swish(layer.gate(x)))
        assert relative(layer(x, Cut.whole([1])), expected) < 1e-12


# --- positions on a grid ---------------------------------------------------------------------------------------------


def test_md_lrpe_by_hand() -> None:
    x = torch.tensor([2.0, -1.0, 3.0], dtype=torch.float64).view(1, 1, 1, 3)
    placed = md_lrpe(x, torch.tensor([3 * 5 + 2]), width=5, base=8.0)  # row 3, column 2; turns of 1 and 8 ** (-2 / 3)
    angles = [3, 3 / 4, 2]
    signs = (2, -1, 3)
    expected = [s * math.cos(a) for s, a in zip(signs, angles)] + [s * math.sin(a) for s, a in zip(signs, angles)]
    assert placed.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_md_lrpe_products_depend_on_rows_and_columns_between() -> None:
    q, k = drawn(2, 1, 1, 2, 8)

    def product(here: tuple[int, int], there: tuple[int, int]) -> Tensor:
        q_placed, k_placed = (
            md_lrpe(y, torch.tensor([7 * row + column]), 7) for y, (row, column) in ((q, here), (k, there))
        )
        return (q_placed * k_placed).sum(-1)

    assert relative(product((5, 3), (2, 6)), product((1003, 0), (1000, 3))) < 1e-10
    assert relative(product((5, 3), (2, 6)), product((5, 4), (2, 6))) > 1e-3
    assert relative(product((5, 3), (2, 6)), product((6, 3), (2, 6))) > 1e-3


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_columns_are_whole_and_every_token_is_in_one(layout: str) -> None:
    lengths, width = [10, 0, 3, 17], 4
    columns = run_ranks(3, lambda group: column_shard(Shard.of(lengths, group, layout), width))
    runs = [run for of_rank in columns[0].runs for run in of_rank]
    assert all(shard.runs == columns[0].runs and shard.rank == rank for rank, shard in enumerate(columns))
    assert sorted(t for run in runs for t in range(run.start, run.stop, run.step)) == list(range(30))
    assert [len(run) for run in runs] == [3, 3, 2, 2, 1, 1, 1, 5, 4, 4, 4]
    assert max(columns[0].num_of(rank) for rank in range(3)) <= 30 / 3 + 5


def test_rows_are_documents_of_their_own() -> None:
    assert row_shard(Shard.of([10, 0, 3], alone()), 4).lengths == (4, 4, 2, 3)


def test_md_tpe_weighs_what_is_before_in_a_row_and_in_a_column() -> None:
    layer, x = loud(MDTPE(8, 2, width=3)), drawn(1, 9, 8).requires_grad_()
    y = layer(x, Cut.whole([9]))
    for t in (4, 8):
        grad = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)[0].norm(dim=-1)[0]
        seen = {s for s in range(t + 1) if s // 3 == t // 3 or s % 3 == t % 3}
        assert {s for s in range(9) if grad[s] > 0} == seen


def test_bytes_of_md_tpe_grow_with_the_tokens_and_any_number_has_a_price() -> None:
    entry = next(entry for entry in ENTRIES if entry.name == "md_tpe")
    bytes_ = [entry.bytes_per_cut(Sizes(dim=32, heads=4), tokens) for tokens in (1, 15, 16, 10**6)]
    assert bytes_[2] == 4 * 2 * 16 * 32  # half of two rows' tokens, there and back; no row is cut
    assert bytes_[3] == 10**6 // 16 * bytes_[2]
    assert min(bytes_) > 0


def test_md_tpe_keeps_no_states() -> None:
    with pytest.raises(ValueError, match="MDTPE keeps no states"):
        MDTPE(8, 2, width=3)(torch.zeros(1, 3, 8), Cut.whole([3], States()))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_layers_that_see_later_tokens_keep_no_states() -> None:
    for layer in (JRT(8, 2), LightNet(8, 2, causal=False)):
        with pytest.raises(ValueError, match="sees later tokens, so it keeps no states"):
            layer(torch.zeros(1, 3, 8), Cut.whole([3], States()))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Based(8, 3), "heads must divide dim"),
        (lambda: Based(8, 2, feature_dim=0), "feature_dim must be at least 1"),
        (lambda: JRT(8, 2, prefix=0), "prefix must be at least 1"),
        (lambda: LightNet(8, 2, start="zero"), "start must be one of empty, one, got 'zero'"),
        (lambda: LightNet(8, 2, gate_rank=0), "gate_rank must be at least 1"),
        (lambda: LightNet(8, 2, width=0), "width must be at least 1"),
        (lambda: MDTPE(8, 2, width=0), "width must be at least 1"),
        (lambda: MDTPE(8, 3, width=4), "heads must divide dim"),
        (lambda: Aaren(8, 3), "heads must divide dim"),
    ],
)
def test_wrong_sizes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
