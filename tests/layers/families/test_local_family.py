"""What the battery does not see of the layers of ``catalog_local``: grids, bad arguments, messages, known cases."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqpar import Cut, Shard
from seqpar.collectives import Group, Ledger, run_ranks
from seqpar.commands.layers import as_json, table
from seqpar.crossing.here import Here
from seqpar.crossing.preceding import preceding
from seqpar.layers import SoftmaxAttention
from seqpar.layers.catalog import find
from seqpar.layers.entry import Sizes
from seqpar.layers.linear.gla import GLA
from seqpar.layers.local.bmojo_f import BMojoF
from seqpar.layers.local.convolution import ShortConvolution
from seqpar.layers.local.gam import GAM
from seqpar.layers.local.linformer import Linformer
from seqpar.layers.local.token_shift import TokenShift
from seqpar.layers.local.vig import ViG
from seqpar.models import Decoder, DecoderConfig
from seqpar.sharding.states import States
from tests.cutting import LAYOUTS, cut, leaves, tensors
from tests.layers.oracles import oracles_local

GRIDS = [8, 0, 4, 20, 12]  # of four columns: two rows, none, one, five, three


def drawn(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    layer = make().double()
    for parameter in layer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return layer


# --- ViG on grids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vig_equals_its_equations_on_grids(layout: str) -> None:
    layer = drawn(lambda: ViG(8, 2, width=4))
    x, upstream = tensors(1, (2, sum(GRIDS), 8), (2, sum(GRIDS), 8))
    x.requires_grad_()
    y = oracles_local.vig_layer(layer, x, GRIDS)
    expected = [y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream)]

    def body(group: Group) -> list[Tensor]:
        mine, shard = copy.deepcopy(layer), cut(GRIDS, group, layout)
        (x_,) = leaves(shard, x.detach())
        y_ = mine(x_, Cut(shard, group))
        d_x, *grads = torch.autograd.grad(y_, [x_, *mine.parameters()], shard.take(upstream))
        return [shard.gather(y_.detach()), shard.gather(d_x), *(group.all_reduce(g).wait() for g in grads)]

    for size in (1, 3, 7):
        for outcome in run_ranks(size, body):
            assert all((got - want).norm() < 1e-11 * (1 + want.norm()) for got, want in zip(outcome, expected))


def test_vig_sees_the_row_above_and_below_but_no_other_document() -> None:
    layer, (x,) = drawn(lambda: ViG(8, 2, width=4)), tensors(2, (1, 24, 8))
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x, Cut.whole([12, 12]))[0, 5].sum(), x)
    assert bool((jacobian[0, :12].norm(dim=-1) > 0).all()), "both recurrences see the whole document"
    assert jacobian[0, 12:].norm() < 1e-15 * jacobian.norm()  # gradients of decays are rounded sums over a chunk


def test_vig_counts_a_token_in_both_directions() -> None:
    """A document of one token: the mean of both states is the state, not half of it and not twice."""
    layer = drawn(lambda: ViG(8, 2, width=1)).requires_grad_(False)
    layer.local_norm.weight.zero_()
    layer.norm.eps = 1e6  # next to nothing is normed: the size of o can be seen
    (x,) = tensors(3, (1, 1, 8))
    y = x * layer.conv_weight[:, 1, 1] + layer.conv_bias
    q, k, v = (part.unflatten(-1, (2, -1)) for part in (y @ layer.qkv.weight.T).split([4, 4, 8], -1))
    o = (q * k).sum(-1, keepdim=True) * v / 2**0.5
    gated = torch.sigmoid(layer.gate(y)) * (o / (o.square().mean(-1, keepdim=True) + 1e6).sqrt()).mul(
        layer.norm.weight
    ).flatten(-2)
    assert (layer(x, Cut.whole([1])) - gated @ layer.out.weight.T).norm() < 1e-12 * gated.norm()


def test_vig_wants_whole_rows_and_no_states() -> None:
    layer = ViG(8, 2, width=4)
    with pytest.raises(ValueError, match="every document must fill rows of 4 tokens, one has 6"):
        layer(torch.randn(1, 6, 8), Cut.whole([6]))
    with pytest.raises(ValueError, match="ViG sees later tokens, so it keeps no states"):
        layer(torch.randn(1, 8, 8), Cut.whole([8], States()))


# --- Linformer -------------------------------------------------------------------------------------------------------


def test_linformer_with_the_identity_as_projection_is_attention() -> None:
    layer = drawn(lambda: Linformer(8, 2, max_tokens=6, projected=6)).requires_grad_(False)
    full = SoftmaxAttention(8, 2, causal=False, rope_base=None).double()
    for name in ("q", "k", "v", "out"):
        getattr(full, name).weight.data.copy_(getattr(layer, name).weight)
    layer.key_weight.copy_(torch.eye(6))
    layer.value_weight.copy_(torch.eye(6))
    (x,) = tensors(4, (2, 6, 8))
    assert (layer(x, Cut.whole([6])) - full(x, Cut.whole([6]))).norm() < 1e-13 * x.norm()


def test_what_linformer_sends_does_not_depend_on_the_length() -> None:
    def sent(group: Group, tokens: int) -> tuple[int, int]:
        ledger = Ledger(group)
        shard = Shard.of([tokens], ledger)
        layer = drawn(lambda: Linformer(8, 2, max_tokens=400, projected=3))
        (x,) = leaves(shard, *tensors(5, (1, tokens, 8)))
        y = layer(x, Cut(shard, ledger))
        forward = ledger.bytes_
        y.sum().backward()
        return forward, ledger.bytes_ - forward

    for tokens in (20, 400):  # two ranks: an all-reduce sends as much as it sums
        assert run_ranks(2, sent, tokens) == [(2 * 3 * 8 * 8, 2 * 3 * 8 * 8)] * 2


def test_linformer_says_how_long_documents_may_be() -> None:
    layer = Linformer(8, 2, max_tokens=5, projected=2)
    with pytest.raises(ValueError, match="a document has 6 tokens, but Linformer has weights for 5 positions"):
        layer(torch.randn(1, 8, 8), Cut.whole([2, 6]))
    with pytest.raises(ValueError, match="Linformer sees later tokens, so it keeps no states"):
        layer(torch.randn(1, 2, 8), Cut.whole([2], States()))


# --- B'MOJO-F and what comes before ----------------------------------------------------------------------------------


class Fading(nn.Module):
    """A memory of nothing but its own token, so that what sees it can be told."""

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return x


def test_bmojo_sees_two_windows_of_which_the_older_one_fades() -> None:
    layer, (x,) = drawn(lambda: BMojoF(8, 2, window=3, memory=Fading(), tied=False)), tensors(6, (1, 12, 8))
    for kind, seen in ((layer.kv, [7, 8, 9]), (layer.fading_kv, [4, 5, 6])):
        muted = copy.deepcopy(layer)
        other = muted.fading_kv if kind is layer.kv else muted.kv
        other.weight.data.zero_()
        keys = torch.autograd.functional.jacobian(lambda x, m=muted: m(x, Cut.whole([12]))[0, 9].sum(), x)
        assert [t for t in range(12) if keys[0, t].norm() > 0 and t != 9] == [t for t in seen if t != 9]


def test_bmojo_of_a_memory_of_nothing_is_attention_over_twice_the_window() -> None:
    layer, (x,) = drawn(lambda: BMojoF(8, 2, window=4, memory=Fading(), kv_heads=1)), tensors(7, (2, 23, 8))
    full = SoftmaxAttention(8, 2, kv_heads=1, window=8).double()
    full.q.weight.data.copy_(layer.q.weight)
    full.out.weight.data.copy_(layer.out.weight)
    full.k.weight.data.copy_(layer.kv.weight[:4])
    full.v.weight.data.copy_(layer.kv.weight[4:])
    whole = full(x, Cut.whole([3, 20]))
    assert (layer(x, Cut.whole([3, 20])) - whole).norm() < 1e-13 * whole.norm()


def test_bmojo_takes_any_memory() -> None:
    layer, (x,) = drawn(lambda: BMojoF(8, 2, window=2, memory=GLA(8, 2))), tensors(8, (1, 15, 8))
    whole = layer(x, Cut.whole([15]))

    def body(group: Group) -> Tensor:
        shard = Shard.of([15], group, "zigzag")
        return shard.gather(copy.deepcopy(layer)(shard.take(x), Cut(shard, group)).detach())

    assert all((each - whole).norm() < 1e-12 * whole.norm() for each in run_ranks(4, body))


def test_only_rows_that_are_missing_come_and_their_gradients_go_home() -> None:
    """Three tokens before each: over a cut three rows; of a rank with one token, to three ranks."""

    def sent(group: Group, tokens: int) -> tuple[int, int]:
        ledger = Ledger(group)
        shard = Shard.of([tokens], ledger)
        (x,) = leaves(shard, torch.zeros(1, tokens, 2))
        found = preceding(x, 3, shard=shard, group=ledger)
        forward = ledger.bytes_
        found.rows.sum().backward()
        return forward // 16, (ledger.bytes_ - forward) // 16

    assert run_ranks(3, sent, 30) == [(3, 0), (3, 3), (0, 3)]
    assert run_ranks(5, sent, 5) == [(3, 0), (3, 1), (2, 2), (1, 3), (0, 3)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_finds_those_before_it(layout: str) -> None:
    lengths, (x,) = [5, 0, 1, 9], tensors(9, (1, 15, 2))
    positions = [p for length in lengths for p in range(length)]

    def body(group: Group) -> None:
        shard = cut(lengths, group, layout)
        rows, places = preceding(shard.take(x), 4, shard=shard, group=group)
        for place, token in zip(places.tolist(), shard.indices_of(group.rank).tolist()):
            for back in range(min(4, positions[token]) + 1):
                assert place >= back and torch.equal(rows[:, place - back], x[:, token - back])

    for size in (1, 2, 6):
        run_ranks(size, body)


def test_states_that_enter_and_leave_again_get_their_gradients_once() -> None:
    """Calls of fewer tokens than come before: what the first had, the last still sees, on any ranks."""
    chunks, left = [2, 1, 3, 4], 5
    x, weights = tensors(11, (1, 10, 2), (10, left + 1))
    expected = torch.zeros(10, dtype=torch.float64)
    for t in range(10):
        for back in range(min(t, left) + 1):
            expected[t - back] += weights[t, back]

    def body(group: Group) -> Tensor:
        states, total, inputs, layer = States(), torch.zeros((), dtype=torch.float64), [], nn.Identity()
        for number, part in enumerate(x.split(chunks, 1)):
            shard, start = Shard.of([part.shape[1]], group), sum(chunks[:number])
            (mine,) = leaves(shard, part)
            rows, places = Here.of(Cut(shard, group, states=states), layer).preceding(mine, left)
            states = states.next(part.shape[1])
            inputs.append((shard, mine))
            for place, token in zip(places.tolist(), shard.indices_of(group.rank).tolist()):
                seen = rows[0, [place - back for back in range(min(start + token, left) + 1)], 0]
                total = total + (seen * weights[start + token, : len(seen)]).sum()
            total = total + 0 * rows.sum()  # a rank without tokens takes part in backward, too
        total.backward()
        return torch.cat([shard.gather(mine.grad)[0, :, 0] for shard, mine in inputs])

    for size in (1, 2, 3, 5):
        for found in run_ranks(size, body):
            assert (found - expected).norm() < 1e-14 * expected.norm()


def test_what_comes_before_says_what_does_not_fit() -> None:
    here = Here.of(Cut.whole([4]), nn.Identity())
    with pytest.raises(ValueError, match="left must be at least 0 tokens, got -1"):
        here.preceding(torch.zeros(1, 4, 2), -1)
    with pytest.raises(ValueError, match=r"x must be \[b, t, d\] with my 4 tokens, got \[1, 5, 2\]"):
        here.preceding(torch.zeros(1, 5, 2), 1)
    with pytest.raises(ValueError, match=r"initial must be \[1, 3, 2\], got \[1, 2, 2\]"):
        preceding(torch.zeros(1, 4, 2), 3, initial=torch.zeros(1, 2, 2), **here.place)


# --- arguments, the decoder, the row that is missing -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: ViG(8, 2, width=0), "width must be at least 1, got 0"),
        (lambda: ViG(9, 2, width=1), "heads must divide dim, got dim=9 and heads=2"),
        (lambda: ViG(8, 2, width=1, temperature=0), "temperature must be above 0, got 0"),
        (lambda: Linformer(8, 3), "heads must divide dim"),
        (lambda: Linformer(8, 2, projected=0), "projected must be at least 1, got 0"),
        (lambda: BMojoF(8, 2, window=0), "window must be at least 1, got 0"),
        (lambda: BMojoF(8, 4, kv_heads=3), "kv_heads must divide heads, got heads=4 and kv_heads=3"),
        (lambda: BMojoF(6, 2), "rotary positions need an even dim / heads, got 3"),
    ],
)
def test_bad_arguments(make: Callable[[], nn.Module], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        make()


@pytest.mark.parametrize("name", ["gam", "short_convolution", "token_shift", "bmojo_f"])
def test_a_decoder_steps_as_it_reads(name: str) -> None:
    torch.manual_seed(1)
    model, tokens = Decoder(DecoderConfig(name, vocabulary=7, dim=32)).double(), torch.randint(7, (1, 9))
    whole, states = model(tokens, Cut.whole([9])), States()
    with torch.no_grad():
        for token, expected in zip(tokens.unbind(1), whole.unbind(1)):
            logits, states = model.step(token, states)
            assert (logits - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize("make", [lambda: ShortConvolution(4, width=3), lambda: TokenShift(4), lambda: GAM(4, slots=2)])
def test_states_are_the_last_inputs(make: Callable[[], nn.Module]) -> None:
    layer, states, (x,) = make().double(), States(), tensors(10, (2, 7, 4))
    layer(x, Cut.whole([7], states))
    (state,) = states.leaving.values()
    assert torch.equal(state, x[:, -state.shape[1] :])


def test_memmamba_says_what_is_missing() -> None:
    entry, sizes = find("memmamba"), Sizes()
    calls: Sequence[Callable[[], Any]] = (lambda: entry.make(sizes), lambda: entry.bytes_per_cut(sizes, 8))
    for call in calls:
        with pytest.raises(ValueError, match="memmamba is not built: its equations were not at hand"):
            call()
    assert as_json(entry, sizes, 8)["bytes_per_cut"] is None
    assert as_json(find("gam"), sizes, 8)["bytes_per_cut"] == 2 * 64 * 4
    shown = table([entry, find("gam")], sizes, 8).plain
    assert "memmamba" in shown and "gam" in shown
