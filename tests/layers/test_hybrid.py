"""The hybrid model gives the same numbers however it is cut: loss, logits, every gradient; and it learns."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar import Cut, sequence_parallel
from seqpar.collectives import Group, Ledger, alone
from seqpar.layers import LightningAttention, LinearAttention, SoftmaxAttention
from seqpar.models import HybridConfig, HybridLM
from seqpar.models.hybrid import MIXERS

LENGTHS = [7, 0, 13, 1, 4]
SMALL: dict[str, Any] = {"vocabulary": 11, "dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "softmax_every": 2}


def build(config: HybridConfig) -> HybridLM:
    """The same weights whenever it is called; large ones, so that every part of the model matters."""
    generator = torch.Generator().manual_seed(4)
    model = HybridLM(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return model


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(11, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(5))
    labels = tokens.clone()
    labels[0, 9:12] = -100
    return tokens, labels


def outcome(group: Group, config: HybridConfig, **how: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    tokens, labels = batch()
    plain = build(config)
    out = sequence_parallel(plain, group=group, **how)(tokens, labels=labels, lengths=LENGTHS)
    out.loss.backward()
    grads = {name: parameter.grad for name, parameter in plain.named_parameters()}
    return out.loss.detach(), out.shard.gather(out.logits.detach()), grads


def worst_error(group: Group, config: HybridConfig, **how: str) -> tuple[float, str]:
    """The largest relative error of any number on this rank, and which one it is."""
    loss, logits, grads = outcome(alone(), config)
    my_loss, my_logits, my_grads = outcome(group, config, **how)
    pairs = {"loss": (my_loss, loss), "logits": (my_logits, logits)}
    pairs |= {name: (my_grads[name], grads[name]) for name in grads}
    return max((((mine - one).norm() / one.norm()).item(), name) for name, (mine, one) in pairs.items())


@pytest.mark.spmd(1, 2, 4)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_is_the_same_on_many_ranks(group: Group, mixer: str) -> None:
    error = worst_error(group, HybridConfig(mixer=mixer, **SMALL))
    assert error[0] < 1e-10, error


@pytest.mark.spmd(3)
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("layout", ["zigzag", "striped"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_is_the_same_in_every_layout(group: Group, mixer: str, layout: str, checkpoint: bool) -> None:
    config = HybridConfig(mixer=mixer, checkpoint=checkpoint, window=5, **SMALL)
    error = worst_error(group, config, layout=layout, transport="all_gather", scan="ring")
    assert error[0] < 1e-10, error


@pytest.mark.spmd(3)
@pytest.mark.parametrize("mixer", MIXERS)
def test_checkpointing_sends_nothing_again(group: Group, mixer: str) -> None:
    sent = []
    for checkpoint in (False, True):
        ledger = Ledger(group)
        outcome(ledger, HybridConfig(mixer=mixer, checkpoint=checkpoint, **SMALL))
        sent.append((ledger.bytes_, ledger.messages))
    assert sent[0] == sent[1]


def test_no_matrix_is_left_out_of_the_gradient() -> None:
    grads = outcome(alone(), HybridConfig(mixer="gla", **SMALL))[2]
    assert all(grad.norm() > 1e-6 for grad in grads.values()), {name: grad.norm() for name, grad in grads.items()}


def test_every_fourth_layer_is_softmax_attention() -> None:
    blocks = HybridLM(HybridConfig(layers=8, mixer="linear_attention")).blocks
    kinds = [type(block.mixer) for block in blocks]
    assert kinds == [*[LinearAttention] * 3, SoftmaxAttention] * 2


def test_lightning_layers_know_their_depth() -> None:
    blocks = HybridLM(HybridConfig(layers=3, heads=2, mixer="lightning_attention", softmax_every=0)).blocks
    decays = [block.mixer.log_decay for block in blocks if isinstance(block.mixer, LightningAttention)]
    expected = [[-0.0625 * share, -(2**-8) * share] for share in (1.00001, 0.50001, 0.00001)]
    assert [list(decay) for decay in decays] == [pytest.approx(layer, rel=1e-9) for layer in expected]


def test_initial_loss_is_that_of_a_guess() -> None:
    torch.manual_seed(0)
    model = HybridLM(HybridConfig())
    logits = model(torch.randint(256, (1, 64)), Cut.whole([64]))
    loss = torch.nn.functional.cross_entropy(logits[0], torch.randint(256, (64,)))
    assert abs(loss.item() - 5.545) < 0.3


def test_it_learns_a_text_by_heart() -> None:
    torch.manual_seed(0)
    model = sequence_parallel(HybridLM(HybridConfig(dim=32, layers=2, mixer="retention")), group=alone())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.tensor([list(b"the same model, the same batch, the same numbers")])
    losses = []
    for _ in range(60):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5 and losses[-1] < 0.5, losses


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mixer": "mamba"}, "mixer must be one of linear_attention, lightning_attention, retention, gla, got 'mamba'"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"softmax_every": -1}, "softmax_every must not be negative"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be above 0"),
    ],
)
def test_wrong_config_says_what_is_expected(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        HybridConfig(**arguments)


def test_a_model_may_be_called_from_many_threads_at_once() -> None:
    model = build(HybridConfig(**SMALL))
    tokens = batch()[0]
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(model(tokens, Cut.whole(LENGTHS)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, results[0]) for result in results)
