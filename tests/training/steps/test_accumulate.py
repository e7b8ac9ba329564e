"""A step of several sequences on replicas of cut models: the loss, gradients and updates of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional

from seqpar import sequence_parallel
from seqpar.collectives import alone
from seqpar.collectives.c10d import ProcessRanks
from seqpar.models import Decoder, DecoderConfig
from seqpar.training.documents import Documents, Packing
from seqpar.training.documents.packing import Packer, Place
from seqpar.training.documents.stream import batch_of
from seqpar.training.extras import adamw
from seqpar.training.loss import next_token_targets
from seqpar.training.steps import accumulate, clip_gradients, cosine, evaluate, split_ranks, sum_over_replicas, total
from tests.training.documents.test_stream import Numbers
from tests.training.test_wrap import tiny

CLIP, STEPS, SEQUENCES = 0.01, 3, 3


class Small(Numbers):
    """Tokens below 11, of documents in windows: their repeated tokens, and documents of one token, are no targets."""

    def tokens(self, document, start, stop):
        return (super().tokens(document, start, stop) * 7) % 11


SOURCE, PACKING = Small([30, 1, 9, 4, 22, 1, 13, 5, 8, 40, 2, 3]), Packing(16, "windows", overlap=4, together=2)


def documents(replica=0, replicas=1):
    return Documents(SOURCE, PACKING, sequences=SEQUENCES, replica=replica, replicas=replicas, prefetch=0)


def one_process(dtype=torch.float64, compute_dtype=None):
    """Losses, gradient norms and the last weights, by plain torch: whole sequences, one sum over all targets."""
    model = tiny().to(dtype)
    uncut = sequence_parallel(model, group=alone())
    optimizer = adamw(model.parameters(), 1e-2)
    schedule = cosine(optimizer, STEPS, 1)
    packer, place, losses, norms = Packer(SOURCE, PACKING, 0), Place(), [], []
    for _ in range(STEPS):
        summed, targets = 0.0, 0
        for _ in range(SEQUENCES):
            pieces, place = packer.next(place)
            batch = batch_of(SOURCE, pieces)
            with torch.autocast("cpu", compute_dtype or torch.bfloat16, enabled=compute_dtype is not None):
                logits = uncut(batch.tokens, lengths=list(batch.lengths)).logits
            wanted = next_token_targets(batch.labels, batch.lengths).flatten()
            exact = logits.flatten(0, 1) if dtype == torch.float64 else logits.flatten(0, 1).float()
            summed = summed + functional.cross_entropy(exact, wanted, reduction="sum")
            targets += int((wanted != -100).sum())
        (summed / targets).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        losses.append(summed.item() / targets)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, norms, nn.utils.parameters_to_vector(model.parameters()).detach()


def train(model, ranks, sharded, compute=None):
    optimizer = adamw(model.parameters(), 1e-2)
    schedule = cosine(optimizer, STEPS, 1)
    losses, norms = [], []
    steps = iter(documents(ranks.world.rank // ranks.sequence.size, ranks.replicas.size))
    for _ in range(STEPS):
        step = next(steps)
        targets = total(step.num_targets, ranks.replicas).item()
        averaged_over = ranks.replicas.size if sharded else 1
        options = {} if compute is None else {"compute": compute}
        summed = accumulate(model, step.batches, targets / averaged_over, **options)
        if not sharded:
            sum_over_replicas(model.parameters(), ranks.replicas)
        norms.append(clip_gradients(model.parameters(), CLIP).item())
        losses.append(total(summed, ranks.replicas).item() / targets)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, norms


def relative(found, expected):
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.spmd(1, 4)
def test_replicas_of_sequence_ranks_train_as_one_process(group):
    """Three sequences on two replicas: one of them has a sequence without a token in its turn."""
    ranks = split_ranks(group, min(2, group.size))
    model = sequence_parallel(tiny(), group=ranks.sequence)
    losses, norms = train(model, ranks, sharded=False)
    expected = one_process()
    assert max(relative(losses, expected[0]), relative(norms, expected[1])) < 1e-10
    assert relative(nn.utils.parameters_to_vector(model.parameters()).detach(), expected[2]) < 1e-10


def joint_mesh(group):
    if not isinstance(group, ProcessRanks) or dist.get_world_size() != 4:
        pytest.skip("needs a world of 4 processes: pytest --world processes")
    return init_device_mesh("cpu", (4,))


@pytest.mark.spmd(4)
def test_fsdp2_over_replicas_and_sequence_ranks_trains_as_one_process(group):
    mesh, ranks, model = joint_mesh(group), split_ranks(group, 2), tiny()
    for part in (*model.mixers, model):
        fully_shard(part, mesh=mesh)
    wrapped = sequence_parallel(model, group=ranks.sequence, sync_gradients=False)
    losses, norms = train(wrapped, ranks, sharded=True)
    expected = one_process()
    assert max(relative(losses, expected[0]), relative(norms, expected[1])) < 1e-10
    whole = torch.cat([each.full_tensor().flatten() for each in wrapped.parameters()]).detach()
    assert relative(whole, expected[2]) < 1e-10


@pytest.mark.spmd(4)
@pytest.mark.parametrize("sharded", [False, True])
def test_bf16_differs_from_one_process_by_its_own_rounding(group, sharded):
    """As far from fp64 as one process in bf16 is; weights, sums and updates are in fp32."""
    mesh, ranks, model = joint_mesh(group) if sharded else None, split_ranks(group, 2), tiny().float()
    exact, rounded = one_process(), one_process(torch.float32, torch.bfloat16)
    if sharded:
        for part in (*model.mixers, model):
            fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    wrapped = sequence_parallel(model, group=ranks.sequence, sync_gradients=not sharded)
    compute = None if sharded else (lambda: torch.autocast("cpu", torch.bfloat16))
    losses, norms = train(wrapped, ranks, sharded, compute)
    assert all(each.dtype == torch.float32 for each in wrapped.parameters())
    assert relative(losses, exact[0]) < max(2**-8, 2 * relative(rounded[0], exact[0]))
    assert relative(norms, exact[1]) < max(2**-7, 2 * relative(rounded[1], exact[1]))


@pytest.mark.spmd(4)
def test_evaluation_counts_every_target_once(group):
    ranks = split_ranks(group, 2)
    model = sequence_parallel(tiny(), group=ranks.sequence)
    held = Documents(SOURCE, PACKING, seed=None, epochs=1, sequences=5, replica=group.rank // 2, replicas=2)
    loss, targets = evaluate(model, held, ranks.replicas)
    assert model.training and targets == sum(max(0, length - 1) for length in SOURCE.lengths)
    uncut, summed = sequence_parallel(tiny(), group=alone()), 0.0
    packer, place = Packer(SOURCE, PACKING, None, 1), Place()
    while (found := packer.next(place))[0]:
        batch, place = batch_of(SOURCE, found[0]), found[1]
        wanted = next_token_targets(batch.labels, batch.lengths).flatten()
        logits = uncut(batch.tokens, lengths=list(batch.lengths)).logits.flatten(0, 1)
        summed += functional.cross_entropy(logits, wanted, reduction="sum").item()
    assert abs(loss - summed / targets) < 1e-12 * loss
    assert evaluate(model, held, ranks.replicas) == (0.0, 0), "an epoch that has been read holds no more"


# Clipping.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_clipping_is_that_of_the_whole_gradient(dtype):
    drawn = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=drawn, dtype=torch.float64).to(dtype) for size in (3, 40, 7)]
    parameters = [nn.Parameter(torch.zeros_like(each)) for each in gradients] + [nn.Parameter(torch.zeros(2))]
    for each, gradient in zip(parameters, gradients):
        each.grad = gradient.clone()
    exact = torch.cat([each.double() for each in gradients]).norm()
    assert relative(clip_gradients(parameters, 1e3), exact) < (1e-12 if dtype == torch.float64 else 1e-6)
    assert all(torch.equal(each.grad, gradient) for each, gradient in zip(parameters, gradients))
    clip_gradients(parameters, 0.5)
    clipped = torch.cat([each.grad.double() for each in parameters[:-1]])
    expected = torch.cat([each.double() for each in gradients]) * (0.5 / (exact + 1e-6))
    assert relative(clipped, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_clipping_leaves_a_gradient_that_is_none_as_it_is():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, torch.inf])
    assert clip_gradients([parameter], 1.0).isinf() and parameter.grad.tolist() == [3.0, torch.inf]
    assert clip_gradients([nn.Parameter(torch.zeros(2))], 1.0) == 0


@pytest.mark.spmd(4)
def test_clipping_what_is_sharded_over_two_meshes_and_what_is_whole(group):
    mesh = joint_mesh(group)
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    plain = nn.ModuleList(nn.Linear(5, 3) for _ in range(3)).double()
    with torch.no_grad():
        for number, each in enumerate(plain.parameters()):
            each.copy_(torch.randn(each.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64))
    whole = copy.deepcopy(plain)
    fully_shard(plain[0], mesh=mesh)
    fully_shard(plain[1], mesh=pairs)
    for model in (plain, whole):
        for each in model.parameters():
            each.grad = each.detach().clone()
    expected = nn.utils.clip_grad_norm_(whole.parameters(), 0.3)
    assert relative(clip_gradients(plain.parameters(), 0.3), expected) < 1e-12
    for each, other in zip(plain.parameters(), whole.parameters()):
        found = each.grad.full_tensor() if hasattr(each.grad, "full_tensor") else each.grad
        assert relative(found, other.grad) < 1e-6


# Compiled blocks.


@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_blocks_train_to_the_same_numbers_and_break_where_they_cross_the_cuts_alone(backend):
    from torch._dynamo.utils import counters  # takes as long to import as torch

    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    config = DecoderConfig("gla softmax", vocabulary=11, dim=16, heads=2)
    plain = sequence_parallel(Decoder(config).double(), group=alone())
    compiled = copy.deepcopy(plain)
    for block in compiled.module.blocks:
        block.compile(backend=backend)
    graphs = []
    for _, step in zip(range(4), documents()):
        for model in (plain, compiled):
            model.zero_grad()
            accumulate(model, step.batches, step.num_targets)
        for mine, right in zip(compiled.parameters(), plain.parameters()):
            assert relative(mine.grad, right.grad) < 1e-12
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == 4, "of each block what is before the crossing, and what is after it"
    assert graphs[1] == graphs[-1] <= 8, "once more for any number of tokens"
    assert all("crosses the cuts" in reason for reason in counters["graph_break"])
