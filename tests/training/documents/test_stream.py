"""Documents in steps: every token of an epoch once, whatever stops a run and however many ranks go on with it."""

import gc
import json
import random
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from seqpar.collectives import Ledger
from seqpar.training.documents import PACKINGS, Documents, Packing, Place, read_once
from seqpar.training.documents.order import shuffled
from seqpar.training.documents.packing import Packer, Piece, best_fit
from seqpar.training.documents.source import digest
from seqpar.training.loss import num_targets


class Numbers:
    """Documents of numbers: token ``t`` of document ``d`` is ``1000 d + t``."""

    def __init__(self, lengths):
        self.lengths, self.fingerprint, self.reads = lengths, digest([str(lengths)]), 0

    def __len__(self):
        return len(self.lengths)

    def length(self, document):
        return self.lengths[document]

    def tokens(self, document, start, stop):
        self.reads += 1
        assert 0 <= start <= stop <= self.lengths[document]
        return 1000 * document + np.arange(start, stop)

    def name(self, document):
        return f"number {document}"


def drawn(seed, num=30, most=40):
    rng = random.Random(seed)
    return Numbers([rng.choice((0, 1, rng.randint(1, most))) for _ in range(num)] + [most])


def packing_of(how, overlap=3):
    return Packing(16 if how != "whole" else 40, how, overlap if how == "windows" else 0, together=2)


def sequences_of(steps):
    """What all replicas' steps hold, in the order of the sequences; those without a token were there to fill up."""
    return [
        batch.pieces for mine in zip(*steps) for row in zip(*(step.batches for step in mine)) for batch in row
        if batch.pieces
    ]  # fmt: skip


def check_batch(batch, tokens):
    """Tokens and labels are those of the pieces, and as many targets are counted as the loss will find."""
    expected = [1000 * p.document + t for p in batch.pieces for t in range(p.start, p.stop)]
    context = [t < p.start + p.context for p in batch.pieces for t in range(p.start, p.stop)]
    labels = [-100 if hidden else token for hidden, token in zip(context, expected)]
    assert batch.tokens.tolist() == [expected] and batch.labels.tolist() == [labels]
    assert len(expected) <= tokens and batch.lengths == tuple(p.size for p in batch.pieces)
    assert max(1, batch.num_targets) == num_targets(batch.labels, batch.lengths)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", PACKINGS)
def test_every_token_once_over_fifty_interruptions_and_changes_of_rank_count(how, seed):
    source, packing, rng = drawn(seed, num=420 if how == "whole" else 160), packing_of(how), random.Random(seed)
    epochs, state, found, stops = 2, None, [], 0
    whole = [list(Documents(source, packing, seed=seed, epochs=epochs, prefetch=0))]
    while True:
        replicas, sequences, left = rng.randint(1, 5), rng.randint(1, 6), rng.randint(0, 1 + (stops > 50) * 1000)
        runs = [
            Documents(source, packing, seed=seed, epochs=epochs, sequences=sequences, replica=replica,
                      replicas=replicas, prefetch=rng.choice((0, 0, 2)))
            for replica in range(replicas)
        ]  # fmt: skip
        for run in runs:
            run.load_state_dict(json.loads(json.dumps(state)) if state else run.state_dict())
        steps = [[step for _, step in zip(range(left), run)] for run in runs]
        assert len({len(each.batches) for mine in steps for each in mine}) <= 1
        found += sequences_of(steps)
        states = [run.state_dict() for run in runs]
        assert all(each == states[0] for each in states) and len(json.dumps(states[0])) < 300
        state, stops = states[0], stops + 1
        if len(steps[0]) < left:
            break
    assert stops > 50
    assert found == sequences_of(whole), "as without a stop"
    seen = Counter((p.document, t) for pieces in found for p in pieces for t in range(p.start + p.context, p.stop))
    assert seen == {(d, t): epochs for d, length in enumerate(source.lengths) for t in range(length)}
    for step in whole[0]:
        for batch in step.batches:
            check_batch(batch, packing.tokens)


@pytest.mark.parametrize("how", ["whole", "windows"])
def test_whole_documents_stay_whole_and_every_token_of_a_window_is_a_target_once(how):
    source = drawn(5)
    targets, whole = Counter(), 0
    for step in Documents(source, packing_of(how), epochs=1, prefetch=0):
        for batch in step.batches:
            whole += sum(p.size == source.lengths[p.document] for p in batch.pieces)
            targets.update(
                1000 * p.document + t for p in batch.pieces for t in range(p.start + max(1, p.context), p.stop)
            )
    if how == "whole":
        assert whole == sum(length > 0 for length in source.lengths)
    assert targets == {1000 * d + t: 1 for d, length in enumerate(source.lengths) for t in range(1, length)}


