"""The decorator: same model, same batch, same numbers; and what it refuses."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from seqpar import Cut, Shard, attention, linear_attention, sequence_parallel
from seqpar.collectives import Ledger, alone, run_ranks
from seqpar.collectives.scan import ALGORITHMS
from seqpar.crossing.attention import TRANSPORTS
from seqpar.sharding.shard import LAYOUTS
from seqpar.training.gradients import sum_over_ranks

LENGTHS = [5, 0, 1, 17, 3]


class Mixer(nn.Module):
    """Softmax or linear attention between two projections."""

    def __init__(self, softmax):
        super().__init__()
        self.softmax = softmax
        self.project = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x, cut):
        q, k, v = self.project(x).view(*x.shape[:2], 2, 12).split(4, -1)
        where = {"shard": cut.shard, "group": cut.group, "slot": cut.slot(self)}
        if self.softmax:
            mixed = attention(q, k, v, transport=cut.transport, **where)
        else:
            mixed = linear_attention(q, k, v, scan=cut.scan, **where)
        return x + self.out(mixed.flatten(2))


class TinyLM(nn.Module):
    """An embedding, four mixers and a head; ``reentrant`` checkpoints every mixer."""

    def __init__(self, reentrant=None, twice=False):
        super().__init__()
        self.reentrant, self.twice = reentrant, twice
        self.embed = nn.Embedding(11, 8)
        self.mixers = nn.ModuleList(Mixer(softmax=i % 2 == 1) for i in range(4))
        self.head = nn.Linear(8, 11)

    def forward(self, tokens, cut):
        x = self.embed(tokens)
        for mixer in [*self.mixers] * (2 if self.twice else 1):
            again = self.reentrant
            x = mixer(x, cut) if again is None else checkpoint(mixer, x, cut, use_reentrant=again)
        return self.head(x)


def tiny(**options):
    """The same weights whatever the options; thread ranks must not share the global generator."""
    model = TinyLM(**options).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def batch(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (2, sum(lengths)), generator=generator)
    labels = torch.where(torch.rand(tokens.shape, generator=generator) < 0.2, -100, tokens)
    return tokens, labels


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def one_device(lengths, seed=0, **options):
    model = sequence_parallel(tiny(**options), group=alone())
    tokens, labels = batch(lengths, seed)
    loss = model(tokens, labels=labels, lengths=lengths).loss
    loss.backward()
    return loss.item(), gradients(model)


def trained(group, lengths, cut_options, model_options, seed=0):
    """(loss, gradients, bytes sent by the layers) of one step; loss and gradients are summed by all_reduce."""
    ledger = Ledger(group)
    model = sequence_parallel(tiny(**model_options), group=ledger, **cut_options)
    tokens, labels = batch(lengths, seed)
    loss = model(tokens, labels=labels, lengths=lengths).loss
    loss.backward()
    return loss.item(), gradients(model), ledger.bytes_ - ledger.bytes_by_verb["all_reduce"]


def assert_same(ranks, loss, gradient):
    assert len({found for found, *_ in ranks}) == 1, "every rank returns the same loss"
    for found, mine, *_ in ranks:
        assert abs(found - loss) <= 1e-12 * abs(loss)
        assert (mine - gradient).norm() <= 1e-10 * gradient.norm()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("scan", ALGORITHMS)
def test_loss_and_gradients_are_those_of_one_device(layout, transport, scan):
    options = {"layout": layout, "transport": transport, "scan": scan}
    expected = one_device(LENGTHS)
    for size in (2, 3):
        assert_same(run_ranks(size, trained, LENGTHS, options, {}), *expected)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(lambda n: sum(n) > 0),
    size=st.integers(1, 8),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 5),
)
def test_any_documents_over_any_ranks(lengths, size, layout, seed):
    expected = one_device(lengths, seed)
    if sum(n > 1 for n in lengths):
        assert_same(run_ranks(size, trained, lengths, {"layout": layout}, {}, seed), *expected)


@pytest.mark.spmd(1, 2, 4)
def test_in_every_world(group):
    for layout in LAYOUTS:
        assert_same([trained(group, LENGTHS, {"layout": layout}, {})], *one_device(LENGTHS))


def test_packed_loss_with_two_ranks_over_one_is_1():
    """A published framework shows 1.83 here: its ring attends across documents."""
    (loss, *_), _ = run_ranks(2, trained, LENGTHS, {}, {})
    assert f"{loss / one_device(LENGTHS)[0]:.3f}" == "1.000"


def test_far_documents_do_not_leak():
    """Changing one document changes no other document's logits."""
    tokens, _ = batch(LENGTHS)
    other = tokens.clone()
    other[:, 6:23] = (other[:, 6:23] + 1) % 11

    def logits(group, tokens):
        out = sequence_parallel(tiny(), group=group)(tokens, lengths=LENGTHS)
        return out.shard.gather(out.logits.detach())

    difference = (run_ranks(3, logits, tokens)[0] - run_ranks(3, logits, other)[0]).abs().sum((0, 2))
    assert (difference[:6] == 0).all()
    assert (difference[23:] == 0).all()
    assert (difference[6:23] > 0).all()


