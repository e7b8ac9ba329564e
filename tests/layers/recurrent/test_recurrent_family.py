"""Recurrent layers beside torch's own, what their states are, and the wavefront of a stack, in counted steps."""

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqpar import Cut, Shard, sequence_parallel
from seqpar.collectives import Group, run_ranks
from seqpar.collectives.group import Later
from seqpar.layers.recurrent.recurrent import GRU, LSTM, SLSTM, Elman, Recurrent
from seqpar.layers.recurrent.recurrent_layer import LeakyCell, RecurrentLayer
from seqpar.layers.recurrent.spiking import LIF, SpikingFFN
from seqpar.models.decoder import Decoder, DecoderConfig
from seqpar.ops.choice import has_triton
from seqpar.sharding.states import States
from tests.layers.drawn import drawn, loud, relative


def ours_and_torchs(layer: Recurrent, theirs: nn.RNNBase) -> list[tuple[Tensor, Tensor]]:
    """Output and gradients of both on the same weights; ours on three ranks."""
    one = layer.matrix.shape[-1]
    own = {name: p for name, p in theirs.named_parameters() if not name.endswith("_reverse")}
    own["weight_ih_l0"].data, own["weight_hh_l0"].data = layer.inner.data[0, 0], layer.matrix.data[0, 0]
    bias = layer.bias.data[0, 0]
    own["bias_ih_l0"].data = bias[: len(own["bias_ih_l0"])].clone()
    own["bias_hh_l0"].data.zero_()[2 * one : 3 * one] = bias[3 * one :] if isinstance(theirs, nn.GRU) else 0
    x, upstream = drawn(2, 11, one), drawn(2, 11, one, seed=1)
    whole = x.clone().requires_grad_()
    expected = theirs(whole)[0]
    expected.backward(upstream)

    def body(group: Group) -> list[tuple[Tensor, Tensor]]:
        mine, shard = copy.deepcopy(layer), Shard.of([11], group)
        y = shard.take(x).clone().requires_grad_()
        out = mine.mix((y,), Cut(shard, group))[:, :, 0]
        out.backward(shard.take(upstream))
        assert mine.inner.grad is not None and mine.matrix.grad is not None
        sums = [group.all_reduce(p.grad).wait()[0, 0] for p in (mine.inner, mine.matrix)]
        theirs_ = [own["weight_ih_l0"].grad, own["weight_hh_l0"].grad]
        pairs = [(shard.gather(out.detach()), expected.detach()), (shard.gather(y.grad), whole.grad)]
        return [*pairs, *zip(sums, theirs_)]

    return run_ranks(3, body)[0]


@pytest.mark.parametrize(
    ("ours", "theirs"), [(Elman, nn.RNN), (GRU, nn.GRU), (LSTM, nn.LSTM)], ids=lambda each: each.__name__
)
def test_one_head_is_torchs_own(ours: type[Any], theirs: type[Any]) -> None:
    pairs = ours_and_torchs(loud(ours(6, 1)), theirs(6, 6, batch_first=True).double())
    assert max(relative(mine, torchs) for mine, torchs in pairs) < 1e-13


@pytest.mark.skipif(not has_triton(), reason="needs triton")
@pytest.mark.parametrize("kind", (Elman, GRU, LSTM, SLSTM))
def test_heads_in_a_kernel_are_those_of_torch(kind: type[Any]) -> None:
    """Interpreted, on two ranks, with a document that goes over the cut."""
    layer, x, upstream = loud(kind(6, 2)), drawn(1, 7, 6), drawn(1, 7, 6, seed=1)

    def body(group: Group, impl: str) -> list[Tensor]:
        mine, shard = copy.deepcopy(layer), Shard.of([2, 5], group)
        y = shard.take(x).clone().requires_grad_()
        out = mine(y, Cut(shard, group, impl=impl))
        out.backward(shard.take(upstream))
        sums = [group.all_reduce(p.grad).wait() for p in mine.parameters()]
        return [shard.gather(out.detach()), shard.gather(y.grad), *sums]

    expected = run_ranks(1, body, "reference")[0]
    assert max(relative(a, b) for a, b in zip(run_ranks(2, body, "triton")[0], expected)) < 1e-13


