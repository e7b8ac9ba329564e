"""Prompts of different lengths are decoded in one batch: each row as if it were alone, or the layer says why not."""

import copy

import pytest
import torch
from torch import Tensor, nn

from seqpar import Cut
from seqpar.layers.catalog import CATALOG
from seqpar.models import Decoder, DecoderConfig
from seqpar.sharding.states import States
from tests.layers.drawn import relative
from tests.layers.rows import ROWS, listed
from tests.layers.test_battery import inputs_of, layer_of

PROMPTS, STEPS = (5, 17, 1, 9), 4
IN_CHUNKS = (
    "titans",
    "moneta",
    "yaad",
    "memora",
    "omeganet",
    "atlas",
    "dla",
    "rmt",
    "hmt",
)  # counted from the start of a document


def alone(layer: nn.Module, row: Tensor, prompt: int) -> tuple[Tensor, States]:
    """What the layer makes of a row by itself, and its states after the prompt."""
    states = States()
    layer(row[:, :prompt], Cut.whole([prompt], states))
    return layer(row, Cut.whole([row.shape[1]]))[:, prompt:], states.next()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", listed(n for n, row in ROWS.items() if CATALOG[row.entry].causal))
def test_rows_at_different_positions_are_rows_by_themselves(name: str) -> None:
    layer = layer_of(name)
    rows = [inputs_of(name, prompt + STEPS)[0][:1] for prompt in PROMPTS]
    with torch.no_grad():
        expected, states = zip(*(alone(layer, *each) for each in zip(rows, PROMPTS)))
        new = torch.cat([row[:, prompt:] for row, prompt in zip(rows, PROMPTS)])
        try:
            together, outputs = States.joined(states), []
            for part in new.split([1, 2, 1], 1):
                outputs.append(layer(part, Cut.whole([part.shape[1]], together)))
                together = together.next()
        except ValueError as error:
            assert name.startswith(IN_CHUNKS) and "rows stand at different positions, 5, 17, 1, 9" in str(error)
            return
    assert relative(torch.cat(outputs, 1), torch.cat(expected)) < 1e-12
    assert together.positions == tuple(prompt + STEPS for prompt in PROMPTS)


def test_a_decoder_steps_and_its_states_travel_by_name() -> None:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig("gla softmax", dim=16, heads=2)).double()
    twin, tokens = copy.deepcopy(model), torch.randint(256, (3, 12))
    with torch.no_grad():
        _, states = zip(*(alone_in(model, row[None], prompt) for row, prompt in zip(tokens, (4, 11, 7))))
        joined = States.restored(twin, States.joined(states).saved(model))
        logits, after = twin.step(tokens[:, -1], joined)
        for row, prompt, mine in zip(tokens, (4, 11, 7), logits):
            whole = torch.cat([row[:prompt], row[-1:]])[None]
            assert relative(mine, model(whole, Cut.whole([prompt + 1]))[0, -1]) < 1e-12
    assert after.positions == (5, 12, 8)


def alone_in(model: Decoder, row: Tensor, prompt: int) -> tuple[Tensor, States]:
    states = States()
    return model(row[:, :prompt], Cut.whole([prompt], states)), states.next()


def test_what_does_not_join_is_said() -> None:
    one, other = layer_of("gla"), layer_of("retention")
    x = inputs_of("gla", 5)[0]
    with torch.no_grad():
        found = [alone(layer, x, 3)[1] for layer in (one, other)]
    for wrong in ([], found, [States(), States()]):
        with pytest.raises(ValueError, match="expected states of one model"):
            States.joined(wrong)