# --- checkpointing, accumulation, other parallelisms ------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_sends_nothing_again(reentrant, layout, transport):
    options = {"layout": layout, "transport": transport}
    plain = run_ranks(3, trained, LENGTHS, options, {})
    again = run_ranks(3, trained, LENGTHS, options, {"reentrant": reentrant})
    assert_same(again, *one_device(LENGTHS))
    assert [sent for *_, sent in again] == [sent for *_, sent in plain]


def test_a_layer_called_twice_under_checkpointing_is_still_right():
    """Which of its calls is recomputed cannot be told, so it sends again: right, only not cheaper."""
    expected = one_device(LENGTHS, twice=True)
    assert_same(run_ranks(3, trained, LENGTHS, {}, {"twice": True, "reentrant": False}), *expected)


def test_checkpointed_micro_batches_stand_where_they_stood():
    """Two batches of other lengths, one backward: each recomputes under its own cut."""
    others = [20, 6]

    def body(group):
        model = sequence_parallel(tiny(reentrant=False), group=group)
        total = 0
        for lengths in (LENGTHS, others):
            tokens, labels = batch(lengths)
            total = total + model(tokens, labels=labels, lengths=lengths).loss
        total.backward()
        return total.item(), gradients(model)

    first, second = one_device(LENGTHS), one_device(others)
    assert_same(run_ranks(3, body), first[0] + second[0], first[1] + second[1])


def test_gradient_accumulation_and_autograd_grad_see_whole_gradients():
    def body(group):
        model = sequence_parallel(tiny(), group=group)
        tokens, labels = batch(LENGTHS)
        for _ in range(2):
            model(tokens, labels=labels, lengths=LENGTHS).loss.backward()
        loss = model(tokens, labels=labels, lengths=LENGTHS).loss
        direct = torch.autograd.grad(loss, list(model.parameters()))
        return gradients(model), torch.cat([g.flatten() for g in direct])

    _, expected = one_device(LENGTHS)
    for accumulated, direct in run_ranks(2, body):
        assert (accumulated - 2 * expected).norm() <= 1e-10 * expected.norm()
        assert (direct - expected).norm() <= 1e-10 * expected.norm()


def test_gradients_are_summed_in_one_message():
    """One for all parameters, and one number for the loss."""

    def body(group):
        ledger = Ledger(group)
        model = sequence_parallel(tiny(), group=ledger)
        tokens, labels = batch(LENGTHS)
        loss = model(tokens, labels=labels, lengths=LENGTHS).loss
        before = ledger.bytes_by_verb["all_reduce"]
        loss.backward()
        numbers = sum(p.numel() for p in model.parameters()) + len(list(model.parameters()))
        return before, ledger.bytes_by_verb["all_reduce"] - before, numbers

    for before, sent, numbers in run_ranks(2, body):
        assert (before, sent) == (8, 8 * numbers)


