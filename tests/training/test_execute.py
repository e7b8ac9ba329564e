"""A step as a plan says: the loss and gradients of one device, for every shape of plan; and what is refused."""

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from seqpar import Cut, next_token_loss, run_plan, sequence_parallel
from seqpar.collectives import Ledger, alone, run_ranks
from seqpar.collectives.c10d import ProcessRanks
from seqpar.training.loss import num_targets
from tests.plans import any_plan, plan_of
from tests.training.test_wrap import batch, gradients, tiny

LENGTHS = (5, 1, 17, 3, 2, 9)


def one_device(lengths, seed=0, dtype=torch.float64):
    """Loss and gradients of the whole batch, packed, on one device, without a plan."""
    model = tiny().to(dtype)
    tokens, labels = batch(lengths, seed)
    cut = Cut.whole(lengths)
    loss = next_token_loss(model(tokens, cut), labels, shard=cut.shard, group=alone())
    loss.backward()
    return loss.item(), gradients(model)


def execute(group, plan, lengths, seed=0, layout="contiguous"):
    """The same with a plan, on this rank."""
    model = sequence_parallel(tiny(), group=group, layout=layout)
    tokens, labels = batch(lengths, seed)
    loss = run_plan(model, plan, tokens, labels=labels, lengths=lengths)
    return loss.item(), gradients(model)


def assert_like_one_device(results, lengths, seed=0):
    expected_loss, expected = one_device(lengths, seed)
    for loss, got in results:
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert (got - expected).norm() <= 1e-10 * expected.norm()
        assert torch.equal(got, results[0][1]), "ranks hold different gradients"


SHAPES = {
    "all share all": [[(range(4), range(6))]],
    "one rank does all": [[([2], range(6))]],
    "data parallel": [[([0], [0, 1]), ([1], [2]), ([2], [3, 4]), ([3], [5])]],
    "large and small": [[((0, 1), [2], "all_to_all"), ([2], [0, 3]), ([3], [1, 4, 5])]],
    "three of four": [[((0, 1, 2), [2, 5], "all_to_all"), ([3], [0])], [((1, 2, 3), [1, 3], "all_gather"), ([0], [4])]],
    "idle ranks": [[((1, 2), [0, 1])], [([3], [2])], [((0, 1), [3]), ((2, 3), [4])], [([0], [5])]],
    "ranks in any order": [[((3, 0, 2), [5, 0, 2]), ([1], [4, 1])], [((2, 3, 1, 0), [3], "all_gather")]],
}


@pytest.mark.spmd(4)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_plan_gives_the_numbers_of_one_device(group, shape):
    assert_like_one_device([execute(group, plan_of(LENGTHS, 4, SHAPES[shape]), LENGTHS)], LENGTHS)


@given(size=st.integers(1, 6), lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7), seed=st.integers(0, 999),
       layout=st.sampled_from(["contiguous", "zigzag", "striped"]))  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_plan_gives_the_numbers_of_one_device(size, lengths, seed, layout):
    plan = any_plan(lengths, size, seed)
    assert_like_one_device(run_ranks(size, execute, plan, lengths, seed, layout), lengths, seed)


@pytest.mark.spmd(1, 2, 4)
def test_a_switch_of_groups_every_step(group):
    """The same model through plans that share nothing, with an optimizer between them."""
    model, twin = sequence_parallel(tiny(), group=group), tiny()
    for step in range(6):
        tokens, labels = batch(LENGTHS, step)
        loss = run_plan(model, any_plan(LENGTHS, group.size, step), tokens, labels=labels, lengths=LENGTHS)
        cut = Cut.whole(LENGTHS)
        expected = next_token_loss(twin(tokens, cut), labels, shard=cut.shard, group=alone())
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
        for trained in (model, twin):
            with torch.no_grad():
                for parameter in trained.parameters():
                    parameter -= 0.3 * parameter.grad
                    parameter.grad = None


@pytest.mark.spmd(2, 3)
def test_gradients_are_added_to_those_that_are_there(group):
    """Accumulation over steps, and a planned step beside an unplanned one of the same model."""
    model = sequence_parallel(tiny(), group=group)
    tokens, labels = batch(LENGTHS)
    model(tokens, labels=labels, lengths=list(LENGTHS)).loss.backward()
    plan = any_plan(LENGTHS, group.size, 1)
    for _ in range(2):
        run_plan(model, plan, tokens, labels=labels, lengths=LENGTHS)
    model(tokens, labels=labels, lengths=list(LENGTHS)).loss.backward()
    _, expected = one_device(LENGTHS)
    assert (gradients(model) - 4 * expected).norm() <= 4e-10 * expected.norm()


@pytest.mark.spmd(2)
def test_checkpointed_layers(group):
    for reentrant in (False, True):
        model = sequence_parallel(tiny(reentrant=reentrant), group=group)
        tokens, labels = batch(LENGTHS)
        model(tokens, labels=labels, lengths=list(LENGTHS)).loss.backward()
        model.zero_grad()
        run_plan(model, any_plan(LENGTHS, 2, 5), tokens, labels=labels, lengths=LENGTHS)
        _, expected = one_device(LENGTHS)
        assert (gradients(model) - expected).norm() <= 1e-10 * expected.norm()


