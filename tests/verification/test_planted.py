"""Thirty faults of users' code, each named in the first line of what ``verify`` says."""

import contextlib
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from seqpar import sequence_parallel, verify
from seqpar.collectives import alone, group_of, run_ranks
from seqpar.collectives.c10d import ProcessRanks
from tests.verification.broken_models import SIZE
from tests.verification.planted import Model, Steps, batch

IN_THE_MODEL = {
    "positions by arange": r"places computes what goes into places\.places \(Embedding\) otherwise on a cut",
    "positions by rank": r"places computes what goes into places\.places \(Embedding\) otherwise on a cut",
    "positions of the batch": "positions go on over documents",
    "attends to its shard only": r"mixer computes what goes into mixer\.out \(Linear\) otherwise on a cut",
    "drops the mask": r"mixer computes what goes into mixer\.out \(Linear\) otherwise on a cut",
    "heads by count": r"mixer computes what goes into mixer\.out \(Linear\) otherwise on a cut",
    "no documents": "packed documents see each other",
    "detached keys": r"gradient of mixer\.qkv\.\w+ is wrong though all outputs are right",
    "own all-reduce": r"gradient of (mixer\.qkv|embed|places\.places)\.\w+ is wrong though all outputs are right",
    "scaled by ranks": "gradient of|gradients: ",
    "roll": r"local \(Local\) gives other numbers",
    "shift": r"local \(Local\) gives other numbers",
    "running sum": r"local \(Local\) gives other numbers",
    "mean of tokens": r"local \(Local\) gives other numbers",
    "softmax over tokens": r"local \(Local\) gives other numbers",
    "normalised over tokens": r"local \(Local\) gives other numbers",
    "convolution": r"local \(Local\) gives other numbers",
    "best tokens": r"local \(Local\) gives other numbers",
    "cumulative max": r"local \(Local\) gives other numbers",
}
ONE_DOCUMENT = ("own all-reduce",)
RANDOM = ("dropout", "noise")
IN_THE_STEP = {
    "mean_of_mine": "loss: each rank has another number, so something is summed or averaged over my tokens only",
    "z_of_mine": "loss: each rank has another number",
    "reward_of_my_last": "loss: each rank has another number",
    "mean_of_means": "loss: .* times that of one device: a wrong divisor",
    "shifted_in_my_shard": "loss: .* times that of one device: .*shifted or lost targets",
    "sum_not_divided": "loss: (each rank has another number|.* a wrong divisor)",
    "loss_times_ranks": "loss: 2 times that of one device, as many as there are ranks",
    "loss_summed_again": "loss: 2 times that of one device, as many as there are ranks",
    "loss_reduced_by_hand": "gradients: 2 times too small, as many as there are ranks",
    "gradients_summed_again": "gradients: 2 times too large, as many as there are ranks",
    "gradients_averaged": "gradients: 2 times too small, as many as there are ranks",
    "clipped_by_rank": "gradients: ranks have different ones",
    "one_rank_steps": "weights after the step: .* the optimizer does something else on some ranks",
    "rates_by_rank": "weights after the step: .* the optimizer does something else on some ranks",
    "draws": "random numbers: two runs of one device differ",
}


def first_line(report):
    assert not report.ok
    with pytest.raises(ValueError, match="not the numbers of one device") as refused:
        report.require()
    assert report.cause in str(refused.value)
    return str(report).splitlines()[0]


def said(line):
    return f"^Not equal: {line}"


def test_there_are_thirty_faults():
    assert len(IN_THE_MODEL) + len(RANDOM) + len(IN_THE_STEP) + 2 >= 30


def test_without_a_fault_a_step_is_equal():
    def body(group):
        report = verify(Steps(group).made(), batch(), group, step=Steps(group).right)
        report.require()
        assert report.cause == "" and report.precision == "float64"
        assert verify(Model(), batch(), group, step=Steps(group).right).ok

    run_ranks(2, body)


@pytest.mark.parametrize("fault", IN_THE_MODEL)
def test_a_fault_in_the_model_is_named(fault):
    given = replace(batch(), lengths=(SIZE,)) if fault in ONE_DOCUMENT else batch()
    (line, *_) = run_ranks(2, lambda group: first_line(verify(Model(fault), given, group, layout="zigzag")))
    assert re.match(said(IN_THE_MODEL[fault]), line), line


@pytest.mark.parametrize("fault", IN_THE_STEP)
def test_a_fault_in_the_step_is_named(fault):
    def body(group):
        steps = Steps(group)
        return first_line(verify(steps.made(), batch(), group, step=getattr(steps, fault)))

    (line, *_) = run_ranks(2, body)
    assert re.match(said(IN_THE_STEP[fault]), line), line


@pytest.mark.parametrize("fault", RANDOM)
def test_random_numbers_are_named_with_their_module(fault):
    (line, *_) = run_ranks(2, lambda group: first_line(verify(Model(fault), batch(), group, step=Steps(group).right)))
    assert re.match(said(r"random numbers: .* first in local \(Local\)"), line), line


def test_gradients_that_nobody_sums_are_named():
    def body(group):
        return first_line(verify(Steps(group).made(sync=False), batch(), group, step=Steps(group).right))

    assert run_ranks(2, body)[0].startswith("Not equal: gradients: ranks have different ones, so nobody sums them")


def test_weights_that_ranks_do_not_share_are_named():
    def body(group):
        def make(ranks):
            model = Model()
            model.head.bias.data += 1.0 * (ranks.size > 1)
            return sequence_parallel(model, group=ranks)

        return first_line(verify(make, batch(), group, step=Steps(group).right))

    assert run_ranks(2, body)[0].startswith("Not equal: weights before the step: head.bias differs")


def test_a_loss_of_ones_own_is_compared_too():
    def right(logits, targets, weights):
        return (logits.logsumexp(-1) ** 2 * weights).sum()

    def wrong(logits, targets, weights):
        return (logits.logsumexp(-1) ** 2 * weights).mean()

    for loss, ok in ((right, True), (wrong, False)):
        reports = run_ranks(2, lambda group, loss=loss: verify(Model(), batch(), group, loss=loss))
        assert all(report.ok is ok for report in reports)
    assert reports[0].cause.startswith("loss: ")


@pytest.mark.spmd(4)
@pytest.mark.parametrize("around", ["ddp", "ddp over data", "fsdp2"])
def test_what_is_wrapped_is_run_as_it_is_wrapped(group, around):
    """DDP over the data ranks alone leaves gradients that nobody sums over the sequence: refused."""
    if not isinstance(group, ProcessRanks) or dist.get_world_size() != 4:
        pytest.skip("needs a world of 4 processes: pytest --world processes")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))

    def make(ranks):
        model = Model()
        if around == "fsdp2":
            fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
        wrapped = sequence_parallel(model, group=ranks, sync_gradients=False)
        over = mesh.get_group("data") if around == "ddp over data" else None
        return wrapped if around == "fsdp2" else DistributedDataParallel(wrapped, process_group=over)

    refused = pytest.raises(ValueError, match="put DDP over the joint mesh")
    with refused if around == "ddp over data" else contextlib.nullcontext():
        verify(make, batch(), group_of(mesh["sequence"]), step=Steps(None).right).require()
    assert alone().size == 1 and torch.is_grad_enabled()