def test_a_parameter_that_nobody_uses_has_no_gradient():
    def body(group):
        model = tiny()
        model.spare = nn.Linear(2, 2).double().requires_grad_()
        nn.init.ones_(model.spare.weight)
        nn.init.ones_(model.spare.bias)
        wrapped = sequence_parallel(model, group=group)
        tokens, labels = batch(LENGTHS)
        wrapped(tokens, labels=labels, lengths=LENGTHS).loss.backward()
        return model.spare.weight.grad, model.head.weight.grad

    for spare, head in run_ranks(2, body):
        assert spare is None
        assert head is not None


def test_a_parameter_used_behind_the_wrappers_back_is_refused():
    """Its gradient would be a part that nobody sums."""

    class Hidden(TinyLM):
        def forward(self, tokens, cut):
            return super().forward(tokens, cut) + self.closure().sum()

    def body(group):
        model = Hidden().double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.1)
        weight = model.head.weight
        model.closure = lambda: weight
        tokens, labels = batch(LENGTHS)
        sequence_parallel(model, group=group)(tokens, labels=labels, lengths=LENGTHS).loss.backward()

    with pytest.raises(ValueError, match=r"the model uses head\.weight by another way than its place"):
        run_ranks(2, body)


def test_a_copied_model_still_sums():
    def body(group):
        model = sequence_parallel(tiny(), group=group)
        tokens, labels = batch(LENGTHS)
        model(tokens, labels=labels, lengths=LENGTHS)
        for twin in (sequence_parallel(copy.deepcopy(model.module), group=group), copy.deepcopy(model)):
            twin(tokens, labels=labels, lengths=LENGTHS).loss.backward()
            assert (gradients(twin) - expected).norm() <= 1e-10 * expected.norm()
            assert all(parameter.grad is None for parameter in model.parameters())

    _, expected = one_device(LENGTHS)
    run_ranks(2, body)


@pytest.mark.spmd(4)
def test_data_parallel_times_sequence_parallel(group):
    """Two replicas of two sequence ranks: each sums over its own, the mean over replicas is the user's."""
    sequence = group.partition([[0, 1], [2, 3]])
    replica = group.partition([[0, 2], [1, 3]])
    seed = replica.rank
    loss, mine, _ = trained(sequence, LENGTHS, {}, {}, seed)
    assert_same([(loss, mine)], *one_device(LENGTHS, seed))
    mean = replica.all_reduce(mine).wait() / 2
    expected = (one_device(LENGTHS, 0)[1] + one_device(LENGTHS, 1)[1]) / 2
    assert (mean - expected).norm() <= 1e-10 * expected.norm()


def test_without_sync_the_average_over_ranks_is_the_gradient():
    """What DDP and FSDP2 take over the joint mesh."""
    _, expected = one_device(LENGTHS)
    ranks = run_ranks(3, trained, LENGTHS, {"sync_gradients": False}, {})
    mean = sum(mine for _, mine, _ in ranks) / 3
    assert (mean - expected).norm() <= 1e-10 * expected.norm()


# --- ways to decorate ------------------------------------------------------------------------------------------------


def test_class_factory_and_instance():
    @sequence_parallel(group=alone(), layout="zigzag")
    class Decorated(TinyLM):
        """Its own words."""

    @sequence_parallel(group=alone())
    def factory(reentrant=None):
        return TinyLM(reentrant)

    assert Decorated.__doc__ == "Its own words."
    assert Decorated.__name__ == "Decorated"
    assert Decorated().sequence_parallel.options.layout == "zigzag"
    assert factory(reentrant=True).module.reentrant is True
    assert isinstance(sequence_parallel(TinyLM(), group=alone()).module, TinyLM)
    bare = sequence_parallel(TinyLM)()
    assert bare.sequence_parallel.group.size == 1, "without a launcher, connect() gives the group of one"


def test_without_labels_there_is_no_loss():
    tokens, _ = batch([26])
    out = sequence_parallel(tiny(), group=alone())(tokens)
    assert out.loss is None
    assert out.logits.shape == (2, 26, 11)


