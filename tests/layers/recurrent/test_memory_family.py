"""Memories: their two implementations beside each other, what equals what, and that nothing sees later tokens."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seqpar import Cut
from seqpar.layers.memory import neural_memory as memories
from seqpar.layers.memory.deep import Loss
from seqpar.layers.memory.mac import MAC
from seqpar.layers.memory.neural_memory import NeuralMemory
from seqpar.layers.memory.rules import Rule, orthogonal
from seqpar.layers.memory.titans import MAG
from seqpar.models.decoder import Decoder, DecoderConfig
from tests.layers.drawn import drawn, relative
from tests.layers.rows import ROWS
from tests.layers.test_battery import inputs_of, layer_of
from tests.layers.test_mutations import printed_mask

AFFINE = ("titans", "titans, four matrices", "moneta", "yaad", "omeganet", "atlas plus, no muon", "dla")
NAMES = (*AFFINE, "titans, loop, three matrices", "memora", "atlas")
TITANS = ("titans mag", "titans mal", "titans mac", "swla", "rmt", "hmt")


def outcome(layer: NeuralMemory, x: Tensor, upstream: Tensor, lengths: list[int]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x, Cut.whole(lengths))
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], upstream)]


@pytest.mark.parametrize("name", AFFINE)
def test_the_closed_form_is_the_loop(name: str) -> None:
    """Chunks of 4 and of 9, documents that end inside of them."""
    layer = copy.deepcopy(layer_of(name))
    for chunk in (4, 9):
        layer.rule = replace(layer.rule, chunk=chunk, closed=True)
        closed = outcome(layer, *inputs_of(name, 24), [11, 13])
        layer.rule = replace(layer.rule, closed=False)
        loop = outcome(layer, *inputs_of(name, 24), [11, 13])
        assert max(relative(*pair) for pair in zip(closed, loop)) < 1e-11


@pytest.mark.parametrize("name", (*NAMES, *TITANS))
def test_no_token_sees_a_later_one(name: str) -> None:
    """Changed from inside of a chunk on."""
    layer, (x, _) = layer_of(name), inputs_of(name, 16)
    with torch.no_grad():
        before = layer(x, Cut.whole([16]))
        for t in (5, 6, 10):
            changed = x.clone()
            changed[:, t:] += 1.0
            after = layer(changed, Cut.whole([16]))
            assert torch.equal(after[:, :t], before[:, :t]) or relative(after[:, :t], before[:, :t]) < 1e-14
            assert relative(after[:, t:], before[:, t:]) > 1e-3


def test_yaad_takes_each_loss_on_its_side_of_the_bound() -> None:
    layer, (x, upstream) = copy.deepcopy(layer_of("yaad")), inputs_of("yaad", 16)
    layer.gates.bias.data.view(2, -1)[:, 2] = 1.0
    found = layer.tokens(torch.randn(2, 16, 24).double(), layer.gates(x).unflatten(-1, (2, -1)))
    shares = []
    for bound in (found.delta, 0 * found.delta):
        errors = found.k - found.v
        shares.append((Loss("huber").gradient(found.k, found.v, bound) == 2 * errors).all(-1).double().mean())
    assert 0.05 < shares[0] < 0.95 and shares[1] == 0
    x = x.clone().requires_grad_()
    y = ROWS["yaad"].oracle(layer, x, [16])
    expected = [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], upstream)]
    assert max(relative(*pair) for pair in zip(outcome(layer, x.detach(), upstream, [16]), expected)) < 1e-10


def reads_of(rule: Rule, tokens: dict[str, Tensor]) -> Tensor:
    """What the tokens read from a memory of one matrix."""
    layer = memories.titans(8, 2, chunk=rule.chunk).double()
    layer.rule = rule
    found = layer.tokens(tokens["convolved"], tokens["gates"])._replace(log_momentum=None)
    start = rule.start((torch.zeros(2, 4, 4, dtype=torch.float64),))
    return rule(found, tuple(each.expand(2, *each.shape) for each in start), 0)[0]


def test_a_memory_of_one_matrix_and_chunks_of_one_token_is_the_delta_rule() -> None:
    """``W = (1 - a) W - 2 step (W k - v) k'``, token by token; with the product as its loss, linear attention."""
    tokens = {"convolved": drawn(2, 7, 24), "gates": drawn(2, 7, 2, 3, seed=1)}
    layer = memories.titans(8, 2).double()
    found = layer.tokens(tokens["convolved"], tokens["gates"])
    for loss, share in ((Loss(), 2.0), (Loss("dot"), 0.0)):
        matrix, outs = torch.zeros(2, 2, 4, 4, dtype=torch.float64), []
        for t in range(7):
            k, v, q = found.k[:, :, t], found.v[:, :, t], found.q[:, :, t]
            error = share * torch.einsum("bhoi,bhi->bho", matrix, k) - (share or 1.0) * v
            keep, step = found.log_keep[:, :, t, None, None].exp(), found.step[:, :, t, None, None]
            matrix = keep * matrix - step * error[..., None] * k[..., None, :]
            outs.append(torch.einsum("bhoi,bhi->bho", matrix, q))
        assert relative(reads_of(Rule(1, 1, loss), tokens), torch.stack(outs, 1)) < 1e-13


