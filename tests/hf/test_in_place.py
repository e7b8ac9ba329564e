"""Models of transformers, cut in place: the numbers of transformers itself, each document alone; nothing changes."""

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("transformers")

from bench.models.hf.halves import AIM, TYPES, halves
from bench.models.hf.measure import measure
from seqpar import sequence_parallel, verify
from seqpar.collectives import Ledger
from seqpar.hf import Exact, attend, detach
from seqpar.hf.attend import NAME
from seqpar.hf.measured import measured
from seqpar.hf.sight import Sight
from tests.hf.models import LENGTHS, expected, tiny, tokens_of, trained, twin

# One of each way of mixing tokens: plain; windows and caps; sinks; a delta rule; Mamba-2 beside attention; chunks;
# positions of its own; attention that is written out; a recurrence inside of a module.
FAMILIES = ("gemma2", "gpt_oss", "qwen3_next", "falcon_h1", "llama4_text", "roberta", "bloom", "rwkv")


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.fixture(scope="module")
def oracle(llama):
    return expected(llama, tokens_of(llama))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.spmd(1, 2, 3, 4)
def test_llama_is_itself(group, llama, oracle, layout):
    model, tokens = twin(llama), tokens_of(llama)
    error, where = oracle.error(trained(sequence_parallel(model, group=group, layout=layout), model, tokens))
    assert error <= 1e-9, where


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_way_of_mixing_tokens_is_itself(model_type):
    found = measure(model_type, [(3, "zigzag")])
    assert found.outcome == "exact", found.why


@pytest.mark.nightly
@pytest.mark.parametrize("model_type", sorted(name for name, row in measured().items() if row.in_place == "exact"))
def test_what_is_on_the_list_is_exact(model_type):
    found = measure(model_type)
    assert found.outcome == "exact", found.why


@pytest.mark.parametrize("model_type", ["llama", "mamba2"])
def test_bf16_costs_a_cut_model_what_it_costs_transformers(model_type):
    assert halves(model_type, draws=3, ranks=3).ratio <= AIM


@pytest.mark.nightly
@pytest.mark.parametrize("model_type", TYPES)
def test_bf16_costs_every_way_of_mixing_tokens_the_same(model_type):
    assert halves(model_type, draws=6, ranks=4).ratio <= AIM


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_next"])
@pytest.mark.spmd(2)
def test_checkpointing_changes_no_gradient_and_sends_nothing_more(group, model_type, reentrant):
    found = {}
    for checkpointing in (False, True):
        model = tiny(model_type).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ledger = Ledger(group)
        wrapped = sequence_parallel(model, group=ledger, layout="zigzag")
        numbers = trained(wrapped, model, tokens_of(model))
        found[checkpointing] = numbers.gradients, ledger.bytes_
    assert found[True][1] == found[False][1]
    assert all(torch.equal(found[True][0][name], each) for name, each in found[False][0].items())


@pytest.mark.spmd(2)
def test_two_calls_before_their_backwards_stand_where_they_stood(group, llama):
    model = twin(llama).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = sequence_parallel(model, group=group)
    tokens, gradients = tokens_of(llama), {}
    for together in (False, True):
        model.zero_grad()
        with Exact():
            first = wrapped(tokens, labels=tokens, lengths=LENGTHS).loss
            if not together:
                first.backward()
            second = wrapped(tokens[:, :40], labels=tokens[:, :40], lengths=(13, 27)).loss
            (second if not together else first + second).backward()
        gradients[together] = [each.grad.clone() for each in model.parameters()]
    assert all(torch.allclose(one, both, rtol=1e-12, atol=1e-14) for one, both in zip(*gradients.values()))


def test_the_model_stays_what_it_was(llama, tmp_path):
    model, prompt = twin(llama), torch.tensor([[5, 6, 7]])
    names, written, implementation = (
        list(model.state_dict()),
        model.generate(prompt, max_new_tokens=5),
        _attention(model),
    )
    wrapped = sequence_parallel(model)
    trained(wrapped, model, tokens_of(llama))
    assert torch.equal(model.generate(prompt, max_new_tokens=5), written)
    assert list(model.state_dict()) == names
    assert _attention(model) == implementation
    assert not any("forward" in vars(part) for part in model.modules())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(again.state_dict()[name], each) for name, each in model.state_dict().items())
    assert detach(wrapped) is model
    sequence_parallel(model)


def _attention(model):
    return {part.config._attn_implementation for part in model.modules() if hasattr(part, "config")}


@pytest.mark.spmd(2)
def test_adapters_of_peft_train_cut(group, llama):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)
    model = peft.get_peft_model(twin(llama), config).double()
    generator = torch.Generator().manual_seed(2)
    for name, each in model.named_parameters():
        if "lora" in name:
            each.data = torch.randn(each.shape, generator=generator, dtype=torch.float64) / 3
    tokens = tokens_of(llama)
    whole = expected(model, tokens)
    trainable = {name for name, each in model.named_parameters() if each.requires_grad}
    error, where = whole.error(trained(sequence_parallel(model, group=group), model, tokens))
    assert error <= 1e-9, where
    assert trainable and all("lora" in name for name in trainable)


# The guard.


SEEN = attend._seen


def blind(kind, who, mask, window, causal):
    """Attention that sees all there is, whatever the mask says."""
    return Sight()


@contextmanager
def blinded(group):
    """Such attention, as long as it lasts."""
    attend._seen = blind
    try:
        yield
    finally:
        group.all_reduce(torch.zeros(1)).wait()  # ranks may be threads, which share it
        attend._seen = SEEN


@pytest.mark.spmd(2)
def test_the_guard_names_the_layer_that_is_not_what_it_was(group):
    model = tiny("mistral")
    tokens = tokens_of(model)
    with blinded(group), pytest.raises(ValueError, match=r"layers\.0\.self_attn.*Nothing was trained"):
        sequence_parallel(model, group=group)(tokens, labels=tokens, lengths=LENGTHS)


@pytest.mark.spmd(2)
def test_verify_asks_transformers(group, llama):
    model, tokens = tiny("mistral"), tokens_of(llama)
    batch = {"tokens": tokens, "labels": tokens, "lengths": LENGTHS}
    wrapped = sequence_parallel(model, group=group)
    report = verify(wrapped, batch, reference="hf")
    assert report.ok
    assert report.rows[-1].name == "transformers"
    wrapped.module.guarded = False
    with blinded(group):
        assert [row.name for row in verify(wrapped, batch, reference="hf").failed] == ["transformers"]
    with pytest.raises(ValueError, match="reference must be"):
        verify(wrapped, batch, reference="jax")


def test_the_attention_of_the_registry_is_for_models_that_are_cut():
    model = tiny("llama")
    sequence_parallel(model)
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="not told where it stands"):
        model(input_ids=torch.tensor([[3, 4]]))