@pytest.mark.parametrize("exponent", (-50.0, -3.0, 50.0))
def test_an_slstm_row_knows_nothing_of_its_batch(exponent: float) -> None:
    """A row that goes on and one that begins, side by side: what is new is decided for each by itself."""
    layer = loud(SLSTM(6, 2))
    layer.bias.data[..., :3] += exponent
    params = (layer.inner[0], layer.matrix[0], layer.bias[0])
    x, fresh = drawn(2, 5, 6), [torch.zeros(2, 2, 3, dtype=torch.float64) for _ in range(4)]
    _, state = layer.kind.cell(params, (x[:1],), tuple(each[:1] for each in fresh))
    mixed = tuple(torch.cat([a, b[:1]]) for a, b in zip(state, fresh))
    together, _ = layer.kind.cell(params, (x,), mixed)
    apart = [layer.kind.cell(params, (x[i : i + 1],), tuple(e[i : i + 1] for e in mixed))[0] for i in (0, 1)]
    assert together.isfinite().all() and relative(together, torch.cat(apart)) < 1e-15


def test_a_bidirectional_cell_sees_the_same_both_ways() -> None:
    layer = loud(SLSTM(6, 2, bidirectional=True))
    for each in (layer.inner, layer.matrix, layer.bias):
        each.data[1] = each.data[0]
    x = drawn(2, 9, 6)
    forwards, backwards = layer.mix((x,), Cut.whole([9])).chunk(2, 2)
    assert relative(layer.mix((x.flip(1),), Cut.whole([9])).chunk(2, 2)[0].flip(1), backwards) < 1e-15
    assert relative(forwards, backwards) > 0.1


def test_a_layer_of_a_cell_of_ones_own_says_what_it_lacks() -> None:
    with pytest.raises(ValueError, match=r"a method start\(\) that gives the first state, Linear has none"):
        RecurrentLayer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="kind must be one of elman, gru, lstm, slstm, got 'rnn'"):
        type("Rnn", (Recurrent,), {"kind_name": "rnn"})(4, 1)
    with pytest.raises(ValueError, match="transport must be one of stream, all_to_all, got 'ring'"):
        LSTM(4, 1, transport="ring")
    with pytest.raises(ValueError, match="heads must divide dim"):
        LSTM(4, 3)


@pytest.mark.parametrize(
    ("change", "text"), [({"tau": 0.5}, "tau must be at least 1"), ({"threshold": 0.0}, "above 0")]
)
def test_neurons_refuse_what_makes_no_sense(change: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LIF(3, **change)


def test_a_neuron_does_not_hide_what_is_not_a_number() -> None:
    x = torch.zeros(1, 3, 2)
    x[0, 1, 0] = torch.nan
    assert LIF(2)(x, Cut.whole([3])).isnan().tolist() == [[[False, False], [True, False], [True, False]]]


def test_a_spiking_feed_forward_part_is_that_of_one_device() -> None:
    """Of spikes only, and some."""
    layer, x = loud(SpikingFFN(3, 5)), drawn(2, 9, 3)

    def body(group: Group) -> Tensor:
        shard = Shard.of([4, 5], group)
        return shard.gather(copy.deepcopy(layer)(shard.take(x), Cut(shard, group)).detach())

    expected = run_ranks(1, body)[0]
    assert torch.equal(run_ranks(3, body)[0], expected)
    assert set(expected.unique().tolist()) == {0.0, 1.0}


# --- in a decoder ----------------------------------------------------------------------------------------------------


def decoder() -> Decoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = DecoderConfig(pattern="lstm slstm gru titans", vocabulary=11, dim=8, heads=2, checkpoint=True)
        return Decoder(config).double()


def test_a_wrapped_decoder_has_the_gradients_of_one_device() -> None:
    whole, tokens = decoder(), torch.randint(11, (2, 13), generator=torch.Generator().manual_seed(0))

    def body(group: Group) -> list[Tensor]:
        model = sequence_parallel(copy.deepcopy(whole), group=group)
        model(tokens, labels=tokens, lengths=[4, 0, 9]).loss.backward()
        return [p.grad for p in model.parameters()]

    expected = run_ranks(1, body)[0]
    for found in run_ranks(3, body):
        assert max(relative(mine, theirs, floor=1e-6) for mine, theirs in zip(found, expected, strict=True)) < 1e-10


def test_prefill_on_cut_ranks_then_step_by_step_on_one() -> None:
    model, tokens = decoder(), torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(1))
    whole = model(tokens, Cut.whole([12])).detach()

    def body(group: Group) -> Tensor:
        mine, states, shard = copy.deepcopy(model), States(), Shard.of([7], group)
        with torch.no_grad():
            mine(shard.take(tokens[:, :7]), Cut(shard, group, states=states))
            states, steps = states.next(), []
            for token in tokens[:, 7:].unbind(1):
                logits, states = mine.step(token, states)
                steps.append(logits)
        return torch.stack(steps, 1)

    assert all(relative(steps, whole[:, 7:]) < 1e-12 for steps in run_ranks(3, body))


