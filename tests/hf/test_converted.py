"""Models of transformers as decoders of our layers: their numbers on each document alone, their files bit by bit."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaConfig

from bench.models.hf.converted import measure_converted
from seqpar import Cut, sequence_parallel
from seqpar.collectives import alone
from seqpar.hf import load, save
from seqpar.hf.converting import convert
from seqpar.hf.converting.rules import Rule, back, out
from seqpar.hf.converting.table import FAMILIES
from seqpar.models import Decoder, DecoderConfig
from seqpar.sharding.states import States
from tests.hf.models import tiny

RULES = (
    Rule(("a",), ("b",)),
    Rule(("a",), ("b",), transposed=True),
    Rule(("a",), ("b",), negated=True),
    Rule(("a",), ("b", "c"), (2, 4)),
    Rule(("a",), ("b", "c"), (1, 2), groups=2),
    Rule(("a",), ("b", "c"), (1, 3), dim=1),
    Rule(("a", "d"), ("b",), (6, 6)),
    Rule(("a",), ("b", "c"), (1, 1, 1), groups=2, joins=(2, 1)),
    Rule(("a",), ("b",), shape=(24,), their_shape=(6, 4)),
)


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_rules_are_read_both_ways(rule):
    theirs = {name: torch.randn(6, 4) for name in rule.theirs}
    ours = out([rule], theirs)
    again = back([rule], ours)
    assert all(torch.equal(again[name], each) for name, each in theirs.items())
    assert sum(each.numel() for each in ours.values()) == sum(each.numel() for each in theirs.values())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_converted_model_is_that_of_transformers(model_type):
    found = measure_converted(model_type, [(3, "zigzag")])
    assert found.outcome == "exact", found


@pytest.mark.nightly
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_converted_model_is_that_of_transformers_in_every_world(model_type):
    found = measure_converted(model_type)
    assert found.outcome == "exact", found


@pytest.mark.sampled(3)
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_files_come_back_bit_by_bit(model_type, tmp_path):
    tiny(model_type).bfloat16().save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    save(load(tmp_path / "theirs"), tmp_path / "ours")
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("theirs", "ours"))
    assert first.config.to_dict() == second.config.to_dict() | {"_name_or_path": first.config._name_or_path}
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(
        torch.equal(each, states[1][name]) and each.dtype == states[1][name].dtype for name, each in states[0].items()
    )


def test_a_converted_model_takes_what_a_decoder_takes():
    model = tiny("qwen3")
    decoder = load(model)
    tokens = torch.arange(3, 15)[None]
    whole = decoder(tokens, Cut.whole([12]))
    states, stepped = States(), []
    for each in tokens.unbind(1):
        logits, states = decoder.step(each, states)
        stepped.append(logits)
    assert (torch.stack(stepped, 1) - whole).norm() < 1e-12 * whole.norm()
    losses = [
        sequence_parallel(load(model), group=alone(), loss_tokens=count)(tokens, labels=tokens).loss.item()
        for count in (0, 5)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def small(**more):
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    return LlamaConfig(**sizes, num_attention_heads=2, **more)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0.1, but decoders have no dropout"),
        ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu' is not known"),
        ({"residual_twist": 2}, "rules do not know what residual_twist=2 means"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "kind 'dynamic' change"),
    ],
)
def test_what_is_not_known_is_refused(config, match):
    with pytest.raises(ValueError, match=match):
        load(small(**config))


def test_a_model_without_rules_is_refused():
    with pytest.raises(ValueError, match=r"model_type 'bloom' has no rules to convert it: .*llama"):
        load(tiny("bloom"))
    with pytest.raises(ValueError, match="load takes a path, a config or a model of transformers, got Linear"):
        load(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"decoders that came from seqpar\.hf\.load"):
        save(Decoder(DecoderConfig("softmax", dim=16, heads=2)), "nowhere")


def test_a_weight_without_a_rule_is_refused():
    model = AutoModelForCausalLM.from_config(small())
    model.model.layers[0].self_attn.twist = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no rule for the weights model.layers.0.self_attn.twist.bias"):
        load(model)


def test_another_forward_pass_is_refused():
    model = AutoModelForCausalLM.from_config(small())
    model.model.norm.register_forward_hook(lambda module, given, found: found * 1.001)
    with pytest.raises(ValueError, match=r"logits differ from those of transformers by 1.0e-03"):
        load(model)
    assert convert.TOLERANCE < 1e-3