def test_a_document_that_is_too_long_to_stay_whole_is_refused_or_left_out():
    source = Numbers([3, 9, 4])
    with pytest.raises(
        ValueError, match=r"number 1: has 9 tokens, a sequence holds 8, and documents are to stay whole"
    ):
        list(Documents(source, Packing(8, "whole"), epochs=1))
    (step,) = Documents(source, Packing(8, "whole", leave_out=True), epochs=1)
    assert sorted(step.batches[0].lengths) == [3, 4]


def test_cut_sequences_are_full_but_the_last_of_an_epoch():
    sizes = [step.num_tokens for step in Documents(drawn(7), Packing(16), epochs=1, prefetch=0)]
    assert set(sizes[:-1]) == {16} and 0 < sizes[-1] <= 16


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 17, 64, 65, 1000])
def test_an_order_holds_every_document_once_and_is_another_one_in_every_epoch(num):
    orders = [shuffled(np.arange(num), num, seed, epoch).tolist() for seed in range(2) for epoch in range(3)]
    assert all(sorted(order) == list(range(num)) for order in orders)
    assert num < 17 or len(set(map(tuple, orders))) == len(orders)
    some = np.array([num - 1, 0, num // 2])
    assert shuffled(some, num, 0, 1).tolist() == [orders[1][place] for place in some], "any place by itself"


def test_an_order_is_as_good_as_drawn():
    """Each document is at each place about as often, over many seeds; and the order never changes between versions."""
    counts = np.zeros((6, 6), int)
    for seed in range(1200):
        counts[np.arange(6), shuffled(np.arange(6), 6, seed, 0)] += 1
    assert (((counts - 200) ** 2 / 200).sum()) < 70, "chi square with 25 degrees of freedom"
    assert shuffled(np.arange(8), 8, 1, 2).tolist() == GOLDEN


GOLDEN = [4, 5, 0, 7, 6, 2, 1, 3]


def test_packing_leaves_no_two_sequences_that_would_fit_into_one():
    rng = random.Random(0)
    for _ in range(50):
        pieces = [Piece(number, 0, rng.randint(1, 20)) for number in range(rng.randint(1, 40))]
        found = best_fit(pieces, 20)
        sizes = sorted(sum(piece.size for piece in each) for each in found)
        assert sorted((p for each in found for p in each), key=lambda p: p.document) == pieces
        assert sizes[-1] <= 20 and (len(sizes) < 2 or sizes[0] + sizes[1] > 20)


def test_the_work_of_packing_grows_as_the_documents_do():
    """Ten times as many documents ask for ten times as many lengths."""

    def asked(num):
        source = drawn(1, num)
        calls, length = Counter(), source.length
        source.length = lambda document: calls.update([document]) or length(document)
        packer, place = Packer(source, packing_of("windows"), 0), Place()
        while place.epoch == 0:
            _, place = packer.next(place)
        return calls.total()

    assert asked(3000) < 12 * asked(300)


# Read ahead.


def threads():
    return [each for each in threading.enumerate() if each.name.startswith("documents")]


def test_what_reads_ahead_ends_with_its_iterator():
    source = drawn(2)
    for count, _ in enumerate(Documents(source, packing_of("cut"), prefetch=3)):
        assert len(threads()) == 1
        if count == 3:
            break
    gc.collect()
    assert not threads()
    list(Documents(source, packing_of("cut"), epochs=1))
    assert not threads()


def test_only_so_many_steps_are_read_ahead():
    source = Numbers([16] * 50)
    steps = iter(Documents(source, Packing(16), prefetch=2))
    next(steps)
    steps.close()
    assert source.reads <= 4


def test_a_program_that_ends_in_the_middle_ends_cleanly():
    program = (
        "from tests.training.documents.test_stream import *\n"
        "steps = iter(Documents(drawn(2), packing_of('cut')))\nnext(steps)\nprint('done')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_an_error_of_the_thread_is_raised_where_the_step_is_taken():
    source = Numbers([16, 16, 16, 16])
    good = source.tokens

    def tokens(document, start, stop):
        if document == 2:
            raise ValueError("number 2: cannot be read")
        return good(document, start, stop)

    source.tokens = tokens
    steps = iter(Documents(source, Packing(16), seed=None))
    assert [next(steps).batches[0].pieces[0].document for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="number 2: cannot be read"):
        next(steps)


def test_a_state_that_is_loaded_on_the_way_is_where_the_next_step_begins():
    documents = Documents(drawn(3), packing_of("windows"), epochs=2)
    state, seen = None, []
    for step in documents:
        seen.append(step.batches[0].pieces)
        state = documents.state_dict() if len(seen) == 4 else state
        if len(seen) == 7:
            documents.load_state_dict(state)
    assert seen[7:10] == seen[4:7]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_gives_the_same_steps_and_goes_on_after_any(workers):
    def documents():
        return Documents(drawn(4), packing_of("cut"), epochs=1, sequences=2, replica=1, replicas=2)

    def loaded(from_):
        return list(DataLoader(from_, batch_size=None, num_workers=workers))

    expected = list(documents())
    found = loaded(documents())
    assert [step.place for step in found] == [step.place for step in expected]
    assert all(torch.equal(a.batches[0].tokens, b.batches[0].tokens) for a, b in zip(found, expected, strict=True))
    again = documents()
    again.load_state_dict(documents().state_after(found[4]))
    assert [step.place for step in loaded(again)] == [step.place for step in expected[5:]]


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "at least 1 token"),
        ({"tokens": 4, "how": "split"}, "packing must be one of cut, whole, windows"),
        ({"tokens": 4, "how": "windows", "overlap": 4}, "overlap by 0 to 3, got 4"),
        ({"tokens": 4, "overlap": 1}, "only windows overlap"),
        ({"tokens": 4, "leave_out": True}, "only where documents stay whole"),
    ],
)
def test_packings_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Packing(**arguments)


