"""What ranks compare in every call of a wrapped model: that two batches, calls, modes or weights differ is noticed."""

import copy
import random
import re

import pytest
import torch

from seqpar import sequence_parallel
from seqpar.collectives import run_ranks
from seqpar.sharding.agreement import fingerprint, lengths_fingerprint
from tests.training.test_wrap import batch, tiny


@pytest.mark.parametrize("size", [2, 4, 8, 16, 64])
def test_documents_that_are_permutations_of_the_same_tokens_are_told_apart(size):
    """Sorting and copying tasks: a linear sum misses 70 % of the swaps of two tokens, 1.4 % of those of 64."""
    drawn = random.Random(size)
    for _ in range(1000):
        documents = [torch.tensor(drawn.sample(range(size), size)) for _ in range(8)]
        first, second = drawn.sample(range(8), 2)
        swapped = list(documents)
        swapped[first], swapped[second] = documents[second], documents[first]
        shuffled = drawn.sample(documents, len(documents))
        whole = torch.cat(documents)[None]
        for other in (torch.cat(swapped)[None], torch.cat(shuffled)[None]):
            assert (fingerprint(whole) == fingerprint(other)) == torch.equal(whole, other)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex128]
)
def test_every_value_shape_and_dtype_counts(dtype):
    values = torch.arange(70000).remainder(2).to(dtype)
    known = fingerprint(values)
    assert fingerprint(values.clone()) == known
    assert fingerprint(torch.cat([values[:3], values])[3:]) == known, "wherever it lies in memory"
    assert fingerprint(values.view(2, -1)) != known
    for index in (0, 1, 65535, 65536, 69999):
        other = values.clone()
        other[index] = 1 - int(values[index].real)
        assert fingerprint(other) != known
    assert fingerprint(values.to(torch.complex64)) != known


def test_low_bits_of_a_digest_are_as_good_as_high_ones():
    counts = torch.zeros(64, dtype=torch.int64)
    for number in range(6400):
        counts[fingerprint(torch.tensor([number, 7, -number])) % 64] += 1
    assert counts.min() > 50
    assert counts.max() < 150


def test_lengths():
    assert lengths_fingerprint([5, 6]) == lengths_fingerprint((5, 6)) == lengths_fingerprint(torch.tensor([5, 6]))
    others = [[6, 5], [5, 6, 0], [5.0, 6.5], [[5, 6], [11]], [], ["5", "6"]]
    assert len({lengths_fingerprint(lengths) for lengths in [[5, 6], *others]}) == 7


def raised(change, size=3):
    """What every rank raises in the call after ``change(rank, model)``, which came after a step that was well."""

    def body(group):
        model = sequence_parallel(tiny(), group=group)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        tokens, labels = batch([13, 13])

        def step():
            model(tokens, labels=labels, lengths=[13, 13]).loss.backward()
            optimizer.step()

        step()
        change(group.rank, model)
        with pytest.raises(ValueError, match=f"rank {group.rank} of {size}: .* must be the same") as error:
            step()
        return str(error.value)

    return run_ranks(size, body)


def on_rank_2(action):
    def change(rank, model):
        if rank == 2:
            with torch.no_grad():
                action(model)

    return change


def repeat(model):
    model.alike._calls += 1


def freeze(model):
    model.module.mixers[1].out.bias.requires_grad_(False)


def add_behind_autograd(model):
    model.module.head.weight.data[3, 4] += 2.0**-20


def load(model):
    state = copy.deepcopy(model.module.state_dict())
    state["mixers.0.out.weight"][0, 0] += 1
    model.module.load_state_dict(state)


def replace(model):
    model.module.head.bias = torch.nn.Parameter(model.module.head.bias + 1)


def spoil(model):
    model.module.mixers[3].out.bias[5] = torch.nan


