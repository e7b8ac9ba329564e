"""States know the documents of their call, and are taken by the layers that kept them only."""

import copy

import pytest
import torch
from torch import Tensor, nn

from seqpar import Cut, Shard
from seqpar.collectives import Group, run_ranks
from seqpar.sharding.states import States
from tests.layers.drawn import relative
from tests.layers.test_battery import expected_of, inputs_of, layer_of

STREAM = (5, 7)
CALLS = ([5], [0, 3], [4])  # the second document begins in the second call, and goes on in the third
READS_POSITIONS = ("retention", "transnormer", "transnormer, alibi, fixed positions", "bmojo_f", "gla")


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        y: Tensor = self.layer(self.layer(x, cut), cut)
        return y


def in_calls(group: Group, name: str, say: bool) -> Tensor:
    layer, states, outputs = layer_of(name), States(), []
    x = inputs_of(name, sum(STREAM))[0]
    with torch.no_grad():
        for part, lengths in zip(x.split([sum(lengths) for lengths in CALLS], 1), CALLS):
            shard = Shard.of(lengths, group)
            outputs.append(shard.gather(layer(shard.take(part), Cut(shard, group, states=states))))
            states = states.next(lengths[-1]) if say else states.next()
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("name", READS_POSITIONS)
def test_positions_are_those_of_the_document(name: str) -> None:
    expected = expected_of(name, STREAM)["output"]
    for size in (1, 2):
        for outcome in run_ranks(size, in_calls, name, size == 1):
            assert relative(outcome, expected) < 1e-12


def test_a_copy_of_the_model_is_refused_and_given_states_by_name() -> None:
    model, x = nn.ModuleList([layer_of("gla"), layer_of("retention")]), inputs_of("gla", 9)[0]
    twin, states = copy.deepcopy(model), States()

    def run(layers: nn.ModuleList, part: Tensor, states: States) -> Tensor:
        cut = Cut.whole([part.shape[1]], states)
        with torch.no_grad():
            for layer in layers:
                part = layer(part, cut)
        return part

    run(model, x[:, :5], states)
    later = states.next()
    with pytest.raises(ValueError, match="another model, or to another copy"):
        run(twin, x[:, 5:], later)
    saved = later.saved(model)
    expected = run(model, x[:, 5:], later)
    assert torch.equal(run(twin, x[:, 5:], States.restored(twin, saved)), expected)
    with pytest.raises(ValueError, match="no layer '1'"):
        States.restored(nn.ModuleList([layer_of("gla")]), saved)
    with pytest.raises(ValueError, match="not in this"):
        later.saved(twin)


def test_a_model_that_takes_only_some_states_is_refused() -> None:
    model, x = nn.ModuleList([layer_of("gla"), layer_of("retention")]), inputs_of("gla", 9)[0]
    states = States()
    for layer in model:
        layer(x, Cut.whole([9], states))
    later = states.next(9)
    model[0](x, Cut.whole([9], later))
    with pytest.raises(ValueError, match="Retention had states but kept none"):
        later.next(9)


def test_a_layer_used_twice_in_one_call_is_refused() -> None:
    x, states = inputs_of("gla", 9)[0], States()
    with pytest.raises(ValueError, match="used twice in one call"):
        Twice(layer_of("gla"))(x, Cut.whole([9], states))
    for _ in range(2):  # the same call again is not the same call twice
        layer_of("retention")(x, Cut.whole([9], states))


def test_lengths_that_were_not_those_of_the_call_are_refused() -> None:
    states = States()
    Cut.whole([4, 3], states)
    for wrong in (4, [3], [4, 2], [7]):
        with pytest.raises(ValueError, match="those of the call"):
            states.next(wrong)
    assert [states.next(right).position for right in (3, [4, 3], None)] == [3, 3, 3]
    Cut.whole([8], states)
    with pytest.raises(ValueError, match="2 calls had these states"):
        states.next()
    assert States(position=2).next(3).position == 5 and States(position=2).next([0, 3]).position == 3
