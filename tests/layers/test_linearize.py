"""A softmax decoder made linear keeps its weights, cuts like any other, steps with a small state, and takes LoRA."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqpar import Cut, sequence_parallel
from seqpar.collectives import Group, alone
from seqpar.layers import SoftmaxAttention
from seqpar.layers.linear.liger import Liger
from seqpar.models import Decoder, DecoderConfig, HybridConfig, HybridLM
from seqpar.models.linearize import linearize
from seqpar.sharding.states import States
from tests.layers.drawn import drawn, loud, relative
from tests.layers.families.test_decay_family import LENGTHS, TOKENS


def decoder(pattern: str = "gla softmax retention softmax", **options: Any) -> Any:
    return loud(Decoder(DecoderConfig(pattern, vocabulary=11, dim=16, **options)))


def batch() -> Tensor:
    return torch.randint(11, (2, TOKENS), generator=torch.Generator().manual_seed(5))


def test_linearize_replaces_softmax_attention_and_keeps_every_weight() -> None:
    model = decoder()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    weights = copy.deepcopy(model.state_dict())
    logits = model(batch(), Cut.whole(LENGTHS))
    assert linearize(model) is model
    assert [type(block.mixer).__name__ for block in model.blocks] == ["GLA", "Liger", "Retention", "Liger"]
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    model.load_state_dict(weights)  # what was saved before fits
    assert relative(model(batch(), Cut.whole(LENGTHS)), logits) > 1e-3


@pytest.mark.spmd(1, 3)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_linearized_model_is_the_same_on_many_ranks(group: Group, checkpoint: bool) -> None:
    config = HybridConfig(vocabulary=11, dim=16, layers=2, heads=4, kv_heads=2, softmax_every=2, checkpoint=checkpoint)

    def outcome(group: Group) -> dict[str, Tensor]:
        model = linearize(loud(HybridLM(config)), window=4)
        out = sequence_parallel(model, group=group, layout="zigzag")(batch(), labels=batch(), lengths=LENGTHS)
        out.loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        return {"loss": out.loss.detach(), "logits": out.shard.gather(out.logits.detach()), **grads}

    one, many = outcome(alone()), outcome(group)
    assert max(relative(many[name], one[name]) for name in one) < 1e-10


def test_a_linearized_model_steps_with_a_state_that_does_not_grow() -> None:
    model, tokens = linearize(decoder(), window=4), batch()[:, :12]
    states, outputs, sizes = States(), [], []
    with torch.no_grad():
        for token in tokens.unbind(1):
            logits, states = model.step(token, states)
            outputs.append(logits)
            sizes.append(sum(state.numel() for state in states.entering.values()))
        whole = model(tokens, Cut.whole([12]))
    assert relative(torch.stack(outputs, 1), whole) < 1e-12
    assert len(set(sizes[3:])) == 1


class LowRank(nn.Module):
    """A frozen linear layer and a trained low-rank addition to it."""

    def __init__(self, linear: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.linear, self.in_features, self.out_features = linear, linear.in_features, linear.out_features
        self.down = nn.Linear(self.in_features, rank, bias=False, dtype=linear.weight.dtype)
        self.up = nn.Linear(rank, self.out_features, bias=False, dtype=linear.weight.dtype)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


def adapted(model: Decoder) -> Decoder:
    """LoRA on q, k and v of every layer that has softmax attention in it; everything else frozen."""
    model.requires_grad_(False)
    for block in model.blocks:
        mixer: Any = block.mixer
        if isinstance(mixer, SoftmaxAttention | Liger):
            mixer.q, mixer.k, mixer.v = (LowRank(each) for each in (mixer.q, mixer.k, mixer.v))
    return model


@pytest.mark.parametrize("adapt_first", [False, True])
def test_low_rank_additions_go_onto_a_linearized_model(adapt_first: bool) -> None:
    expected = linearize(decoder())(batch(), Cut.whole(LENGTHS))
    model = linearize(adapted(decoder())) if adapt_first else adapted(linearize(decoder()))
    logits = model(batch(), Cut.whole(LENGTHS))
    assert relative(logits, expected) < 1e-13  # nothing is added yet
    logits.backward(drawn(*logits.shape, seed=4))
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all(name.rsplit(".", 2)[1] in ("down", "up") for name in trained)
    assert all(model.get_parameter(name).grad.norm() > 0 for name in trained if ".up." in name)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: linearize(decoder("gla retention")), "needs a model with softmax attention"),
        (lambda: linearize(linearize(decoder())), "none .left."),
        (lambda: linearize(decoder(), window=0), "window must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_linearized_is_said(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_a_failed_linearize_changes_nothing() -> None:
    model = decoder()
    model.blocks[3].mixer.causal = False
    with pytest.raises(ValueError, match="causal"):
        linearize(model)
    assert [type(block.mixer).__name__ for block in model.blocks].count("SoftmaxAttention") == 2
