"""An open call: what has tokens is cut, the rest goes through, and every rank is called with the same."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from seqpar import Packed, sequence_parallel
from seqpar.collectives import Ledger, alone, run_ranks

LENGTHS = [4, 0, 6, 3]
SIZE = sum(LENGTHS)
TOKENS = torch.arange(2 * SIZE).view(2, SIZE)


@dataclass
class Seen:
    """What a model got, and a part that has no tokens."""

    first: torch.Tensor
    style: torch.Tensor
    name: str


class Echo(nn.Module):
    """Returns what it is called with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, tokens=None, cut=None, **inputs):
        assert cut is not None
        return {"tokens": tokens, **inputs}


def echoed(group, token_dims=None, **call):
    model = sequence_parallel(Echo(), group=group, layout="zigzag", token_dims=token_dims or {})
    return model(**call).gather()


@pytest.mark.spmd(1, 3)
def test_what_has_tokens_is_cut_and_the_rest_goes_through(group):
    x = torch.randn(2, SIZE, 5, generator=torch.Generator().manual_seed(0))
    style, table, turned = torch.ones(2, 5), torch.ones(SIZE, 2), TOKENS.expand(3, 2, SIZE) + 0.5
    nested = {"a": x + 1, "b": (TOKENS, "text", None)}
    found = echoed(
        group,
        {"table": None, "turned": 2},
        tokens=TOKENS,
        lengths=LENGTHS,
        x=x,
        style=style,
        table=table,
        turned=turned,
        nested=nested,
        flag=True,
        row=TOKENS[:1],
    )
    assert torch.equal(found["tokens"], TOKENS) and torch.equal(found["x"], x) and found["style"] is style
    assert found["table"] is table and found["flag"] is True and torch.equal(found["turned"], turned)
    assert torch.equal(found["nested"]["a"], x + 1) and torch.equal(found["nested"]["b"][0], TOKENS)
    assert found["nested"]["b"][1:] == ("text", None) and torch.equal(found["row"], TOKENS[:1])


@pytest.mark.spmd(1, 3)
def test_a_model_without_tokens_takes_what_it_reads_by_name(group):
    x = torch.randn(2, SIZE, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(echoed(group, inputs_embeds=x, lengths=LENGTHS)["inputs_embeds"], x)
    assert torch.equal(echoed(group, tokens=x)["tokens"], x), "continuous inputs stand in the place of tokens"


@pytest.mark.spmd(1, 3)
def test_dataclasses_come_back_with_gradients_that_are_summed(group):
    class Model(Echo):
        def forward(self, tokens, cut):
            return Seen(tokens.double()[..., None] * self.weight, torch.zeros(3), "me")

    model = sequence_parallel(Model(), group=group)
    found = model(TOKENS, lengths=LENGTHS).gather()
    found.first.sum().backward()
    assert isinstance(found, Seen) and found.name == "me" and found.style.shape == (3,)
    assert model.module.weight.grad == TOKENS.sum() and torch.equal(found.first[..., 0].long(), TOKENS)


OTHERS = {
    "a key more": {"x": TOKENS, "y": TOKENS},
    "another key": {"y": TOKENS},
    "no key": {},
    "another shape": {"x": TOKENS[:1]},
    "another dtype": {"x": TOKENS.int()},
    "other numbers": {"x": TOKENS + 1},
    "another kind": {"x": 3},
    "an object": {"x": object()},
    "weights": {"x": TOKENS, "targets": TOKENS, "weights": TOKENS.double()},
    "a divisor": {"x": TOKENS, "divisor": 3},
    "a mask": {"x": TOKENS, "attention_mask": torch.ones(2, SIZE)},
    "a mask that does not fit": {"x": TOKENS, "attention_mask": torch.ones(9)},
    "a second sequence": {"x": Packed(TOKENS)},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_rank_that_is_called_with_other_inputs_raises_on_every_rank_before_anything_is_sent(other):
    def body(group):
        ledger = Ledger(group)
        model = sequence_parallel(Echo(), group=ledger)
        with pytest.raises(ValueError, match="the batch's other inputs must be the same on every rank, but rank 1's"):
            model(TOKENS, **(other if group.rank == 1 else {"x": TOKENS}))
        return {verb for verb, sent in ledger.bytes_by_verb.items() if sent}

    assert run_ranks(3, body) == [{"all_gather"}] * 3, "nothing but what is compared"


REFUSED = {
    "x is not": ({"x": torch.ones(SIZE)}, r"x \[13\] has a dim of 13.*token_dims=\{'x': \.\.\.\}"),
    "rows do not sum": ({"lengths": [[4, 9], [6, 6]]}, "lengths of row 1 must be at least 0 and sum to its 13"),
    "rows are missing": ({"lengths": [[13]]}, "lengths must be a list for each of 2 rows"),
    "a hole": ({"attention_mask": (torch.arange(SIZE) % 4 > 0).expand(2, SIZE)}, "not what is between tokens"),
    "a mask of pairs": ({"attention_mask": torch.ones(2, 1, SIZE, SIZE)}, r"attention_mask must be \[2, 13\]"),
    "both": ({"labels": TOKENS, "targets": TOKENS}, "labels are shifted by one token and targets are not"),
    "weights alone": ({"weights": torch.ones(2, SIZE)}, "weights and divisor are those of a loss"),
    "int weights": ({"labels": TOKENS, "weights": TOKENS}, "weights must be floating point"),
    "second": ({"source": Packed(TOKENS, [4, 4])}, "lengths of source sum to 8, it holds 13"),
}


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_on_every_rank(call, words):
    def body(group):
        with pytest.raises(ValueError, match=words):
            sequence_parallel(Echo(), group=group)(TOKENS, **call)

    run_ranks(2, body)


def test_without_anything_to_read_there_is_a_word():
    with pytest.raises(ValueError, match="call the model with tokens"):
        sequence_parallel(Echo(), group=alone())(style=torch.ones(3))


@pytest.mark.spmd(1, 2)
def test_rows_come_back_as_rows(group):
    mask = torch.tensor([[0] * 3 + [1] * 10, [1] * 13])
    found = echoed(group, tokens=TOKENS, attention_mask=mask, x=TOKENS[..., None].double())
    assert torch.equal(found["tokens"], TOKENS * mask) and torch.equal(found["x"][..., 0], (TOKENS * mask).double())