def test_the_state_of_other_documents_is_refused():
    state = Documents(drawn(1), packing_of("cut"), seed=1).state_dict()
    for other, name in (
        (Documents(drawn(2), packing_of("cut"), seed=1), "data"),
        (Documents(drawn(1), packing_of("windows"), seed=1), "packing"),
        (Documents(drawn(1), packing_of("cut"), seed=2), "seed"),
    ):
        with pytest.raises(ValueError, match=f"the state is of other documents: its {name} is"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="no state of documents"):
        other.load_state_dict({"step": 3})


@pytest.mark.parametrize("how", PACKINGS)
def test_documents_without_a_token_are_no_endless_run(how):
    with pytest.raises(ValueError, match="no token in 3 documents"):
        next(iter(Documents(Numbers([0, 0, 0]), packing_of(how))))


def test_documents_that_do_not_fill_one_sequence_are_no_endless_run():
    with pytest.raises(ValueError, match="hold 9 tokens together, which do not fill one sequence of 16"):
        next(iter(Documents(Numbers([4, 5]), Packing(16))))
    assert len(list(Documents(Numbers([4, 5]), Packing(16), epochs=1))) == 1


# Read by one rank for those that share its sequences.


@pytest.mark.spmd(1, 3, 4)
def test_ranks_of_one_sequence_get_what_each_would_read_and_one_of_them_reads(group):
    def made():
        return Documents(drawn(6), packing_of("windows"), epochs=2, sequences=3, replica=1, replicas=2)

    documents, expected = made(), list(made())
    ledger = Ledger(group)
    for step, other in zip(read_once(documents, ledger), expected, strict=True):
        assert step.place == other.place
        for found, right in zip(step.batches, other.batches, strict=True):
            assert torch.equal(found.tokens, right.tokens) and torch.equal(found.labels, right.labels)
            assert (found.lengths, found.pieces, found.num_targets) == (right.lengths, right.pieces, right.num_targets)
        assert documents.state_dict() == made().state_after(step)
        assert json.dumps(documents.state_dict())
    assert (documents._source.reads > 0) == (group.rank == 0)
    assert ledger.messages <= (3 * len(expected) + 1) * (group.size - 1).bit_length()


@pytest.mark.spmd(3)
def test_what_the_reading_rank_finds_wrong_is_raised_on_all(group):
    steps = read_once(Documents(Numbers([16, 40, 16]), Packing(16, "whole", together=1), seed=None), group)
    assert next(steps).batches[0].lengths == (16,)
    with pytest.raises(ValueError, match="number 1: has 40 tokens"):
        next(steps)