def test_parameters_that_no_document_uses_and_frozen_ones_get_no_gradient():
    def body(group):
        model = tiny()
        model.unused = nn.Parameter(torch.ones(3))
        model.head.weight.requires_grad_(False)
        wrapped = sequence_parallel(model, group=group)
        tokens, labels = batch(LENGTHS)
        run_plan(wrapped, any_plan(LENGTHS, 3, 2), tokens, labels=labels, lengths=LENGTHS)
        return [name for name, parameter in model.named_parameters() if parameter.grad is None]

    assert run_ranks(3, body) == [["unused", "head.weight"]] * 3


def test_bfloat16_sums_over_micro_batches_are_rounded_once():
    """Eight micro-batches of one document each are no further from fp64 than one micro-batch of all."""
    lengths = [8] * 8
    plans = [plan_of(lengths, 1, [[([0], [d])] for d in range(8)]), plan_of(lengths, 1, [[([0], range(8))]])]
    _, exact = one_device(lengths)
    errors = []
    for plan in plans:
        model = sequence_parallel(tiny().bfloat16(), group=alone())
        tokens, labels = batch(lengths)
        run_plan(model, plan, tokens, labels=labels, lengths=lengths)
        errors.append((gradients(model).double() - exact).norm() / exact.norm())
    assert errors[0] <= 1.1 * errors[1], errors


def test_nothing_to_predict():
    def body(group):
        model = sequence_parallel(tiny(), group=group)
        tokens, _ = batch(LENGTHS)
        none = torch.full_like(tokens, -100)
        loss = run_plan(model, any_plan(LENGTHS, 2, 3), tokens, labels=none, lengths=LENGTHS)
        return loss.item(), gradients(model).abs().max().item()

    assert run_ranks(2, body) == [(0.0, 0.0)] * 2


def test_targets_are_counted_within_documents():
    labels = torch.tensor([[1, 2, 3, -100, 5, 6], [-100, 2, 3, 4, 5, 6]])
    assert num_targets(labels, [2, 3, 1]) == 2 + 3
    assert num_targets(torch.full((1, 4), -100), [4]) == 1


@pytest.mark.nightly
@pytest.mark.spmd(3)
def test_two_hundred_steps_make_each_group_once_and_leak_nothing(group):
    """With another plan every step: after a round of all plans there are neither more groups nor more tensors."""
    plans = [any_plan(LENGTHS, 3, seed) for seed in range(10)]
    counting = CountingGroup(group)
    model = sequence_parallel(tiny(), group=counting)
    tokens, labels = batch(LENGTHS)
    alive = []
    for step in range(200):
        run_plan(model, plans[step % 10], tokens, labels=labels, lengths=LENGTHS)
        if step in (19, 109, 199):
            alive.append(tensors_alive(group))
    mine = {each.ranks for plan in plans for each in plan.groups_of(group.rank) if each and each.ranks != (0, 1, 2)}
    assert set(counting.made) == mine
    assert all(len(made) == 1 for made in counting.made.values()), "a group was made twice"
    assert max(alive[1:]) <= alive[0] + 9, f"tensors alive after 20, 110 and 200 steps: {alive}"
    if isinstance(group, ProcessRanks):
        made = len(group.shared.process_groups)
        run_plan(model, plans[0], tokens, labels=labels, lengths=LENGTHS)
        assert len(group.shared.process_groups) == made


class CountingGroup(Ledger):
    """A group that keeps every subgroup it returned, by its ranks."""

    def __init__(self, group):
        super().__init__(group)
        self.made = {}

    def subgroup(self, ranks):
        made = self._group.subgroup(ranks)
        self.made.setdefault(tuple(ranks), {})[id(made)] = made
        return made


def tensors_alive(group):
    """How many there are while every rank stands still."""
    group.all_reduce(torch.ones(1)).wait()
    gc.collect()
    count = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
    group.all_reduce(torch.ones(1)).wait()
    return count


# hooks, optimizers, what is not trained


def planned(group, prepare, seeds=(0, 1)):
    """Parameters and gradients after planned steps of a model that ``prepare`` changed first."""
    model = tiny()
    prepare(model)
    wrapped = sequence_parallel(model, group=group)
    for seed in seeds:
        tokens, labels = batch(LENGTHS, seed)
        run_plan(wrapped, any_plan(LENGTHS, group.size, 1), tokens, labels=labels, lengths=LENGTHS)
    return everything(model)


def unplanned(prepare, seeds=(0, 1)):
    """The same on one device, without plans."""
    model, cut = tiny(), Cut.whole(LENGTHS)
    prepare(model)
    for seed in seeds:
        tokens, labels = batch(LENGTHS, seed)
        next_token_loss(model(tokens, cut), labels, shard=cut.shard, group=alone()).backward()
    return everything(model)