def test_a_model_runs_uncut_too():
    tokens, _ = batch(LENGTHS)
    alike = sequence_parallel(tiny(), group=alone())(tokens, lengths=LENGTHS).logits
    assert torch.equal(tiny()(tokens, Cut.whole(LENGTHS)), alike)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda rank, b: {**b, "tokens": b["tokens"] + (rank == 1)},
            "the batch's tokens must be the same on every rank",
        ),
        (
            lambda rank, b: {**b, "tokens": b["tokens"].int() if rank else b["tokens"]},
            "the batch's tokens must be the same",
        ),
        (lambda rank, b: {**b, "labels": None if rank == 1 else b["labels"]}, "the batch's labels must be the same"),
        (lambda rank, b: {**b, "lengths": [13, 13] if rank == 1 else [26]}, "lengths .* but rank 1's differs"),
        (lambda rank, b: {**b, "lengths": [20]}, "lengths sum to 20, tokens hold 26"),
        (lambda rank, b: {**b, "lengths": [12.5, 13.5]}, "lengths must be whole numbers"),
        (lambda rank, b: {**b, "lengths": [30, -4]}, "lengths must not be negative, document 1 has -4"),
        (lambda rank, b: {**b, "tokens": b["tokens"][0]}, r"tokens must be \[batch, tokens\], got \[26\]"),
        (lambda rank, b: {**b, "labels": b["labels"][:, 1:]}, r"labels must be \[2, 26\] like tokens, got \[2, 25\]"),
    ],
)
def test_a_batch_that_is_not_one_batch_raises_on_every_rank(change, words):
    def body(group):
        tokens, labels = batch([26])
        given = change(group.rank, {"tokens": tokens, "labels": labels, "lengths": [26]})
        model = sequence_parallel(tiny(), group=group)
        with pytest.raises(ValueError, match=rf"rank {group.rank} of 3: .*{words}"):
            model(**given)

    run_ranks(3, body)


def test_other_weights_or_options_on_a_rank_raise_on_every_rank():
    def body(group, change):
        model, options = tiny(), {}
        if group.rank == 1 and change == "weights":
            with torch.no_grad():
                model.head.bias[3] += 1e-9
        if group.rank == 1 and change == "options":
            options = {"scan": "ring"}
        tokens, _ = batch([26])
        with pytest.raises(ValueError, match=f"the {change} must be the same on every rank, but rank 1's differs"):
            sequence_parallel(model, group=group, **options)(tokens)

    run_ranks(2, body, "weights")
    run_ranks(2, body, "options")


@pytest.mark.parametrize("option", ["layout", "transport", "scan"])
def test_unknown_options(option):
    with pytest.raises(ValueError, match=f"{option} must be one of .*, got 'round'"):
        sequence_parallel(TinyLM(), group=alone(), **{option: "round"})
    with pytest.raises(ValueError, match="takes a module, its class or a factory, got int"):
        sequence_parallel(3, group=alone())


def test_summing_different_parameters_together_is_noticed():
    """On every rank, and before a number of a gradient is sent."""

    def body(group):
        ledger = Ledger(group)
        gradients = [torch.ones(3), None]
        with pytest.raises(ValueError, match=rf"rank {group.rank} of 2: .* different parameters: those of rank 1 are"):
            sum_over_ranks(gradients, [torch.ones(3), torch.ones(2)], ledger, ["a", f"b{group.rank}"])
        return ledger.bytes_by_verb["all_reduce"]

    assert run_ranks(2, body) == [0, 0]


def test_a_cut_says_where_a_layer_stands():
    cut = Cut(Shard.of([4], alone()), alone())
    assert (cut.transport, cut.scan) == ("ring", "all_gather")


def test_a_wrapped_model_over_several_ranks_is_not_pickled():
    def body(group):
        with pytest.raises(ValueError, match=r"save module.state_dict\(\) instead"):
            torch.save(sequence_parallel(tiny(), group=group), io.BytesIO())

    run_ranks(2, body)