CHANGES = {
    "the number of the call must be .* but rank 2 is at call 3, the others at call 2": repeat,
    "what is trained must be .* rank 2's differs": freeze,
    "the mode must be .* rank 2's differs": lambda model: model.eval(),
    "the weights must be .* rank 2's differs from rank 0's in head.weight;": add_behind_autograd,
    "the weights must be .* in mixers.0.out.weight": load,
    "the weights must be .* in head.bias": replace,
    "1 numbers of mixers.3.out.bias on rank 2 are not finite": spoil,
}


@pytest.mark.parametrize("words", CHANGES)
def test_a_rank_that_went_another_way_after_the_first_call_is_told_on_every_rank(words):
    for text in raised(on_rank_2(CHANGES[words])):
        assert re.search(words, text), text


def test_buffers_count_as_weights():
    def body(group):
        module = tiny()
        module.register_buffer("bias", torch.full((3,), float(group.rank == 1)))
        with pytest.raises(ValueError, match=r"the weights must be the same .* rank 1's differs from rank 0's in bias"):
            sequence_parallel(module, group=group)(batch([9])[0])

    run_ranks(3, body)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_one_rank_in_another_mode(context):
    def body(group):
        model = sequence_parallel(tiny(), group=group)
        tokens, _ = batch([9])
        model(tokens)
        with pytest.raises(ValueError, match="the mode must be the same on every rank, but rank 1's differs"):
            if group.rank == 1:
                with context():
                    model(tokens)
            else:
                model(tokens)

    run_ranks(3, body)


def test_a_copy_of_a_model_is_compared_anew():
    def body(group):
        model = sequence_parallel(tiny(), group=group)
        tokens, _ = batch([9])
        model(tokens)
        twin = copy.deepcopy(model)
        if group.rank == 1:
            twin.module.head.weight.data[0, 0] += 1
        with pytest.raises(ValueError, match=r"in head\.weight"):
            twin(tokens)
        model(tokens)

    run_ranks(2, body)


def test_every_number_of_the_weights_is_looked_at_in_turn():
    """A write that torch does not count, in a model that is larger than one call's slice."""

    def body(group):
        module = tiny()
        module.register_buffer("table", torch.zeros(200_000))
        model = sequence_parallel(module, group=group)
        tokens, _ = batch([9])
        model(tokens)
        if group.rank == 1:
            module.table.data[123_456] = 1.0
        for call in range(8):
            try:
                model(tokens)
            except ValueError as error:
                assert "in table" in str(error)
                return call
        return None

    calls = run_ranks(2, body)
    assert calls[0] == calls[1] is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b["tokens"].float(), "tokens must be int64"),
        (lambda b: b["tokens"].clone().fill_(11), "tokens must be below the model's vocabulary of 11, got 11"),
        (lambda b: b["tokens"].clone().fill_(-1), "tokens must not be negative, got -1"),
    ],
)
def test_tokens_that_a_model_cannot_embed(change, words):
    def body(group):
        tokens, labels = batch([13, 13])
        wrong = change({"tokens": tokens})
        with pytest.raises(ValueError, match=f"rank {group.rank} of {group.size}: {words}"):
            sequence_parallel(tiny(), group=group)(wrong, labels=labels)

    run_ranks(1, body)
    run_ranks(2, body)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda labels: labels.int(), "labels must be int64, got torch.int32"),
        (lambda labels: labels.float(), "labels must be int64"),
        (lambda labels: labels.clone().fill_(11), "labels must be below the model's vocabulary of 11, got 11"),
        (lambda labels: labels.where(labels != 3, -1), "labels must not be negative, or -100"),
    ],
)
def test_labels_that_a_model_cannot_predict(change, words):
    def body(group):
        tokens, labels = batch([13, 13])
        with pytest.raises(ValueError, match=f"rank {group.rank} of {group.size}: {words}"):
            sequence_parallel(tiny(), group=group)(tokens, labels=change(labels))

    run_ranks(2, body)