def test_moneta_with_squares_and_no_norm_is_yaad_with_no_bound() -> None:
    x, upstream = drawn(2, 12, 8), drawn(2, 12, 8, seed=1)
    squares = memories.yaad(8, 2, chunk=4).double()
    squares.rule = replace(squares.rule, loss=Loss("lp", 2.0), retention="norm", norm_power=2.0)
    plain = copy.deepcopy(squares)
    plain.rule = replace(plain.rule, loss=Loss(), retention="plain")
    lengths = [12]
    for layer in (squares, plain):
        layer.counts, layer.gates = [1, 1, 0, 0], torch.nn.Linear(8, 4).double()
    plain.gates.load_state_dict(squares.gates.state_dict())
    assert (
        max(relative(*p) for p in zip(outcome(squares, x, upstream, lengths), outcome(plain, x, upstream, lengths)))
        < 1e-11
    )


def test_muon_makes_singular_values_about_one() -> None:
    values = torch.linalg.svdvals(orthogonal(drawn(3, 2, 5, 9)))
    assert values.min() > 0.4 and values.max() < 1.3
    assert relative(orthogonal(drawn(3, 2, 9, 5).mT), orthogonal(drawn(3, 2, 9, 5)).mT) < 1e-13


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        memories.titans(8, 2, chunk=0)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        memories.omeganet(8, 2, window=0)
    with pytest.raises(ValueError, match="heads must divide dim, got dim=8 and heads=3"):
        memories.titans(8, 3)
    with pytest.raises(ValueError, match="the memory's chunk, 64, must divide segment, got 100"):
        MAC(8, 2, segment=100)
    with pytest.raises(ValueError, match="persistent must be at least 1, got 0"):
        MAG(8, 2, persistent=0)


def test_mac_as_printed_lets_tokens_see_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, (x, _) = layer_of("titans mac"), inputs_of("titans mac", 8)
    printed_mask(monkeypatch)
    changed = torch.cat([x[:, :4], x[:, 4:] + 1.0], 1)
    before, after = (layer(y, Cut.whole([8])).detach() for y in (x, changed))
    assert relative(after[:, :4], before[:, :4]) > 1e-2


def test_every_rule_of_the_catalog_is_in_the_battery_with_chunks_that_end_inside_a_shard() -> None:
    assert all(layer_of(name).rule.chunk < 5 for name in NAMES) and set(NAMES) <= set(ROWS)


@pytest.mark.parametrize("name", ["titans", "titans_mac"])
def test_a_new_decoder_stays_finite_over_many_chunks(name: str) -> None:
    """Its keys are nearly equal, so a chunk's steps add up."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(pattern=f"{name} {name}", vocabulary=50, dim=32, heads=2))
    with torch.no_grad():
        assert model(torch.randint(0, 50, (1, 1024)), Cut.whole([1024])).isfinite().all()