def everything(model):
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([each.detach().flatten() for each in (*found, *model.parameters())])


def stepping(model):
    """An optimizer that steps inside backward."""

    def step(parameter):
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad + parameter.grad.square()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)


def squaring(model):
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.square())


def by_two_paths(model):
    model.mixers[2] = model.mixers[0]
    model.again = model.head


@pytest.mark.parametrize("prepare", [stepping, squaring, by_two_paths])
def test_what_users_do_to_parameters_sees_whole_gradients_once(prepare):
    expected = unplanned(prepare)
    for size in (1, 3):
        for got in run_ranks(size, planned, prepare):
            assert (got - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.spmd(1, 3)
@pytest.mark.parametrize("off", ["no_grad", "frozen"])
def test_a_plan_evaluates_where_nothing_is_trained(group, off):
    model = sequence_parallel(tiny().requires_grad_(off != "frozen"), group=group)
    tokens, labels = batch(LENGTHS)
    with torch.set_grad_enabled(off != "no_grad"):
        loss = run_plan(model, any_plan(LENGTHS, group.size, 3), tokens, labels=labels, lengths=LENGTHS)
    assert loss.item() == pytest.approx(one_device(LENGTHS)[0], rel=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


# what is refused


def refused(group, message, plan, model=None, lengths=LENGTHS, seed=0):
    """Every rank raises this before a document is worked on, and the gradients it had are still there."""
    model = model or sequence_parallel(tiny(), group=group)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    tokens, labels = batch(lengths, seed)
    with pytest.raises(ValueError, match=message):
        run_plan(model, plan, tokens, labels=labels, lengths=lengths)
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())


@pytest.mark.spmd(2, 3)
def test_ranks_with_other_plans(group):
    """Equal in all but a digit of a prediction: the hash tells."""
    plan = any_plan(LENGTHS, group.size, 0)
    mine = replace(plan, step_seconds=1.5) if group.rank == 1 else plan
    refused(group, "the plan must be the same on every rank, but rank 1's differs from rank 0's", mine)


@pytest.mark.spmd(2, 3)
def test_ranks_with_other_batches(group):
    plan = any_plan(LENGTHS, group.size, 0)
    refused(group, "the batch's tokens must be the same on every rank", plan, seed=int(group.rank == 1))


def everything_on(rank, documents=range(6)):
    return [[([rank], documents)]]


@pytest.mark.spmd(2)
@pytest.mark.parametrize("devices, lengths, micro_batches, message", [
    (3, LENGTHS, everything_on(0), "plan is for 3 ranks, the model is wrapped over 2"),
    (2, LENGTHS[:5], everything_on(0, range(5)), "for 5 documents of 28 tokens together, the batch has 6 of 37"),
    (2, LENGTHS, everything_on(0, range(5)), "does not place each of 6 documents once"),
    (2, LENGTHS, everything_on(0, [0, 1, 2, 3, 4, 4]), "does not place each of 6 documents once"),
    (2, LENGTHS, [[([0], [0, 1, 2]), ([0], [3, 4, 5])]], "micro-batch 0 of the plan has a rank twice"),
    (2, LENGTHS, everything_on(2), "micro-batch 0 of the plan has a rank twice, or one that does not exist"),
    (2, LENGTHS, [[((0, 1), range(6), "carrier pigeon")]], "transport 'carrier pigeon' is not one of ring, all_gather"),
])  # fmt: skip
def test_plans_that_are_not_of_this_batch(group, devices, lengths, micro_batches, message):
    refused(group, message, plan_of(lengths, devices, micro_batches))


def test_models_that_are_not_wrapped_or_leave_gradients_to_others():
    plan = plan_of(LENGTHS, 1, everything_on(0))
    refused(alone(), "takes a model from sequence_parallel", plan, model=tiny())
    around = object.__new__(nn.parallel.DistributedDataParallel)  # none is made, which needs processes
    with pytest.raises(ValueError, match="DistributedDataParallel: a rank that a micro-batch leaves out would miss"):
        run_plan(around, plan, batch(LENGTHS)[0], labels=batch(LENGTHS)[1], lengths=LENGTHS)
    later = sequence_parallel(tiny(), group=alone(), sync_gradients=False)
    refused(alone(), "sums the gradients itself", plan, model=later)


def test_an_error_inside_keeps_the_gradients_that_were_there():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = tiny(), 0

        def forward(self, tokens, cut):
            self.calls += 1
            if self.calls == 2:
                raise MemoryError("in the second micro-batch")
            return self.inner(tokens, cut)

    model = sequence_parallel(Breaks(), group=alone())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    tokens, labels = batch(LENGTHS)
    with pytest.raises(MemoryError):
        run_plan(model, plan_of(LENGTHS, 1, [[([0], [d])] for d in range(6)]), tokens, labels=labels, lengths=LENGTHS)
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