# --- the wavefront ---------------------------------------------------------------------------------------------------


class Clocked:
    """A group in counted time: a message is there when its sender had come so far. ``step`` is a rank's work."""

    def __init__(self, group: Group, sent: dict[tuple[int, int], list[int]]) -> None:
        self._group, self._sent, self.now = group, sent, 0
        self.rank, self.size = group.rank, group.size
        self._got: defaultdict[int, int] = defaultdict(int)

    def step(self, count: int) -> None:
        self.now += count

    def exchange(self, send: Tensor | None, to: int | None, receive: Tensor | None, source: int | None) -> Any:
        if to is not None:
            self._sent[self.rank, to].append(self.now)
        pending = self._group.exchange(send, to, receive, source)

        def wait() -> Tensor | None:
            found = pending.wait()
            if source is not None:
                number, self._got[source] = self._got[source], self._got[source] + 1
                self.now = max(self.now, self._sent[source, self.rank][number])
            return found

        return Later(wait)


class CountedCell(LeakyCell):
    """Whose steps its rank's clock counts, forwards and again in backward."""

    clock: Any = None

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        self.clock.step(x.shape[1])
        return super().forward(x, state)


def steps_of(size: int, layers: int, layout: str, tokens: int = 48) -> int:
    """Until the last rank is done, forwards and backwards."""
    sent: defaultdict[tuple[int, int], list[int]] = defaultdict(list)

    def body(group: Group) -> int:
        clocked: Any = Clocked(group, sent)
        shard = Shard.of([tokens], clocked, layout)
        stack = [RecurrentLayer(CountedCell(2)) for _ in range(layers)]
        x = torch.randn(1, shard.num_local, 2, requires_grad=True)
        y = x
        for layer in stack:
            layer.cell.clock = clocked
            y = layer(y, Cut(shard, clocked))
        probes = layers if size > 1 else 0  # one row each, before the first message
        y.sum().backward()
        return clocked.now - probes

    return max(run_ranks(size, body))


def test_a_stack_is_a_wavefront() -> None:
    """12 layers on 4 ranks take (12 + 3) / (12 x 4) of one rank's time, forwards and backwards."""
    alone = steps_of(1, 12, "contiguous")
    assert alone == 2 * 12 * 48
    assert steps_of(2, 12, "contiguous") <= 0.56 * alone
    assert steps_of(4, 12, "contiguous") <= 0.35 * alone


def test_zigzag_has_no_wavefront() -> None:
    assert steps_of(4, 12, "zigzag") >= 0.9 * steps_of(1, 12, "contiguous")
