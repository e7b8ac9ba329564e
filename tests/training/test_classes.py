"""A decorated class is a class: what it makes is what it made, and it trains as a wrapped model does."""

import copy
import io
from typing import ClassVar

import pytest
import torch
from torch import nn

from seqpar import Cut, run_plan, sequence_parallel, verify
from seqpar.collectives import alone, run_ranks
from tests.plans import plan_of
from tests.training.test_wrap import LENGTHS, TinyLM, batch, gradients, one_device, tiny


@sequence_parallel(group=alone(), layout="zigzag")
class Stored(TinyLM):
    """Words of its own."""

    kinds: ClassVar = ["tiny"]

    @classmethod
    def from_pretrained(cls, twice=False):
        return cls(twice=twice)

    def helper(self):
        return self.head.out_features


def decorated(group):
    """A class of this rank, as each rank's process has one, and a model with the usual weights."""
    cls = sequence_parallel(TinyLM, group=group)
    model = cls().double()
    model.load_state_dict(tiny().state_dict())
    return cls, model


@pytest.mark.spmd(1, 2, 4)
def test_its_models_train_to_the_numbers_of_one_device(group):
    cls, model = decorated(group)
    tokens, labels = batch(LENGTHS)
    out = model(tokens, labels=labels, lengths=LENGTHS)
    out.loss.backward()
    loss, expected = one_device(LENGTHS)
    assert abs(out.loss.item() - loss) <= 1e-12 and isinstance(model, cls) and issubclass(cls, TinyLM)
    assert (gradients(model) - expected).norm() <= 1e-10 * expected.norm()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twin(tokens, labels=labels, lengths=LENGTHS).loss.backward()
    assert (gradients(twin) - expected).norm() <= 1e-10 * expected.norm() and isinstance(twin, cls)


def test_it_has_all_that_its_class_has():
    model = Stored.from_pretrained(twice=True).double()
    assert isinstance(model, Stored) and model.twice and model.helper() == 11 and Stored.kinds == ["tiny"]
    assert model.state_dict().keys() == TinyLM().state_dict().keys()
    assert [name for name, _ in model.named_children()] == [name for name, _ in TinyLM().named_children()]
    assert model.sequence_parallel.options.layout == "zigzag" and Stored.__doc__ == "Words of its own."

    class More(Stored):
        def helper(self):
            return super().helper() + 1

    tokens, labels = batch(LENGTHS)
    assert More().helper() == 12 and More()(tokens, labels=labels, lengths=LENGTHS).loss is not None
    whole = model(tokens, Cut.whole(LENGTHS))
    assert (whole - model(tokens, lengths=LENGTHS).gather()).norm() <= 1e-12 * whole.norm()


@pytest.mark.parametrize("make", [Stored, lambda: sequence_parallel(TinyLM, group=alone())()])
def test_models_are_stored_and_loaded_by_their_names(make):
    model, file = make(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, TinyLM)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))


@pytest.mark.spmd(2)
def test_plans_and_verify_take_it(group):
    _, model = decorated(group)
    tokens, labels = batch(LENGTHS)
    assert verify(model, {"tokens": tokens, "labels": labels, "lengths": LENGTHS}).ok
    plan = plan_of(LENGTHS, 2, [[((0, 1), range(len(LENGTHS)))]])
    loss = run_plan(model, plan, tokens, labels=labels, lengths=LENGTHS)
    assert abs(loss.item() - one_device(LENGTHS)[0]) <= 1e-12


def test_a_model_without_a_cut_says_what_to_do():
    class Plain(nn.Module):
        def forward(self, tokens):
            return tokens

    with pytest.raises(ValueError, match=r"Plain.forward\(tokens\) takes no cut.*write forward\(tokens, cut\)"):
        run_ranks(2, lambda group: sequence_parallel(Plain(), group=group))
    with pytest.raises(ValueError, match="takes no cut"):
        sequence_parallel(Plain, group=alone())()
