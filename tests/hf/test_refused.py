"""What cannot be honoured is refused by name, on every rank alike."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import DynamicCache

from seqpar import sequence_parallel
from seqpar.collectives import run_ranks
from seqpar.hf.measured import EXACT, REFUSED, measured
from tests.hf.models import tiny, tokens_of


class Other(nn.Linear):
    """A module that was not there when the type was measured."""

    __module__ = "transformers.models.other.modeling_other"


def unknown(model):
    model.config.model_type = "no_such_type"


def refused(model):
    model.config.model_type = next(name for name, row in measured().items() if row.in_place == REFUSED)


def replaced(model):
    model.model.layers[0].self_attn.o_proj = Other(32, 32)


def other_layers(model):
    model.config.layer_types = ["linear_attention"] * 2


def wrapped(model):
    sequence_parallel(model, group=None)


def dropping(model):
    model.train()
    model.model.layers[1].self_attn.attention_dropout = 0.1


def balancing(model):
    model.config.output_router_logits = True


def by_length(model):
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model.config.max_position_embeddings = 32


WRONG = {
    unknown: "'no_such_type'",
    refused: "are not cut",
    replaced: r"layers\.0\.self_attn\.o_proj is a Other",
    other_layers: "'linear_attention'",
    wrapped: "wrapped already",
    dropping: r"layers\.1\.self_attn.*attention_dropout > 0",
    balancing: "output_router_logits=False",
    by_length: r"33 tokens.*dynamic",
}


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
def test_a_model_that_is_not_known_is_refused_on_every_rank(spoil):
    def body(group):
        model = tiny("llama")
        spoil(model)
        with pytest.raises(ValueError, match=WRONG[spoil]) as error:
            tokens = tokens_of(model)
            sequence_parallel(model, group=group)(tokens, labels=tokens, lengths=(19, 1, 0, 33, 12))
        return str(error.value).partition(": ")[2]

    assert len(set(run_ranks(2, body))) == 1


MASK = torch.ones(2, 65, dtype=torch.long)
CALLS = [
    ({"attention_mask": torch.ones(2, 1, 65, 65)}, r"attention_mask must be \[2, 65\]"),
    ({"attention_mask": MASK.index_fill(1, torch.tensor([30]), 0)}, "not what is between tokens"),
    ({"past_key_values": DynamicCache()}, "past_key_values.*no cache"),
    ({"cache": DynamicCache()}, "cache.*no cache"),
    ({"use_cache": True}, "use_cache.*no cache"),
    ({"position_ids": torch.arange(65).expand(2, -1)}, "position_ids.*follows from lengths"),
    ({"input_ids": torch.ones(2, 65, dtype=torch.long)}, "input_ids"),
    ({"inputs_embeds": torch.ones(2, 65, 32)}, "inputs_embeds"),
]


@pytest.mark.spmd(2)
def test_a_call_that_cannot_be_honoured_is_refused_on_every_rank(group):
    model = tiny("llama")
    tokens, cut = tokens_of(model), sequence_parallel(model, group=group)
    for wrong, why in CALLS:
        with pytest.raises(ValueError, match=why):
            cut(tokens, labels=tokens, **wrong)
    with pytest.raises(ValueError, match="input_ids"):
        cut(input_ids=tokens)
    assert cut.module.guarded  # nothing ran


@pytest.mark.spmd(4)
def test_a_rank_without_tokens_is_refused(group):
    model = tiny("llama")
    with pytest.raises(ValueError, match="leave one without any"):
        sequence_parallel(model, group=group)(torch.tensor([[3, 4, 5]]))


@pytest.mark.spmd(2)
def test_tokens_beyond_the_vocabulary_are_refused(group):
    model = tiny("llama")
    with pytest.raises(ValueError, match="vocabulary of 64"):
        sequence_parallel(model, group=group)(torch.full((1, 9), 64))


def test_the_list_says_why():
    rows = measured().values()
    assert all(row.in_place in (EXACT, REFUSED) for row in rows)
    assert all(row.error <= 1e-9 and row.modules and not row.why for row in rows if row.in_place == EXACT)
    assert all(row.why for row in rows if row.in_place == REFUSED)
